"""`record`: scalars in a state that never changes its structure."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox

PARAMS = {"w": jnp.array([[3.0, 0.0], [0.0, 0.0]]), "b": jnp.array([4.0])}
GRADS = {"w": jnp.array([[1.0, 2.0], [0.0, 2.0]]), "b": jnp.array([4.0])}  # norm 5
ALL = ("grad_norm", "update_norm", "param_norm", "update_to_param_ratio")


def read(tx, grads=GRADS, params=PARAMS, **extra):
    state = tx.init(params)
    updates, state = tx.update(grads, state, params, **extra)
    return {k: float(v) for k, v in ox.recorded(state).items()}, updates


def test_norms_and_ratio_of_a_link():
    got, updates = read(ox.record(optax.scale(0.1), ALL))
    want = {
        "grad_norm": 5.0,
        "update_norm": 0.5,
        "param_norm": 5.0,
        "update_to_param_ratio": 0.1,
    }
    assert got == pytest.approx(want)
    jax.tree.map(lambda u, g: np.testing.assert_allclose(u, 0.1 * g), updates, GRADS)


def test_without_a_link_it_passes_everything_on():
    got, updates = read(ox.record())
    jax.tree.map(np.testing.assert_array_equal, updates, GRADS)
    assert got == {"grad_norm": 5.0, "update_norm": 5.0}


def test_the_norm_before_clipping_is_that_of_the_gradient():
    tx = optax.chain(
        ox.record(name="raw"), optax.clip_by_global_norm(1.0), ox.record(name="clipped")
    )
    got, _ = read(tx)
    assert got["raw/grad_norm"] == 5
    assert got["clipped/grad_norm"] == pytest.approx(1)


def test_the_clip_fraction_is_the_part_of_the_steps_beyond_max_norm():
    tx = ox.record(scalars=[], max_norm=5.0, decay=0.75)
    state, seen, want = tx.init(PARAMS), [], 0.0
    for t, factor in enumerate([1.0, 1.01, 0.5, 2.0, 3.0, 1.0, 1.1], 1):
        grads = jax.tree.map(lambda g: factor * g, GRADS)
        _, state = tx.update(grads, state, PARAMS)
        want += max(0.25, 1 / t) * ((factor > 1) - want)  # a norm of 5 is not clipped
        seen.append((float(ox.recorded(state)["clip_fraction"]), want))
    got, want = np.transpose(seen)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(got[:4], [0, 1 / 2, 1 / 3, 1 / 2], rtol=1e-6)


def test_clipped_entries_is_the_part_of_the_entries_beyond_max_delta():
    assert read(ox.record(max_delta=1.5))[0]["clipped_entries"] == pytest.approx(3 / 5)
    assert read(ox.record(max_delta=2.0))[0]["clipped_entries"] == pytest.approx(1 / 5)
    negative = jax.tree.map(jnp.negative, GRADS)
    assert read(ox.record(max_delta=1.5), negative)[0]["clipped_entries"] > 0.5
    assert read(ox.record(max_delta=1.0), {}, {})[0]["clipped_entries"] == 0


def test_functions_see_everything():
    functions = {
        "agreement": lambda grads, updates, **_: jnp.vdot(grads["b"], updates["b"]),
        "loss": lambda value, **_: value,
        "largest": lambda params, **_: jnp.max(params["w"]),
        "is_large": lambda updates, **_: updates["b"][0] > 1,
        "number": lambda **_: 3,
    }
    tx = ox.record(optax.scale(-1.0), [], functions=functions, name="mine")
    got, _ = read(tx, value=jnp.float32(7.0))
    assert got == {
        "mine/agreement": -16.0,
        "mine/is_large": 0.0,
        "mine/largest": 3.0,
        "mine/loss": 7.0,
        "mine/number": 3.0,
    }


def test_records_are_found_anywhere():
    inner = ox.record(optax.trace(0.9), name="inner")
    tx = optax.chain(
        ox.record(name="first"),
        ox.record(optax.apply_if_finite(inner, 3), name="outer"),
        optax.masked(ox.record(name="w"), {"w": True, "b": False}),
    )
    got, _ = read(tx)
    assert {key.partition("/")[0] for key in got} == {"first", "outer", "inner", "w"}
    assert got["w/grad_norm"] == 3  # of the visible leaves
    assert list(got) == sorted(got)
    assert ox.recorded(optax.adam(1.0).init(PARAMS)) == {}
    twice = optax.chain(ox.record(), ox.record())
    with pytest.raises(ValueError, match=r"share grad_norm, update_norm.*name="):
        ox.recorded(twice.init(PARAMS))


def test_it_runs_in_scan():
    tx = optax.chain(ox.record(max_norm=1.0), optax.clip_by_global_norm(1.0))
    grads = jax.tree.map(lambda g: jnp.stack([g, 2 * g, 3 * g]), GRADS)

    def body(state, g):
        state = tx.update(g, state, PARAMS)[1]
        return state, ox.recorded(state)

    last, history = jax.jit(lambda s: jax.lax.scan(body, s, grads))(tx.init(PARAMS))
    np.testing.assert_allclose(history["grad_norm"], [5, 10, 15], rtol=1e-6)
    assert ox.recorded(last)["clip_fraction"] == 1


def test_control_optax_monitor_changes_its_structure_and_fails_in_scan():
    tx = optax.monitor({"norm": optax.tree.norm})
    grads = jax.tree.map(lambda g: jnp.stack([g, g]), GRADS)

    def body(state, g):
        return tx.update(g, state, PARAMS)[1], None

    try:
        jax.lax.scan(body, tx.init(PARAMS), grads)
    except TypeError as error:
        assert "carry" in str(error)
    else:
        pytest.skip(f"optax {optax.__version__} has mended it: monitor runs in scan")


def test_norms_of_16_bit_and_of_huge_leaves_are_right():
    ones = {"w": jnp.ones(4096, jnp.bfloat16)}
    assert read(ox.record(), ones, ones)[0]["grad_norm"] == 64
    huge = {"w": jnp.full(4, 1e30)}
    got, _ = read(ox.record(scalars=ALL), huge, huge)
    assert got["grad_norm"] == pytest.approx(2e30)
    assert got["update_to_param_ratio"] == pytest.approx(1)


def test_parameters_of_zero_give_a_ratio_of_zero():
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    got, _ = read(ox.record(scalars=["update_to_param_ratio"]), GRADS, zeros)
    assert got["update_to_param_ratio"] == 0


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="record: scalars must be one of 'grad_norm'"):
        ox.record(scalars=["gradient_norm"])
    with pytest.raises(ValueError, match="record: max_norm"):
        ox.record(max_norm=-1.0)
    with pytest.raises(ValueError, match="record: decay"):
        ox.record(decay=1.0)
    with pytest.raises(ValueError, match="a name occurs twice"):
        ox.record(functions={"grad_norm": lambda **_: 0.0})
    for scalar in ("param_norm", "update_to_param_ratio"):
        tx = ox.record(scalars=[scalar])
        with pytest.raises(
            ValueError, match=f"record of {scalar} needs the parameters"
        ):
            tx.update(GRADS, tx.init(PARAMS))
    tx = ox.record(functions={"mine": lambda grads, **_: grads["w"]})
    with pytest.raises(ValueError, match=r"'mine' must return a scalar, got \(2, 2\)"):
        tx.update(GRADS, tx.init(PARAMS))

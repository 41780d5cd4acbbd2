"""`stored`: the state of any link in 16 or 8 bits."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict

import optax_ext as ox

DTYPES = ["bfloat16", "uint8"]
STEPS, B2 = 3000, 0.999
EXACT = 1 - B2**STEPS


def tree(seed=0, dtype=jnp.float32, **shapes):
    rng = np.random.default_rng(seed)
    shapes = shapes or {"w": (64, 64), "b": (64,)}
    return {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}


def nbytes(state):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def nu_of(tx, grads, steps=STEPS):
    params = jax.tree.map(jnp.ones_like, grads)
    body = lambda _, s: tx.update(grads, s, params)[1]  # noqa: E731
    state = jax.jit(lambda s: jax.lax.fori_loop(0, steps, body, s))(tx.init(params))
    return optax.tree.get(ox.unpack_stored_state(state), "nu")["w"]


# Second moments -----------------------------------------------------------------------


def test_a_bfloat16_second_moment_reaches_its_value():
    """3000 unit gradients: an entry is off by 1.5 %, the mean of 4096 by 0.04 %."""
    nu = nu_of(ox.stored(optax.scale_by_adam(b2=B2)), {"w": jnp.ones((64, 64))})
    assert abs(float(nu.mean()) / EXACT - 1) < 0.01
    assert float(nu.std()) / EXACT < 0.03


def test_to_the_nearest_it_stalls_at_a_quarter():
    """From 1/4 on, an increment below 0.001 * 3/4 is below half a gap of 2^-9."""
    tx = ox.stored(optax.scale_by_adam(b2=B2), rounding="nearest")
    nu = nu_of(tx, {"w": jnp.ones((64, 64))})
    np.testing.assert_array_equal(nu, 0.25)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_an_8_bit_second_moment_reaches_its_value(rounding):
    """Also in a block whose gradients differ by a factor of 200."""
    sizes = jnp.exp2(-jnp.arange(64) / 8)
    grads = {"w": jnp.broadcast_to(sizes, (64, 64))}
    tx = ox.stored(optax.scale_by_adam(b2=B2), "uint8", rounding)
    ratio = nu_of(tx, grads) / grads["w"] ** 2 / EXACT
    assert abs(float(ratio.mean()) - 1) < 0.01
    # To the nearest, half a gap: 4/2/q, q = 255 / 200^(1/2).
    assert float(jnp.abs(ratio - 1).max()) < (0.12 if rounding == "nearest" else 0.35)
    unit = nu_of(tx, {"w": jnp.ones((64, 64))})
    np.testing.assert_allclose(unit, EXACT, rtol=1e-4)  # the largest entry is exact


def test_a_second_moment_falls_too():
    """Where half the gradients of a block shrink, nearest 8-bit codes stay behind."""
    big, small = jnp.ones((64, 64)), jnp.ones((64, 64)).at[:, ::2].set(0.1)

    def follow(rounding):
        tx = ox.stored(optax.scale_by_adam(b2=0.99), "uint8", rounding)
        params = {"w": big}

        def body(i, s):
            return tx.update({"w": jnp.where(i < 300, big, small)}, s, params)[1]

        state = jax.jit(lambda s: jax.lax.fori_loop(0, 1000, body, s))(tx.init(params))
        nu = optax.tree.get(ox.unpack_stored_state(state), "nu")["w"]
        return float(nu[:, ::2].mean())

    want = 0.01 + 0.99 * 0.99**700
    assert abs(follow("stochastic") / want - 1) < 0.02
    assert follow("nearest") > 1.05 * want


# What is stored -----------------------------------------------------------------------


def test_bfloat16_halves_the_bytes_and_8_bits_quarter_them():
    params = {"a": jnp.ones((512, 512)), "b": jnp.ones((1024, 300)), "s": jnp.ones(7)}
    entries = 512 * 512 + 1024 * 300
    small = 2 * 7 * 4 + 4  # moments of s, count
    key = 8

    def size(tx):
        return nbytes(jax.eval_shape(tx.init, params))

    adam = optax.scale_by_adam()
    assert size(adam) == 2 * 4 * entries + small
    assert size(ox.stored(adam, rounding="nearest")) == 2 * 2 * entries + small
    assert size(ox.stored(adam)) == 2 * 2 * entries + small + key
    scales = 512 * 2 + 1024 * 2
    eight = 2 * (entries + 4 * scales) + small + key
    assert size(ox.stored(adam, "uint8")) == eight
    assert 0.25 < eight / size(adam) < 0.256


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_state_is_as_narrow_after_a_step_as_before(dtype):
    params = tree()
    tx = ox.stored(optax.adamw(1e-3), dtype)
    state = tx.init(params)
    after = jax.jit(tx.update)(params, state, params)[1]
    assert nbytes(after) == nbytes(state)
    nu = optax.tree.get(after, "nu")
    codes = nu["w"].codes if dtype == "uint8" else nu["w"]
    assert codes.dtype == jnp.dtype(dtype)
    assert codes.shape == (64, 64)
    assert nu["b"].dtype == jnp.float32  # below min_size


def narrow(state):
    return sum(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(state))


def test_every_kind_of_state_is_found():
    params = tree()
    count = lambda tx: narrow(ox.stored(tx).init(params))  # noqa: E731
    adam = optax.scale_by_adam()
    assert count(adam) == 2
    assert count(optax.chain(optax.trace(0.9), adam, optax.scale(2.0))) == 3
    assert count(ox.cautious(adam)) == 2
    assert count(ox.bucketed(ox.full_precision(adam))) == 2
    assert count(optax.apply_if_finite(adam, 3)) == 2
    assert count(ox.graft(adam, optax.trace(0.9))) == 3
    assert count(optax.masked(adam, {"w": True, "b": False})) == 2
    assert count(optax.masked(adam, {"w": False, "b": True})) == 0
    labels = {"w": "a", "b": "b"}
    assert count(optax.partition({"a": adam, "b": optax.trace(0.9)}, labels)) == 2
    multi = optax.MultiSteps(adam, 2)
    wrapped = optax.GradientTransformation(multi.init, multi.update)
    assert count(wrapped) == 3
    # Rows and columns are no parameters.
    factored = ox.stored(optax.scale_by_factored_rms(), min_size=1)
    assert narrow(factored.init({"w": jnp.ones((128, 128))})) == 0
    assert narrow(ox.bucketed(ox.stored(adam)).init(params)) == 2


def test_parameters_of_every_tree_are_found():
    w = jnp.ones((64, 64))
    model = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    trees = [w, [w], (w,), {"a": {"b": w}}, FrozenDict({"a": w}), nnx.state(model)]
    for params in trees:
        tx = ox.stored(optax.scale_by_adam())
        state = tx.init(params)
        assert narrow(state) == 2
        after = tx.update(params, state, params)[1]
        assert jax.tree.structure(after) == jax.tree.structure(state)


def test_float64_and_other_shapes_stay_what_they_are(x64):
    params = {"w": jnp.ones((64, 64), jnp.float64)}
    state = ox.stored(optax.scale_by_adam()).init(params)
    assert optax.tree.get(state, "nu")["w"].dtype == jnp.float64


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_leaves_are_exact(dtype):
    params, grads = tree(), tree(1)
    tx = ox.stored(optax.scale_by_adam(), dtype, min_size=4097)
    want = ox.full_precision(optax.scale_by_adam())
    got = tx.update(grads, tx.init(params), params)[0]
    jax.tree.map(
        np.testing.assert_array_equal, got, want.update(grads, want.init(params))[0]
    )


# The step -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_step_is_that_of_float32(dtype):
    """The step is computed before anything is rounded."""
    params, grads = tree(), tree(1)
    tx, want = ox.stored(optax.adamw(1e-3), dtype), optax.adamw(1e-3)
    got = tx.update(grads, tx.init(params), params)[0]
    with jax.numpy_dtype_promotion("standard"):
        expected = want.update(grads, want.init(params), params)[0]
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize(("dtype", "off"), [("bfloat16", 0.01), ("uint8", 0.12)])
def test_later_steps_are_close_to_those_of_float32(dtype, off):
    params = tree()
    exact = ox.full_precision(optax.scale_by_adam())
    txs = [exact, ox.stored(exact, dtype)]

    def body(states, seed):
        grads = jax.tree.map(
            lambda p: jax.random.normal(jax.random.key(seed), p.shape), params
        )
        both = [tx.update(grads, s, params) for tx, s in zip(txs, states, strict=True)]
        return [s for _, s in both], [u["w"] for u, _ in both]

    start = [tx.init(params) for tx in txs]
    want, got = jax.jit(lambda s: jax.lax.scan(body, s, jnp.arange(100)))(start)[1]
    error = jnp.linalg.norm(got[50:] - want[50:]) / jnp.linalg.norm(want[50:])
    assert float(error) < off


def test_bfloat16_parameters_have_float32_arithmetic_and_their_updates_dtype():
    params = tree(dtype=jnp.bfloat16)
    tx = ox.stored(optax.adamw(1e-3), "bfloat16")
    updates, state = tx.update(params, tx.init(params), params)
    assert updates["w"].dtype == jnp.bfloat16
    assert optax.tree.get(state, "nu")["b"].dtype == jnp.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_state_that_does_not_change_stays_bit_equal(dtype):
    """Reading and writing back is exact: MultiSteps and guards may hold a state."""
    params = tree()
    hold = optax.conditionally_transform(
        ox.full_precision(optax.scale_by_adam()), lambda step: jnp.asarray(step) < 1
    )
    tx = ox.stored(hold, dtype)
    state = tx.update(tree(1), tx.init(params), params)[1]
    after = jax.jit(tx.update)(tree(2), state, params)[1]
    for name in ("mu", "nu"):
        jax.tree.map(
            np.testing.assert_array_equal,
            optax.tree.get(after, name),
            optax.tree.get(state, name),
        )
    assert (after.key != state.key).any()


def test_keys_decide_the_rounding():
    params, grads = tree(), tree(1)

    def mu(key):
        tx = ox.stored(optax.trace(0.9), key=key)
        return tx.update(grads, tx.init(params), params)[1].inner_state.trace["w"]

    first, same, other = (mu(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()
    np.testing.assert_array_equal(mu(None), first)
    np.testing.assert_array_equal(mu(jax.random.PRNGKey(0)), first)
    assert mu(jax.random.key(0, impl="rbg")).dtype == jnp.bfloat16


def test_equal_leaves_are_rounded_by_different_bits():
    params = tree(a=(64, 64), b=(64, 64))
    grads = dict.fromkeys(params, params["a"])
    tx = ox.stored(optax.trace(0.9))
    trace = tx.update(grads, tx.init(params), params)[1].inner_state.trace
    assert (trace["a"] != trace["b"]).any()


def test_block_size_is_the_number_of_entries_that_share_a_scale():
    params = tree(w=(32, 512))
    state = ox.stored(optax.trace(0.9), jnp.uint8, block_size=128).init(params)
    assert state.inner_state.trace["w"].scales.shape == (32, 4)


def test_unpack_finds_every_stored_state():
    params = tree()
    tx = optax.chain(
        ox.stored(optax.trace(0.9), jnp.bfloat16), ox.stored(optax.trace(0.5), "uint8")
    )
    _, state = tx.update(tree(1), tx.init(params), params)
    first, second = ox.unpack_stored_state(state)
    assert first.trace["w"].dtype == second.trace["w"].dtype == jnp.float32
    np.testing.assert_allclose(first.trace["w"], tree(1)["w"], rtol=2**-7)
    plain = optax.adam(1e-3).init(params)
    assert jax.tree.structure(ox.unpack_stored_state(plain)) == jax.tree.structure(
        plain
    )


# Errors -------------------------------------------------------------------------------


def test_arguments_are_checked():
    inner = optax.trace(0.9)
    for dtype in ("float8", "int4", jnp.float16):
        with pytest.raises(ValueError, match=r"stored: dtype .*'bfloat16', 'uint8'"):
            ox.stored(inner, dtype)
    with pytest.raises(ValueError, match="stored: rounding"):
        ox.stored(inner, "bfloat16", "up")
    with pytest.raises(ValueError, match="stored: block_size"):
        ox.stored(inner, "uint8", block_size=0)
    with pytest.raises(ValueError, match="stored: min_size"):
        ox.stored(inner, "uint8", min_size=0)


def test_a_link_that_keeps_bfloat16_itself_is_refused():
    tx = ox.stored(optax.adam(1e-3, mu_dtype=jnp.bfloat16))
    with pytest.raises(ValueError, match=r"stored: .*\.mu\['b'\].* mu_dtype"):
        tx.init(tree())


# Eight devices ------------------------------------------------------------------------

_EIGHT = """
import json, jax, jax.numpy as jnp, numpy as np, optax, optax_ext as ox
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
specs = {"rows": P("d"), "columns": P(None, "d"), "conv": P(None, None, "d")}
shapes = {"rows": (64, 96), "columns": (16, 520), "conv": (3, 3, 16, 32)}
rng = np.random.default_rng(0)
one = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
many = {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in one.items()}
bad = []
for dtype in ("bfloat16", "uint8"):
    tx = ox.stored(optax.scale_by_adam(), dtype, min_size=1)
    results = []
    for params in (one, many):
        state = tx.init(params)
        updates, state = jax.jit(tx.update)(params, state, params)
        results.append(updates)
    for k in shapes:
        leaf = optax.tree.get(state, "nu")[k]
        leaf = leaf if dtype == "bfloat16" else leaf.codes
        if not leaf.sharding.is_equivalent_to(many[k].sharding, leaf.ndim):
            bad.append([dtype, k, str(leaf.sharding)])
        if not np.allclose(results[0][k], results[1][k], rtol=1e-6):
            bad.append([dtype, k, "numbers"])
print(json.dumps({"devices": len(jax.devices()), "bad": bad}))
"""


def test_eight_devices_shard_the_stored_state_and_give_the_numbers_of_one():
    flags = "--xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    process = subprocess.run(
        [sys.executable, "-c", _EIGHT],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout) == {"devices": 8, "bad": []}

"""Factors of the maximal update parametrization."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox

KINDS = {k: k for k in ("hidden", "input", "vector", "output", "fixed")}
WIDTH_IN = {"hidden": 4.0, "input": 1.0, "vector": 1.0, "output": 8.0, "fixed": 1.0}
WIDTH_OUT = {"hidden": 2.0, "input": 4.0, "vector": 8.0, "output": 1.0, "fixed": 1.0}
ONES = {k: jnp.ones((2, 3)) for k in KINDS}


def factors(*args, updates=ONES, **kwargs):
    tx = ox.scale_by_mup(*args, **kwargs)
    scaled, state = tx.update(updates, tx.init(updates))
    assert state == optax.EmptyState()
    return {k: float(x.ravel()[0]) for k, x in scaled.items()}


@pytest.mark.parametrize(
    ("optimizer", "readout", "hidden", "grows", "output"),
    [
        ("adam", "multiplier", 1 / 4, {"input": 1.0, "vector": 1.0}, 1.0),
        ("adam", "init", 1 / 4, {"input": 1.0, "vector": 1.0}, 1 / 8),
        ("sgd", "multiplier", 2 / 4, {"input": 4.0, "vector": 8.0}, 8.0),
        ("sgd", "init", 2 / 4, {"input": 4.0, "vector": 8.0}, 1 / 8),
    ],
)
def test_the_table(optimizer, readout, hidden, grows, output):
    got = factors(KINDS, WIDTH_IN, WIDTH_OUT, optimizer, readout)
    assert got == {"hidden": hidden, **grows, "output": output, "fixed": 1.0}


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("readout", ["multiplier", "init"])
def test_at_the_base_width_it_is_the_identity(optimizer, readout):
    got = factors(KINDS, 1.0, optimizer=optimizer, readout=readout)
    assert got == dict.fromkeys(KINDS, 1.0)


def test_one_tree_of_widths_serves_both_axes():
    both = dict.fromkeys(KINDS, 4.0)
    got = factors(KINDS, both, optimizer="sgd")
    assert got == factors(KINDS, both, both, optimizer="sgd")
    assert got == factors(KINDS, 4.0, optimizer="sgd")
    assert (got["hidden"], got["vector"], got["output"]) == (1.0, 4.0, 4.0)


def test_base_width_1_is_mulo():
    assert factors("hidden", 64.0, updates={"w": ONES["hidden"]}) == {"w": 1 / 64}


def test_widths_may_be_arrays_of_any_type():
    widths = {k: np.int64(w) for k, w in WIDTH_IN.items()}
    assert factors(KINDS, widths) == factors(KINDS, WIDTH_IN)
    arrays = jax.tree.map(lambda w: jnp.asarray(w, jnp.int32), WIDTH_IN)
    assert factors(KINDS, arrays) == factors(KINDS, WIDTH_IN)


def test_holes_pass():
    updates = {**ONES, "hidden": None, "output": optax.MaskedNode()}
    tx = ox.scale_by_mup(KINDS, WIDTH_IN, WIDTH_OUT, "sgd")
    scaled, _ = tx.update(updates, tx.init(updates))
    assert scaled["hidden"] is None
    assert scaled["output"] == optax.MaskedNode()
    np.testing.assert_array_equal(scaled["vector"], 8.0)


def test_decay_behind_it_does_not_shrink_with_the_width():
    params = {"w": jnp.ones((2, 2))}
    tx = optax.chain(ox.scale_by_mup("hidden", 8.0), optax.add_decayed_weights(0.1))
    updates, _ = tx.update({"w": jnp.zeros((2, 2))}, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], 0.1)


def test_unknown_names_and_widths_are_refused():
    for args, message in [
        (("wide", 1.0), "kinds must be one of 'hidden', .* got 'wide'"),
        (({"a": "hidden", "b": 3}, 1.0), "kinds must be one of"),
        (("hidden", 0.0), "width_in must lie in"),
        (("hidden", 1.0, {"w": -1.0}), "width_out must lie in"),
        (("hidden", 1.0, None, "lion"), "optimizer must be one of 'adam', 'sgd'"),
        (("hidden", 1.0, None, "adam", "zero"), "readout must be one of"),
    ]:
        with pytest.raises(ValueError, match=f"^scale_by_mup: {message}"):
            ox.scale_by_mup(*args)


def test_trees_that_do_not_fit_are_named():
    tx = ox.scale_by_mup({"a": "hidden"}, 2.0)
    with pytest.raises(ValueError, match=r"^scale_by_mup: leaf \['b'\]"):
        tx.update({"a": jnp.ones(2), "b": jnp.ones(2)}, optax.EmptyState())


def shapes(n, heads=3):
    return {
        "bias": jax.ShapeDtypeStruct((n,), jnp.float32),
        "conv": jax.ShapeDtypeStruct((2, 2, n, 2 * n), jnp.float32),
        "embed": jax.ShapeDtypeStruct((5, n), jnp.float32),
        "head": jax.ShapeDtypeStruct((n, 3), jnp.float32),
        "one": jax.ShapeDtypeStruct((), jnp.float32),
        "temp": jax.ShapeDtypeStruct((heads,), jnp.float32),
    }


def test_kinds_and_widths_are_read_off_shapes():
    kinds, width_in, width_out = ox.mup_widths(shapes(12), shapes(4))
    assert kinds == {
        "bias": "vector",
        "conv": "hidden",
        "embed": "input",
        "head": "output",
        "one": "fixed",
        "temp": "fixed",
    }
    one = dict.fromkeys(kinds, 1.0)
    assert width_in == {**one, "conv": 3.0, "head": 3.0}
    assert width_out == {**one, "bias": 3.0, "conv": 3.0, "embed": 3.0}


def test_what_is_read_off_goes_into_the_link():
    params = jax.tree.map(lambda s: jnp.ones(s.shape), shapes(12))
    got = factors(*ox.mup_widths(params, shapes(4)), updates=params)
    assert got["conv"] == np.float32(1 / 3)
    assert {got[k] for k in got if k != "conv"} == {1.0}


@pytest.mark.parametrize("params", [{}, {"a": None}])
def test_a_tree_without_leaves_has_no_widths(params):
    assert ox.mup_widths(params, params) == (params, params, params)


def test_shapes_that_have_no_rule_are_named():
    def leaf(*shape):
        return {"w": jnp.zeros(shape)}

    for new, old in [((4, 3, 2), (2, 3, 2)), ((4, 3), (4,)), ((4, 3), (0, 3))]:
        with pytest.raises(ValueError, match=r"leaf \['w'\] grows .*only the last two"):
            ox.mup_widths(leaf(*new), leaf(*old))
    with pytest.raises(ValueError, match="trees of two structures"):
        ox.mup_widths(leaf(2), {"v": jnp.zeros(2)})


WIDTHS = (64, 256, 1024)
NAMES = ("embed", "hidden", "head")


def network(params, x, multiplier):
    """Activations of all layers of a perceptron with two hidden layers."""
    first = jnp.tanh(x @ params["embed"])
    second = jnp.tanh(first @ params["hidden"])
    return first, second, multiplier * second @ params["head"]


@functools.cache
def changes(width, corrected):
    """Root mean squares of what 5 steps of Adam do to the activations."""
    rng, base = np.random.default_rng(0), WIDTHS[0]

    def initial(n):
        deviations = {"embed": ((4, n), 0.5), "hidden": ((n, n), n**-0.5)}
        deviations["head"] = (n, 3), base**-0.5 if corrected else n**-0.5
        return {
            k: jnp.asarray(s * rng.normal(size=shape), jnp.float32)
            for k, (shape, s) in deviations.items()
        }

    x, y = (jnp.asarray(rng.normal(size=(8, k)), jnp.float32) for k in (4, 3))
    params = start = initial(width)
    multiplier = base / width if corrected else 1.0
    widths = ox.mup_widths(params, initial(base))
    link = ox.scale_by_mup(*widths) if corrected else optax.identity()
    adam = ox.full_precision(optax.scale_by_adam())
    tx = optax.chain(adam, link, optax.scale(-0.01))

    @jax.jit
    def step(params, state):
        def loss(p):
            return jnp.mean((network(p, x, multiplier)[-1] - y) ** 2)

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(5):
        params, state = step(params, state)
    before, after = (network(p, x, multiplier) for p in (start, params))
    return [
        float(jnp.sqrt(jnp.mean((a - b) ** 2)))
        for a, b in zip(after, before, strict=True)
    ]


def slopes(corrected):
    """Exponents with which the changes grow with the width, by layer."""
    series = np.log([changes(width, corrected) for width in WIDTHS])
    return np.polyfit(np.log(WIDTHS), series, 1)[0]


def test_five_steps_change_the_activations_as_much_at_every_width():
    np.testing.assert_array_less(np.abs(slopes(True)), 0.15)


def test_without_it_the_change_of_hidden_activations_and_logits_grows():
    _, hidden, logits = slopes(False)
    assert hidden > 0.3
    assert logits > 0.3

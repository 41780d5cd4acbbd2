"""Width exponents: which factor a leaf gets, and how labels reach it."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox

SHAPES = {"embed": (512, 8), "block": {"w": (512, 3), "b": (3,)}, "head": (512, 2)}
LABELS = {"embed": "embedding", "block": "hidden", "head": "readout"}
PARAMS = jax.tree.map(jnp.ones, SHAPES, is_leaf=lambda x: type(x) is tuple)


def factors(*args, params=PARAMS, **kwargs):
    """What updates of ones come out as, one number a leaf."""
    tx = ox.scale_by_width_exponents(*args, **kwargs)
    state = tx.init(params)
    assert state == optax.EmptyState()
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    for leaf in jax.tree.leaves(updates):
        assert (leaf == leaf.ravel()[0]).all()
    return jax.tree.map(lambda leaf: float(leaf.ravel()[0]), updates)


def test_four_times_the_base_width():
    want = {"embed": 1.0, "block": {"w": 0.25, "b": 1.0}, "head": 0.25}
    assert factors(LABELS) == want
    want = {"embed": 1.0, "block": {"w": 0.5, "b": 1.0}, "head": 0.5}
    assert factors(LABELS, alignment="none") == want


@pytest.mark.parametrize("alignment", ["full", "none"])
def test_at_the_base_width_it_is_the_identity(alignment):
    tx = ox.scale_by_width_exponents(LABELS, alignment, base_width=512)
    g = jax.tree.map(lambda p: jnp.arange(0.0, p.size).reshape(p.shape) / 7, PARAMS)
    updates, _ = tx.update(g, tx.init(PARAMS), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, updates, g)


def test_exponents_override_those_of_the_table_and_add_to_them():
    got = factors(LABELS, exponents={"embedding": 0.5, "hidden": 1.5})
    assert got == {"embed": 0.5, "block": {"w": 0.125, "b": 1.0}, "head": 0.25}
    got = factors({**LABELS, "head": "mine"}, exponents={"mine": -0.5})
    assert got["head"] == 2.0


def test_an_unknown_label_has_exponent_0():
    assert factors({**LABELS, "head": "mine"})["head"] == 1.0


def test_fan_in_decides_for_every_leaf():
    got = factors("hidden", fan_in=lambda p: 128 * p.shape[-1])
    assert got == {
        "embed": 1 / 8,
        "block": {"w": np.float32(1 / 3), "b": np.float32(1 / 3)},
        "head": 1 / 2,
    }


def test_the_fan_in_of_a_convolution_is_its_axis_of_inputs():
    kernel = jnp.ones((3, 3, 256, 5))
    assert factors("hidden", params=kernel) == 0.5


def test_labels_may_be_a_function_of_params():
    def by_name(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: LABELS[path[0].key], params
        )

    assert factors(by_name) == factors(LABELS)


def test_labels_reach_leaves_in_buckets_and_behind_masks():
    def hidden(params):
        return jax.tree.map(lambda _: "hidden", params)

    link = ox.scale_by_width_exponents(hidden)
    mask = {"embed": False, "block": True, "head": True}
    for tx, embed in ((ox.bucketed(link), 0.25), (optax.masked(link, mask), 1.0)):
        updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
        got = jax.tree.map(lambda leaf: float(leaf.ravel()[0]), updates)
        assert got == {"embed": embed, "block": {"w": 0.25, "b": 1.0}, "head": 0.25}


def test_a_leaf_without_inputs_is_named():
    tx = ox.scale_by_width_exponents("hidden", fan_in=lambda p: 0)
    with pytest.raises(ValueError, match=r"scale_by_width.*fan_in must lie in \(0"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


def test_without_parameters_it_says_so():
    tx = ox.scale_by_width_exponents("hidden")
    with pytest.raises(ValueError, match="scale_by_width_exponents needs the param"):
        tx.update(PARAMS, tx.init(PARAMS))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"alignment": "half"}, "alignment must be one of 'full', 'none'"),
        ({"base_width": 0.0}, "base_width must lie in"),
        ({"exponents": {"mine": "1"}}, "exponents of 'mine' must be a number"),
    ],
)
def test_a_bad_argument_is_named(bad, message):
    with pytest.raises(
        (ValueError, TypeError), match=f"scale_by_width_exponents: {message}"
    ):
        ox.scale_by_width_exponents("hidden", **bad)

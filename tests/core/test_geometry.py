"""Lengths and projections at the edges of float32, and in trees with holes."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox
from optax_ext._core.geometry import inner_product, length, tangent, tree_length
from optax_ext._core.leaves import map_leaves
from optax_ext._core.trees import treated

X = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)


@pytest.mark.parametrize("size", [1e-35, 1e-30, 1.0, 1e30, 3e37])
def test_the_length_neither_overflows_nor_underflows(size):
    x = jnp.asarray(X * np.float32(size))
    want = np.linalg.norm(np.asarray(x, np.float64))
    # 12 squares and a root: some roundings of float32.
    np.testing.assert_allclose(length(x), want, rtol=1e-6)
    np.testing.assert_allclose(tree_length({"a": x[0], "b": [x[1:]]}), want, rtol=1e-6)


def test_the_length_along_an_axis_keeps_it_on_request():
    want = np.linalg.norm(X, axis=1)
    np.testing.assert_allclose(length(jnp.asarray(X), axis=1), want, rtol=1e-6)
    assert length(jnp.asarray(X), axis=(0, 1), keepdims=True).shape == (1, 1)


def test_zero_and_nothing_have_length_zero():
    assert length(jnp.zeros((2, 2))) == 0
    assert length(jnp.zeros((0, 3))) == 0
    assert tree_length({}) == 0


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_tangent_is_orthogonal_and_loses_only_the_radial_part(size):
    x, w = jnp.asarray(X[0]), jnp.asarray(X[1] * np.float32(size))
    out = np.asarray(tangent(x, w), np.float64)
    unit = np.asarray(w, np.float64) / np.linalg.norm(np.asarray(w, np.float64))
    # Rounding of a sum of 4 products of size 1.
    assert abs(out @ unit) < 1e-6
    np.testing.assert_allclose(out + unit * (unit @ X[0]), X[0], atol=1e-6)


def test_every_direction_is_tangent_to_zero():
    x = jnp.asarray(X)
    np.testing.assert_array_equal(tangent(x, jnp.zeros_like(x)), x)


def test_inner_products_leave_out_the_holes_of_the_first_tree():
    a = {"a": jnp.asarray(X[0]), "b": optax.MaskedNode(), "c": None}
    b = {"a": jnp.asarray(X[1]), "b": jnp.asarray(X[2]), "c": jnp.asarray(X[2])}
    np.testing.assert_allclose(inner_product(a, b), X[0] @ X[1], rtol=1e-6)


def test_the_default_mask_is_the_leaves_of_rank_two_and_more():
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3), "hole": None}
    assert treated(None, params) == {"w": True, "b": False, "hole": False}
    stacked = {"w": ox.Bucket(jnp.ones((5, 2, 3))), "b": ox.Bucket(jnp.ones((5, 3)))}
    assert treated(None, stacked) == {"w": True, "b": False}
    assert treated({"w": False, "b": True, "hole": True}, params)["b"] is True
    assert treated(lambda p: {k: k == "b" for k in p}, params)["w"] is False


def test_a_rule_sees_the_booleans_of_a_mask_as_they_are():
    def rule(g, slots, keep):
        assert keep in (True, False)
        return (g if keep else 0 * g), slots

    updates = {"w": jnp.ones((2, 3)), "v": ox.Bucket(jnp.ones((4, 3)))}
    out, _ = map_leaves(rule, updates, (), ({"w": False, "v": True},))
    assert out["w"].sum() == 0
    assert out["v"].stack.sum() == 12

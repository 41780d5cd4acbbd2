"""A tree as one vector, and back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from optax_ext._core.flat import FlatView
from optax_ext._core.trees import Bucket


def tree():
    return {
        "b": jnp.array([1.0, 2.0], jnp.bfloat16),
        "a": {"w": jnp.arange(6.0).reshape(2, 3), "none": None},
        "masked": optax.MaskedNode(),
        "scalar": jnp.array(7.0, jnp.float32),
        "empty": jnp.zeros((0, 3)),
        "stack": Bucket(jnp.array([[8.0, 9.0], [10.0, 11.0]])),
    }


def test_the_vector_has_the_leaves_in_tree_order():
    view = FlatView(tree(), "method")
    vector = view.to(tree())
    want = [0, 1, 2, 3, 4, 5, 1, 2, 7, 8, 9, 10, 11]
    np.testing.assert_array_equal(vector, want)
    assert vector.dtype == jnp.float32
    assert view.size == vector.size


def test_it_is_the_order_of_ravel_pytree():
    params = {"b": jnp.ones((2, 2)), "a": jnp.arange(3.0), "c": jnp.array(5.0)}
    want, _ = ravel_pytree(params)
    np.testing.assert_array_equal(FlatView(params, "method").to(params), want)


def test_back_restores_structure_holes_and_dtypes():
    view = FlatView(tree(), "method")
    back = view.back(view.to(tree()))
    assert jax.tree.structure(back) == jax.tree.structure(tree())
    assert isinstance(back["stack"], Bucket)
    for got, want in zip(jax.tree.leaves(back), jax.tree.leaves(tree()), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


def test_one_float64_leaf_makes_the_vector_float64(x64):
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2, jnp.float64)}
    view = FlatView(params, "method")
    assert view.to(params).dtype == view.dtype == jnp.float64
    assert view.back(view.to(params))["a"].dtype == jnp.bfloat16


def test_sizes_and_dtypes_are_known_of_shapes_alone():
    shapes = jax.eval_shape(tree)
    view = FlatView(shapes, "method")
    assert (view.size, view.dtype) == (13, jnp.float32)
    got = jax.eval_shape(lambda t: view.back(view.to(t)), shapes)
    assert got == shapes


def test_leaves_of_another_tree_at_holes_are_skipped():
    updates = {"a": jnp.ones(2), "b": None, "c": optax.MaskedNode()}
    params = {"a": 3 * jnp.ones(2), "b": jnp.ones(4), "c": jnp.ones(1)}
    view = FlatView(updates, "method")
    np.testing.assert_array_equal(view.to(params), [3, 3])


def test_a_function_keeps_the_parameters_at_holes():
    updates = {"a": jnp.ones(2), "b": None}
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.full(4, 5.0)}
    view = FlatView(updates, "method")

    def f(p):
        assert p["a"].dtype == jnp.bfloat16
        return jnp.sum(p["a"].astype(jnp.float32) ** 2) + jnp.sum(p["b"])

    flat = view.function(f, params)
    assert flat(view.to(params)) == 22
    np.testing.assert_array_equal(jax.grad(flat)(view.to(params)), [2, 2])


@pytest.mark.parametrize("empty", [{}, {"a": None}, (), {"a": jnp.zeros((0, 2))}])
def test_a_tree_without_numbers_is_an_empty_vector(empty):
    view = FlatView(empty, "method")
    vector = view.to(empty)
    assert vector.shape == (0,)
    assert jax.tree.structure(view.back(vector)) == jax.tree.structure(empty)


def test_trees_that_do_not_fit_are_told_apart():
    view = FlatView({"a": jnp.ones(2)}, "method")
    with pytest.raises(ValueError, match=r"method: leaf \['a'\]"):
        view.to({"b": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"method: a leaf of shape \(2,\)"):
        view.to({"a": jnp.ones(3)})


def test_a_leaf_of_integers_is_refused():
    with pytest.raises(TypeError, match="int32"):
        _ = FlatView({"a": jnp.ones(2, jnp.int32)}, "method").dtype

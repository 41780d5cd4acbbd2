"""Masks and norms that the losses share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_ext.losses._numerics import (
    mask_of,
    masked_mean,
    masked_sums,
    norm_of,
    unit_rows,
)


def test_sums_of_parts_add_up_to_the_mean_of_the_whole():
    values = jnp.arange(12.0).reshape(2, 6)
    where = jnp.array([[1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1]], bool)
    parts = [masked_sums(values[:, i : i + 3], where[:, i : i + 3]) for i in (0, 3)]
    total, count = (sum(part[k].sum() for part in parts) for k in (0, 1))
    # The first row keeps 2 and 1 tokens, the second 3 and 3: no empty part.
    np.testing.assert_allclose(total / count, values[where].mean(), rtol=1e-6)


def test_a_mean_over_nothing_is_zero_with_gradient_zero():
    values, where = jnp.ones((2, 3)), jnp.zeros((2, 3), bool)
    np.testing.assert_array_equal(masked_mean(values, where), jnp.zeros(2))
    gradient = jax.grad(lambda v: masked_mean(v, where).sum())(values)
    np.testing.assert_array_equal(gradient, jnp.zeros((2, 3)))


def test_a_mask_of_another_shape_is_refused_by_name():
    with pytest.raises(AssertionError, match="where must have a flag a value"):
        mask_of(jnp.ones(3, bool), jnp.ones((2, 3)))


def test_the_norm_and_the_unit_row_of_zero_are_zero_with_finite_gradients():
    zero = jnp.zeros((2, 3))
    assert (norm_of(zero) == 0).all() and (unit_rows(zero) == 0).all()
    for function in (norm_of, unit_rows):
        gradient = jax.grad(lambda x, f=function: f(x).sum())(zero)
        assert jnp.isfinite(gradient).all()


def test_unit_rows_have_length_one_along_their_axis():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    np.testing.assert_allclose(norm_of(unit_rows(x, axis=0), axis=0), 1, rtol=1e-6)

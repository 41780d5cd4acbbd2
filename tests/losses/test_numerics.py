"""Masks and norms that the losses share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_ext.losses._numerics import mask_of, masked_mean, norm_of, unit_rows


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

"""The diagonal Fisher information from gradients of single examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ext as ox


def test_of_a_gaussian_it_is_one_over_the_variance():
    """Of the mean of N(m, s^2), with labels drawn from the model."""
    m, s = jnp.array([1.0, -2.0]), jnp.array([0.5, 2.0])
    draws = m[None] + s[None] * jax.random.normal(jax.random.key(0), (20_000, 2))

    def log_prob(m, x):
        return -jnp.sum(((x - m) / s) ** 2) / 2

    grads = jax.vmap(jax.grad(log_prob), (None, 0))(m, draws)
    # Squares of normals vary by sqrt(2) of their mean: 1 % for 20,000.
    np.testing.assert_allclose(ox.diagonal_fisher(grads), 1 / s**2, rtol=0.04)


def test_squares_are_averaged_in_float32_along_any_axis():
    g = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.bfloat16)
    wide = g.astype(jnp.float32)
    got = ox.diagonal_fisher({"w": g, "hole": None}, axis=1)
    assert got["hole"] is None
    assert got["w"].dtype == jnp.float32
    np.testing.assert_allclose(got["w"], (wide**2).mean(1), rtol=1e-6)


def test_integers_are_refused():
    with pytest.raises(TypeError, match="cannot be trained"):
        ox.diagonal_fisher(jnp.ones((2, 3), int))

"""The diagonal Fisher information from gradients of single examples."""

# Trees of arrays, which the types of optax leave open.
# pyright: reportArgumentType=false

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


def test_the_estimator_is_the_mean_square_of_logistic_regression(x64):
    """Gradients (p - y) x: with labels drawn from p, the mean is p (1 - p) x^2."""
    x, w = jnp.array([[1.0, -2.0], [0.5, 3.0]]), jnp.array([0.3, -0.2])
    p = jax.nn.sigmoid(x @ w)
    estimator, mean = ox.empirical_fisher_diag(), 0.0
    for y in ([0, 0], [0, 1], [1, 0], [1, 1]):
        labels = jnp.asarray(y, jnp.float64)
        each = (p - labels)[:, None] * x
        h, _ = estimator.update(None, (), w, per_example_grads=each)
        want = jnp.mean((p - labels)[:, None] ** 2 * x**2, axis=0)
        np.testing.assert_allclose(np.asarray(h), want, rtol=1e-12)
        mean += float(jnp.prod(jnp.where(labels == 1, p, 1 - p))) * np.asarray(h)
    fisher = jnp.mean((p * (1 - p))[:, None] * x**2, axis=0)
    np.testing.assert_allclose(mean, fisher, rtol=1e-12)


def test_any_link_takes_the_estimator():
    tx = ox.precondition_by_hessian_diag(ox.empirical_fisher_diag(), b2=0.0)
    x = jnp.ones(2)
    each = jnp.array([[1.0, 0.0], [3.0, 2.0]])
    out, _ = tx.update(x, tx.init(x), x, per_example_grads=each)
    np.testing.assert_allclose(np.asarray(out), [1 / 5, 1 / 2], rtol=1e-6)


def test_the_estimator_names_what_is_missing():
    estimator = ox.empirical_fisher_diag()
    with pytest.raises(ValueError, match=r"fisher_diag needs .* 'per_example_grads'"):
        estimator.update(None, (), jnp.ones(2))

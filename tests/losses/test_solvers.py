"""Iteration counts with a gradient, and quadratic models of a loss."""

# Arrays, trees and flax models, which the types of jax and optax leave open.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportReturnType=false, reportOptionalMemberAccess=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox

COUNT = ox.losses.iteration_count_surrogate
SURROGATE = ox.losses.target_surrogate_loss


def halving(n=10):
    return 2 * 0.5 ** jnp.arange(n, dtype=float)


def test_numbers_of_the_specification(x64):
    r = halving()
    value, grad = jax.value_and_grad(COUNT)(r, 1e-2)
    assert value == 8
    np.testing.assert_allclose(grad[:3], [0.105795, 0.197519, 0.235574], atol=5e-7)
    np.testing.assert_array_equal(grad[8:], jnp.zeros(2))
    soft, soft_grad = jax.value_and_grad(COUNT)(r, 1e-2, straight_through=False)
    assert soft == pytest.approx(4.83721, abs=5e-6)
    np.testing.assert_array_equal(grad, soft_grad)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("slope", [1.0, 0.2, 30.0])
def test_the_gradient_is_that_of_the_masked_sigmoids(x64, slope, log):
    r, tol = jnp.asarray(np.random.default_rng(0).uniform(0, 0.2, (3, 6))), 0.05
    f = jnp.log if log else (lambda x: x)

    def soft(r):
        excess = jnp.maximum(f(r) - f(jnp.asarray(tol)), 0)
        return jnp.sum(jnp.where(r > tol, jax.nn.sigmoid(slope * excess), 0), -1)

    options = {"slope": slope, "log": log}
    got = COUNT(r, tol, straight_through=False, **options)
    np.testing.assert_allclose(got, soft(r), rtol=1e-14)
    np.testing.assert_array_equal(COUNT(r, tol, **options), jnp.sum(r > tol, -1))
    np.testing.assert_allclose(
        jax.grad(lambda r: COUNT(r, tol, **options).sum())(r),
        jax.grad(lambda r: soft(r).sum())(r),
        rtol=1e-12,
        atol=1e-14,
    )


@pytest.mark.parametrize("log", [False, True])
def test_zero_and_infinite_residuals_have_finite_gradients(log):
    r = jnp.array([jnp.inf, 1e30, 1.0, 1e-30, 0.0])
    value, grad = jax.value_and_grad(COUNT)(r, 1e-2, log=log)
    assert value == 3
    assert jnp.isfinite(grad).all()


def test_a_solver_that_breaks_down_does_not_count_as_converged():
    assert jnp.isnan(COUNT(jnp.array([1.0, jnp.nan]), 1e-2))


@pytest.mark.parametrize("name", ["tol", "slope"])
def test_bad_hyperparameters_of_the_count_are_named(name):
    with pytest.raises(ValueError, match=f"{name} must lie in"):
        COUNT(halving(), **{"tol": 0.1, name: 0.0})


def test_bad_residuals_are_named():
    with pytest.raises(AssertionError, match="residuals"):
        COUNT(jnp.ones(3, int), 0.1)
    with pytest.raises(AssertionError, match="residuals"):
        COUNT(jnp.float32(1.0), 0.1)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 3)])
def test_surrogate_is_the_printed_formula(x64, shape):
    f, z, d = (normal(i, *shape) for i in range(3))
    got = SURROGATE(f, z, d, eta=0.7)
    want = (d * (f - z) + (f - z) ** 2 / 1.4).reshape(5, -1).sum(-1)
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_at_the_anchor_the_parameter_gradient_is_the_true_one(x64):
    x, w, labels = normal(3, 6, 4), normal(4, 4, 3), jnp.arange(6) % 3

    def loss(z):
        return optax.losses.softmax_cross_entropy_with_integer_labels(z, labels).mean()

    z = x @ w
    d = jax.grad(loss)(z)
    true = jax.grad(lambda w: loss(x @ w))(w)
    got = jax.grad(lambda w: SURROGATE(x @ w, z, d, eta=3.0).sum())(w)
    np.testing.assert_array_equal(got, true)


def test_with_one_over_l_it_bounds_a_logistic_loss_from_above(x64):
    n, labels = 8, jnp.asarray(np.random.default_rng(5).integers(0, 2, 8)).astype(float)

    def loss(z):
        return optax.losses.sigmoid_binary_cross_entropy(z, labels).mean()

    def gap(z, f):
        model = loss(z) + SURROGATE(f, z, jax.grad(loss)(z), eta=4.0 * n).sum()
        return model - loss(f)

    z, f = 4 * normal(6, 2000, n), 4 * normal(7, 2000, n)
    gaps = jax.vmap(gap)(z, f)
    assert gaps.min() > -1e-14
    halved = jax.vmap(
        lambda z, f: (
            loss(z) + SURROGATE(f, z, jax.grad(loss)(z), eta=80.0 * n).sum() - loss(f)
        )
    )(z, f)
    assert halved.min() < 0  # and not for any eta


def test_for_large_eta_the_surrogate_is_linear(x64):
    f, z, d = (normal(i, 5, 3) for i in range(8, 11))
    got = SURROGATE(f, z, d, eta=1e14)
    np.testing.assert_allclose(got, (d * (f - z)).sum(-1), rtol=1e-10)


def test_anchor_and_its_gradient_are_detached():
    f, z, d = (jnp.ones((2, 3)) * i for i in (1.0, 2.0, 3.0))
    _, at_z, at_d = jax.grad(lambda *x: SURROGATE(*x).sum(), (0, 1, 2))(f, z, d)
    assert not at_z.any()
    assert not at_d.any()


def test_bad_arguments_of_the_surrogate_are_named():
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match="eta must lie in"):
        SURROGATE(x, x, x, eta=0.0)
    with pytest.raises(AssertionError, match="output_grads"):
        SURROGATE(x, x, x[:1])
    with pytest.raises(AssertionError, match="outputs"):
        SURROGATE(*[jnp.float32(1.0)] * 3)

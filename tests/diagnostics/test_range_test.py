"""The learning-rate range test."""

# pyright: reportArgumentType=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox

CURVATURES = jnp.array([10.0, 1.0])


def quadratic(x):
    return jnp.sum(CURVATURES * x**2) / 2


def heavy_ball(momentum):
    return lambda lr: optax.sgd(lr, momentum)


# Momentum damps slower than it diverges, so that at 0.9 the loss is far from rounding
# to zero when the limit comes.
@pytest.mark.parametrize("num_steps", [101, 201])
@pytest.mark.parametrize("momentum", [0.5, 0.8, 0.9])
def test_heavy_ball_breaks_within_a_tenth_of_its_limit(momentum, num_steps):
    limit = 2 * (1 + momentum) / 10
    *_, stable = ox.lr_range_test(
        quadratic, jnp.ones(2), heavy_ball(momentum), 0.0, 2 * limit, num_steps
    )
    np.testing.assert_allclose(stable, limit, rtol=0.1)


def test_rates_are_linear_and_losses_are_those_before_each_step():
    lrs, losses, stable = ox.lr_range_test(
        quadratic, jnp.ones(2), optax.sgd, 0.01, 0.05, num_steps=5
    )
    np.testing.assert_allclose(lrs, [0.01, 0.02, 0.03, 0.04, 0.05], rtol=1e-6)
    x, want = np.ones(2), []
    for lr in lrs:
        want.append(float(quadratic(x)))
        x = x - float(lr) * np.array([10.0, 1.0]) * x
    np.testing.assert_allclose(losses, want, rtol=1e-5)
    assert stable == lrs[-1]


def test_a_loss_of_four_times_the_smallest_is_the_last_that_counts():
    # The parameter counts the steps, so that the loss is any series.
    def series(*losses):
        def value_fn(x):
            here = jnp.asarray(losses)[jnp.round(x).astype(int)]
            return here + x - jax.lax.stop_gradient(x)

        step = optax.stateless(lambda updates, params: updates)
        lrs, got, stable = ox.lr_range_test(
            value_fn, jnp.zeros(()), lambda lr: step, 0.0, 3.0, len(losses)
        )
        np.testing.assert_array_equal(got, np.float32(losses))
        return float(jnp.searchsorted(lrs, stable))

    assert series(2.0, 1.0, 4.0, 4.1) == 2
    assert series(2.0, 1.0, 4.1, 4.2) == 1
    assert series(8.0, 1.0, 9.0, 2.0) == 3  # it came back
    assert series(9.0, 1.0, np.inf, np.nan) == 1
    assert series(1.0, -1.0, -2.0, 0.0) == 2


def test_a_loss_that_never_was_finite_has_no_stable_rate():
    *_, stable = ox.lr_range_test(
        lambda x: jnp.sum(x) * jnp.nan, jnp.ones(2), optax.sgd, 0.0, 1.0, 3
    )
    assert jnp.isnan(stable)


def test_it_runs_under_jit_with_optimizers_that_look_at_the_loss():
    def tx_fn(lr):
        return optax.chain(
            ox.precondition_by_hessian_diag(ox.hutchinson_diag()), optax.scale(-lr)
        )

    def run(x):
        return ox.lr_range_test(quadratic, x, tx_fn, 0.0, 0.1, 4)

    for got, want in zip(jax.jit(run)(jnp.ones(2)), run(jnp.ones(2)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_an_empty_range_is_refused():
    for low, high in ((1.0, 1.0), (-1.0, 1.0), (2.0, 1.0), (0.0, np.inf)):
        with pytest.raises(ValueError, match=f"low = {low} must be 0 or more"):
            ox.lr_range_test(quadratic, jnp.ones(2), optax.sgd, low, high, 3)
    for steps in (1, 2.0):
        with pytest.raises(ValueError, match="num_steps must be an integer of 2"):
            ox.lr_range_test(quadratic, jnp.ones(2), optax.sgd, 0.0, 1.0, steps)

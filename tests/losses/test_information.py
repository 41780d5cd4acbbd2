"""Cauchy-Schwarz divergence, mutual information, and the bottleneck of both."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ext as ox

rng = np.random.default_rng(0)
X, Y, T = (rng.normal(size=(7, d)) for d in (3, 1, 2))
Y_PRED = Y + 0.5 * rng.normal(size=Y.shape)
DIVERGENCE, QMI = ox.losses.cs_conditional_divergence, ox.losses.cs_qmi


def floats(*arrays, dtype=jnp.float32):
    return [jnp.asarray(a, dtype) for a in arrays]


def gram(a, b, s):
    return np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / (2 * s**2))


def qmi(x, t, sx, st):
    k, q = gram(x, x, sx), gram(t, t, st)
    rows = np.log((k.mean(1) * q.mean(1)).mean())
    return np.log((k * q).mean()) + np.log(k.mean() * q.mean()) - 2 * rows


@pytest.mark.parametrize(("sigma_x", "sigma_y"), [(1.0, 1.0), (0.7, 2.0)])
def test_the_divergence_as_printed(x64, sigma_x, sigma_y):
    k = gram(X, X, sigma_x)

    def log_s(a, b):
        return np.log(((k * gram(a, b, sigma_y)).sum(1) / k.sum(1) ** 2).sum())

    want = log_s(Y, Y) + log_s(Y_PRED, Y_PRED) - 2 * log_s(Y_PRED, Y)
    got = DIVERGENCE(
        *floats(X, Y, Y_PRED, dtype=float), sigma_x=sigma_x, sigma_y=sigma_y
    )
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_a_right_prediction_costs_nothing_with_a_finite_gradient():
    x, y = floats(X, Y)
    value, gradient = jax.value_and_grad(lambda p: DIVERGENCE(x, y, p))(y)
    assert value == 0
    assert jnp.isfinite(gradient).all()


def test_the_estimate_falls_below_zero_next_to_a_right_prediction(x64):
    x, y = floats(X, Y, dtype=float)
    gradient = jax.grad(lambda p: DIVERGENCE(x, y, p))(y)
    assert DIVERGENCE(x, y, y - 0.1 * gradient) < -1e-5


def test_no_random_prediction_was_better_than_the_right_one(x64):
    @jax.jit
    @jax.vmap
    def draw(key):
        x, y, p = jax.random.normal(key, (3, 8, 1))
        return DIVERGENCE(x, y, p)

    assert draw(jax.random.split(jax.random.key(0), 500)).min() > 0


def test_targets_without_an_axis_are_samples_in_one_dimension():
    x, y, p = floats(X, Y, Y_PRED)
    np.testing.assert_array_equal(DIVERGENCE(x, y[:, 0], p[:, 0]), DIVERGENCE(x, y, p))
    # Not a collapsed Gram matrix, whose divergence is the squared error.
    squares = jnp.sum((y - p) ** 2)
    assert abs(DIVERGENCE(x, y[:, 0], p[:, 0]) - squares) > 0.1


@pytest.mark.parametrize(("sigma_x", "sigma_t"), [(1.0, 1.0), (0.4, 3.0)])
def test_the_information_as_printed(x64, sigma_x, sigma_t):
    kwargs = {"sigma_x": sigma_x, "sigma_t": sigma_t}
    x, t = floats(X, T, dtype=float)
    want = qmi(X, T, sigma_x, sigma_t)
    np.testing.assert_allclose(QMI(x, t, **kwargs), want, rtol=1e-11)
    norm = np.sqrt(qmi(X, X, sigma_x, sigma_x) * qmi(T, T, sigma_t, sigma_t))
    got = QMI(x, t, normalized=True, **kwargs)
    np.testing.assert_allclose(got, want / norm, rtol=1e-11)


def test_information_is_symmetric_and_not_negative(x64):
    x, t = floats(X, T, dtype=float)
    one = QMI(x, t, sigma_x=0.8, sigma_t=1.3)
    np.testing.assert_allclose(QMI(t, x, sigma_x=1.3, sigma_t=0.8), one, rtol=1e-12)
    keys = jax.random.split(jax.random.key(1), 500)
    draws = jax.jit(jax.vmap(lambda k: QMI(*jax.random.normal(k, (2, 6, 1)))))(keys)
    assert draws.min() >= 0


def test_inputs_say_all_about_themselves():
    (x,) = floats(X)
    np.testing.assert_allclose(QMI(x, x, normalized=True), 1, rtol=1e-6)


def test_a_full_grid_is_independent(x64):
    grid = jnp.array([*itertools.product([0.0, 1.0, 2.5], [0.0, 0.3, 4.0, 5.0])])
    np.testing.assert_allclose(QMI(grid[:, :1], grid[:, 1:]), 0, atol=1e-14)


@pytest.mark.parametrize("normalized", [True, False])
def test_a_constant_code_says_nothing_with_a_finite_gradient(normalized):
    (x,) = floats(X)
    value, gradient = jax.value_and_grad(lambda t: QMI(x, t, normalized=normalized))(
        jnp.full((7, 2), 1.3)
    )
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros((7, 2)))


def test_a_code_that_hardly_varies_is_resolved_in_float32():
    t = 1e-2 * T  # kernels differ from 1 by 1e-4
    got = QMI(*floats(X, t), normalized=True)
    norm = np.sqrt(qmi(X, X, 1.0, 1.0) * qmi(t, t, 1.0, 1.0))
    np.testing.assert_allclose(got, qmi(X, t, 1.0, 1.0) / norm, rtol=1e-4)


@pytest.mark.parametrize("sigma", [1e-3, 1e3])
def test_narrow_and_wide_kernels_are_finite(sigma):
    x, y, p, t = floats(X, Y, Y_PRED, T)
    names = ("sigma_x", "sigma_y", "sigma_t")
    loss = functools.partial(ox.losses.cs_ib_loss, **dict.fromkeys(names, sigma))
    value, gradients = jax.value_and_grad(
        lambda p, t: loss(x, y, p, t), argnums=(0, 1)
    )(p, t)
    assert jnp.isfinite(value)
    assert all(jnp.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("normalized", [True, False])
def test_the_bottleneck_adds_beta_times_the_information(normalized):
    x, y, p, t = floats(X, Y, Y_PRED, T)
    got = ox.losses.cs_ib_loss(
        x,
        y,
        p,
        t,
        beta=0.3,
        sigma_x=0.9,
        sigma_y=1.1,
        sigma_t=1.4,
        normalized=normalized,
    )
    want = DIVERGENCE(x, y, p, sigma_x=0.9, sigma_y=1.1) + 0.3 * QMI(
        x, t, sigma_x=0.9, sigma_t=1.4, normalized=normalized
    )
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_the_batch_may_come_in_any_order():
    arrays = floats(X, Y, Y_PRED, T)
    other = [a[::-1] for a in arrays]
    got = ox.losses.cs_ib_loss(*other)
    np.testing.assert_allclose(got, ox.losses.cs_ib_loss(*arrays), rtol=1e-5)


def test_what_does_not_fit_is_named():
    x, y, t = floats(X, Y, T)
    with pytest.raises(AssertionError, match="x must be"):
        QMI(x[None], t)
    with pytest.raises(AssertionError, match="x, t must have one length"):
        QMI(x, t[:3])
    with pytest.raises(AssertionError, match="x, t need a sample"):
        QMI(x[:0], t[:0])
    with pytest.raises(AssertionError, match="y, y_pred"):
        DIVERGENCE(x, y, t)


def test_hyperparameters_outside_their_range_are_named():
    x, y, t = floats(X, Y, T)
    with pytest.raises(ValueError, match="cs_conditional_divergence: sigma_y"):
        DIVERGENCE(x, y, y, sigma_y=0.0)
    with pytest.raises(ValueError, match="cs_qmi: sigma_t"):
        QMI(x, t, sigma_t=-1.0)
    with pytest.raises(ValueError, match="cs_ib_loss: beta"):
        ox.losses.cs_ib_loss(x, y, y, t, beta=-1.0)

"""NoProp: the terms of its likelihood bound."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ext as ox

ALPHA_BAR = np.array([0.05, 0.2, 0.45, 0.7, 0.95])


def blocks(seed=0):
    rng = np.random.default_rng(seed)
    return (jnp.asarray(rng.normal(size=s)) for s in ((4, 3, 2), (3, 2)))


@pytest.mark.parametrize("eta", [0.1, 0.7])
def test_loss_is_the_printed_formula(x64, eta):
    predictions, targets = blocks()
    got = ox.losses.noprop_loss(predictions, targets, jnp.asarray(ALPHA_BAR), eta=eta)
    snr = ALPHA_BAR / (1 - ALPHA_BAR)
    squares = np.sum((np.asarray(predictions) - np.asarray(targets)) ** 2, -1)
    want = 4 * eta / 2 * np.diff(snr)[:, None] * squares
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_weights_telescope_and_are_those_of_the_kl_terms(x64):
    a, _, c = ox.losses.noprop_posterior_coeffs(jnp.asarray(ALPHA_BAR))
    unit = jnp.ones((4, 1, 1)), jnp.zeros((1, 1))
    terms = ox.losses.noprop_loss(*unit, jnp.asarray(ALPHA_BAR), eta=2.0)[:, 0] / 4
    np.testing.assert_allclose(terms, a**2 / c, rtol=1e-12)
    np.testing.assert_allclose(terms.sum(), 18.947368, rtol=1e-7)


def test_sampler_with_perfect_predictions_ends_on_the_label(x64):
    mean, variance = np.sqrt(ALPHA_BAR[0]), 1 - ALPHA_BAR[0]
    coefficients = ox.losses.noprop_posterior_coeffs(jnp.asarray(ALPHA_BAR))
    for at, (a, b, c) in enumerate(zip(*coefficients, strict=True), 1):
        mean, variance = a + b * mean, b**2 * variance + c
        np.testing.assert_allclose(mean, np.sqrt(ALPHA_BAR[at]), rtol=1e-12)
        np.testing.assert_allclose(variance, 1 - ALPHA_BAR[at], rtol=1e-12)


def test_a_block_has_no_gradient_from_the_term_of_another():
    predictions, targets = (x.astype(jnp.float32) for x in blocks(1))
    jacobian = jax.jacobian(
        lambda p: ox.losses.noprop_loss(p, targets, jnp.float32(ALPHA_BAR)).sum(-1)
    )(predictions)
    moved = abs(jacobian).sum((2, 3)) > 0
    np.testing.assert_array_equal(moved, np.eye(4, dtype=bool))


def test_gradients_flow_into_learnt_label_embeddings(x64):
    predictions, targets = blocks(2)
    grad = jax.grad(
        lambda u: ox.losses.noprop_loss(predictions, u, jnp.asarray(ALPHA_BAR)).sum()
    )(targets)
    weight = 4 * 0.1 * np.diff(ALPHA_BAR / (1 - ALPHA_BAR))[:, None, None]
    want = np.sum(weight * (targets[None] - predictions), 0)
    np.testing.assert_allclose(grad, want, rtol=1e-12)


def test_prior_kl_is_that_of_a_gaussian_from_the_standard_normal(x64):
    _, targets = blocks(3)
    for level in (0.0, 0.3, 0.99):
        got = ox.losses.noprop_prior_kl(targets, jnp.asarray(level))
        mean, variance = np.sqrt(level) * np.asarray(targets), 1 - level
        want = (variance + mean**2 - 1 - np.log(variance)).sum(-1) / 2
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-15)


def test_prior_kl_of_almost_pure_noise_keeps_its_digits_in_float32():
    got = ox.losses.noprop_prior_kl(jnp.zeros((1, 2)), jnp.float32(1e-3))
    level = float(np.float32(1e-3))
    # -(a + log(1 - a)) is a^2 / 2 and cancels all but its last digits.
    np.testing.assert_allclose(got, [-(level + np.log1p(-level))], rtol=3e-4)


X = jnp.ones((4, 3, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: ox.losses.noprop_loss(X[0], X[0], a), "predictions"),
        (lambda a: ox.losses.noprop_loss(X, X[0, :1], a), "targets must be"),
        (lambda a: ox.losses.noprop_loss(X, X[0], a[:4]), "one entry more"),
        (lambda a: ox.losses.noprop_loss(X, X[0], a[0]), "alpha_bar must be a vector"),
        (lambda a: ox.losses.noprop_prior_kl(X, a[0]), "targets"),
        (lambda a: ox.losses.noprop_prior_kl(X[0], a), "alpha_bar_0 must be a scalar"),
        (lambda a: ox.losses.noprop_posterior_coeffs(a[:1]), "T \\+ 1 entries"),
    ],
)
def test_shapes_that_do_not_fit_are_named(call, message):
    with pytest.raises(AssertionError, match=message):
        call(jnp.asarray(ALPHA_BAR, jnp.float32))


def test_eta_must_not_be_negative():
    with pytest.raises(ValueError, match="eta must lie"):
        ox.losses.noprop_loss(X, X[0], jnp.float32(ALPHA_BAR), eta=-0.1)

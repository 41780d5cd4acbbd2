"""z-loss, and the sensitivity of the final loss to the learning rate."""

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

rng = np.random.default_rng(0)
LOGITS = rng.normal(0, 3, (2, 4, 5))
LABELS = jnp.asarray(rng.integers(0, 5, (2, 4)))


@pytest.mark.parametrize("coef", [1e-4, 0.3])
def test_the_gradient_is_two_coef_log_z_times_the_softmax(x64, coef):
    logits = jnp.asarray(LOGITS)
    value = ox.losses.z_loss(logits, coef=coef)
    gradient = jax.grad(lambda z: ox.losses.z_loss(z, coef=coef).sum())(logits)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    np.testing.assert_allclose(value, coef * log_z**2, rtol=1e-14)
    want = 2 * coef * log_z[..., None] * jax.nn.softmax(logits)
    np.testing.assert_allclose(gradient, want, rtol=1e-12)
    np.testing.assert_allclose(gradient.sum(-1), 2 * coef * log_z, rtol=1e-12)


def test_normalised_logits_cost_nothing(x64):
    logits = jax.nn.log_softmax(jnp.asarray(LOGITS))
    np.testing.assert_allclose(ox.losses.z_loss(logits, coef=1.0), 0, atol=1e-29)


def test_the_sum_is_cross_entropy_plus_penalty(x64):
    logits = jnp.asarray(LOGITS)
    got = ox.losses.cross_entropy_with_z_loss(logits, LABELS, coef=0.02)
    plain = optax.losses.softmax_cross_entropy_with_integer_labels(logits, LABELS)
    want = plain + ox.losses.z_loss(logits, coef=0.02)
    np.testing.assert_allclose(got, want, rtol=1e-14)


@pytest.mark.parametrize("scale", [1e4, -1e4, 0.0])
def test_huge_and_equal_logits_are_finite(scale):
    logits = jnp.array([[scale, 0.0, -scale], [scale, scale, scale]])
    value, gradient = jax.value_and_grad(
        lambda z: ox.losses.cross_entropy_with_z_loss(z, jnp.array([2, 1])).sum()
    )(logits)
    assert jnp.isfinite(value)
    assert jnp.isfinite(gradient).all()


RATES = jnp.array([1e-4, 1e-3, 1e-2, 1e-1])
FINAL = jnp.array([4.0, 3.0, 2.5, jnp.nan])


def test_sensitivity_by_hand():
    # 4, 3, 2.5 and, for the run that diverged, 6.
    assert ox.losses.lr_sensitivity(RATES, FINAL, 6.0) == 15.5 / 4 - 2.5
    np.testing.assert_allclose(
        ox.losses.lr_sensitivity(RATES, FINAL, 6.0, rule="trapezoid"),
        (3.5 + 2.75 + 4.25) / 3 - 2.5,
        rtol=1e-6,
    )


def test_no_loss_counts_for_more_than_the_first():
    final = FINAL.at[3].set(1e30)
    want = ox.losses.lr_sensitivity(RATES, FINAL, 6.0)
    assert ox.losses.lr_sensitivity(RATES, final, 6.0) == want
    assert ox.losses.lr_sensitivity(RATES, final.at[3].set(jnp.inf), 6.0) == want


@pytest.mark.parametrize("rule", ["mean", "trapezoid"])
def test_the_order_of_the_runs_does_not_matter(rule):
    order = jnp.array([2, 0, 3, 1])
    got = ox.losses.lr_sensitivity(RATES[order], FINAL[order], 6.0, rule=rule)
    want = ox.losses.lr_sensitivity(RATES, FINAL, 6.0, rule=rule)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_an_uneven_grid_is_integrated_over_the_logarithm(x64):
    rates = jnp.exp(jnp.array([0.0, 1.0, 4.0]))
    got = ox.losses.lr_sensitivity(
        rates, jnp.array([1.0, 3.0, 1.0]), 9.0, rule="trapezoid"
    )
    np.testing.assert_allclose(got, (2 * 1 + 2 * 3) / 4 - 1, rtol=1e-14)


@pytest.mark.parametrize("rule", ["mean", "trapezoid"])
def test_a_rate_that_does_not_matter_gives_zero(rule):
    got = ox.losses.lr_sensitivity(RATES, jnp.full(4, 2.0), 9.0, rule=rule)
    np.testing.assert_allclose(got, 0, atol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("learning_rate", [1e-3, 0.5])
def test_independent_decay_does_not_see_the_peak_rate(learning_rate):
    schedule = jnp.array([0.1, 0.5, 1.0, 0.3])
    tx = ox.adamw_decoupled(
        learning_rate, b2=0.95, weight_decay=1e-2, schedule=lambda t: schedule[t]
    )
    params = jnp.array([1.0, -2.0])
    state = tx.init(params)
    for _ in range(4):
        updates, state = tx.update(jnp.zeros(2), state, params)
        params = optax.apply_updates(params, updates)
    want = np.prod(1 - schedule * 1e-2) * np.array([1.0, -2.0])
    np.testing.assert_allclose(params, want, rtol=1e-13)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ox.losses.z_loss(jnp.arange(3)), "logits must be floating"),
        (lambda: ox.losses.z_loss(jnp.zeros((2, 0))), "logits need classes"),
        (
            lambda: ox.losses.cross_entropy_with_z_loss(RATES[None], RATES[:1]),
            "labels must be integers",
        ),
        (
            lambda: ox.losses.cross_entropy_with_z_loss(RATES[None], LABELS),
            "labels must be",
        ),
        (
            lambda: ox.losses.lr_sensitivity(RATES[None], FINAL, 1.0),
            "learning_rates must be a vector",
        ),
        (
            lambda: ox.losses.lr_sensitivity(RATES, FINAL[:2], 1.0),
            "final_losses must be like",
        ),
        (lambda: ox.losses.lr_sensitivity(RATES, FINAL, FINAL), "init_loss must be"),
        (
            lambda: ox.losses.lr_sensitivity(
                RATES[:1], FINAL[:1], 1.0, rule="trapezoid"
            ),
            "the trapezoid rule needs two",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(AssertionError, match=message):
        call()


def test_hyperparameters_outside_their_range_are_named():
    with pytest.raises(ValueError, match="z_loss: coef must lie in"):
        ox.losses.z_loss(RATES, coef=-1.0)
    with pytest.raises(ValueError, match="lr_sensitivity: rule must be one of 'mean'"):
        ox.losses.lr_sensitivity(RATES, FINAL, 1.0, rule="max")

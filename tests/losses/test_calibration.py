"""Calibration of predicted quantiles, and confidence that ranks errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ext as ox

rng = np.random.default_rng(0)
PIT = ox.losses.pit_calibration_loss


@pytest.mark.parametrize("p", [1, 2, 1.5])
def test_the_sort_is_the_mean_distance_to_the_expected_order_statistics(x64, p):
    pit = jnp.array([0.9, 0.2, 0.4])
    got = PIT(pit, kind="sort", p=p)
    want = np.mean(np.abs(np.array([0.2, 0.4, 0.9]) - [0.25, 0.5, 0.75]) ** p)
    np.testing.assert_allclose(got, want, rtol=1e-14)


def test_expected_order_statistics_cost_nothing():
    n = 9
    assert PIT(jnp.arange(1, n + 1, dtype=jnp.float32) / (n + 1), kind="sort") == 0


def test_the_gradient_of_the_sort_is_one_over_n_each():
    pit = jnp.array([0.9, 0.2, 0.4, 0.41])  # expected 0.2, 0.4, 0.6, 0.8
    gradient = jax.grad(lambda z: PIT(z, kind="sort"))(pit + 0.01)
    np.testing.assert_allclose(gradient, np.array([1, 1, 1, -1]) / 4)


@pytest.mark.parametrize(("levels", "slope", "p"), [(7, 20.0, 1), (100, 100.0, 2)])
def test_the_kde_by_hand(x64, levels, slope, p):
    pit = rng.random(6)
    a = (np.arange(levels) + 0.5) / levels
    smooth = 1 / (1 + np.exp(-slope * (a[:, None] - pit)))
    want = np.mean(np.abs(smooth.mean(1) - a) ** p)
    got = PIT(jnp.asarray(pit), levels=levels, slope=slope, p=p)
    np.testing.assert_allclose(got, want, rtol=1e-13)


def test_a_steep_kde_is_the_empirical_distribution_function(x64):
    pit = rng.random(8)
    a = (np.arange(100) + 0.5) / 100
    want = np.mean(np.abs((pit < a[:, None]).mean(1) - a))
    got, gradient = jax.value_and_grad(lambda z: PIT(z, slope=1e6))(jnp.asarray(pit))
    np.testing.assert_allclose(got, want, rtol=1e-9)
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("kind", ["kde", "sort"])
def test_overconfidence_raises_the_predicted_scale(kind):
    errors = jnp.asarray(rng.normal(0, 1, 200), jnp.float32)

    def loss(log_scale):
        return PIT(jax.scipy.stats.norm.cdf(errors / jnp.exp(log_scale)), kind=kind)

    value, slope = jax.value_and_grad(loss)(-1.0)
    assert value > 0.1
    assert slope < 0


@pytest.mark.parametrize("kind", ["kde", "sort"])
def test_the_batch_may_come_in_any_order(kind):
    pit = jnp.asarray(rng.random(11), jnp.float32)
    got = PIT(pit[::-1], kind=kind)
    np.testing.assert_allclose(got, PIT(pit, kind=kind), rtol=1e-5)


@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
@pytest.mark.parametrize("kind", ["kde", "sort"])
def test_certain_and_impossible_targets_have_finite_gradients(kind, p):
    pit = jnp.array([0.0, 0.0, 0.5, 1.0, 1.0])  # the third is where it should be
    gradient = jax.grad(lambda z: PIT(z, kind=kind, p=p))(pit)
    assert jnp.isfinite(gradient).all()


def test_a_target_where_it_should_be_has_no_gradient():
    gradient = jax.grad(lambda z: PIT(z, kind="sort"))(jnp.array([0.75, 0.25, 0.6]))
    np.testing.assert_allclose(gradient, [0, 0, 1 / 3])


SCORE = ox.losses.logit_norm_score
LOGITS = rng.normal(0, 2, (5, 6))


@pytest.mark.parametrize("p", [1.0, 4.0, 8.0])
@pytest.mark.parametrize("center", [True, False])
def test_the_score_by_hand(x64, p, center):
    v = LOGITS - LOGITS.mean(-1, keepdims=True) if center else LOGITS
    want = v.max(-1) / (np.abs(v) ** p).sum(-1) ** (1 / p)
    got = SCORE(jnp.asarray(LOGITS), p=p, center=center)
    np.testing.assert_allclose(got, want, rtol=1e-13)


def test_neither_factor_nor_shift_changes_the_score(x64):
    logits = jnp.asarray(LOGITS)
    want = SCORE(logits)
    np.testing.assert_allclose(SCORE(7 * logits - 3), want, rtol=1e-12)
    assert not np.allclose(SCORE(logits - 3, center=False), want)


def test_the_gradient_of_the_score_agrees_with_finite_differences(x64):
    logits, h = jnp.asarray(LOGITS), 1e-6
    direction = jnp.asarray(rng.normal(size=LOGITS.shape))

    def along(t):
        return SCORE(logits + t * direction).sum()

    want = (along(h) - along(-h)) / (2 * h)
    np.testing.assert_allclose(jax.grad(along)(0.0), want, rtol=1e-8)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e4, -1e4, 1e30])
def test_equal_logits_say_nothing(value, center):
    logits = jnp.full((1, 7), value)
    score, gradient = jax.value_and_grad(lambda z: SCORE(z, center=center).sum())(
        logits
    )
    if center or value == 0:
        assert score == 0
    assert jnp.isfinite(score)
    assert jnp.isfinite(gradient).all()


SCORES = jnp.asarray(rng.permutation(20) / 20, jnp.float32)
CORRECT = jnp.asarray(rng.random(20) < 0.7)


def test_the_curve_counts_errors_among_the_most_confident():
    coverage, risk = ox.losses.risk_coverage_curve(SCORES, CORRECT)
    order = np.argsort(-np.asarray(SCORES))
    errors = np.cumsum(~np.asarray(CORRECT)[order])
    np.testing.assert_allclose(coverage, np.arange(1, 21) / 20, rtol=1e-6)
    np.testing.assert_allclose(risk, errors / np.arange(1, 21), rtol=1e-6)


def test_ties_keep_the_order_given():
    correct = jnp.array([True, True, False])
    risk = ox.losses.risk_coverage_curve(jnp.ones(3), correct).risk
    np.testing.assert_allclose(risk, [0, 0, 1 / 3], rtol=1e-6)


@pytest.mark.parametrize(("n", "errors"), [(10, 3), (8, 8), (5, 0)])
def test_the_area_under_a_perfect_ranking(x64, n, errors):
    correct = jnp.arange(n) < n - errors
    got = ox.losses.area_under_risk_coverage(-jnp.arange(n, dtype=float), correct)
    want = sum((k - n + errors) / k for k in range(n - errors + 1, n + 1)) / n
    np.testing.assert_allclose(got, want, rtol=1e-13)
    if (n, errors) == (10, 3):
        np.testing.assert_allclose(got, 0.0647222, atol=5e-8)


@pytest.mark.parametrize("rule", ["mean", "trapezoid"])
def test_an_error_rate_that_ignores_confidence_is_the_area(rule):
    got = ox.losses.area_under_risk_coverage(SCORES, jnp.zeros(20, bool), rule=rule)
    np.testing.assert_allclose(got, 1, rtol=1e-6)


def test_the_trapezoid_rule_integrates_from_the_first_example_on():
    correct = jnp.array([True, False, True])  # risks 0, 1/2, 1/3
    got = ox.losses.area_under_risk_coverage(
        jnp.array([3.0, 2.0, 1.0]), correct, rule="trapezoid"
    )
    np.testing.assert_allclose(got, (1 / 4 + 5 / 12) / 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PIT(jnp.zeros((2, 2))), "pit must be a vector"),
        (lambda: SCORE(jnp.arange(3)), "logits must be floating"),
        (lambda: SCORE(jnp.zeros((2, 0))), "logits need classes"),
        (
            lambda: ox.losses.risk_coverage_curve(SCORES, SCORES),
            "correct must be booleans",
        ),
        (lambda: ox.losses.risk_coverage_curve(SCORES, CORRECT[:2]), "correct, scores"),
        (
            lambda: ox.losses.area_under_risk_coverage(
                SCORES[:1], CORRECT[:1], rule="trapezoid"
            ),
            "the trapezoid rule needs two",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(AssertionError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PIT(SCORES, kind="cdf"), "pit_calibration_loss: kind must be one of"),
        (lambda: PIT(SCORES, levels=0), "levels must be an integer of 1 or more"),
        (lambda: PIT(SCORES, slope=0.0), "pit_calibration_loss: slope"),
        (lambda: PIT(SCORES, p=0.5), "pit_calibration_loss: p must lie in"),
        (lambda: SCORE(SCORES, p=0.0), "logit_norm_score: p must lie in"),
        (
            lambda: ox.losses.area_under_risk_coverage(SCORES, CORRECT, rule="sum"),
            "area_under_risk_coverage: rule must be one of",
        ),
    ],
)
def test_hyperparameters_outside_their_range_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

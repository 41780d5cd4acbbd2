"""Curricula and weights from the losses of a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox

CURRICULUM, WEIGHTS = ox.losses.curriculum_weight, ox.losses.loss_based_weights
EASY = jnp.array([[0.0, 0.3], [0.8, 1.0]])
rng = np.random.default_rng(0)
LOSSES = jnp.asarray(rng.gamma(2.0, 1.0, 8), jnp.float32)
WHERE = jnp.asarray([1, 0, 1, 1, 0, 1, 1, 1], bool)
STRATEGIES = ["linupper", "quadratic", "extremes", "uniform"]


def test_a_curriculum_goes_from_easiness_to_one():
    np.testing.assert_array_equal(CURRICULUM(EASY, 0, 20), EASY)
    for step in (20, 21, jnp.int32(10**9)):
        np.testing.assert_array_equal(CURRICULUM(EASY, step, 20), np.ones((2, 2)))
    weights = jnp.stack([CURRICULUM(EASY, step, 20) for step in range(25)])
    assert (jnp.diff(weights, axis=0) >= 0).all()
    assert (weights >= 0).all()
    assert (weights <= 1).all()


@pytest.mark.parametrize("step", [0, 3, 7, 11])
def test_the_fade_is_optax_linear_schedule(step):
    with jax.numpy_dtype_promotion("standard"):
        f = optax.linear_schedule(0.0, 1.0, 10)(step)
    want = EASY * (1 - f) + f
    np.testing.assert_allclose(CURRICULUM(EASY, step, 10), want, rtol=1e-6)


def test_easiness_is_a_constant():
    def total(losses, easy):
        return jnp.sum(CURRICULUM(easy, 5, 20) * losses)

    of_losses, of_easy = jax.grad(total, argnums=(0, 1))(jnp.ones((2, 2)), EASY)
    np.testing.assert_array_equal(of_losses, CURRICULUM(EASY, 5, 20))
    np.testing.assert_array_equal(of_easy, np.zeros((2, 2)))


def test_ranks_one_and_two_are_an_easy_pair():
    ranks = jnp.array([1, 2])
    first, second = ox.losses.reciprocal_rank_score(ranks)
    assert ox.losses.pairwise_easiness(first, second) == 0.75


def test_the_hardest_of_several_negatives_decides():
    positive, negatives = jnp.array([0.9, 0.2]), jnp.array([[0.1, 0.5], [1.0, 0.0]])
    got = ox.losses.pairwise_easiness(positive, negatives)
    np.testing.assert_allclose(got, [0.7, 0.1], rtol=1e-6)


def test_ranks_may_be_floats_and_keep_their_precision(x64):
    assert ox.losses.reciprocal_rank_score(jnp.array([3])).dtype == jnp.float64
    got = ox.losses.reciprocal_rank_score(jnp.array([2.5], jnp.float32))
    assert (got[0], got.dtype) == (jnp.float32(0.4), jnp.float32)


def test_a_point_is_as_easy_as_its_score_is_right():
    got = ox.losses.pointwise_easiness(jnp.array([0.9, 0.9]), jnp.array([True, False]))
    np.testing.assert_allclose(got, [0.9, 0.1], rtol=1e-6)


def test_normalised_scores_are_those_of_the_items_that_are_there():
    scores = jnp.array([[3.0, 99.0, 1.0, 2.0], [5.0, 5.0, 5.0, 7.0]])
    where = jnp.array([[1, 0, 1, 1], [1, 1, 1, 0]], bool)
    got = ox.losses.normalized_score(scores, where=where)
    np.testing.assert_array_equal(got, [[1, 0, 0, 0.5], [0, 0, 0, 0]])
    gradient = jax.grad(lambda s: ox.losses.normalized_score(s).sum())(scores)
    assert jnp.isfinite(gradient).all()
    none = jnp.zeros((2, 4), bool)
    got = ox.losses.normalized_score(scores, where=none)
    np.testing.assert_array_equal(got, np.zeros((2, 4)))


@pytest.mark.parametrize(
    ("strategy", "score"),
    [
        ("linupper", lambda h, d: np.minimum(h + d, d)),
        ("quadratic", lambda h, d: 1 - h**2 / d**2),
        ("extremes", lambda h, d: np.abs(h)),
        ("uniform", lambda h, d: 0 * h),
    ],
)
@pytest.mark.parametrize(("delta", "temperature"), [(1.0, 0.4), (2.5, 1.3)])
def test_the_strategies_as_printed(x64, strategy, score, delta, temperature):
    l = np.asarray(LOSSES, np.float64)
    h = delta * (2 * l - l.max() - l.min()) / (l.max() - l.min())
    want = np.exp(score(h, delta) / temperature)
    got = WEIGHTS(
        jnp.asarray(l), strategy=strategy, delta=delta, temperature=temperature
    )
    np.testing.assert_allclose(got, want / want.sum(), rtol=1e-12)


def test_above_mid_range_linupper_weighs_all_alike():
    weights = WEIGHTS(jnp.array([0.0, 1.0, 2.1, 3.0, 4.0]))
    np.testing.assert_allclose(weights[2:], weights[4], rtol=1e-6)
    assert weights[0] < weights[1] < weights[2]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weights_sum_to_one_and_follow_their_losses(strategy):
    order = jnp.asarray(rng.permutation(8))
    weights = WEIGHTS(LOSSES, strategy=strategy)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)
    got = WEIGHTS(LOSSES[order], strategy=strategy)
    np.testing.assert_allclose(got, weights[order], rtol=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_mask_is_a_slice(strategy):
    losses = LOSSES.at[1].set(1e6)
    weights = WEIGHTS(losses, strategy=strategy, where=WHERE)
    want = WEIGHTS(losses[WHERE], strategy=strategy)
    np.testing.assert_allclose(weights[WHERE], want, rtol=1e-6)
    np.testing.assert_array_equal(weights[~WHERE], 0)
    none = WEIGHTS(losses, strategy=strategy, where=jnp.zeros(8, bool))
    np.testing.assert_array_equal(none, np.zeros(8))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_equal_losses_and_high_temperatures_give_equal_weights(strategy):
    for losses, temperature in ((jnp.full(8, 3.3), 1.0), (LOSSES, 1e9)):
        got = WEIGHTS(losses, strategy=strategy, temperature=temperature)
        np.testing.assert_allclose(got, np.full(8, 1 / 8), rtol=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_gradient_of_the_weighted_sum_is_the_weights(strategy):
    def total(losses):
        return jnp.sum(WEIGHTS(losses, strategy=strategy) * losses)

    want = WEIGHTS(LOSSES, strategy=strategy)
    np.testing.assert_array_equal(jax.grad(total)(LOSSES), want)
    assert jnp.isfinite(WEIGHTS(jnp.array([1e4, -1e4, 0.0]), strategy=strategy)).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CURRICULUM(jnp.arange(3), 0, 5), "difficulty must be floating"),
        (lambda: CURRICULUM(EASY, jnp.arange(2), 5), "step must be a scalar"),
        (
            lambda: ox.losses.pairwise_easiness(EASY[0], LOSSES),
            "score_pos, score_neg",
        ),
        (
            lambda: ox.losses.pointwise_easiness(EASY, EASY),
            "is_positive must be booleans",
        ),
        (lambda: ox.losses.normalized_score(EASY, where=WHERE), "where must have"),
        (lambda: WEIGHTS(LOSSES[None]), "losses must be a vector"),
        (lambda: WEIGHTS(LOSSES, where=WHERE[:2]), "where must have"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(AssertionError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CURRICULUM(EASY, 0, 0), "curriculum_weight: curriculum_steps"),
        (lambda: WEIGHTS(LOSSES, strategy="linear"), "loss_based_weights: strategy"),
        (lambda: WEIGHTS(LOSSES, delta=0.0), "loss_based_weights: delta"),
        (lambda: WEIGHTS(LOSSES, temperature=0.0), "loss_based_weights: temperature"),
    ],
)
def test_hyperparameters_outside_their_range_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

"""Co-teaching and nested dropout."""

# Arrays, trees and flax models, which the types of jax and optax leave open.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportReturnType=false, reportOptionalMemberAccess=false

import fractions

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ext as ox

weights = ox.losses.co_teaching_weights


@pytest.mark.parametrize("rate", ["0", "0.1", "0.2", "0.3", "0.45", "0.7", "0.9", "1"])
@pytest.mark.parametrize("n", [1, 7, 10, 50, 100, 1000])
def test_the_kept_count_is_that_of_exact_arithmetic(rate, n):
    exact = (1 - fractions.Fraction(rate)) * n // 1
    losses = jnp.asarray(np.random.default_rng(n).normal(0, 1, n), jnp.float32)
    assert weights(losses, float(rate)).sum() == exact
    assert jax.jit(weights)(losses, jnp.float32(rate)).sum() == exact
    with jax.enable_x64(True):
        assert weights(jnp.asarray(losses, float), float(rate)).sum() == exact


def test_the_smallest_losses_are_kept_and_ties_go_by_position():
    losses = jnp.array([0.5, 0.1, 0.5, 0.5, 0.2])
    np.testing.assert_array_equal(weights(losses, 0.2), [1, 1, 1, 0, 1])
    np.testing.assert_array_equal(weights(losses, 0.4), [1, 1, 0, 0, 1])
    np.testing.assert_array_equal(weights(jnp.ones(4), 0.5), [1, 1, 0, 0])


def test_a_loss_that_is_no_number_is_left_out():
    losses = jnp.array([jnp.nan, 2.0, jnp.inf, 1.0])
    np.testing.assert_array_equal(weights(losses, 0.5), [0, 1, 0, 1])


def test_each_network_learns_what_the_other_selects():
    a = jnp.array([1.0, 2.0, 30.0, 4.0])
    b = jnp.array([10.0, 5.0, 1.0, 2.0])
    loss_a, loss_b = ox.losses.co_teaching_loss(a, b, 0.5)
    assert loss_a == (30 + 4) / 2  # b has 2 and 3 smallest
    assert loss_b == (10 + 5) / 2  # a has 0 and 1 smallest


def test_selection_has_no_gradient():
    a = jnp.array([1.0, 2.0, 30.0, 4.0])
    b = jnp.array([10.0, 5.0, 1.0, 2.0])
    grads = jax.jacobian(
        lambda *x: jnp.stack(ox.losses.co_teaching_loss(*x, 0.5)), (0, 1)
    )(a, b)
    np.testing.assert_array_equal(grads[0], [[0, 0, 0.5, 0.5], [0] * 4])
    np.testing.assert_array_equal(grads[1], [[0] * 4, [0.5, 0.5, 0, 0]])
    np.testing.assert_array_equal(jax.grad(lambda x: weights(x, 0.5).sum())(a), 0)


def test_nothing_forgotten_is_the_plain_mean_and_all_forgotten_is_zero():
    a, b = jnp.array([1.0, 2.0, 6.0]), jnp.array([3.0, 5.0, 1.0])
    assert ox.losses.co_teaching_loss(a, b, 0.0) == (3.0, 3.0)
    assert ox.losses.co_teaching_loss(a, b, 1.0) == (0.0, 0.0)


def test_the_forget_rate_ramps_over_epochs_from_0():
    schedule = ox.losses.forget_rate_schedule(0.2, 5)
    got = [schedule(e) for e in range(7)]
    np.testing.assert_allclose(got, [0, 0.05, 0.1, 0.15, 0.2, 0.2, 0.2], rtol=1e-6)


@pytest.mark.parametrize("ramp", [0, 1])
def test_without_a_ramp_the_rate_is_there_at_once(ramp):
    schedule = ox.losses.forget_rate_schedule(0.3, ramp)
    np.testing.assert_allclose([schedule(0), schedule(9)], 0.3, rtol=1e-6)


def test_the_schedule_feeds_the_loss_under_jit():
    a, b = jnp.arange(10.0), jnp.arange(10.0)[::-1]
    schedule = ox.losses.forget_rate_schedule(0.3, 4)

    @jax.jit
    def kept(epoch):
        return weights(a, schedule(epoch)).sum()

    np.testing.assert_array_equal([kept(e) for e in range(5)], [10, 9, 8, 7, 7])
    assert jax.jit(ox.losses.co_teaching_loss)(a, b, schedule(0))[0] == a.mean()


def test_the_first_features_are_kept_and_all_of_them_is_the_identity():
    x = jnp.arange(1.0, 7.0).reshape(2, 3)
    np.testing.assert_array_equal(
        ox.losses.nested_dropout(x, 2), [[1, 2, 0], [4, 5, 0]]
    )
    np.testing.assert_array_equal(ox.losses.nested_dropout(x, 3), x)
    traced = jax.jit(ox.losses.nested_dropout)(x, jnp.asarray(1, jnp.int32))
    np.testing.assert_array_equal(traced, [[1, 0, 0], [4, 0, 0]])


def test_dropped_features_have_no_gradient():
    grads = jax.grad(lambda x: ox.losses.nested_dropout(x, 1).sum())(jnp.ones((2, 3)))
    np.testing.assert_array_equal(grads, [[1, 0, 0]] * 2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_features_keep_their_dtype(dtype):
    assert ox.losses.nested_dropout(jnp.ones((2, 3), dtype), 2).dtype == dtype


@pytest.mark.parametrize(("std", "mean"), [(3.0, 0.0), (0.5, 4.0), (100.0, 2.5)])
def test_probabilities_are_the_printed_ones(x64, std, mean):
    k = np.arange(1, 9)
    want = np.exp(-(((k - mean) / std) ** 2))
    got = ox.losses.nested_dropout_probs(8, std=std, mean=mean)
    np.testing.assert_allclose(got, want / want.sum(), rtol=1e-13)


def test_a_narrow_distribution_far_away_is_still_one():
    got = ox.losses.nested_dropout_probs(4, std=1e-2, mean=100.0)
    np.testing.assert_array_equal(got, [0, 0, 0, 1])


def test_mistakes_are_named():
    losses = jnp.ones(3)
    with pytest.raises(ValueError, match="forget_rate must lie"):
        weights(losses, 1.5)
    with pytest.raises(AssertionError, match="losses must be a vector"):
        weights(losses[None], 0.5)
    with pytest.raises(AssertionError, match="losses_a must be a vector"):
        ox.losses.co_teaching_loss(losses[None], losses[None], 0.5)
    with pytest.raises(AssertionError, match="of the same examples"):
        ox.losses.co_teaching_loss(losses, losses[:2], 0.5)
    with pytest.raises(ValueError, match="rate must lie"):
        ox.losses.forget_rate_schedule(-0.1, 5)
    with pytest.raises(ValueError, match="k must lie in"):
        ox.losses.nested_dropout(jnp.ones((2, 3)), 4)
    with pytest.raises(AssertionError, match="features must be floating"):
        ox.losses.nested_dropout(jnp.ones((2, 3), int), 2)
    with pytest.raises(ValueError, match="std must lie"):
        ox.losses.nested_dropout_probs(4, std=0.0)

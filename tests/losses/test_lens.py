"""LENS: rewards of confident mistakes, and their advantages."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ext as ox


def groups(seed=0, dtype=float):
    """Groups of five: all wrong, all right, one right, and two mixed ones."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 7, (5, 5))
    log_probs = lengths * rng.uniform(-2.0, -0.1, (5, 5))
    correct = np.array(
        [[0] * 5, [1] * 5, [0, 1, 0, 0, 0], [1, 0, 1, 0, 0], [0, 1, 1, 1, 1]]
    )
    return jnp.asarray(correct), jnp.asarray(log_probs, dtype), jnp.asarray(lengths)


def printed(correct, log_probs, lengths, scale=True, normalize=False):
    """Section 5.1 of the paper, in NumPy and without logarithms."""
    pi, g = np.exp(np.asarray(log_probs)), correct.shape[-1]
    c = pi ** (1 / np.asarray(lengths))
    rewards = np.ones(c.shape)
    for i, right in enumerate(np.asarray(correct, bool)):
        d = 2 * c[i].max()
        if right.any():
            d = max(d, 1 / np.mean(right / (c[i] if normalize else pi[i])))
        rewards[i] = np.where(right, 1, -c[i] / (d - c[i]) / (g if scale else 1))
    return rewards


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_rewards_are_the_printed_formula(x64, scale, normalize):
    arguments = groups()
    got = ox.losses.lens_rewards(
        *arguments, scale_by_group=scale, normalize_difficulty=normalize
    )
    want = printed(*arguments, scale, normalize)
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_the_surest_of_an_all_wrong_group_costs_one_over_the_group(x64):
    correct, log_probs, lengths = groups()
    wrong = ox.losses.lens_rewards(correct, log_probs, lengths)[0]
    assert float(wrong.min()) == pytest.approx(-1 / 5, rel=1e-14)
    assert jnp.argmin(wrong) == jnp.argmax(log_probs[0] / lengths[0].astype(float))
    assert jnp.all((wrong < 0) & (wrong >= -1 / 5 - 1e-15))


def test_mistakes_matter_where_grpo_sees_nothing(x64):
    correct, log_probs, lengths = (x[0] for x in groups())
    plain = ox.losses.group_relative_advantages(correct.astype(float))
    np.testing.assert_array_equal(plain, jnp.zeros(5))
    advantages = ox.losses.lens_advantages(correct, log_probs, lengths)
    # The surer, the lower.
    order = np.argsort(np.asarray(log_probs) / np.asarray(lengths))
    assert np.all(np.diff(np.asarray(advantages)[order]) < 0)
    assert float(advantages.sum()) == pytest.approx(0, abs=1e-16)


@pytest.mark.parametrize(("weight", "ddof", "eps"), [(0.25, 1, 1e-4), (2.0, 0, 0.1)])
def test_advantages_are_normalised_in_mixed_groups_and_only_centred_without(
    x64, weight, ddof, eps
):
    correct, log_probs, lengths = groups(1)
    got = ox.losses.lens_advantages(
        correct,
        log_probs,
        lengths,
        negative_weight=weight,
        ddof=ddof,
        eps=eps,
        scale_by_group=False,
        normalize_difficulty=True,
    )
    rewards = printed(correct, log_probs, lengths, scale=False, normalize=True)
    centred = rewards - rewards.mean(1, keepdims=True)
    want = centred / (rewards.std(1, ddof=ddof, keepdims=True) + eps)
    want[0] = weight * centred[0]
    np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-15)
    np.testing.assert_array_equal(got[1], jnp.zeros(5))


def test_the_reward_is_the_policy_gradient_of_the_papers_likelihood(x64):
    # Theorem 1: for E over the policy of r log pi + (1 - r) log(1 - pi/D).
    logits, difficulty = jnp.array([0.3, -0.2, 1.0, 0.1]), 2.5
    right = jnp.array([1.0, 0.0, 0.0, 1.0])
    pi = jax.nn.softmax(logits)
    chances = jax.lax.stop_gradient(pi)

    def likelihood(logits):
        p = jax.nn.softmax(logits)
        each = right * jnp.log(p) + (1 - right) * jnp.log1p(-p / difficulty)
        return chances @ each

    value = right - (1 - right) * pi / (difficulty - pi)

    def surrogate(logits):
        return chances @ (value * jax.nn.log_softmax(logits))

    np.testing.assert_allclose(
        jax.grad(surrogate)(logits), jax.grad(likelihood)(logits), atol=1e-16
    )


def test_the_penalty_is_the_derivative_of_the_papers_weight(x64):
    def weight(z):
        return -jnp.log1p(-z) / z - 1

    z = 0.3
    slope = jax.grad(lambda z: z * weight(z))(z)
    assert float(slope) == pytest.approx(0.428571, abs=5e-7)
    # In a group of one with D = c / z: all wrong has z = 1/2, a penalty of 1.
    one = jnp.ones(1)
    alone = ox.losses.lens_rewards(0 * one, -one, one)
    assert float(-alone[0]) == pytest.approx(0.5 / (1 - 0.5))


def test_long_answers_do_not_overflow():
    correct = jnp.array([[True, False, False], [False, False, False]])
    log_probs = jnp.array([[-1e4, -2e4, -500.0], [-1e4, -2.0, -3e4]])
    lengths = jnp.full((2, 3), 10000)
    rewards = ox.losses.lens_rewards(correct, log_probs, lengths)
    assert jnp.all(jnp.isfinite(rewards))
    advantages = ox.losses.lens_advantages(correct, log_probs, lengths)
    assert jnp.all(jnp.isfinite(advantages))


def test_an_answer_without_tokens_counts_as_one_token_long(x64):
    log_probs = jnp.log(jnp.array([0.5, 0.25]))
    none, one = [
        ox.losses.lens_rewards(jnp.zeros(2), log_probs, jnp.array(lengths))
        for lengths in ([0, 1], [1, 1])
    ]
    np.testing.assert_array_equal(none, one)


def test_correctness_and_lengths_may_be_of_any_kind():
    correct, log_probs, lengths = groups(2, jnp.float32)
    plain = ox.losses.lens_advantages(correct, log_probs, lengths)
    for right in (correct.astype(bool), correct.astype(jnp.float32)):
        for long in (lengths, lengths.astype(jnp.float32)):
            got = ox.losses.lens_advantages(right, log_probs, long)
            np.testing.assert_array_equal(got, plain)
            assert got.dtype == jnp.float32


def test_no_gradient_flows():
    correct, log_probs, lengths = groups(3, jnp.float32)
    for fn in (ox.losses.lens_rewards, ox.losses.lens_advantages):
        grads = jax.grad(lambda *x, fn=fn: (fn(*x) ** 2).sum(), argnums=(0, 1, 2))(
            correct.astype(jnp.float32), log_probs, lengths.astype(jnp.float32)
        )
        for grad in grads:
            np.testing.assert_array_equal(grad, jnp.zeros_like(grad))


def test_bad_arguments_are_named():
    x = jnp.zeros((2, 3))
    with pytest.raises(AssertionError, match="correct, old_log_probs, lengths"):
        ox.losses.lens_rewards(x, x, jnp.ones(3))
    with pytest.raises(AssertionError, match="old_log_probs must be floating point"):
        ox.losses.lens_rewards(x, jnp.zeros((2, 3), jnp.int32), x)
    with pytest.raises(AssertionError, match="axis of answers"):
        ox.losses.lens_rewards(jnp.array(0), jnp.array(-1.0), jnp.array(1))
    with pytest.raises(ValueError, match="negative_weight must lie in"):
        ox.losses.lens_advantages(x, x, x, negative_weight=-math.inf)

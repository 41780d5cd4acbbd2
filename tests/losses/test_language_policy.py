"""GRPO and ReMax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ext as ox

COUNTS = (5, 3, 1, 0)


def answers(seed=0, dtype=float):
    """Log-probabilities now, before and of a reference, advantages, and a mask."""
    rng = np.random.default_rng(seed)
    old = rng.normal(-1.5, 0.7, (4, 5))
    arrays = (old + rng.normal(0, 0.3, (4, 5)), old, old + rng.normal(0, 0.2, (4, 5)))
    arrays = (*arrays, rng.normal(size=4))
    where = jnp.arange(5)[None] < jnp.array(COUNTS)[:, None]
    return (*(jnp.asarray(x, dtype) for x in arrays), where)


def printed_grpo(now, old, ref, advantages, where, low, high, beta, level):
    """Losses of tokens as the formulas have them, in NumPy."""
    log_ratio, m = np.asarray(now - old), np.asarray(where, float)
    if level == "sequence":
        mean = (log_ratio * m).sum(1) / np.maximum(m.sum(1), 1)
        log_ratio = np.repeat(mean[:, None], 5, 1)
    r, a = np.exp(log_ratio), np.asarray(advantages)[:, None]
    d = np.asarray(ref - now)
    surrogate = np.maximum(-a * r, -a * np.clip(r, 1 - low, 1 + high))
    return (surrogate + beta * (np.exp(d) - d - 1)) * m


@pytest.mark.parametrize("aggregate", ["sequence", "token", "constant"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("low", "high", "beta"), [(0.2, None, 0.0), (0.1, 0.3, 0.7)])
def test_grpo_is_the_printed_formula(x64, aggregate, level, low, high, beta):
    now, old, ref, advantages, where = answers()
    got = ox.losses.grpo_loss(
        now,
        old,
        advantages,
        where=where,
        ref_log_probs=ref,
        clip_range=low,
        clip_range_high=high,
        beta=beta,
        level=level,
        aggregate=aggregate,
        max_length=7,
    )
    tokens = printed_grpo(
        now, old, ref, advantages, where, low, high or low, beta, level
    ).sum(1)
    n = np.array(COUNTS)
    want = {
        "sequence": tokens / np.maximum(n, 1),
        "token": 4 * tokens / n.sum(),
        "constant": tokens / 7,
    }[aggregate]
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-15)
    assert got[3] == 0


def test_on_policy_gradient_is_the_advantage_over_tokens_and_answers(x64):
    now, _, _, advantages, where = answers(1)
    grad = jax.grad(
        lambda x: ox.losses.grpo_loss(x, now, advantages, where=where).mean()
    )(now)
    n = np.maximum(COUNTS, 1)[:, None]
    want = np.where(where, -np.asarray(advantages)[:, None] / (4 * n), 0)
    np.testing.assert_allclose(grad, want, rtol=1e-14)


def test_a_reference_equal_to_the_policy_adds_no_loss_and_no_gradient(x64):
    now, old, _, advantages, where = answers(2)
    plain = functools.partial(ox.losses.grpo_loss, where=where)
    with_penalty = functools.partial(plain, ref_log_probs=now, beta=0.5)
    np.testing.assert_array_equal(
        with_penalty(now, old, advantages), plain(now, old, advantages)
    )
    grads = [
        jax.grad(lambda x, fn=fn: fn(x, old, advantages).sum())(now)
        for fn in (plain, with_penalty)
    ]
    np.testing.assert_allclose(*grads, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("aggregate", ["sequence", "token", "constant"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_padding_changes_nothing_whatever_it_holds(aggregate, level):
    now, old, ref, advantages, where = answers(3, jnp.float32)
    options = {"beta": 0.1, "level": level, "aggregate": aggregate, "max_length": 8}

    def total(now, old, ref, where):
        losses = ox.losses.grpo_loss(
            now, old, advantages, where=where, ref_log_probs=ref, **options
        )
        return losses.sum()

    # A ratio of e^1e4 overflows, and may not leave a trace under the mask.
    pads = [jnp.full((4, 5), x, jnp.float32) for x in (5e3, -5e3, 5e3, 0)]
    longer = [
        jnp.concatenate([x, pad.astype(x.dtype)], axis=1)
        for x, pad in zip((now, old, ref, where), pads, strict=True)
    ]
    value, grad = jax.value_and_grad(total)(now, old, ref, where)
    padded_value, padded_grad = jax.value_and_grad(total)(*longer)
    np.testing.assert_allclose(padded_value, value, rtol=1e-6)
    np.testing.assert_allclose(padded_grad[:, :5], grad, rtol=1e-6, atol=1e-8)
    np.testing.assert_array_equal(padded_grad[:, 5:], jnp.zeros((4, 5)))


def test_one_token_makes_token_and_sequence_level_agree(x64):
    now, old, ref, advantages, _ = (x[:, :1] if x.ndim == 2 else x for x in answers(4))
    losses = [
        ox.losses.grpo_loss(
            now, old, advantages, ref_log_probs=ref, beta=0.1, level=level
        )
        for level in ("token", "sequence")
    ]
    np.testing.assert_allclose(*losses, rtol=1e-14)


def test_the_sequence_ratio_has_a_gradient_on_all_its_tokens(x64):
    now, _, _, advantages, _ = answers(5)
    grad = jax.grad(
        lambda x: ox.losses.grpo_loss(x, now, advantages, level="sequence").sum()
    )(now)
    want = jnp.broadcast_to(-advantages[:, None] / 5, (4, 5))
    np.testing.assert_allclose(grad, want, rtol=1e-14)


@pytest.mark.parametrize("aggregate", ["token", "constant"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_micro_batches_of_different_token_counts_add_up_exactly(x64, aggregate, level):
    now, old, ref, advantages, where = answers(6)
    options = {"beta": 0.1, "level": level, "aggregate": aggregate, "max_length": 9}

    def parts(now, i, **more):
        return ox.losses.grpo_loss(
            now[i],
            old[i],
            advantages[i],
            where=where[i],
            ref_log_probs=ref[i],
            **options,
            **more,
        )

    def accumulated(now):
        batches = [
            parts(now, i, return_parts=True)
            for i in (slice(0, 1), slice(1, 3), slice(3, 4))
        ]
        total, count = (sum(x.sum() for x in p) for p in zip(*batches, strict=True))
        return total / count

    whole = jax.value_and_grad(lambda now: parts(now, slice(None)).mean())(now)
    for got, want in zip(jax.value_and_grad(accumulated)(now), whole, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-13, atol=1e-16)


def test_grpo_detaches_all_but_the_log_probabilities_that_learn():
    now, old, ref, advantages, where = answers(7, jnp.float32)

    def total(old, ref, advantages):
        return ox.losses.grpo_loss(
            now, old, advantages, where=where, ref_log_probs=ref, beta=0.3
        ).sum()

    for grad in jax.grad(total, (0, 1, 2))(old, ref, advantages):
        np.testing.assert_array_equal(grad, jnp.zeros_like(grad))


def test_the_penalty_keeps_its_digits_near_the_reference():
    # exp(d) - d - 1 is d^2 / 2 = 5e-9, which float32 loses beside 1.
    now, zero = jnp.full((1, 1), -1.0), jnp.zeros(1)
    loss = ox.losses.grpo_loss(now, now, zero, ref_log_probs=now + 1e-4, beta=1.0)
    d = float((now + 1e-4 - now)[0, 0])
    assert float(loss[0]) == pytest.approx(np.expm1(d) - d, rel=2e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "word"}, "level must be one of"),
        ({"aggregate": "mean"}, "aggregate must be one of"),
        ({"aggregate": "constant"}, "needs max_length"),
        ({"max_length": 0}, "max_length must lie in"),
        ({"beta": -0.1}, "beta must lie in"),
        ({"beta": 0.1}, "beta is not 0, so pass ref_log_probs"),
        ({"clip_range": 0.0}, "clip_range must lie in"),
        ({"clip_range_high": 0.0}, "clip_range_high must lie in"),
    ],
)
def test_bad_hyperparameters_of_grpo_are_named(options, message):
    x = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match=message):
        ox.losses.grpo_loss(x, x, jnp.zeros(2), **options)


def test_bad_shapes_of_grpo_are_named():
    x = jnp.zeros((2, 3))
    with pytest.raises(AssertionError, match="advantages must have one value"):
        ox.losses.grpo_loss(x, x, jnp.zeros(3))
    with pytest.raises(AssertionError, match="old_log_probs"):
        ox.losses.grpo_loss(x, x[:, :2], jnp.zeros(2))
    with pytest.raises(AssertionError, match="where"):
        ox.losses.grpo_loss(x, x, jnp.zeros(2), where=jnp.ones(2, bool))


def printed_remax(rewards, greedy, where, now, ref, kl, gamma, clip):
    advantages = np.zeros(where.shape)
    for i, row in enumerate(np.asarray(where)):
        n = row.sum()
        for j in range(n):
            reward = np.clip(rewards[i] - greedy[i], -clip, clip) * gamma ** (n - j)
            advantages[i, j] = reward - kl * (now[i, j] - ref[i, j])
    return advantages


@pytest.mark.parametrize(
    ("kl", "gamma", "clip"), [(0.0, 1.0, 5.0), (0.05, 0.9, 0.5), (0.2, 0.5, 1.0)]
)
def test_remax_advantages_are_the_printed_formula(x64, kl, gamma, clip):
    now, _, ref, rewards, where = answers(8)
    greedy = jnp.asarray(np.random.default_rng(9).normal(size=4))
    got = ox.losses.remax_advantages(
        rewards, greedy, where, now, ref, kl_coef=kl, gamma=gamma, reward_clip=clip
    )
    want = printed_remax(rewards, greedy, where, now, ref, kl, gamma, clip)
    np.testing.assert_allclose(got, want, rtol=1e-13, atol=1e-16)
    loss = ox.losses.remax_loss(
        now,
        rewards,
        greedy,
        where=where,
        ref_log_probs=ref,
        kl_coef=kl,
        gamma=gamma,
        reward_clip=clip,
    )
    np.testing.assert_allclose(loss, -want * np.asarray(now), rtol=1e-13, atol=1e-16)


def test_the_penalty_of_remax_uses_the_old_policy_if_it_is_given(x64):
    now, old, ref, rewards, where = answers(10)
    given = {"where": where, "ref_log_probs": ref, "kl_coef": 0.3}
    loss = ox.losses.remax_loss(now, rewards, rewards, old_log_probs=old, **given)
    want = np.where(where, 0.3 * (old - ref) * now, 0)
    np.testing.assert_allclose(loss, want, rtol=1e-13)


def test_the_reward_of_the_greedy_answer_gives_no_gradient():
    now, _, _, rewards, where = answers(11, jnp.float32)
    grad = jax.grad(
        lambda x: ox.losses.remax_loss(x, rewards, rewards, where=where).sum()
    )(now)
    np.testing.assert_array_equal(grad, jnp.zeros_like(now))


def test_remax_is_unbiased_on_a_bandit_and_its_baseline_cuts_the_variance(x64):
    logits = jnp.log(jnp.array([0.6, 0.3, 0.1]))
    pi, rewards = jnp.exp(logits), jnp.array([1.0, 0.2, 2.0])

    def estimates(greedy):
        """The gradient for each arm, [arm, logit]."""

        def loss(logits, arm):
            log_prob = jax.nn.log_softmax(logits)[arm][None, None]
            reward = rewards[arm][None]
            return ox.losses.remax_loss(log_prob, reward, jnp.full(1, greedy)).sum()

        return jnp.stack([-jax.grad(loss)(logits, arm) for arm in range(3)])

    exact = jax.grad(lambda x: jax.nn.softmax(x) @ rewards)(logits)
    variances = {}
    for greedy in (0.0, 1.0):  # no baseline; the reward of the likeliest arm
        each = estimates(greedy)
        np.testing.assert_allclose(pi @ each, exact, atol=1e-15)
        variances[greedy] = float(pi @ (each**2).sum(1) - (exact**2).sum())
    assert variances[0.0] == pytest.approx(0.611064, abs=5e-7)
    assert variances[1.0] == pytest.approx(0.231864, abs=5e-7)


def test_parts_of_remax_add_up_to_the_official_mean_over_tokens(x64):
    now, _, _, rewards, where = answers(12)
    zeros = jnp.zeros(4)
    whole = ox.losses.remax_loss(now, rewards, zeros, where=where)
    parts = [
        ox.losses.remax_loss(
            now[i], rewards[i], zeros[i], where=where[i], return_parts=True
        )
        for i in (slice(0, 1), slice(1, 4))
    ]
    total, count = (sum(x.sum() for x in p) for p in zip(*parts, strict=True))
    assert total / count == pytest.approx(float(whole.sum()) / 9, rel=1e-14)


def test_no_gradient_flows_into_rewards_or_references_of_remax():
    now, old, ref, rewards, where = answers(13, jnp.float32)

    def total(rewards, greedy, old, ref):
        given = {"old_log_probs": old, "ref_log_probs": ref, "kl_coef": 0.2}
        return ox.losses.remax_loss(now, rewards, greedy, where=where, **given).sum()

    for grad in jax.grad(total, (0, 1, 2, 3))(rewards, rewards + 1, old, ref):
        np.testing.assert_array_equal(grad, jnp.zeros_like(grad))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_coef": 0.1}, "kl_coef is not 0, so pass ref_log_probs"),
        ({"kl_coef": -0.1}, "kl_coef must lie in"),
        ({"gamma": 0.0}, "gamma must lie in"),
        ({"gamma": 1.1}, "gamma must lie in"),
        ({"reward_clip": 0.0}, "reward_clip must lie in"),
    ],
)
def test_bad_hyperparameters_of_remax_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ox.losses.remax_loss(jnp.zeros((2, 3)), jnp.zeros(2), jnp.zeros(2), **options)


def test_bad_shapes_of_remax_are_named():
    with pytest.raises(AssertionError, match="greedy_rewards must have one value"):
        ox.losses.remax_loss(jnp.zeros((2, 3)), jnp.zeros(2), jnp.zeros(3))
    with pytest.raises(AssertionError, match="ref_log_probs, where"):
        ox.losses.remax_advantages(
            jnp.zeros(2),
            jnp.zeros(2),
            jnp.ones((2, 3), bool),
            jnp.zeros((2, 3)),
            jnp.zeros((2, 2)),
            kl_coef=0.1,
        )

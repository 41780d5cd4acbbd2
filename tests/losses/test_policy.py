"""PPO's clipped surrogate and group-relative advantages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ext as ox

INF = float("inf")


def surrogate(log_ratio, advantages, low, high):
    """The printed formula, in NumPy."""
    r, a = np.exp(np.asarray(log_ratio)), np.asarray(advantages)
    return np.maximum(-a * r, -a * np.clip(r, 1 - low, 1 + high))


def random_ratios(seed, shape=(7, 5)):
    """Log-ratios well to both sides of every bound used here, and advantages."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(0, 0.5, shape)), jnp.asarray(rng.normal(0, 2, shape))


def central_differences(fn, x, h=1e-6):
    """The gradient of scalar `fn`, one element at a time."""
    grad = np.zeros(x.shape)
    for i in np.ndindex(*x.shape):
        e = np.zeros(x.shape)
        e[i] = h
        grad[i] = (float(fn(x + e)) - float(fn(x - e))) / (2 * h)
    return grad


@pytest.mark.parametrize(
    ("low", "high"), [(0.2, None), (0.2, 0.28), (0.05, 0.6), (0.9, 0.01), (0.3, INF)]
)
def test_surrogate_is_the_pessimistic_maximum(x64, low, high):
    log_ratio, advantages = random_ratios(0)
    got = ox.losses.clipped_surrogate_loss(
        log_ratio, advantages, clip_range=low, clip_range_high=high
    )
    want = surrogate(log_ratio, advantages, low, low if high is None else high)
    np.testing.assert_allclose(got, want, rtol=1e-14)


@pytest.mark.parametrize(("low", "high"), [(0.2, None), (0.1, 0.4), (0.3, INF)])
def test_surrogate_gradient_agrees_with_finite_differences(x64, low, high):
    log_ratio, advantages = random_ratios(1)

    def total(x):
        return ox.losses.clipped_surrogate_loss(
            x, advantages, clip_range=low, clip_range_high=high
        ).sum()

    # Truncation is h^2/6 of the value, rounding 1e-16/h of the sum.
    np.testing.assert_allclose(
        jax.grad(total)(log_ratio),
        central_differences(total, log_ratio),
        rtol=1e-8,
        atol=1e-7,
    )


def test_on_policy_loss_is_minus_the_advantage_and_so_is_its_gradient(x64):
    advantages = jnp.array([1.5, -0.5, 2.0, 0.25])
    log_ratio = jnp.zeros(4)
    loss, grad = jax.value_and_grad(
        lambda x: ox.losses.clipped_surrogate_loss(x, advantages).mean()
    )(log_ratio)
    assert loss == -advantages.mean()
    np.testing.assert_array_equal(grad, -advantages / 4)


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "gradient"),
    [
        (2.0, 1.5, -2.4, 0.0),
        (-2.0, 1.5, 3.0, 3.0),
        (2.0, 0.5, -1.0, -1.0),
        (-2.0, 0.5, 1.6, 0.0),
    ],
)
def test_only_what_the_clip_lets_pass_has_a_gradient(
    x64, advantage, ratio, loss, gradient
):
    got, grad = jax.value_and_grad(ox.losses.clipped_surrogate_loss)(
        jnp.log(ratio), advantage
    )
    assert got == pytest.approx(loss, rel=1e-15)
    assert grad == pytest.approx(gradient, rel=1e-15, abs=0)


def test_wide_open_clip_is_the_importance_weighted_loss(x64):
    log_ratio, advantages = random_ratios(2)
    got = ox.losses.clipped_surrogate_loss(
        log_ratio, advantages, clip_range=0.999999, clip_range_high=INF
    )
    np.testing.assert_allclose(got, -advantages * jnp.exp(log_ratio), rtol=1e-15)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_clip_of_a_few_float32_ulps_is_decided_in_log_space(sign):
    # 2.05e-6 and the bound 2e-6 round to the same float32 ratio, 1 + 17 ulps.
    log_ratio = sign * jnp.array([1.95e-6, 2.05e-6])
    grad = jax.grad(
        lambda x: ox.losses.clipped_surrogate_loss(
            x, jnp.full(2, sign), clip_range=2e-6
        ).sum()
    )(log_ratio)
    assert grad[0] != 0
    assert grad[1] == 0


@pytest.mark.parametrize("high", [None, INF])
@pytest.mark.parametrize("log_ratio", [1e4, -1e4, INF, -INF])
def test_zero_advantage_gives_zero_whatever_the_ratio(log_ratio, high):
    value, grad = jax.value_and_grad(ox.losses.clipped_surrogate_loss)(
        jnp.float32(log_ratio), 0.0, clip_range_high=high
    )
    assert value == 0
    assert grad == 0


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "loss"),
    [(1e4, 2.0, -2.4), (-1e4, -2.0, 1.6), (-1e4, 2.0, 0.0)],
)
def test_extreme_ratios_that_the_clip_bounds_are_harmless(log_ratio, advantage, loss):
    value, grad = jax.value_and_grad(ox.losses.clipped_surrogate_loss)(
        jnp.float32(log_ratio), advantage
    )
    assert value == pytest.approx(loss, rel=1e-6)
    assert grad == 0


def test_nan_log_ratios_are_not_hidden_by_the_clip():
    loss = ox.losses.clipped_surrogate_loss(jnp.array([jnp.nan]), jnp.array([1.0]))
    assert jnp.isnan(loss[0])


def test_no_gradient_flows_into_advantages_or_old_log_probs():
    x, advantages = jnp.array([0.1, -0.3]), jnp.array([1.0, -2.0])

    def total(old, advantages):
        return ox.losses.ppo_clip_loss(x, old, advantages).sum()

    for grad in jax.grad(total, (0, 1))(x - 0.1, advantages):
        np.testing.assert_array_equal(grad, jnp.zeros(2))


def test_ppo_is_the_surrogate_of_the_log_probability_difference():
    log_ratio, advantages = (x.astype(jnp.float32) for x in random_ratios(3))
    old = jnp.full_like(log_ratio, -1.0)
    np.testing.assert_array_equal(
        ox.losses.ppo_clip_loss(
            old + log_ratio, old, advantages, clip_range=0.1, clip_range_high=0.3
        ),
        ox.losses.clipped_surrogate_loss(
            (old + log_ratio) - old, advantages, clip_range=0.1, clip_range_high=0.3
        ),
    )


def test_advantage_of_a_sample_broadcasts_over_its_tokens():
    log_ratio, advantages = (x.astype(jnp.float32) for x in random_ratios(4))
    per_sample = advantages[:, :1]
    np.testing.assert_array_equal(
        ox.losses.clipped_surrogate_loss(log_ratio, per_sample),
        ox.losses.clipped_surrogate_loss(
            log_ratio, jnp.broadcast_to(per_sample, log_ratio.shape)
        ),
    )


def test_surrogate_is_the_same_under_jit_and_vmap():
    log_ratio, advantages = (x.astype(jnp.float32) for x in random_ratios(5))
    fn = ox.losses.clipped_surrogate_loss
    plain = fn(log_ratio, advantages)
    np.testing.assert_allclose(jax.jit(fn)(log_ratio, advantages), plain, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(fn)(log_ratio, advantages), plain, rtol=1e-6)


def test_clip_range_may_be_traced():
    log_ratio, advantages = (x.astype(jnp.float32) for x in random_ratios(6))
    ranges = jnp.array([0.1, 0.3])

    def loss(clip_range):
        return ox.losses.clipped_surrogate_loss(
            log_ratio, advantages, clip_range=clip_range
        )

    for got, clip_range in zip(jax.vmap(loss)(ranges), (0.1, 0.3), strict=True):
        np.testing.assert_allclose(got, loss(clip_range), rtol=1e-6)


def test_bfloat16_is_computed_in_float32():
    log_ratio, advantages = (x.astype(jnp.bfloat16) for x in random_ratios(7))
    got = ox.losses.clipped_surrogate_loss(log_ratio, advantages)
    want = ox.losses.clipped_surrogate_loss(
        log_ratio.astype(jnp.float32), advantages.astype(jnp.float32)
    )
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, want)


def test_python_numbers_do_not_widen_float32_arrays(x64):
    x = jnp.zeros(2, jnp.float32)
    assert ox.losses.clipped_surrogate_loss(x, 1.0).dtype == jnp.float32
    wide = ox.losses.clipped_surrogate_loss(x, jnp.ones(2, jnp.float64))
    assert wide.dtype == jnp.float64


@pytest.mark.parametrize(
    "hyperparams",
    [
        {"clip_range": 0.0},
        {"clip_range": 1.0},
        {"clip_range": -0.2},
        {"clip_range_high": 0.0},
        {"clip_range_high": -0.1},
    ],
)
def test_bad_clip_ranges_are_named(hyperparams):
    (name,) = hyperparams
    x = jnp.zeros(2)
    with pytest.raises(ValueError, match=rf"{name} must lie in"):
        ox.losses.clipped_surrogate_loss(x, x, **hyperparams)
    with pytest.raises(ValueError, match=rf"{name} must lie in"):
        ox.losses.ppo_clip_loss(x, x, x, **hyperparams)


@pytest.mark.parametrize(
    ("log_probs", "old_log_probs", "advantages", "named"),
    [
        ((3,), (4,), (3,), "old_log_probs"),
        ((3, 4), (3, 4), (3,), "advantages"),
        ((3, 4), (3, 4), (4, 1), "advantages"),
    ],
)
def test_shapes_that_do_not_fit_are_named(log_probs, old_log_probs, advantages, named):
    with pytest.raises(AssertionError, match=named):
        ox.losses.ppo_clip_loss(
            jnp.zeros(log_probs), jnp.zeros(old_log_probs), jnp.zeros(advantages)
        )


@pytest.mark.parametrize("named", ["log_probs", "old_log_probs", "advantages"])
def test_integers_are_refused_by_name(named):
    arguments = dict.fromkeys(("log_probs", "old_log_probs", "advantages"), jnp.ones(2))
    arguments[named] = jnp.ones(2, jnp.int32)
    with pytest.raises(AssertionError, match=rf"\[{named} must be floating point"):
        ox.losses.ppo_clip_loss(**arguments)


def reference_advantages(rewards, axis=-1, scale="group", ddof=1, eps=1e-4):
    """The rule in NumPy."""
    centred = rewards - rewards.mean(axis, keepdims=True)
    if scale == "none":
        return centred
    over = axis if scale == "group" else None
    return centred / (rewards.std(over, ddof=ddof, keepdims=True) + eps)


@pytest.mark.parametrize("axis", [-1, 0, 1])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize(("ddof", "eps"), [(1, 1e-4), (0, 1e-4), (1, 0.1), (2, 1e-6)])
def test_advantages_are_standardised_rewards(x64, axis, scale, ddof, eps):
    rewards = np.random.default_rng(8).normal(3.0, 2.0, (4, 5, 6))
    got = ox.losses.group_relative_advantages(
        jnp.asarray(rewards), axis=axis, scale=scale, ddof=ddof, eps=eps
    )
    want = reference_advantages(rewards, axis, scale, ddof, eps)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)


def test_advantages_have_mean_zero_and_forget_the_scale_of_rewards(x64):
    rewards = jnp.asarray(np.random.default_rng(9).normal(size=(3, 8)))
    advantages = ox.losses.group_relative_advantages(rewards)
    np.testing.assert_allclose(advantages.mean(-1), jnp.zeros(3), atol=1e-15)
    scaled = ox.losses.group_relative_advantages(7 * rewards + 2)
    # std/(std + eps) moves by at most eps/std of itself.
    tolerance = 1e-4 / float(rewards.std(-1, ddof=1).min())
    np.testing.assert_allclose(scaled, advantages, rtol=tolerance)


@pytest.mark.parametrize(("ddof", "std"), [(1, np.sqrt(0.5)), (0, 0.5)])
def test_two_rewards_have_the_advantages_worked_out_by_hand(x64, ddof, std):
    got = ox.losses.group_relative_advantages(jnp.array([0.0, 1.0]), ddof=ddof)
    np.testing.assert_allclose(got, np.array([-0.5, 0.5]) / (std + 1e-4), rtol=1e-15)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_have_advantage_exactly_zero(scale):
    # In float32 the mean of 24 times 21.7 is not 21.7, and 1/eps would make it 0.04.
    rewards = jnp.full((2, 24), 21.7).at[1].set(0.1)
    got = ox.losses.group_relative_advantages(rewards, scale=scale)
    np.testing.assert_array_equal(got, jnp.zeros((2, 24)))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 1)])
def test_group_of_one_has_advantage_zero(scale, shape):
    got = ox.losses.group_relative_advantages(jnp.full(shape, 2.5), scale=scale)
    np.testing.assert_array_equal(got, jnp.zeros(shape))


def test_batch_scale_counts_all_rewards_not_those_of_a_group(x64):
    rewards = np.random.default_rng(11).normal(size=(4, 2))
    got = ox.losses.group_relative_advantages(
        jnp.asarray(rewards), scale="batch", ddof=2
    )
    want = reference_advantages(rewards, scale="batch", ddof=2)
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_advantages_are_detached_float32_and_the_same_under_jit_and_vmap():
    rewards = jnp.asarray(np.random.default_rng(10).normal(size=(3, 8)), jnp.float32)
    fn = ox.losses.group_relative_advantages
    plain = fn(rewards)
    np.testing.assert_allclose(jax.jit(fn)(rewards), plain, rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(fn)(rewards), plain, rtol=1e-5)
    assert fn(rewards.astype(jnp.bfloat16)).dtype == jnp.float32
    grad = jax.grad(lambda r: (fn(r) ** 2).sum())(rewards)
    np.testing.assert_array_equal(grad, jnp.zeros_like(rewards))


@pytest.mark.parametrize(
    ("hyperparams", "message"),
    [
        ({"scale": "prompt"}, "scale must be one of 'group', 'batch', 'none'"),
        ({"ddof": -1}, "ddof must lie in"),
        ({"eps": 0.0}, "eps must lie in"),
    ],
)
def test_bad_hyperparameters_of_advantages_are_named(hyperparams, message):
    with pytest.raises(ValueError, match=message):
        ox.losses.group_relative_advantages(jnp.zeros((2, 3)), **hyperparams)


def test_bad_rewards_are_named():
    with pytest.raises(AssertionError, match="rewards"):
        ox.losses.group_relative_advantages(jnp.zeros((2, 3), jnp.int32))
    with pytest.raises(AssertionError, match="axis"):
        ox.losses.group_relative_advantages(jnp.zeros((2, 3)), axis=2)

"""Lagrange multipliers as weights of rewards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox

THETA = [0.4, -0.2, 0.1]


def mean_rewards(seed=0, steps=12):
    return jnp.asarray(np.random.default_rng(seed).normal(0, 0.7, (steps, 3)))


def run(weighting, rewards):
    """Weights of every step, and the state after the last."""

    def step(state, reward):
        weights, state = weighting.update(reward, state)
        return state, weights

    state, weights = jax.jit(
        lambda rewards: jax.lax.scan(step, weighting.init(), rewards)
    )(rewards)
    return np.asarray(weights), state


@pytest.mark.parametrize("mode", ["inequality", "equality"])
@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize(
    ("rate", "momentum", "max_norm", "init"), [(0.1, 0.1, 0.5, 0.01), (0.9, 0.6, 9, -1)]
)
def test_weights_follow_the_printed_rule(
    x64, mode, bounded, rate, momentum, max_norm, init
):
    rewards = mean_rewards()
    options = {"learning_rate": rate, "momentum": momentum, "max_norm": max_norm}
    weighting = ox.lagrangian_reward_weights(
        THETA, mode=mode, bounded=bounded, init=init, **options
    )
    got, state = run(weighting, rewards)
    u, v = np.full(3, float(init)), np.zeros(3)
    for weights, reward in zip(got, np.asarray(rewards), strict=True):
        mu, slope = u, np.ones(3)
        if bounded and mode == "inequality":
            mu = 1 / (1 + np.exp(-u))
            slope = mu * (1 - mu)
        elif bounded:
            mu, slope = np.tanh(u), 1 / np.cosh(u) ** 2
        first = 3 - mu.sum() if bounded else 1
        np.testing.assert_allclose(weights, [first, *mu], rtol=1e-12, atol=1e-15)
        g = slope * (reward - THETA)
        v = momentum * v + g * min(1, max_norm / np.linalg.norm(g))
        u = u - rate * v
        if mode == "inequality" and not bounded:
            u = np.maximum(u, 0)
    np.testing.assert_allclose(state.multipliers, u, rtol=1e-12, atol=1e-15)


def test_the_step_is_that_of_optax_sgd_on_clipped_gradients(x64):
    rewards = mean_rewards(1)
    _, state = run(ox.lagrangian_reward_weights(THETA), rewards)
    tx = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1, momentum=0.1))
    u = jnp.full(3, 0.01)
    opt_state = tx.init(u)
    for reward in rewards:
        grad = jax.grad(lambda u, r=reward: jax.nn.sigmoid(u) @ (r - jnp.array(THETA)))(
            u
        )
        updates, opt_state = tx.update(grad, opt_state)
        u = jnp.asarray(optax.apply_updates(u, updates))
    np.testing.assert_allclose(state.multipliers, u, rtol=1e-12)


def test_violated_constraints_gain_weight_and_satisfied_ones_lose_it():
    weighting = ox.lagrangian_reward_weights([0.5, 0.5])
    weights, _ = run(weighting, jnp.tile(jnp.array([0.0, 1.0]), (20, 1)))
    assert np.all(np.diff(weights[:, 1]) > 0) and np.all(np.diff(weights[:, 2]) < 0)


@functools.cache
def quadratic(theta, mode):
    """Ascent on x of -x^2/2 under x >= theta (or =), with the multiplier beside it."""
    with jax.enable_x64(True):
        weighting = ox.lagrangian_reward_weights([theta], mode=mode)

        def step(carry, _):
            x, state = carry
            weights, state = weighting.update(x[None], state)
            # The gradients of -x^2/2 and of x, mixed as advantages are.
            ascent = ox.constrained_advantage(-x, jnp.ones(1), weights)
            return (x + 0.05 * ascent, state), None

        start = jnp.zeros(()), weighting.init()
        (x, state), _ = jax.lax.scan(step, start, length=20000)
        return float(x), float(weighting.update(x[None], state)[0][1])


@pytest.mark.parametrize("mode", ["inequality", "equality"])
def test_the_multiplier_of_a_quadratic_converges_to_its_closed_form(mode):
    x, mu = quadratic(0.5, mode)
    assert x == pytest.approx(0.5, abs=1e-12)
    assert mu == pytest.approx(1 / 3, abs=1e-12)


def test_a_constraint_that_does_not_bind_loses_its_weight():
    _, mu = quadratic(-1.0, "inequality")
    assert mu == pytest.approx(4.5e-4, abs=5e-5)


@pytest.mark.parametrize(("mode", "low"), [("inequality", 0.0), ("equality", -1.0)])
def test_bounded_multipliers_stay_inside(x64, mode, low):
    weights, _ = run(
        ox.lagrangian_reward_weights(THETA, mode=mode, learning_rate=1.0),
        100 * mean_rewards(2),
    )
    assert np.all((weights[:, 1:] > low) & (weights[:, 1:] < 1))
    np.testing.assert_allclose(weights.sum(1), 3, rtol=1e-14)


def test_without_a_learning_rate_weights_are_fixed():
    weighting = ox.lagrangian_reward_weights(THETA, learning_rate=0.0)
    weights, _ = run(weighting, mean_rewards(3).astype(jnp.float32))
    np.testing.assert_array_equal(weights, np.tile(weights[:1], (12, 1)))


def test_met_constraints_only_let_the_momentum_decay(x64):
    weighting = ox.lagrangian_reward_weights(THETA, momentum=0.5)
    _, state = run(weighting, mean_rewards(4))
    _, after = weighting.update(jnp.array(THETA), state)
    np.testing.assert_allclose(after.momentum, 0.5 * state.momentum, rtol=1e-15)


def test_no_gradient_flows_and_the_state_keeps_its_dtype():
    weighting = ox.lagrangian_reward_weights(THETA)
    state = weighting.init()

    def total(rewards):
        weights, after = weighting.update(rewards, state, step=1)
        return weights.sum() + after.multipliers.sum(), after

    for dtype in (jnp.float32, jnp.bfloat16):
        grad, after = jax.grad(total, has_aux=True)(jnp.ones(3, dtype))
        np.testing.assert_array_equal(grad, jnp.zeros(3, dtype))
        assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
        assert {x.dtype for x in after} == {jnp.dtype("float32")}


def test_advantages_are_mixed_by_the_weights(x64):
    rng = np.random.default_rng(5)
    kl, rewards, w = (
        rng.normal(size=(2, 4)),
        rng.normal(size=(2, 4, 3)),
        rng.normal(size=4),
    )
    got = ox.constrained_advantage(
        jnp.asarray(kl), jnp.asarray(rewards), jnp.asarray(w)
    )
    np.testing.assert_allclose(got, w[0] * kl + rewards @ w[1:], rtol=1e-12, atol=1e-15)


def test_mixed_advantages_are_detached():
    arguments = jnp.ones(4), jnp.ones((4, 2)), jnp.ones(3)
    grads = jax.grad(lambda *x: ox.constrained_advantage(*x).sum(), (0, 1, 2))(
        *arguments
    )
    for grad in grads:
        np.testing.assert_array_equal(grad, jnp.zeros_like(grad))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "less"}, "mode must be one of"),
        ({"learning_rate": -0.1}, "learning_rate must lie in"),
        ({"momentum": 1.0}, "momentum must lie in"),
        ({"max_norm": 0.0}, "max_norm must lie in"),
    ],
)
def test_bad_hyperparameters_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ox.lagrangian_reward_weights(THETA, **options)


def test_bad_shapes_are_named():
    with pytest.raises(AssertionError, match="thresholds"):
        ox.lagrangian_reward_weights(jnp.zeros((2, 2)))
    weighting = ox.lagrangian_reward_weights(THETA)
    with pytest.raises(AssertionError, match="mean_rewards"):
        weighting.update(jnp.zeros(2), weighting.init())
    with pytest.raises(AssertionError, match="reward_advantages"):
        ox.constrained_advantage(jnp.zeros(2), jnp.zeros((2, 2)), jnp.zeros(4))
    with pytest.raises(AssertionError, match="weights"):
        ox.constrained_advantage(jnp.zeros(2), jnp.zeros((2, 2)), jnp.zeros((1, 3)))

"""Policy gradients of set functions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ext as ox


def steps(seed=0, dtype=float):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(4, 6)), dtype) for _ in range(3))


@pytest.mark.parametrize("gamma", [1.0, 0.7, 0.0])
def test_reward_to_go_is_the_discounted_sum_of_what_follows(x64, gamma):
    _, gains, _ = steps()
    got = ox.losses.reward_to_go(gains, gamma=gamma)
    g = np.asarray(gains)
    want = [sum(gamma ** (j - i) * g[:, j] for j in range(i, 6)) for i in range(6)]
    np.testing.assert_allclose(got, np.stack(want, 1), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("gamma", [1.0, 0.8])
@pytest.mark.parametrize("with_baseline", [True, False])
def test_the_loss_weighs_log_probabilities_with_what_is_to_come(
    x64, gamma, with_baseline
):
    log_probs, gains, baseline = steps(1)
    given = baseline if with_baseline else None
    where = jnp.arange(6)[None] < jnp.array([6, 4, 1, 0])[:, None]
    got = ox.losses.submodular_policy_loss(
        log_probs, gains, where=where, gamma=gamma, baseline=given
    )
    m = np.asarray(where, float)
    returns = np.asarray(ox.losses.reward_to_go(gains * m, gamma=gamma))
    advantages = returns - np.asarray(baseline) * with_baseline
    want = -(m * advantages * np.asarray(log_probs)).sum(1)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-15)
    assert got[3] == 0


def test_gains_of_a_trajectory_add_up_to_what_it_is_worth(x64):
    values = jnp.cumsum(jnp.abs(steps(2)[0]), axis=-1)
    first = ox.losses.reward_to_go(jnp.diff(values, axis=-1))[:, 0]
    np.testing.assert_allclose(first, values[:, -1] - values[:, 0], rtol=1e-13)


def coverage_problem():
    """All trajectories of three steps over three states, and their set values."""
    areas = np.array([1.0, 0.7, 2.0])

    def value(visited):
        return np.sqrt(sum(areas[s] for s in set(visited)))

    paths = np.array(list(itertools.product(range(3), repeat=4)))
    paths = paths[paths[:, 0] == 0]
    values = [[value(path[: t + 1]) for t in range(4)] for path in paths]
    return paths, np.array(values)


def log_probs_of(logits, paths):
    """Of a policy that knows the time and the state: logits [time, state, next]."""
    chosen = logits[jnp.arange(3), paths[:, :-1]]
    return ox.losses.token_log_probs(chosen, jnp.asarray(paths[:, 1:]))


@pytest.mark.parametrize("with_baseline", [True, False])
def test_the_estimator_is_unbiased_for_any_baseline_of_the_history(x64, with_baseline):
    paths, values = coverage_problem()
    rng = np.random.default_rng(3)
    logits = jnp.asarray(rng.normal(size=(3, 3, 3)))
    table = jnp.asarray(rng.normal(size=(3, 3, 3, 3)))  # by time and what was visited
    at = [[np.where(np.arange(3) <= t, p[:3], 0) for t in range(3)] for p in paths]
    x, y, z = np.moveaxis(np.array(at), -1, 0)
    baseline = table[jnp.arange(3)[None], x, y, z]
    gains = jnp.diff(jnp.asarray(values), axis=-1)
    given = baseline if with_baseline else None

    def objective(logits):
        chances = jnp.exp(log_probs_of(logits, paths).sum(1))
        return chances @ jnp.asarray(values[:, -1] - values[:, 0])

    chances = jnp.exp(log_probs_of(logits, paths).sum(1))

    def loss(logits):
        losses = ox.losses.submodular_policy_loss(
            log_probs_of(logits, paths), gains, baseline=given
        )
        return chances @ losses

    np.testing.assert_allclose(
        -jax.grad(loss)(logits), jax.grad(objective)(logits), atol=1e-15
    )


def test_masked_steps_add_no_gain_and_no_term():
    log_probs, gains, baseline = steps(4, jnp.float32)
    where = jnp.array([[True, False, True, True, False, False]] * 4)
    kept = jnp.array([0, 2, 3])
    got = ox.losses.submodular_policy_loss(
        log_probs, gains, baseline=baseline, where=where
    )
    want = ox.losses.submodular_policy_loss(
        log_probs[:, kept], gains[:, kept], baseline=baseline[:, kept]
    )
    np.testing.assert_allclose(got, want, rtol=1e-5)
    losses, count = ox.losses.submodular_policy_loss(
        log_probs, gains, baseline=baseline, where=where, return_parts=True
    )
    np.testing.assert_array_equal(losses, got)
    np.testing.assert_array_equal(count, jnp.full(4, 3.0))


def test_no_gradient_flows_into_gains_or_baseline_of_the_loss():
    log_probs, gains, baseline = steps(5, jnp.float32)
    grads = jax.grad(
        lambda g, b: ox.losses.submodular_policy_loss(log_probs, g, baseline=b).sum(),
        argnums=(0, 1),
    )(gains, baseline)
    for grad in grads:
        np.testing.assert_array_equal(grad, jnp.zeros_like(grad))


def test_bad_arguments_are_named():
    x = jnp.zeros((2, 3))
    for fn in (ox.losses.reward_to_go, ox.losses.submodular_policy_loss):
        arrays = (x,) * (1 + (fn is ox.losses.submodular_policy_loss))
        for gamma in (-0.1, 1.1):
            with pytest.raises(ValueError, match="gamma must lie in"):
                fn(*arrays, gamma=gamma)
    with pytest.raises(AssertionError, match="axis of time"):
        ox.losses.reward_to_go(jnp.array(1.0))
    with pytest.raises(AssertionError, match="log_probs, gains, baseline"):
        ox.losses.submodular_policy_loss(x, x, baseline=x[0])
    with pytest.raises(AssertionError, match="where"):
        ox.losses.submodular_policy_loss(x, x, where=jnp.ones(3, bool))

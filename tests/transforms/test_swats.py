"""SWATS."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def run(tx, x, gradients, jit=jax.jit):
    """Updates and states of all steps."""
    tx = ox.full_precision(tx)  # optax's own are not strict
    state, update, updates, states = tx.init(x), jit(tx.update), [], []
    for g in gradients:
        u, state = update(g, state, x)
        updates.append(u)
        states.append(state)
    return updates, states


def switch_step(states):
    """The number of the first step after which the rate is set; None without one."""
    rates = [float(s.rate) for s in states]
    return next((k for k, rate in enumerate(rates, 1) if rate > 0), None)


@pytest.mark.usefixtures("x64")
def test_a_constant_gradient_switches_at_the_second_step_at_its_own_rate():
    g = normal(7, dtype="float64")
    _, states = run(ox.swats(1e-3), jnp.zeros(7), [g] * 3)
    assert switch_step(states) == 2
    # eps changes the rate by eps / |g|.
    expected = 1e-3 * 7 / jnp.sum(jnp.abs(g))
    np.testing.assert_allclose(states[1].rate, expected, rtol=1e-6)


def test_a_relative_tolerance_switches_a_constant_gradient_in_float32_at_once():
    for seed in range(3):
        _, states = run(
            ox.swats(rel_tol=1e-4), jnp.zeros(7), [normal(7, seed=seed)] * 3
        )
        assert switch_step(states) == 2


def test_the_sgd_step_at_the_implied_rate_projects_on_the_adam_step():
    g, h = normal(7), normal(7, seed=1)
    tx = ox.swats(0.1, b2=0.9, switch_tol=0.0)
    (_, u), (first, second) = run(tx, jnp.zeros(7), [g, h])
    gamma = (second.average - 0.9 * first.average) / 0.1
    np.testing.assert_allclose(gamma, -jnp.sum(u * u) / jnp.sum(u * h), rtol=1e-5)
    projected = u * (jnp.sum(-gamma * h * u) / jnp.sum(u * u))
    np.testing.assert_allclose(projected, u, rtol=1e-5)


@pytest.mark.parametrize("scope", ["global", "per_leaf"])
def test_before_the_switch_it_is_adam_bit_for_bit(scope):
    x = {"a": jnp.zeros((4, 3)), "b": jnp.zeros(3)}
    gs = [{"a": normal(4, 3, seed=t), "b": normal(3, seed=t)} for t in range(4)]
    options = {"b1": 0.8, "b2": 0.95, "eps": 1e-3}
    # Two programs may round differently: no jit.
    ours, theirs = (
        run(tx, x, gs, jit=lambda f: f)[0]
        for tx in (
            ox.swats(0.05, **options, switch_tol=0.0, scope=scope),
            optax.adam(0.05, **options),
        )
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_the_switching_step_is_adam_and_sgd_starts_with_an_empty_buffer():
    g, b1 = normal(5), 0.8
    tx = ox.swats(0.01, b1=b1, rel_tol=1e-3)
    updates, states = run(tx, jnp.zeros(5), [g] * 5)
    adam, _ = run(optax.adam(0.01, b1=b1), jnp.zeros(5), [g] * 2)
    assert switch_step(states) == 2
    np.testing.assert_allclose(updates[1], adam[1], rtol=1e-6)
    assert not states[1].adam.mu.any()
    v = 0.0
    for k in (2, 3, 4):
        v = b1 * v + g
        expected = -(1 - b1) * states[1].rate * v
        np.testing.assert_allclose(updates[k], expected, rtol=1e-6)
        np.testing.assert_allclose(states[k].adam.mu, v, rtol=1e-6)
        assert states[k].rate == states[1].rate


def test_after_the_switch_sgd_follows_the_shape_of_the_schedule():
    g = normal(5)
    schedule = optax.piecewise_constant_schedule(0.01, {3: 0.5})
    with jax.numpy_dtype_promotion("standard"):
        updates, states = run(ox.swats(schedule, rel_tol=1e-3), g, [g] * 4)
        constant, _ = run(ox.swats(0.01, rel_tol=1e-3), g, [g] * 4)
    assert switch_step(states) == 2
    np.testing.assert_allclose(updates[2], constant[2], rtol=1e-6)
    np.testing.assert_allclose(updates[3], 0.5 * constant[3], rtol=1e-6)


@pytest.mark.parametrize("dead", [0.0, 1e-30])
def test_steps_without_an_implied_rate_change_no_average(dead):
    g = normal(5)
    zero = jnp.full(5, dead)
    _, states = run(ox.swats(0.01, switch_tol=0.0), g, [zero, zero, g, zero, g])
    weights = [float(s.weight) for s in states]
    assert weights[:2] == [0.0, 0.0]
    assert weights[2] == pytest.approx(1e-3)
    if dead == 0.0:  # <u, g> = 0 although the momentum is alive
        assert weights[3] == weights[2]


def test_the_average_is_over_its_own_weight():
    g = normal(5)
    _, states = run(ox.swats(0.01, switch_tol=0.0), g, [jnp.zeros(5)] * 4 + [g] * 2)
    implied = states[4].average / states[4].weight
    u, h = run(optax.adam(0.01), g, [jnp.zeros(5)] * 4 + [g])[0][-1], g
    np.testing.assert_allclose(implied, -jnp.sum(u * u) / jnp.sum(u * h), rtol=1e-5)


def test_a_negative_rate_never_switches():
    # Adam's momentum outlives a reversal of the gradient: <u, g> > 0.
    gs = [jnp.ones(3), jnp.full(3, -0.1), jnp.full(3, -0.1)]
    _, states = run(ox.swats(0.01, switch_tol=1e9), jnp.zeros(3), gs[:1])
    assert float(states[0].rate) == 0.0  # never at the first step
    _, states = run(ox.swats(0.01, b2=0.1, switch_tol=1e9), jnp.zeros(3), gs)
    assert float(states[1].average) < 0
    assert float(states[1].rate) == 0.0


@pytest.mark.parametrize(("tolerance", "switches"), [(0.9, False), (1.1, True)])
@pytest.mark.parametrize("name", ["switch_tol", "rel_tol"])
def test_the_tolerance_is_the_bound_on_the_distance(name, tolerance, switches):
    gs = [normal(5), normal(5) + 0.2 * normal(5, seed=1)]
    _, states = run(ox.swats(0.01, b2=0.9, switch_tol=0.0), gs[0], gs)
    average = [float(s.average) for s in states]
    gamma = (average[1] - 0.9 * average[0]) / 0.1
    distance = abs(average[1] / float(states[1].weight) - gamma)
    bound = distance if name == "switch_tol" else distance / abs(gamma)
    options = {"switch_tol": 0.0, name: tolerance * bound}
    _, states = run(ox.swats(0.01, b2=0.9, **options), gs[0], gs)
    assert (switch_step(states) == 2) is switches


def test_one_leaf_switches_alone_with_per_leaf_and_the_tree_at_once_without():
    x = {"steady": jnp.zeros(3), "noisy": jnp.zeros(3), "hole": None}
    gs = [
        {"steady": normal(3), "noisy": normal(3, seed=t), "hole": None}
        for t in range(1, 5)
    ]
    _, states = run(ox.swats(0.01, rel_tol=1e-4, scope="per_leaf"), x, gs)
    assert float(states[1].rate["steady"]) > 0
    assert float(states[-1].rate["noisy"]) == 0
    assert not states[1].adam.mu["steady"].any()
    assert states[1].adam.mu["noisy"].any()
    _, states = run(ox.swats(0.01, rel_tol=1e-4), x, gs)
    assert jnp.shape(states[-1].rate) == ()
    assert float(states[-1].rate) == 0


def test_per_leaf_is_the_global_method_on_each_leaf():
    x = {"a": jnp.zeros((2, 2)), "b": jnp.zeros(3)}
    gs = [{"a": normal(2, 2), "b": normal(3, seed=t // 2)} for t in range(6)]
    options = {"rel_tol": 1e-3, "b2": 0.5}
    ours, _ = run(ox.swats(0.01, **options, scope="per_leaf"), x, gs)
    for name in x:
        alone, _ = run(ox.swats(0.01, **options), x[name], [g[name] for g in gs])
        np.testing.assert_allclose([u[name] for u in ours], alone, rtol=1e-5)


@pytest.mark.parametrize("scope", ["global", "per_leaf"])
def test_buckets_change_nothing(scope):
    x = {name: jnp.zeros((2, 2)) for name in "ab"}
    gs = [{"a": normal(2, 2), "b": normal(2, 2, seed=t)} for t in range(4)]
    tx = ox.swats(0.01, rel_tol=1e-3, scope=scope)
    plain, stacked = run(tx, x, gs)[0], run(ox.bucketed(tx), x, gs)[0]
    for a, b in zip(plain, stacked, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5), a, b)


def test_arguments_outside_their_range_are_named():
    for options in ({"switch_tol": -1.0}, {"rel_tol": -1.0}, {"b1": 1.0}):
        with pytest.raises(ValueError, match=f"swats: {next(iter(options))} must lie"):
            ox.swats(**options)
    with pytest.raises(ValueError, match="swats: learning_rate must lie"):
        ox.swats(-1.0)
    with pytest.raises(ValueError, match="scope must be one of 'global', 'per_leaf'"):
        ox.swats(scope="leaf")

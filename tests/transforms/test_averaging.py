"""`kalman_average_params` and `kalman_params`."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox
from tests.test_goldens import HERE, NAMES, Golden


def observe(tx, points):
    """The state after the parameters went through some points."""
    x = points[0]
    state = tx.init(x)
    update = jax.jit(tx.update)
    for point in points[1:]:
        updates, state = update(point - x, state, x)
        np.testing.assert_array_equal(updates, point - x)
        x = point
    return state


@pytest.mark.usefixtures("x64")
def test_averages_and_gains_are_the_goldens():
    golden = Golden.load(HERE / "wrappers_schedules/kalman_average_params.npz")
    tx, params = eval(golden.meta["call"], dict(NAMES)), golden.tree("p0")
    state, grads = tx.init(params), golden.tree("g")
    for t in range(24):
        now = jax.tree.map(lambda g, t=t: g[t], grads)
        updates, state = tx.update(now, state, params)
        params = optax.apply_updates(params, updates)
        for name, want in golden.flat("out/filtered").items():
            got = ox.kalman_params(state)[name]
            golden.check(f"step {t}, {name}", got, want[t])
        golden.check(f"gain {t}", state[-1].gain, golden.arrays["out/gain"][t])


@pytest.mark.parametrize(("q", "r"), [(1e-4, 1e-2), (0.3, 0.2)])
def test_the_gain_goes_to_its_limit_from_any_variance(q, r):
    prior = (q + np.sqrt(q**2 + 4 * q * r)) / 2
    want = prior / (prior + r)
    if (q, r) == (1e-4, 1e-2):
        np.testing.assert_allclose(want, 0.0951249, rtol=1e-6)
    for start in (0.0, 1.0, 100.0):
        tx = ox.kalman_average_params(q, r, start)
        np.testing.assert_allclose(
            observe(tx, jnp.zeros((300, 1))).gain, want, rtol=1e-5
        )


def test_without_process_noise_it_is_the_running_mean():
    points = jnp.asarray(np.random.default_rng(0).normal(size=(30, 4)), jnp.float32)
    state = observe(ox.kalman_average_params(0.0, 1.0, 1e6), points)
    # The first point weighs 1e-6; 30 roundings.
    want = np.mean(points[1:], axis=0)
    np.testing.assert_allclose(ox.kalman_params(state), want, rtol=0, atol=5e-6)
    np.testing.assert_allclose(state.gain, 1 / 29, rtol=1e-5)


def test_only_the_ratios_of_the_variances_count():
    points = jnp.asarray(np.random.default_rng(0).normal(size=(9, 4)), jnp.float32)
    a = observe(ox.kalman_average_params(0.1, 0.5, 2.0), points)
    b = observe(ox.kalman_average_params(0.4, 2.0, 8.0), points)
    np.testing.assert_array_equal(a.average, b.average)


def test_the_average_of_noisy_descent_is_nearer_to_the_solution():
    rng = np.random.default_rng(0)
    a, solution = jnp.asarray(rng.normal(size=(200, 5))), jnp.arange(5.0)
    rows = jnp.asarray(rng.integers(200, size=(600,)))
    b = a @ solution + jnp.asarray(rng.normal(size=200))
    best = jnp.linalg.lstsq(a, b)[0]
    tx = optax.chain(optax.sgd(0.05), ox.kalman_average_params())

    def step(carry, row):
        x, state = carry
        g = (a[row] @ x - b[row]) * a[row]
        updates, state = tx.update(g, state, x)
        x = optax.apply_updates(x, updates)
        return (x, state), (x, ox.kalman_params(state))

    x = jnp.zeros(5)
    _, (xs, means) = jax.lax.scan(step, (x, tx.init(x)), rows)

    def error(ys):
        return jnp.mean(jnp.sum((ys[300:] - best[None]) ** 2, 1))

    assert error(means) < 0.8 * error(xs)


def test_the_average_of_bfloat16_parameters_is_float32_and_hidden_leaves_are_missing():
    x = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(1)}
    tx = optax.masked(ox.kalman_average_params(), {"a": True, "b": False})
    updates = jax.tree.map(lambda p: jnp.full_like(p, 2.0**-10), x)
    out, state = tx.update(updates, tx.init(x), x)
    average = ox.kalman_params(state)
    assert average["a"].dtype == jnp.float32
    np.testing.assert_allclose(average["a"], 1 + 0.99 * 2.0**-10, rtol=1e-6)
    assert isinstance(average["b"], optax.MaskedNode)
    assert out is not None and out["b"] is updates["b"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"process_noise": -1.0}, r"process_noise must lie in \[0.0"),
        ({"observation_noise": 0.0}, r"observation_noise must lie in \(0.0"),
        ({"initial_variance": -1.0}, r"initial_variance must lie in \[0.0"),
    ],
)
def test_wrong_arguments_are_named(changed, message):
    with pytest.raises(ValueError, match=f"kalman_average_params: {message}"):
        ox.kalman_average_params(**changed)


def test_missing_parameters_and_states_are_named():
    tx = ox.kalman_average_params()
    with pytest.raises(ValueError, match="kalman_average_params needs the parameters"):
        tx.update(jnp.ones(1), tx.init(jnp.ones(1)))
    with pytest.raises(ValueError, match=r"kalman_params needs .* got 0"):
        ox.kalman_params(optax.sgd(0.1).init(jnp.ones(1)))

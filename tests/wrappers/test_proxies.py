"""`proxy_prox` and `adaptive_eta`."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox
from tests.test_goldens import HERE, NAMES, Golden, gradient_source

X = jnp.array([0.5, -1.0, 2.0])


def spd(seed):
    m = np.random.default_rng(seed).normal(size=(3, 3))
    return m @ m.T / 3 + np.eye(3) / 2


def once(tx, g, x=X, **extra):
    return tx.update(g, tx.init(x), x, **extra)[0]


# proxy_prox ---------------------------------------------------------------------------


@pytest.mark.parametrize("prox_step", [0.3, 2.0])
def test_without_a_proxy_one_step_is_sgd_with_the_prox_step(prox_step):
    tx = ox.proxy_prox(optax.sgd(prox_step), prox_step, inner_steps=1)
    g = jnp.array([1.0, -2.0, 3.0])
    out = once(tx, g, proxy_value_fn=lambda x: jnp.sum(0 * x))
    np.testing.assert_array_equal(out, -jnp.float32(prox_step) * g)


@pytest.mark.usefixtures("x64")
def test_with_the_loss_as_its_own_proxy_it_is_the_proximal_step():
    a, eta, x = spd(0), 0.7, X.astype(float)
    tx = ox.proxy_prox(optax.sgd(0.25), eta, inner_steps=200)
    out = once(tx, a @ x, x, proxy_value_fn=lambda x: x @ a @ x / 2)
    want = np.linalg.solve(np.eye(3) + eta * a, x)
    np.testing.assert_allclose(x + out, want, rtol=0, atol=1e-15)


@pytest.mark.usefixtures("x64")
def test_two_quadratics_meet_at_the_solution_of_a_linear_system():
    a, h, eta, x = spd(0), spd(1), 0.7, X.astype(float)
    tx = ox.proxy_prox(optax.sgd(0.25), eta, inner_steps=200)
    out = once(tx, a @ x, x, proxy_value_fn=lambda x: x @ h @ x / 2)
    m = np.eye(3) / eta + h
    np.testing.assert_allclose(x + out, np.linalg.solve(m, (m - a) @ x), atol=2e-15)


def test_inner_is_fresh_at_every_outer_step():
    tx = ox.proxy_prox(optax.sgd(0.1, momentum=0.9), 1.0, inner_steps=3)
    state = tx.init(X)
    outs = []
    for _ in range(2):
        out, state = tx.update(X, state, X, proxy_value_fn=lambda x: jnp.sum(x**4))
        outs.append(out)
    np.testing.assert_array_equal(*outs)
    assert state == optax.EmptyState()


def test_inner_gets_its_own_gradient_as_grad_and_its_own_parameters():
    def seen(g, state, params, *, grad, **others):
        return -0.5 * grad + 0 * params, state

    inner = optax.GradientTransformationExtraArgs(lambda p: (), seen)
    h = {"proxy_value_fn": lambda x: jnp.sum(x**4) / 9, "grad": jnp.zeros(3)}
    out = once(ox.proxy_prox(inner, 1.0, 4), X, **h)
    want = once(ox.proxy_prox(optax.sgd(0.5), 1.0, 4), X, **h)
    np.testing.assert_allclose(out, want, rtol=1e-6)


def test_inner_steps_below_the_spacing_of_bfloat16_add_up():
    x = jnp.ones(2, jnp.bfloat16)
    tx = ox.proxy_prox(optax.sgd(2.0**-10), 1e6, inner_steps=16)
    out = once(tx, -x, x, proxy_value_fn=lambda x: jnp.sum(x))
    np.testing.assert_allclose(out.astype(float), [2.0**-6] * 2, rtol=2.0**-8)
    assert out.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prox_step": 0.0}, r"prox_step must lie in \(0.0"),
        ({"inner_steps": 0}, "inner_steps must be an integer"),
    ],
)
def test_wrong_arguments_of_proxy_prox_are_named(changed, message):
    with pytest.raises(ValueError, match=f"proxy_prox: {message}"):
        ox.proxy_prox(optax.sgd(0.1), **changed)


def test_proxy_prox_names_what_is_missing():
    tx = ox.proxy_prox(optax.sgd(0.1))
    with pytest.raises(ValueError, match="proxy_prox needs the extra argument 'proxy_"):
        once(tx, X)
    with pytest.raises(ValueError, match="proxy_prox needs the parameters"):
        tx.update(X, tx.init(X), proxy_value_fn=jnp.sum)


# adaptive_eta -------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
def test_the_step_sizes_are_the_goldens():
    golden = Golden.load(HERE / "wrappers_schedules/adaptive_eta.npz")
    tx, params = eval(golden.meta["call"], dict(NAMES)), golden.tree("p0")
    gradient, state = gradient_source(golden, NAMES), tx.init(params)
    for t in range(8):
        grads, extra = gradient(params, state, {})
        updates, state = tx.update(grads, state, params, **extra)
        params = optax.apply_updates(params, updates)
        golden.check(f"eta at {t}", state.eta, golden.arrays["out/eta"][t])


def test_a_rate_of_0_is_gradient_descent():
    tx = ox.adaptive_eta(optax.identity(), 0.3, 0.0)
    out = once(tx, X, aux_value_fn=lambda x: jnp.sum(x**3))
    np.testing.assert_array_equal(out, -jnp.float32(0.3) * X)


def test_eta_moves_by_the_slope_of_the_score_along_the_direction_of_inner():
    tx = ox.adaptive_eta(optax.scale(2.0), init_eta=0.5, eta_lr=0.01)
    state = tx.init(X)

    def score(x):
        return -jnp.sum(x**4)

    out, state = tx.update(X, state, X, aux_value_fn=score)
    # d = 2 x, so x - eta d = 0: no slope. Then from another point.
    assert state.eta == 0.5
    g = jnp.array([1.0, 0.0, 0.0])
    out, state = tx.update(g, state, X, aux_value_fn=score)
    # x_1 - eta 2 = -0.5: slope -4 (-0.5)^3 (-2) = -1.
    np.testing.assert_allclose(state.eta, 0.49, rtol=1e-6)
    np.testing.assert_allclose(out, -0.98 * g, rtol=1e-6)


def test_eta_stops_at_0_and_can_recover():
    tx = ox.adaptive_eta(optax.identity(), init_eta=0.1, eta_lr=1.0)
    state, g = tx.init(X), jnp.ones(3)
    out, state = tx.update(g, state, X, aux_value_fn=jnp.sum)  # downhill is worse
    np.testing.assert_array_equal(out, jnp.zeros(3))
    assert state.eta == 0
    out, state = tx.update(g, state, X, aux_value_fn=lambda x: -jnp.sum(x))
    np.testing.assert_array_equal(out, -3 * jnp.ones(3))


@pytest.mark.parametrize("slope", [np.nan, np.inf])
def test_a_score_without_a_finite_slope_leaves_eta(slope):
    tx = ox.adaptive_eta(optax.identity(), init_eta=0.1, eta_lr=1.0)
    out = once(tx, X, aux_value_fn=lambda x: -slope * jnp.sum(x))
    np.testing.assert_array_equal(out, -jnp.float32(0.1) * X)


def test_eta_is_float32_for_bfloat16_parameters_and_shared_by_all_leaves():
    x = {"a": jnp.ones(1, jnp.bfloat16), "b": jnp.ones((2, 2))}
    tx = ox.adaptive_eta(optax.identity(), init_eta=0.1, eta_lr=0.001)

    def score(p):
        return -jnp.sum(p["b"]) * p["a"][0].astype(float)

    out, state = tx.update(x, tx.init(x), x, aux_value_fn=score)
    # s = -4 (1 - eta)^2 has the slope 8 (1 - eta) = 7.2; the point is rounded for a.
    np.testing.assert_allclose(state.eta, 0.1072, rtol=1e-3)
    assert state.eta.dtype == jnp.float32
    assert (out["a"].dtype, out["b"].dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("name", ["init_eta", "eta_lr"])
def test_wrong_arguments_of_adaptive_eta_are_named(name):
    good = {"init_eta": 0.1, "eta_lr": 0.1}
    with pytest.raises(ValueError, match=rf"adaptive_eta: {name} must lie in \[0.0"):
        ox.adaptive_eta(optax.identity(), **{**good, name: -1.0})


def test_adaptive_eta_names_what_is_missing():
    tx = ox.adaptive_eta(optax.identity(), 0.1, 0.1)
    with pytest.raises(ValueError, match="adaptive_eta needs the extra argument 'aux"):
        once(tx, X)
    with pytest.raises(ValueError, match="adaptive_eta needs the parameters"):
        tx.update(X, tx.init(X), aux_value_fn=jnp.sum)

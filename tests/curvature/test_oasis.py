"""OASIS: the measured learning rate, its guards, and what it costs."""

# Trees of arrays, which the types of optax leave open.
# pyright: reportIndexIssue=false

# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox
from tests.curvature.replay import Quartic

GIVEN = ox.external_hessian_diag()
START = {"a": np.array([1.0, -2.0]), "b": np.array([[0.5]])}


def trajectory(tx, f, x, steps, hessian_diag=None):
    """Parameters before each step, and states after it."""

    def step(carry, _):
        x, state = carry
        h = None if hessian_diag is None else hessian_diag(x)
        g = jax.grad(f)(x)
        updates, state = tx.update(g, state, x, value_fn=f, hessian_diag=h)
        new = optax.apply_updates(x, updates)
        return (new, state), (x, state)

    @jax.jit
    def run(x):
        return jax.lax.scan(step, (x, tx.init(x)), length=steps)[1]

    return run(jax.tree.map(jnp.asarray, x))


def cosh(p):
    return sum(jnp.sum(jnp.cosh(x)) for x in p.values())


def cosh_diag(p):
    return jax.tree.map(jnp.cosh, p)


def test_the_learning_rates_are_those_of_the_golden_file(x64):
    golden = Quartic("oasis")
    given = {
        k.removeprefix("x/hessian_diag/"): v
        for k, v in golden.arrays.items()
        if k.startswith("x/hessian_diag/")
    }

    def extra(params, t):
        return {"hessian_diag": {k: v[t] for k, v in given.items()}}

    tx = ox.oasis(b2=0.99, alpha=0.01, eta0=0.001, estimator=GIVEN)
    got = [state.eta for state in golden.states(tx, 30, extra)]
    np.testing.assert_allclose(got, golden.arrays["out/eta"], rtol=1e-9)


def test_exact_curvature_halves_the_error_of_a_quadratic(x64):
    d = jnp.geomspace(1.0, 1000.0, 6)
    start = jnp.arange(1.0, 7.0)
    tx = ox.oasis(estimator=GIVEN)
    xs, states = trajectory(tx, lambda x: x @ (d * x) / 2, start, 10, lambda x: d)
    # Differences of numbers that halve ten times.
    np.testing.assert_allclose(states.eta[1:], 0.5, rtol=1e-12)
    np.testing.assert_allclose(xs[2:] / xs[1:-1], 0.5, rtol=1e-12)


def test_the_rate_grows_no_faster_than_its_bound(x64):
    tx = ox.oasis(estimator=GIVEN, eta0=0.1)
    _, states = trajectory(tx, cosh, START, 30, cosh_diag)
    eta, theta = np.asarray(states.eta), np.asarray(states.theta)
    assert np.isinf(theta[0]) and np.isfinite(theta[1:]).all()
    np.testing.assert_allclose(theta[1:], eta[1:] / eta[:-1], rtol=1e-14)
    assert (eta[2:] <= np.sqrt(1 + theta[1:-1]) * eta[1:-1] * (1 + 1e-14)).all()


def test_a_multiple_of_the_loss_takes_the_same_steps(x64):
    tx = ox.oasis(estimator=GIVEN)
    once, _ = trajectory(tx, cosh, START, 15, cosh_diag)
    seven, _ = trajectory(
        tx,
        lambda p: 7 * cosh(p),
        START,
        15,
        lambda p: jax.tree.map(lambda h: 7 * h, cosh_diag(p)),
    )
    for name in once:
        np.testing.assert_allclose(seven[name], once[name], rtol=1e-9, atol=1e-12)


def reference(steps, b2, alpha, eta0, decay):
    """The rule in NumPy on one vector, signed curvature sin(x)."""
    x = np.array([1.0, -2.0, 0.5])
    eta, theta, path = eta0, np.inf, []
    d = old_x = old_g = np.zeros(3)
    for k in range(steps):
        path.append(x)
        g, h = np.sinh(x) + decay * x, 3 * np.sin(3 * x)
        d = h if k == 0 else b2 * d + (1 - b2) * h
        floor = np.maximum(np.abs(d), alpha)
        if k:
            top = np.sum(floor * (x - old_x) ** 2)
            local = 0.5 * np.sqrt(top / np.sum((g - old_g) ** 2 / floor))
            new = min(np.sqrt(1 + theta) * eta, local)
            theta, eta = new / eta, new
        old_x, old_g, x = x, g, x - eta * g / floor
    return np.stack(path)


@pytest.mark.parametrize("same_batch", [False, True])
def test_every_argument_enters_as_the_rule_says(x64, same_batch):
    """On one batch the two forms of the previous gradient are one."""
    how = {"b2": 0.7, "alpha": 0.8, "eta0": 0.05}
    tx = ox.oasis(**how, estimator=GIVEN, same_batch=same_batch, weight_decay=0.3)

    def diagonal(p):
        return jax.tree.map(lambda x: 3 * jnp.sin(3 * x), p)

    xs, states = trajectory(tx, cosh, START, 12, diagonal)
    got = np.concatenate([xs["a"], xs["b"][:, 0]], axis=1)
    np.testing.assert_allclose(got, reference(12, decay=0.3, **how), rtol=1e-9)
    assert (states.previous_grads == ()) is same_batch


def test_without_movement_or_turn_the_rate_waits():
    tx = ox.oasis(estimator=GIVEN, eta0=0.25)
    x = jnp.ones(2)
    state, update = tx.init(x), jax.jit(tx.update)

    def step(g, x, state):
        return update(g, state, x, hessian_diag=jnp.ones(2))

    for _ in range(3):  # nothing turns
        out, state = step(jnp.ones(2), x, state)
        np.testing.assert_allclose(out, -0.25)
        assert jnp.isinf(state.theta)
    # It moved by 1 and turned by 1 in each entry: half the ratio, theta = 0.5 / 0.25.
    _, state = step(jnp.zeros(2), x - 1, state)
    assert (state.eta, state.theta) == (0.5, 2.0)
    # Nothing moved: eta grows to its bound, sqrt(1 + 2) times 0.5.
    _, state = step(jnp.ones(2), x - 1, state)
    np.testing.assert_allclose(state.eta, 0.5 * np.sqrt(3), rtol=1e-6)
    np.testing.assert_allclose(state.theta, np.sqrt(3), rtol=1e-6)


def counted(log):
    """A random estimator: has a state, and estimates 1, 2, 3, ..."""

    def update(updates, state, params=None, **extra):
        del updates, extra
        jax.debug.callback(lambda: log.append(1))
        h = (state + 1).astype(jnp.float32)
        return jax.tree.map(lambda p: h * jnp.ones_like(p), params), state + 1

    return optax.GradientTransformationExtraArgs(
        lambda p: jnp.zeros([], jnp.int32), update
    )


@pytest.mark.parametrize("samples", [1, 4])
def test_the_first_step_averages_several_estimates_and_later_ones_take_one(samples):
    log, seen = [], []
    tx = ox.oasis(estimator=counted(log), d0_samples=samples, b2=0.5)
    x = jnp.ones(2)
    state, update = tx.init(x), jax.jit(tx.update)
    first = np.mean(np.arange(samples) + 1)
    for want in (first, (first + samples + 1) / 2):
        _, state = update(x, state, x)
        jax.effects_barrier()
        seen.append(len(log))
        np.testing.assert_allclose(state.hessian, want, rtol=1e-6)
    assert seen == [samples, samples + 1]


def test_the_previous_gradient_costs_one_gradient_after_the_first_step():
    calls = []

    def f(x):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.sum(jnp.cosh(x))

    tx = ox.oasis(estimator=GIVEN, same_batch=True)
    x = jnp.ones(2)
    state, seen = tx.init(x), []
    update = jax.jit(
        lambda s: tx.update(x, s, x, value_fn=f, hessian_diag=jnp.ones(2))[1]
    )
    for _ in range(3):
        state = update(state)
        jax.effects_barrier()
        seen.append(len(calls))
    assert seen == [0, 1, 2]


def test_hutchinson_is_the_default_estimator(x64):
    f = lambda x: jnp.sum(x**4)  # noqa: E731
    x = jnp.array([1.0, 2.0])  # one Rademacher draw is exact here
    got, _ = trajectory(ox.oasis(), f, x, 5)
    want, _ = trajectory(ox.oasis(estimator=GIVEN), f, x, 5, lambda x: 12 * x**2)
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_parameters_that_get_no_gradient_are_not_moved_by_same_batch():
    """The previous gradient is taken at the present value of a hidden leaf."""
    tx = ox.oasis(estimator=GIVEN, same_batch=True)
    params = {"a": jnp.ones(2), "b": jnp.full(2, 5.0)}

    def f(p):
        return jnp.sum(p["a"] ** 2 * p["b"])

    def step(x, state):
        g = {"a": jax.grad(f)(x)["a"], "b": None}
        h = {"a": 2 * x["b"], "b": x["b"]}
        return tx.update(g, state, x, value_fn=f, hessian_diag=h)

    @jax.jit
    def two(x):
        out, state = step(x, tx.init(x))
        return step({**x, "a": x["a"] + out["a"]}, state)

    out, state = two(params)
    assert out["b"] is None
    np.testing.assert_allclose(state.eta, 0.5, rtol=1e-4)  # a quadratic


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"b2": 1.0}, r"oasis: b2 must lie in \[0.0, 1.0\)"),
        ({"alpha": 0.0}, r"oasis: alpha must lie in \(0.0"),
        ({"eta0": -1.0}, r"oasis: eta0 must lie in \(0.0"),
        ({"d0_samples": 0}, "oasis: d0_samples must be an integer"),
        ({"weight_decay": -0.1}, "oasis: weight_decay must lie in"),
    ],
)
def test_arguments_outside_their_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ox.oasis(**arguments)


def test_what_is_missing_is_named():
    x = jnp.ones(2)
    for tx, how, message in (
        (ox.oasis(), {}, "hutchinson_diag needs .* 'value_fn'"),
        (
            ox.oasis(estimator=GIVEN, same_batch=True),
            {"hessian_diag": x},
            "oasis needs .* 'value_fn'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(
                lambda s, tx=tx, how=how: tx.update(x, s, x, **how), tx.init(x)
            )
        with pytest.raises(ValueError, match="oasis needs the parameters"):
            tx.update(x, tx.init(x))

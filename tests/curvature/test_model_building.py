"""SMB: steps that pass are gradient descent, the others come from a model."""

# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox
from tests.curvature.replay import Quartic

RNG = np.random.default_rng(0)


def first_step(tx, f, x, **extra):
    @jax.jit
    def step(x):
        value, grads = jax.value_and_grad(f)(x)
        return tx.update(grads, tx.init(x), x, value=value, value_fn=f, **extra)

    return step(x)


def states_of(tx, f, x, steps):
    def step(carry, _):
        x, state = carry
        value, grads = jax.value_and_grad(f)(x)
        updates, state = tx.update(grads, state, x, value=value, value_fn=f)
        return (jax.tree.map(jnp.add, x, updates), state), state

    @jax.jit
    def run(x):
        return jax.lax.scan(step, (x, tx.init(x)), length=steps)[1]

    return run(x)


def paper(g, y, s, eta):
    """The step of the model as it is printed."""
    norm = np.linalg.norm
    sigma = (norm(s) * (norm(y) + norm(g) / eta) - y @ s) / 2
    theta = (y @ s + 2 * sigma) ** 2 - norm(s) ** 2 * norm(y) ** 2
    c_g = -(norm(s) ** 2) / (2 * sigma)
    c_s = c_g / theta * (-(y @ s + 2 * sigma) * (y @ g) + norm(y) ** 2 * (s @ g))
    c_y = c_g / theta * (-(y @ s + 2 * sigma) * (s @ g) + norm(s) ** 2 * (y @ g))
    return c_s * s + c_g * g + c_y * y


def always_modelled(**arguments):
    """The promised decrease is more than any step makes."""
    return ox.smb(c=1e6, **arguments)


def test_the_golden_files_steps_by_the_model_are_ours(x64):
    golden = Quartic("smb")
    states = list(golden.states(ox.smb(1.0, eta=0.99, c=0.1), 30))
    counts = [0, *(int(state.model_steps) for state in states)]
    np.testing.assert_array_equal(np.diff(counts), golden.arrays["out/model_step"])


@pytest.mark.parametrize("eta", [0.99, 0.5])
def test_model_steps_on_quadratics_go_down_and_are_short_enough(x64, eta):
    """2000 of them, with condition numbers up to 1e4; the rule as it is printed."""
    tx = always_modelled(learning_rate=0.7, eta=eta)

    @jax.jit
    @jax.vmap
    def steps(a, x):
        def f(x):
            return x @ a @ x / 2

        g = a @ x
        return g, tx.update(g, tx.init(x), x, value=f(x), value_fn=f)[0]

    q = np.linalg.qr(RNG.normal(size=(2000, 4, 4)))[0]
    eigenvalues = 10 ** RNG.uniform(-2, 2, size=(2000, 4))
    a = np.einsum("nij,nj,nkj->nik", q, eigenvalues, q)
    x = RNG.normal(size=(2000, 4))
    g, out = map(np.asarray, steps(jnp.asarray(a), jnp.asarray(x)))
    assert (np.sum(g * out, axis=1) < 0).all()
    ratio = np.linalg.norm(out, axis=1) / np.linalg.norm(0.7 * g, axis=1)
    assert ratio.max() <= eta
    for i in range(0, 2000, 50):
        s = -0.7 * g[i]
        np.testing.assert_allclose(out[i], paper(g[i], a[i] @ s, s, eta), rtol=1e-7)


def test_a_step_that_passes_is_gradient_descent_bit_for_bit():
    f = lambda x: jnp.sum(x**2)  # noqa: E731
    x = jnp.array([1.0, -3.0, 0.1])
    out, state = first_step(ox.smb(0.3), f, x)
    np.testing.assert_array_equal(out, -jnp.float32(0.3) * jax.grad(f)(x))
    assert state.model_steps == 0


def test_a_step_that_does_not_decrease_enough_is_modelled():
    f, x = lambda x: jnp.sum(x**2), jnp.array([1.0])
    # x - 0.9 * 2 = -0.8: f falls by 0.36, promised were c * 0.9 * 4.
    for c, models in ((0.09, 0), (0.11, 1)):
        _, state = first_step(ox.smb(0.9, c=c), f, x)
        assert state.model_steps == models


def test_where_the_gradient_does_not_change_the_model_shortens_by_eta():
    out, _ = first_step(
        always_modelled(learning_rate=0.5, eta=0.8), jnp.sum, jnp.ones(3)
    )
    np.testing.assert_allclose(out, -0.8 * 0.5, rtol=1e-6)


def test_each_leaf_has_its_own_model_and_one_without_gradient_stays(x64):
    def f(p):
        return jnp.sum(p["a"] ** 2) + 50 * jnp.sum(p["b"] ** 2) + 0 * jnp.sum(p["c"])

    params = {k: jnp.asarray(RNG.normal(size=3)) for k in "abc"}
    out, _ = first_step(always_modelled(learning_rate=0.5), f, params)
    for name, curvature in (("a", 2.0), ("b", 100.0)):
        g = curvature * np.asarray(params[name])
        want = paper(g, curvature * -0.5 * g, -0.5 * g, 0.99)
        np.testing.assert_allclose(out[name], want, rtol=1e-9)
    np.testing.assert_array_equal(out["c"], 0)


@pytest.mark.parametrize("size", [1e-30, 1e-15, 1e15, 1e30])
def test_the_model_neither_overflows_nor_underflows(size):
    """It is of degree 1 in s, and of degree 0 in g and y together."""
    g, turned = jnp.array([3.0, -1.0]), jnp.array([-1.0, 2.0])
    s = -0.5 * np.asarray(g)
    want = paper(np.asarray(g), np.asarray(turned - g), s, 0.99)

    @jax.jit
    def step(g, turned):
        def value_fn(x):  # its gradient is `turned` wherever the trial is
            return turned @ (x - jax.lax.stop_gradient(x)) + 1

        tx, x = ox.smb(0.5, grad_norm_eps=0.0), jnp.zeros(2)
        return tx.update(g, tx.init(x), x, value=0.0, value_fn=value_fn)[0]

    got = step(g * size, turned * size)
    np.testing.assert_allclose(got / size, want, rtol=1e-5)


def test_short_gradients_are_not_tested():
    f, x = lambda x: jnp.sum(x**2), jnp.array([1.0])
    _, state = first_step(always_modelled(grad_norm_eps=2.1), f, x)
    assert state.model_steps == 0
    _, state = first_step(always_modelled(grad_norm_eps=1.9), f, x)
    assert state.model_steps == 1


@pytest.mark.parametrize(("c", "evaluations"), [(0.0, 1), (1e6, 2)])
def test_it_costs_one_value_and_a_gradient_where_the_test_fails(c, evaluations):
    calls = []

    def f(x):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.sum(x**2)

    tx, x = ox.smb(0.1, c=c), jnp.ones(2)
    step = jax.jit(lambda g, v: tx.update(g, tx.init(x), x, value=v, value_fn=f))
    jax.block_until_ready(step(2 * x, 2.0))
    jax.effects_barrier()
    assert len(calls) == evaluations


def test_the_learning_rate_may_be_a_schedule():
    tx = ox.smb(optax.linear_schedule(0.4, 0.0, 4))
    states = states_of(tx, lambda x: jnp.sum(x**2), jnp.ones(2), 4)
    np.testing.assert_allclose(states.learning_rate, [0.4, 0.3, 0.2, 0.1], rtol=1e-6)


def test_the_automatic_schedule_falls_where_the_model_is_needed():
    how = {"auto_schedule": True, "window": 3, "threshold": 0.5, "factor": 0.5}
    tx = ox.smb(0.5, c=1e6, **how)
    states = states_of(tx, lambda x: jnp.sum(x**2), jnp.ones(2), 7)
    np.testing.assert_allclose(
        states.learning_rate, [0.5] * 2 + [0.25] * 3 + [0.125] * 2
    )
    np.testing.assert_array_equal(states.model_steps, [1, 2, 0, 1, 2, 0, 1])


def test_the_automatic_schedule_grows_elsewhere_up_to_its_bound():
    how = {"auto_schedule": True, "window": 2, "factor": 0.5, "max_learning_rate": 0.3}
    tx = ox.smb(0.1, c=0.0, **how)
    states = states_of(tx, lambda x: jnp.sum(x**2), jnp.ones(2), 6)
    np.testing.assert_allclose(states.learning_rate, [0.1] + [0.2] * 5)
    np.testing.assert_array_equal(states.model_steps, 0)


def test_a_share_of_exactly_the_threshold_grows_the_rate():
    """One step in two fails: at x = 1 with rate 0.5 the first trial is the minimum."""
    how = {"auto_schedule": True, "window": 1, "factor": 0.5, "threshold": 1.0}
    tx = ox.smb(0.5, c=1e6, **how)
    states = states_of(tx, lambda x: jnp.sum(x**2), jnp.ones(1), 1)
    np.testing.assert_allclose(states.learning_rate, [1.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": -1.0}, "learning_rate must lie in"),
        ({"eta": 1.0}, r"eta must lie in \(0.0, 1.0\)"),
        ({"c": -1.0}, "c must lie in"),
        ({"grad_norm_eps": -1.0}, "grad_norm_eps must lie in"),
        ({"window": 0}, "window must be an integer"),
        ({"threshold": 1.5}, "threshold must lie in"),
        ({"factor": 1.0}, r"factor must lie in \(0.0, 1.0\)"),
        ({"max_learning_rate": -1.0}, "max_learning_rate must lie in"),
        (
            {"learning_rate": lambda t: 0.1, "auto_schedule": True},
            "auto_schedule changes a number",
        ),
    ],
)
def test_arguments_outside_their_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=f"smb: {message}"):
        ox.smb(**arguments)


@pytest.mark.parametrize("missing", ["value", "value_fn"])
def test_what_is_missing_is_named(missing):
    x, tx = jnp.ones(2), ox.smb()
    given = {"value": 2.0, "value_fn": jnp.sum}
    given.pop(missing)
    with pytest.raises(ValueError, match=f"smb needs .* '{missing}'"):
        tx.update(x, tx.init(x), x, **given)
    with pytest.raises(ValueError, match="smb needs the parameters"):
        tx.update(x, tx.init(x))

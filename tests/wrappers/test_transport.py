"""`implicit_gradient_transport`, `normalized_igt` and `igt_eval_params`."""

# Arrays and trees, which the types of jax and optax leave open.
# pyright: reportOperatorIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox
from tests.test_goldens import HERE, NAMES, Golden

IGT = ox.implicit_gradient_transport
DIM, SIGMA, ETA = 10, 0.3, 0.1
CURVATURES = np.linspace(0.5, 2.0, DIM)


def gradient(x):
    return jnp.asarray(CURVATURES, x.dtype) * x


def gradients(xs):
    return CURVATURES * np.asarray(xs)


def start(dtype=float):
    return jnp.asarray(np.random.default_rng(0).normal(size=DIM), dtype)


def walk(tx, steps, noise=None):
    """Parameters and states before each step, and the momentum after it."""
    x = start()
    noise = jnp.zeros((steps, DIM)) if noise is None else noise

    def step(carry, n):
        x, state = carry
        updates, after = tx.update(gradient(x) + n, state, x)
        return (optax.apply_updates(x, updates), after), (x, state.base, after.mu)

    return jax.lax.scan(step, (x, tx.init(x)), noise)[1]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["normalized_igt", "normalized_igt_schedule"])
def test_the_iterates_are_those_of_the_golden(name):
    golden = Golden.load(HERE / f"curvature/{name}.npz")
    tx = eval(golden.meta["call"], dict(NAMES))
    params, grads = golden.tree("p0"), golden.tree("g")
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(5):
        now = jax.tree.map(lambda g, t=t: g[t], grads)
        updates, state = update(now, state, params)
        params = optax.apply_updates(params, updates)
        for leaf, want in golden.flat("out/eval").items():
            golden.check(f"step {t}, {leaf}", ox.igt_eval_params(state)[leaf], want[t])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "eta",
    [0.05, 0.7, lambda t: (2 / (t + 2)) ** 0.8, lambda t: 0.5 + 0.4 * jnp.cos(t * 1.0)],
    ids=["0.05", "0.7", "decaying", "swinging"],
)
@pytest.mark.parametrize("inner", [optax.sgd(0.1), optax.adam(0.05)])
def test_on_a_quadratic_the_momentum_is_the_gradient_at_the_iterate(eta, inner):
    _, bases, momenta = walk(IGT(inner, eta), 30)
    # Extrapolation by 1/eta = 20 steps multiplies roundings.
    np.testing.assert_allclose(momenta, gradients(bases), rtol=0, atol=1e-13)


@pytest.mark.usefixtures("x64")
def test_normalized_steps_have_the_length_of_the_learning_rate():
    schedule = optax.linear_schedule(0.3, 0.1, 10)
    noise = jnp.asarray(np.random.default_rng(1).normal(size=(12, DIM)))
    _, bases, _ = walk(ox.normalized_igt(schedule, eta=0.2), 12, noise)
    lengths = np.linalg.norm(np.diff(bases, axis=0), axis=1)
    np.testing.assert_allclose(lengths, [schedule(t) for t in range(11)], rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("inner", [optax.sgd(0.1), ox.lion_k(0.05)])
def test_with_eta_1_it_is_inner_on_plain_gradients(inner):
    noise = jnp.asarray(np.random.default_rng(1).normal(size=(20, DIM)))
    xs, bases, momenta = walk(IGT(inner, eta=1.0), 20, noise)
    np.testing.assert_allclose(xs, bases, rtol=0, atol=1e-14)
    np.testing.assert_allclose(momenta, gradients(xs) + noise, rtol=1e-14)

    def step(carry, n):
        x, state = carry
        updates, state = inner.update(gradient(x) + n, state, x)
        return (optax.apply_updates(x, updates), state), x

    _, want = jax.lax.scan(step, (start(), inner.init(start())), noise)
    np.testing.assert_allclose(xs, want, rtol=0, atol=1e-14)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("learning_rate", [0.02, 0.1, 0.3])
def test_noise_is_averaged_as_by_momentum_whatever_the_step_size(learning_rate):
    steps = 4000
    noise = SIGMA * jnp.asarray(np.random.default_rng(2).normal(size=(steps, DIM)))
    _, bases, momenta = walk(ox.normalized_igt(learning_rate, ETA), steps, noise)
    errors = np.linalg.norm(momenta - gradients(bases), axis=1)[100:]
    rms = np.sqrt(np.mean(errors**2))
    # 4000 steps, correlated over 10 to 20 of them, of 10 coordinates: about 2%.
    np.testing.assert_allclose(rms, SIGMA * np.sqrt(DIM * ETA / (2 - ETA)), rtol=0.05)


def test_a_zero_momentum_does_not_move():
    x = start()
    tx = ox.normalized_igt(0.1)
    updates, state = tx.update(jnp.zeros(DIM), tx.init(x), x)
    np.testing.assert_array_equal(updates, 0)
    np.testing.assert_array_equal(ox.igt_eval_params(state), x)


def test_decay_pulls_the_iterate_by_the_learning_rate():
    x = jnp.array([2.0, -4.0])
    tx = ox.normalized_igt(0.1, eta=1.0, weight_decay=0.5)
    _, state = tx.update(jnp.zeros(2), tx.init(x), x)
    np.testing.assert_allclose(ox.igt_eval_params(state), 0.95 * x, rtol=1e-6)


def test_iterates_of_bfloat16_parameters_are_float32():
    x = jnp.full(3, 100.0, jnp.bfloat16)
    tx = IGT(optax.sgd(0.01), eta=0.5)
    state = tx.init(x)
    for _ in range(10):  # each step is below half a unit in the last place
        updates, state = tx.update(jnp.ones(3, jnp.bfloat16), state, x)
        x = optax.apply_updates(x, updates)
    np.testing.assert_allclose(ox.igt_eval_params(state), 99.9, rtol=1e-6)
    assert ox.igt_eval_params(state, x).dtype == jnp.bfloat16


def test_hidden_leaves_of_the_iterates_come_from_the_parameters():
    x = {"w": jnp.ones(2), "b": jnp.zeros(2)}
    tx = optax.masked(IGT(optax.sgd(0.5), 0.5), {"w": True, "b": False})
    _, state = tx.update(x, tx.init(x), x)
    assert isinstance(ox.igt_eval_params(state)["b"], optax.MaskedNode)
    full = ox.igt_eval_params(state, x)
    np.testing.assert_array_equal(full["w"], [0.5, 0.5])
    np.testing.assert_array_equal(full["b"], x["b"])


def test_a_state_without_iterates_is_refused():
    with pytest.raises(ValueError, match=r"igt_eval_params.*TransportState"):
        ox.igt_eval_params(optax.sgd(0.1).init(start()))


@pytest.mark.parametrize("eta", [0.0, 1.5])
def test_eta_outside_its_range_is_refused(eta):
    with pytest.raises(ValueError, match="implicit_gradient_transport: eta"):
        IGT(optax.sgd(0.1), eta)


def test_missing_parameters_are_named():
    tx = IGT(optax.sgd(0.1), 0.5)
    with pytest.raises(ValueError, match=r"implicit_gradient_transport.*parameters"):
        tx.update(start(), tx.init(start()))

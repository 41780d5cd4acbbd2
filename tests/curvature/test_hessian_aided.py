"""`scale_by_hessian_aided_momentum`."""

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
from tests.test_goldens import HERE, Golden, quartics

HARPG = ox.scale_by_hessian_aided_momentum
DIM, SIGMA, ETA = 10, 0.3, 0.1
CURVATURES = np.linspace(0.5, 2.0, DIM)


def quadratic(x):
    return jnp.sum(jnp.asarray(CURVATURES, x.dtype) * x**2) / 2


def start(dtype=float):
    return jnp.asarray(np.random.default_rng(0).normal(size=DIM), dtype)


def walk(tx, rate, noise, f=quadratic):
    """Points, gradients with noise, and what came out, of all steps."""

    def step(carry, n):
        x, state = carry
        g = jax.grad(f)(x) + n
        d, state = tx.update(g, state, x, value_fn=f)
        return (x - rate * d, state), (x, g, d)

    return jax.lax.scan(step, (start(), tx.init(start())), noise)[1]


@pytest.mark.usefixtures("x64")
def test_the_goldens_products_are_taken_between_its_points():
    golden = Golden.load(HERE / "curvature/harpg.npz")
    f = quartics(golden)[0]["value_fn"]
    p, q, hvp = golden.tree("p"), golden.arrays["x/q"], golden.tree("x")["hvp"]
    for t in range(2, len(q)):
        last, now = (jax.tree.map(lambda x, i=i: x[i], p) for i in (t - 2, t - 1))
        step = jax.tree.map(jnp.subtract, now, last)
        between = jax.tree.map(lambda a, s, t=t: a + q[t] * s, last, step)
        got = ox.hvp(f)(between, step)
        for leaf, want in hvp.items():
            golden.check(f"step {t}, {leaf}", got[leaf], np.asarray(want[t]))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "eta", [0.0, 0.05, 0.7, lambda t: 2 / (t + 2)], ids=["0", "0.05", "0.7", "decaying"]
)
def test_on_a_quadratic_the_momentum_is_the_gradient(eta):
    _, g, d = walk(HARPG(eta, normalize=False), 0.1, jnp.zeros((30, DIM)))
    np.testing.assert_allclose(d, g, rtol=0, atol=1e-14)


@pytest.mark.parametrize("normalize", [True, False])
def test_with_eta_1_it_is_the_gradient(normalize):
    noise = jnp.asarray(np.random.default_rng(1).normal(size=(10, DIM)))
    _, g, d = walk(HARPG(1.0, normalize), 0.1, noise)
    want = g / jnp.linalg.norm(g, axis=1, keepdims=True) if normalize else g
    np.testing.assert_allclose(d, want, rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_noise_is_averaged_as_by_momentum_whatever_the_step_size():
    steps = 4000
    noise = SIGMA * jnp.asarray(np.random.default_rng(2).normal(size=(steps, DIM)))
    for rate in (0.02, 0.3):  # spectral radius 2: both converge
        x, _, d = walk(HARPG(ETA, normalize=False), rate, noise)
        errors = np.linalg.norm(d - jnp.asarray(CURVATURES)[None] * x, axis=1)[100:]
        # 4000 steps, correlated over 10 to 20 of them, of 10 coordinates: about 2%.
        want = SIGMA * np.sqrt(DIM * ETA / (2 - ETA))
        np.testing.assert_allclose(np.sqrt(np.mean(errors**2)), want, rtol=0.05)


def cubic(x):
    return jnp.sum(x**3) / 6  # the Hessian is x itself


def products(keys):
    """The correction at the second of two steps, from 0 to 1: it is q."""

    def one(key):
        tx = HARPG(0.0, normalize=False, key=key)
        zero, x = jnp.zeros(1), jnp.ones(1)
        _, state = tx.update(zero, tx.init(zero), zero, value_fn=cubic)
        return tx.update(zero, state, x, value_fn=cubic)[0][0]

    return jax.vmap(one)(keys)


def test_the_point_of_the_hessian_is_uniform_on_the_last_step():
    q = np.asarray(products(jax.random.split(jax.random.key(1), 400)))
    assert 0 <= q.min() < 0.05
    assert 0.95 < q.max() <= 1
    # Five standard errors of a mean of 400 uniform numbers.
    assert abs(q.mean() - 0.5) < 5 * np.sqrt(1 / 12 / 400)


def test_a_new_point_is_drawn_each_step():
    tx = HARPG(0.0, normalize=False)
    zero, x = jnp.zeros(1), jnp.ones(1)
    state = tx.init(zero)
    drawn = []
    for p in (zero, x, zero, x):
        before = state.mu
        _, state = tx.update(zero, state, p, value_fn=cubic)
        drawn.append(abs(float((state.mu - before)[0])))
    assert drawn[0] == 0
    assert len(set(drawn[1:])) == 3


def test_there_is_no_product_at_the_first_step_and_one_at_each_later():
    calls, so_far = [], []

    def counted(x):
        jax.debug.callback(lambda: calls.append(1))
        return quadratic(x)

    tx, x = HARPG(), start()
    step = jax.jit(
        lambda x, s: tx.update(jax.grad(quadratic)(x), s, x, value_fn=counted)
    )
    state = tx.init(x)
    for _ in range(3):
        d, state = step(x, state)
        x = x - 0.1 * d
        jax.effects_barrier()
        so_far.append(len(calls))
    assert so_far == [0, 1, 2]


def test_a_product_from_outside_stands_in_for_the_function():
    tx = HARPG(0.25, normalize=False)
    x, nan = jnp.ones(2), jnp.full(2, jnp.nan)
    _, state = tx.update(jnp.array([4.0, 8.0]), tx.init(x), x, hvp=nan)  # unused yet
    d, _ = tx.update(jnp.zeros(2), state, x, hvp=jnp.array([1.0, -8.0]))
    np.testing.assert_array_equal(d, [3.75, 0.0])


def test_a_zero_momentum_stays_zero():
    tx, x = HARPG(), start()
    d, state = tx.update(jnp.zeros(DIM), tx.init(x), x, value_fn=quadratic)
    np.testing.assert_array_equal(d, 0)
    np.testing.assert_array_equal(state.mu, 0)


def test_frozen_leaves_are_constants_of_the_function():
    x = {"w": jnp.ones(2), "frozen": jnp.full(2, 3.0)}
    g = {"w": jnp.full(2, 3.0), "frozen": None}

    def f(p):
        return jnp.sum(p["w"] ** 2 * p["frozen"]) / 2

    tx = HARPG(0.0, normalize=False)
    _, state = tx.update(g, tx.init(x), x, value_fn=f)
    d, _ = tx.update(g, state, {**x, "w": x["w"] / 2}, value_fn=f)
    np.testing.assert_array_equal(d["w"], [1.5, 1.5])
    assert d["frozen"] is None


def test_what_is_missing_is_named():
    tx, x = HARPG(), start()
    name = "scale_by_hessian_aided_momentum"
    with pytest.raises(ValueError, match=f"{name}.*'value_fn'"):
        tx.update(x, tx.init(x), x)
    with pytest.raises(ValueError, match=f"{name}.*parameters"):
        tx.update(x, tx.init(x), value_fn=quadratic)
    for eta in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"{name}: eta"):
            HARPG(eta)


def test_in_a_chain_it_descends():
    tx = optax.chain(
        HARPG(), optax.scale_by_learning_rate(lambda t: 0.4 / (t.astype(float) + 2))
    )
    x = start()
    state = tx.init(x)
    step = jax.jit(
        lambda x, s: tx.update(jax.grad(quadratic)(x), s, x, value_fn=quadratic)
    )
    for _ in range(60):
        updates, state = step(x, state)
        x = optax.apply_updates(x, updates)
    assert quadratic(x) < quadratic(start()) / 4

"""INNAprop: inertial dynamics, RMSprop as a special case, decay and its mask."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox


def draws(shape, steps, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(steps, *shape)), dtype)


def trajectory(tx, x, gradients):
    def step(carry, g):
        x, state = carry
        updates, state = tx.update(g, state, x)
        x = optax.apply_updates(x, updates)
        return (x, state), x

    return jax.lax.scan(step, (x, tx.init(x)), gradients)[1]


def reference(g, p, rate, alpha, beta, b2, eps, weight_decay):
    """The specification in NumPy, with the parameters themselves."""
    psi, v, out = (1 - alpha * beta) * p, np.zeros_like(p), []
    for t, g_t in enumerate(g, start=1):
        lr = rate(t - 1)
        x = (1 - lr * weight_decay) * p
        v = b2 * v + (1 - b2) * g_t**2
        psi = (1 - lr / beta) * psi + lr * (1 / beta - alpha) * x
        inertia = lr / (beta - lr) * ((1 - alpha * beta) * x - psi)
        p = x + inertia - lr * beta * g_t / (np.sqrt(v / (1 - b2**t)) + eps)
        out.append(p)
    return np.stack(out)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "changed",
    [
        {"alpha": 0.5},
        {"alpha": 2.0, "beta": 2.0},
        {"b2": 0.9},
        {"eps": 0.5},
        {"weight_decay": 0.3},
        {"weight_decay": 0.0},
    ],
    ids=str,
)
def test_every_argument_does_what_the_specification_says(changed):
    defaults = {"alpha": 0.1, "beta": 0.9, "b2": 0.999, "eps": 1e-8}
    options = {**defaults, "weight_decay": 0.01, **changed}
    g, x = draws((4,), 30, jnp.float64), jnp.asarray([1.0, -2.0, 0.0, 3.0])

    def rate(count):
        return 0.2 / (count + 2.0)

    with jax.numpy_dtype_promotion("standard"):
        ours = trajectory(ox.innaprop(rate, **options), x, g)
    theirs = reference(np.asarray(g), np.asarray(x), rate, **options)
    np.testing.assert_allclose(ours, theirs, rtol=1e-11)


@pytest.mark.parametrize("beta", [0.9, 0.5])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_with_alpha_beta_1_it_is_rmsprop_bit_for_bit(beta, dtype):
    with jax.enable_x64(dtype == "float64"):
        g = draws((5,), 40, dtype)
        tx = ox.innaprop(0.05, alpha=1 / beta, beta=beta, weight_decay=0.0)
        # Adam without momentum is RMSprop with its bias corrected.
        rmsprop = optax.chain(optax.scale_by_adam(b1=0.0), optax.scale(-0.05 * beta))
        x = jnp.ones(5, dtype)
        state, other = tx.init(x), rmsprop.init(x)
        for g_t in g:
            updates, state = tx.update(g_t, state, x)
            with jax.numpy_dtype_promotion("standard"):
                want, other = rmsprop.update(g_t, other, x)
            np.testing.assert_array_equal(updates, want)
            x = x + updates
        np.testing.assert_array_equal(state.psi, np.zeros(5))


@pytest.mark.usefixtures("x64")
def test_the_first_step_has_one_size_whatever_alpha():
    g, x = jnp.asarray([[3.0, -4.0, 0.0]]), jnp.asarray([1.0, 2.0, 3.0])
    for alpha in (0.0, 0.1, 2.0):
        tx = ox.innaprop(0.1, alpha=alpha, beta=0.8, weight_decay=0.0)
        moved = trajectory(tx, x, g)[0]
        want = x + 0.1 * 0.8 * np.asarray([-1, 1, 0])
        np.testing.assert_allclose(moved, want, rtol=1e-8)  # eps


@pytest.mark.usefixtures("x64")
def test_without_gradient_and_decay_it_rests():
    x = jnp.asarray([1.0, -20.0, 3e-5])
    tx = ox.innaprop(0.05, weight_decay=0.0)
    moved = trajectory(tx, x, jnp.zeros((50, 3)))
    np.testing.assert_allclose(moved[-1], x, rtol=1.1e-14)


def test_the_size_of_the_gradient_does_not_matter():
    g = draws((4,), 20)
    tx, x = ox.innaprop(0.05, eps=0.0), jnp.ones(4)
    near, far = trajectory(tx, x, g), trajectory(tx, x, g * 1024)
    np.testing.assert_array_equal(near, far)


@pytest.mark.parametrize(
    "mask",
    [{"a": True, "b": False}, lambda params: {"a": True, "b": False}],
    ids=["tree", "function"],
)
def test_masked_leaves_do_not_decay(mask):
    g = draws((4,), 10)
    x, same = jnp.ones(4), {"a": g, "b": g}
    both = trajectory(
        ox.innaprop(0.1, weight_decay=0.5, mask=mask), {"a": x, "b": x}, same
    )
    for name, weight_decay in (("a", 0.5), ("b", 0.0)):
        alone = trajectory(ox.innaprop(0.1, weight_decay=weight_decay), x, g)
        np.testing.assert_allclose(both[name], alone, rtol=1e-6)


@pytest.mark.parametrize("size", [0.0, 1e30, 1e-30])
def test_gradients_at_the_edges_of_float32_make_no_nan(size):
    g = jnp.sign(draws((4,), 4)) * jnp.float32(size)
    assert np.isfinite(trajectory(ox.innaprop(0.1), jnp.ones(4), g)).all()


def test_a_learning_rate_equal_to_beta_is_refused():
    with pytest.raises(ValueError, match=r"innaprop: learning_rate must not be equal"):
        ox.innaprop(0.9)
    with pytest.raises(ValueError, match="for both"):
        ox.innaprop(2.0, beta=2.0)


def test_without_parameters_it_says_so():
    tx, x = ox.innaprop(0.1), jnp.ones(2)
    with pytest.raises(ValueError, match="innaprop needs the parameters"):
        tx.update(x, tx.init(x))


@pytest.mark.parametrize(
    "bad", [{"alpha": -1.0}, {"beta": 0.0}, {"b2": 1.0}, {"eps": -1.0}]
)
def test_an_argument_outside_its_range_is_named(bad):
    with pytest.raises(ValueError, match=f"innaprop: {next(iter(bad))} must"):
        ox.innaprop(0.1, **bad)

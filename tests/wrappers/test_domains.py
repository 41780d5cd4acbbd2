"""`fish`: meta steps over domains."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox

MOMENTUM = optax.sgd(0.1, momentum=0.9)


def follow(tx, grads, x):
    """Parameters after each step."""
    state, xs = tx.init(x), []
    update = jax.jit(tx.update)
    for g in grads:
        updates, state = update(g, state, x)
        x = optax.apply_updates(x, updates)
        xs.append(x)
    return np.asarray(xs)


def noise(steps, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=5)) for _ in range(steps)]


@pytest.mark.usefixtures("x64")
def test_it_is_optax_lookahead_on_plain_parameters():
    grads, x = noise(9), jnp.linspace(-1.0, 1.0, 5)
    got = follow(ox.fish(MOMENTUM, meta_lr=0.6, num_domains=3), grads, x)
    tx = optax.lookahead(MOMENTUM, sync_period=3, slow_step_size=0.2)
    params = optax.LookaheadParams.init_synced(x)
    state = tx.init(params)
    for t, g in enumerate(grads):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        # Sums of numbers of size 1, in another order.
        np.testing.assert_allclose(got[t], params.fast, rtol=0, atol=1e-15)


@pytest.mark.usefixtures("x64")
def test_a_meta_rate_of_the_number_of_domains_is_inner():
    grads, x = noise(7), jnp.ones(5)
    got = follow(ox.fish(MOMENTUM, meta_lr=3.0, num_domains=3), grads, x)
    np.testing.assert_allclose(got, follow(MOMENTUM, grads, x), rtol=0, atol=1e-14)


def test_a_meta_rate_of_0_goes_back_to_the_start():
    x = jnp.linspace(-1.0, 1.0, 5)
    got = follow(ox.fish(optax.sgd(0.5), meta_lr=0.0, num_domains=2), noise(4), x)
    np.testing.assert_allclose(got[[1, 3]], [x, x], rtol=0, atol=1e-7)


@pytest.mark.usefixtures("x64")
def test_both_orders_together_follow_the_inner_product_of_the_gradients():
    rng = np.random.default_rng(0)
    a = [m + m.T for m in rng.normal(size=(2, 5, 5))]
    b, x, lr = rng.normal(size=(2, 5)), jnp.asarray(rng.normal(size=5)), 0.01

    def gradient(i, x):
        return a[i] @ x - b[i]

    def total(order):
        """What a round adds up to, in units of -lr."""
        tx = ox.fish(optax.sgd(lr), meta_lr=2.0, num_domains=2)
        state, y = tx.init(x), x
        for i in order:
            updates, state = tx.update(gradient(i, y), state, y)
            y = optax.apply_updates(y, updates)
        return (x - y) / lr

    mean = sum(map(total, itertools.permutations(range(2)))) / 2
    agreement = jax.grad(lambda x: jnp.vdot(gradient(0, x), gradient(1, x)))(x)
    want = gradient(0, x) + gradient(1, x) - lr / 2 * agreement
    # Exact for quadratics; rounding is divided by lr.
    np.testing.assert_allclose(mean, want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("reset", [True, False])
def test_the_inner_state_survives_a_round_unless_reset(reset):
    tx = ox.fish(optax.sgd(1.0, 0.5), 2.0, num_domains=2, reset_inner=reset)
    xs = follow(tx, [jnp.ones(1)] * 3, jnp.zeros(1))
    np.testing.assert_array_equal(xs[:, 0], [-1.0, -2.5, -3.5 if reset else -4.25])


def test_slow_parameters_are_float32_and_small_steps_are_not_lost_there():
    x = jnp.ones(2, jnp.bfloat16)
    tx = ox.fish(optax.sgd(1.0), meta_lr=0.5, num_domains=2)
    state = tx.init(x)
    for _ in range(2):
        # Far below the spacing of bfloat16 at 1, 2^-8.
        updates, state = tx.update(jnp.full(2, 2.0**-10, jnp.bfloat16), state, x)
        assert updates.dtype == jnp.bfloat16
    # Steps were never applied: 1 - 2^-10, of which a quarter is taken.
    np.testing.assert_array_equal(state.slow, np.float32([1 - 2.0**-12] * 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1.0, 2), "meta_lr must lie in"),
        ((1.0, 0), "num_domains must be an integer of 1 or more"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=f"fish: {message}"):
        ox.fish(optax.sgd(0.1), *arguments)


def test_it_asks_for_parameters():
    tx = ox.fish(optax.sgd(0.1), 1.0, 2)
    with pytest.raises(ValueError, match="fish needs the parameters"):
        tx.update(jnp.ones(1), tx.init(jnp.ones(1)))

"""Cautious weight decay: the link and its two optimizers."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox


def once(tx, u, x):
    return tx.update(u, tx.init(x), x)[0]


def descend(tx, x, steps, gradient):
    positions, state = [x], tx.init(x)
    update = jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(gradient(x), state, x)
        x = optax.apply_updates(x, updates)
        positions.append(x)
    return np.asarray(positions)


def cautious_descent():
    return optax.chain(
        ox.add_cautious_decayed_weights(0.5), optax.scale_by_learning_rate(0.1)
    )


def test_the_specifications_example():
    u = jnp.array([0.5, 0.5, -0.5, 0.7, 0.0])
    x = jnp.array([1.0, -1.0, 2.0, 0.0, 3.0])
    out = once(ox.add_cautious_decayed_weights(0.1), u, x)
    np.testing.assert_allclose(out, np.float32([0.6, 0.5, -0.5, 0.7, 0.3]), rtol=1.2e-7)


def test_below_the_minimum_of_a_quadratic_it_never_decays():
    # f = (x - 1)^2 / 2 from 0.2: the gradient and x always have opposite signs.
    x = descend(cautious_descent(), jnp.asarray(0.2), 60, lambda x: x - 1)
    expected = 1 - 0.8 * 0.9 ** np.arange(61)
    np.testing.assert_allclose(x, expected, rtol=1e-5)


def test_the_stationary_point_stays_that_of_the_plain_loss():
    for start in (0.2, 2.0, -1.0):
        x = descend(cautious_descent(), jnp.asarray(start), 200, lambda x: x - 1)
        np.testing.assert_allclose(x[-1], 1.0, rtol=1e-6)
    plain = optax.chain(
        optax.add_decayed_weights(0.5), optax.scale_by_learning_rate(0.1)
    )
    x = descend(plain, jnp.asarray(0.2), 200, lambda x: x - 1)
    np.testing.assert_allclose(x[-1], 2 / 3, rtol=1e-6)


def test_above_the_minimum_the_first_step_decays():
    x = descend(cautious_descent(), jnp.asarray(2.0), 1, lambda x: x - 1)
    np.testing.assert_allclose(x[1], 1.8, rtol=1.2e-7)


def test_no_decay_is_the_identity():
    rng = np.random.default_rng(0)
    u, x = jnp.asarray(rng.normal(size=(2, 50)), jnp.float32)
    np.testing.assert_array_equal(once(ox.add_cautious_decayed_weights(0.0), u, x), u)


def test_it_is_ordinary_decay_where_the_direction_agrees_and_nothing_elsewhere():
    rng = np.random.default_rng(0)
    u, x = jnp.asarray(rng.normal(size=(2, 50)), jnp.float32)
    out = once(ox.add_cautious_decayed_weights(0.3), u, x)
    decayed = once(optax.add_decayed_weights(0.3), u, x)
    np.testing.assert_array_equal(out, jnp.where(u * x >= 0, decayed, u))


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_dead_entry_decays_in_full(zero):
    out = once(
        ox.add_cautious_decayed_weights(0.5), jnp.full(2, zero), jnp.array([4.0, -4.0])
    )
    np.testing.assert_array_equal(out, [2.0, -2.0])


def test_opposite_signs_are_seen_although_the_product_underflows():
    u, x = jnp.array([1e-30]), jnp.array([-1e-30])
    assert (u * x == 0).all()
    np.testing.assert_array_equal(once(ox.add_cautious_decayed_weights(0.5), u, x), u)


def test_a_schedule_of_the_decay_is_read_from_0_and_counted_in_the_state():
    tx = ox.add_cautious_decayed_weights(lambda count: (count + 1) / 4)
    x = u = jnp.ones(1)
    state = tx.init(x)
    assert isinstance(state, ox.CautiousDecayState)
    for t in (1, 2, 3):
        out, state = tx.update(u, state, x)
        np.testing.assert_array_equal(out, [1 + t / 4])
    assert state.count == 3


def test_without_a_schedule_there_is_no_state():
    state = ox.add_cautious_decayed_weights(0.1).init(jnp.ones(2))
    assert state == optax.EmptyState()


@pytest.mark.parametrize(
    "mask",
    [{"a": True, "b": False}, lambda params: {"a": True, "b": False}],
    ids=["tree", "function"],
)
def test_masked_leaves_do_not_decay(mask):
    x = {"a": jnp.ones(1), "b": jnp.ones(1)}
    out = once(ox.add_cautious_decayed_weights(0.5, mask), x, x)
    assert (float(out["a"][0]), float(out["b"][0])) == (1.5, 1.0)


def test_a_decay_that_is_no_number_is_named():
    with pytest.raises(
        TypeError, match="add_cautious_decayed_weights: weight_decay mu"
    ):
        ox.add_cautious_decayed_weights("0.1")


# The optimizers -----------------------------------------------------------------------

PAIRS = {
    "adamw_cwd": (ox.adamw_cwd, optax.scale_by_adam, {"b1": 0.8, "eps": 1e-3}),
    "lion_cwd": (ox.lion_cwd, optax.scale_by_lion, {"b1": 0.8, "b2": 0.9}),
}
every_pair = pytest.mark.parametrize(
    ("ours", "scale", "options"), PAIRS.values(), ids=PAIRS
)


def noisy(x, t):
    rng = np.random.default_rng(t)
    return x - 0.3 + jnp.asarray(rng.normal(size=x.shape), jnp.float32)


def assert_equal_trajectories(a, b, steps=10):
    x = y = jnp.linspace(-1.0, 1.0, 9)
    s, r = a.init(x), b.init(y)
    for t in range(steps):
        u, s = a.update(noisy(x, t), s, x)
        v, r = b.update(noisy(y, t), r, y)
        x, y = optax.apply_updates(x, u), optax.apply_updates(y, v)
        np.testing.assert_array_equal(x, y)


@every_pair
def test_it_is_the_chain_of_direction_decay_and_learning_rate(ours, scale, options):
    chain = ox.full_precision(
        optax.chain(
            scale(**options),
            ox.add_cautious_decayed_weights(0.2),
            optax.scale_by_learning_rate(0.05),
        )
    )
    tx = ours(0.05, weight_decay=0.2, **options)
    assert_equal_trajectories(tx, chain)


@every_pair
def test_without_decay_it_is_the_base_optimizer(ours, scale, options):
    base = ox.full_precision(
        optax.chain(scale(**options), optax.scale_by_learning_rate(0.05))
    )
    assert_equal_trajectories(ours(0.05, weight_decay=0.0, **options), base)


@every_pair
def test_decay_is_multiplied_by_the_learning_rate(ours, scale, options):
    # A zero gradient gives a zero direction, so the whole entry decays.
    tx = ours(lambda count: 0.5 / (count + 1), weight_decay=0.5)
    x = jnp.array([4.0])
    state = tx.init(x)
    for rate in (0.5, 0.25):
        updates, state = tx.update(jnp.zeros(1), state, x)
        np.testing.assert_array_equal(updates, [-rate * 0.5 * 4.0])


@every_pair
def test_the_mask_spares_decay_only(ours, scale, options):
    tx = ours(1.0, weight_decay=0.5, mask={"a": True, "b": False})
    x = {"a": jnp.full(1, 2.0), "b": jnp.full(1, 2.0)}
    updates = once(tx, jax.tree.map(jnp.ones_like, x), x)
    np.testing.assert_allclose(updates["b"] - updates["a"], [1.0], rtol=1e-6)
    # Adam's 1 - b2^t cancels in float32: 6e-8 / (2 * 1e-3).
    np.testing.assert_allclose(updates["b"], [-1.0], rtol=3e-5)


@every_pair
def test_the_moment_is_kept_in_mu_dtype(ours, scale, options):
    x = jnp.ones(2)
    for mu_dtype, expected in ((None, jnp.float32), (jnp.bfloat16, jnp.bfloat16)):
        state = ours(0.1, mu_dtype=mu_dtype).init(x)
        assert optax.tree.get(state, "mu").dtype == expected

"""Gravity: squashed gradients, the growing average, and the random initial velocity."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox

AT_REST = {"v0_std": 0.0}


def once(tx, g):
    return tx.update(g, tx.init(g))[0]


def test_the_first_step_from_rest():
    g = jnp.asarray([0.0, 1.0, -1.0, 0.5])
    zeta = np.asarray([0.0, 0.5, -0.5, 0.4])
    out = once(ox.scale_by_gravity(**AT_REST), g)
    np.testing.assert_allclose(out, (1 - 1.9 / 3) * zeta, rtol=1e-6)
    # The Keras file counts from 0: the first average weighs 1/2.
    out = once(ox.scale_by_gravity(count_start=0, **AT_REST), g)
    np.testing.assert_allclose(out, zeta / 2, rtol=1e-6)
    out = once(ox.scale_by_gravity(b=0.5, **AT_REST), g)
    np.testing.assert_allclose(out, (1 - 1.5 / 3) * zeta, rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_positions_are_linear_in_the_initial_velocity():
    g = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)))
    velocity = jnp.asarray([1.0, -2.0, 0.0, 3.0])

    def after_three(v0):
        tx, x = ox.gravity(0.1, alpha=0.0), jnp.zeros(4)
        state = optax.tree.set(tx.init(x), velocity=v0)
        for g_t in g:
            updates, state = tx.update(g_t, state, x)
            x = x + updates
        return x

    shift = after_three(velocity) - after_three(jnp.zeros(4))
    np.testing.assert_allclose(shift, -0.1 * 1.4047333333 * velocity, rtol=1e-10)


def test_the_maximum_is_over_one_leaf():
    tx = ox.scale_by_gravity(**AT_REST)
    alone, both = jnp.asarray([0.5]), {"a": jnp.asarray([0.5]), "b": jnp.ones(1)}
    np.testing.assert_array_equal(once(tx, both)["a"], once(tx, alone))
    assert once(tx, jnp.asarray([0.5, 1.0]))[0] < once(tx, alone)[0]


def test_it_is_not_invariant_to_the_scale_of_the_gradient():
    tx, g = ox.scale_by_gravity(**AT_REST), jnp.asarray([1.0, 0.5])
    assert (once(tx, 100 * g) < once(tx, g) / 10).all()


@pytest.mark.parametrize("size", [0.0, 1e30, 1e-30])
def test_gradients_at_the_edges_of_float32_make_no_nan(size):
    tx, g = ox.scale_by_gravity(), jnp.asarray([1.0, -1.0, 0.0]) * jnp.float32(size)
    state = tx.init(g)
    for _ in range(3):
        out, state = tx.update(g, state)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(once(ox.scale_by_gravity(**AT_REST), g)[2], 0.0)


# The initial velocity -----------------------------------------------------------------


def test_its_standard_deviation_is_alpha_over_the_first_learning_rate():
    x = jnp.zeros(200_000)

    def std(*args, **kwargs):
        return float(
            optax.tree.get(ox.gravity(*args, **kwargs).init(x), "velocity").std()
        )

    # The standard error is 1 / sqrt(2 n) = 0.16 %.
    np.testing.assert_allclose(std(), 0.1, atol=1e-3)
    np.testing.assert_allclose(std(0.5, alpha=0.2), 0.4, rtol=1e-2)
    falling = optax.linear_schedule(0.2, 0.0, 10)
    np.testing.assert_allclose(std(falling, alpha=0.1), 0.5, rtol=1e-2)
    assert std(alpha=0.0) == 0.0


def test_leaves_of_one_shape_start_differently():
    params = {"a": jnp.zeros(50), "b": jnp.zeros(50)}
    velocity = ox.scale_by_gravity().init(params).velocity
    assert not np.isclose(velocity["a"], velocity["b"]).any()
    stacked = ox.bucketed(ox.scale_by_gravity()).init(params).velocity
    (bucket,) = stacked.values()
    assert not np.isclose(bucket.stack[0], bucket.stack[1]).any()


def test_the_key_decides_and_the_state_holds_none():
    x = jnp.zeros(5)

    def velocity(**options):
        state = ox.scale_by_gravity(**options).init(x)
        assert state._fields == ("count", "velocity")
        return np.asarray(state.velocity)

    np.testing.assert_array_equal(velocity(), velocity(key=jax.random.key(0)))
    assert (velocity() != velocity(key=jax.random.key(1))).all()
    legacy = jax.random.PRNGKey(1)
    np.testing.assert_array_equal(velocity(key=legacy), velocity(key=jax.random.key(1)))


def test_init_from_shapes_draws_nothing():
    shapes = {"a": jax.ShapeDtypeStruct((3,), jnp.bfloat16), "b": None}
    state = ox.scale_by_gravity().init(shapes)
    assert state.velocity == {"a": jax.ShapeDtypeStruct((3,), jnp.float32), "b": None}


def test_init_under_jit_is_init():
    tx, x = ox.gravity(), {"a": jnp.ones((2, 3)), "b": jnp.ones(())}
    # Fused, the draw and the product with its deviation may round once, not twice.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-7),
        jax.jit(tx.init)(x),
        tx.init(x),
    )


def test_a_learning_rate_that_starts_at_0_needs_a_start_at_rest():
    warm_up = optax.linear_schedule(0.0, 0.1, 10)
    with pytest.raises(ValueError, match="gravity: learning_rate at the first step"):
        ox.gravity(warm_up)
    with pytest.raises(ValueError, match="gravity: learning_rate at the first step"):
        ox.gravity(0.0)
    tx = ox.gravity(warm_up, alpha=0.0)
    np.testing.assert_array_equal(once(tx, jnp.ones(2)), np.zeros(2))


def test_the_optimizer_passes_its_arguments_on():
    key = jax.random.key(3)
    tx = ox.gravity(0.5, alpha=0.2, b=0.7, count_start=2, key=key)
    link = ox.scale_by_gravity(b=0.7, v0_std=0.4, count_start=2, key=key)
    g = jnp.asarray([1.0, 2.0])
    np.testing.assert_allclose(once(tx, g), -0.5 * once(link, g), rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "bad"),
    [
        (ox.scale_by_gravity, {"b": 1.0}),
        (ox.scale_by_gravity, {"v0_std": -1.0}),
        (ox.scale_by_gravity, {"count_start": -1}),
        (ox.gravity, {"alpha": -1.0}),
    ],
)
def test_an_argument_outside_its_range_is_named(make, bad):
    with pytest.raises(ValueError, match=f"{make.__name__}: {next(iter(bad))} must"):
        make(**bad)

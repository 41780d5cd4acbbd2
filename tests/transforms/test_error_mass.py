"""Steps over the mean probability of error, and the paper's perceptron table."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox

# The paper's worst case: labels times inputs, of which one disagrees with the rest.
WORST = jnp.ones((1000, 2)).at[:, 0].set(0.5).at[0, 1].set(-1.0)


def once(tx, g, **extra):
    return tx.update(g, tx.init(g), **extra)[0]


def logistic(theta):
    """Mean logistic loss, and the mean probability of error."""
    margins = WORST @ theta
    return jnp.mean(jax.nn.softplus(-margins)), jnp.mean(jax.nn.sigmoid(-margins))


def normalized(theta):
    loss = ox.losses.normalized_sigmoid_binary_cross_entropy
    labels = jnp.ones(len(WORST), jnp.int32)
    return jnp.mean(loss(WORST @ theta, labels))


def by_link(rate):
    tx = optax.chain(ox.scale_by_inverse_error_mass(), optax.sgd(rate))

    def step(theta):
        g, mass = jax.grad(logistic, has_aux=True)(theta)
        return theta + once(tx, g, error_mass=mass)

    return jax.jit(step)


def by_loss(rate):
    return jax.jit(lambda theta: theta - rate * jax.grad(normalized)(theta))


def steps_until_separated(step, limit=400):
    theta = jnp.zeros(2)
    for t in range(limit):
        if (np.asarray(WORST) @ np.asarray(theta) > 0).all():
            return t
        theta = step(theta)
    return limit


@pytest.mark.parametrize("make_step", [by_link, by_loss])
@pytest.mark.parametrize(("rate", "steps"), [(100, 2), (10, 2), (1, 16), (0.1, 157)])
def test_the_papers_table_of_steps_to_separation(make_step, rate, steps):
    assert steps_until_separated(make_step(rate)) == steps
    # R^2 / mu^2 + 2 log(2n - 1) / (lr mu^2) with R^2 = 1.25 and margin mu = 1/2.
    assert steps <= 5 + 2 * np.log(1999) / (rate / 4)


def test_plain_gradient_descent_takes_308_steps_where_it_takes_2():
    def plain(theta):
        return theta - 100 * jax.grad(lambda x: logistic(x)[0])(theta)

    assert steps_until_separated(jax.jit(plain)) == 308


def test_steps_are_at_most_the_rate_times_the_largest_input():
    largest, step = np.sqrt(1.25), by_link(0.5)
    for seed in range(5):
        theta = jnp.asarray(np.random.default_rng(seed).normal(size=2) * 3, jnp.float32)
        assert jnp.linalg.norm(step(theta) - theta) <= 0.5 * largest * (1 + 1e-6)


def test_it_divides_every_leaf_by_the_mass():
    g = {"w": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}
    out = once(ox.scale_by_inverse_error_mass(), g, error_mass=jnp.float32(0.25))
    np.testing.assert_array_equal(out["w"], [4.0, -8.0])
    assert out["b"] == 2.0


@pytest.mark.parametrize("mass", [0.25, np.float64(0.25), jnp.bfloat16(0.25)])
def test_the_mass_may_be_any_number(mass):
    out = once(ox.scale_by_inverse_error_mass(), jnp.ones(1), error_mass=mass)
    np.testing.assert_array_equal(out, [4.0])
    assert out.dtype == jnp.float32


def test_a_mass_below_eps_counts_as_eps():
    tx = ox.scale_by_inverse_error_mass(eps=0.5)
    np.testing.assert_array_equal(once(tx, jnp.ones(1), error_mass=0.1), [2.0])
    zero = once(ox.scale_by_inverse_error_mass(), jnp.zeros(1), error_mass=0.0)
    np.testing.assert_array_equal(zero, [0.0])


def test_errors_name_what_is_wrong():
    tx = ox.scale_by_inverse_error_mass()
    with pytest.raises(ValueError, match="mass needs the extra argument 'error_mass'"):
        once(tx, jnp.ones(1))
    with pytest.raises(ValueError, match=r"error_mass must be a scalar.*\(3,\)"):
        once(tx, jnp.ones(1), error_mass=jnp.ones(3))
    with pytest.raises(ValueError, match="scale_by_inverse_error_mass: eps must lie"):
        ox.scale_by_inverse_error_mass(eps=0.0)

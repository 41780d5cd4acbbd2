"""What the specification takes from optax as it is, and what it claims of it."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox


def draws(shape, steps):
    return np.random.default_rng(0).normal(size=(steps, *shape))


@pytest.mark.usefixtures("x64")
def test_amsgrad_without_bias_corrections_is_the_papers():
    tx = ox.full_precision(
        optax.scale_by_amsgrad(
            0.9, 0.99, bias_correction_mu=False, bias_correction_nu=False
        )
    )
    state = tx.init(jnp.zeros(4))
    m = v = largest = np.zeros(4)
    for g in draws((4,), 40):
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        largest = np.maximum(largest, v)
        direction, state = tx.update(jnp.asarray(g), state)
        want = m / (np.sqrt(largest) + 1e-8)
        np.testing.assert_allclose(direction, want, rtol=1e-12)


def test_the_gradient_noise_of_optax_anneals_as_in_the_paper():
    size = 200_000
    tx = ox.full_precision(optax.add_noise(0.3, 0.55, jax.random.key(0)))
    again = ox.full_precision(optax.add_noise(0.3, 0.55, jax.random.key(0)))
    g = jnp.full(size, 2.0)
    state, other = tx.init(g), again.init(g)
    for count in range(11):
        noisy, state = tx.update(g, state)
        repeated, other = again.update(g, other)
        np.testing.assert_array_equal(noisy, repeated)
        std = np.sqrt(0.3 / (count + 1) ** 0.55)
        if count in (0, 10):  # .5477 and .2833
            # Standard errors: 0.16 % of the deviation, and std / 447 of the mean.
            np.testing.assert_allclose(np.std(noisy), std, rtol=0.01)
            np.testing.assert_allclose(np.mean(noisy), 2.0, rtol=0, atol=0.01 * std)


@pytest.mark.usefixtures("x64")
def test_novograd_does_not_see_the_scale_of_a_leaf():
    tx = ox.full_precision(optax.novograd(0.1, b1=0.95, b2=0.98, eps=1e-8))
    start = {"a": jnp.ones((2, 3)), "b": jnp.ones(4)}

    def end(scale):
        x, state = start, tx.init(start)
        for a, b in zip(draws((2, 3), 20), draws((4,), 20), strict=True):
            g = {"a": scale * jnp.asarray(a), "b": jnp.asarray(b)}
            updates, state = tx.update(g, state, x)
            x = optax.apply_updates(x, updates)
        assert all(n.shape == () for n in jax.tree.leaves(optax.tree.get(state, "nu")))
        return x

    # What eps leaves of it: 1e-8 over a norm of about 2, at each of 20 steps of .1.
    near, far = end(1.0), end(1e3)
    np.testing.assert_allclose(far["a"], near["a"], rtol=0, atol=1e-7)
    np.testing.assert_array_equal(far["b"], near["b"])

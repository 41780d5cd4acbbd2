"""Extreme eigenvalues against dense Hessians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import optax_ext as ox


def value_fn(tree):
    x = jnp.concatenate([tree["a"], tree["b"].ravel()])
    curvatures = jnp.linspace(-2.0, 7.0, x.size, dtype=x.dtype)
    return jnp.sum(curvatures * x**2) / 2 + jnp.sum(jnp.sin(x)) * x[0]


PARAMS = {"a": jnp.linspace(-1.0, 1.0, 3), "b": jnp.linspace(0.2, 0.9, 6).reshape(2, 3)}


def dense(params):
    flat, unravel = ravel_pytree(params)
    return np.linalg.eigvalsh(
        np.asarray(jax.hessian(lambda v: value_fn(unravel(v)))(flat))
    )


@pytest.mark.parametrize("num_iters", [9, 50])
def test_a_full_krylov_space_has_both_ends_of_the_spectrum(num_iters):
    found = ox.hessian_extreme_eigenvalues(value_fn, PARAMS, num_iters)
    want = dense(PARAMS)
    # Some hundreds of roundings of float32, of the largest.
    np.testing.assert_allclose(found, want[[0, -1]], atol=1e-4)


def test_a_smaller_space_stays_between_them_and_any_key_will_do():
    want = dense(PARAMS)
    for seed in range(5):
        key = jax.random.key(seed)
        found = ox.hessian_extreme_eigenvalues(value_fn, PARAMS, 4, key)
        assert want[0] - 1e-4 <= found.smallest <= found.largest <= want[-1] + 1e-4
        assert found.largest > 0.8 * want[-1]


def test_it_runs_under_jit_and_in_float64(x64):
    params = jax.tree.map(lambda p: p.astype(jnp.float64), PARAMS)
    found = jax.jit(lambda p: ox.hessian_extreme_eigenvalues(value_fn, p))(params)
    np.testing.assert_allclose(found, dense(params)[[0, -1]], rtol=1e-12)


def test_an_unusable_number_of_iterations_is_an_error():
    with pytest.raises(ValueError, match="num_iters"):
        ox.hessian_extreme_eigenvalues(value_fn, PARAMS, 0)

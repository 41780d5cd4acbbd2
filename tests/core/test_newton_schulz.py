"""The Newton-Schulz iteration: its numbers, and what float32 and bfloat16 cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax.contrib import _muon

from optax_ext._core.newton_schulz import newton_schulz


def matrix(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def conditioned(number, n=32, seed=0):
    """A matrix whose singular values fall from 1 to 1 / number."""
    u, v = (np.linalg.qr(matrix((n, n), seed + i))[0] for i in range(2))
    return u * np.geomspace(1, 1 / number, n) @ v


def singular_values(x):
    return np.linalg.svd(np.asarray(x, np.float64))[1]


@pytest.mark.parametrize("shape", [(8, 8), (6, 10), (10, 6)])
def test_it_is_optax_contrib_muons_iteration(shape, x64):
    x = jnp.asarray(matrix(shape))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        theirs = _muon.orthogonalize_via_newton_schulz(
            x, jnp.array([3.4445, -4.7750, 2.0315]), 5, eps=1e-8
        )
    np.testing.assert_allclose(newton_schulz(x, eps=1e-8), theirs, rtol=0, atol=1e-14)


@pytest.mark.parametrize("number", [1, 2, 5, 10, 20])
def test_singular_values_end_near_1_up_to_a_condition_number_of_20(number):
    s = singular_values(newton_schulz(jnp.asarray(conditioned(number), jnp.float32)))
    assert 0.6 < s.min()
    assert s.max() < 1.3


def test_singular_vectors_stay(x64):
    x = conditioned(20)
    u, _, v = np.linalg.svd(x)
    turned = u.T @ np.asarray(newton_schulz(jnp.asarray(x))) @ v.T
    np.testing.assert_allclose(turned, np.diag(np.diag(turned)), atol=1e-10)


@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (256, 64)])
def test_float32_agrees_with_float64_to_6_digits_and_bfloat16_to_a_tenth(shape, x64):
    x = matrix(shape)
    exact = np.asarray(newton_schulz(jnp.asarray(x)))
    for dtype, error in ((jnp.float32, 5e-6), (jnp.bfloat16, 0.1)):
        got = np.asarray(newton_schulz(jnp.asarray(x, dtype)), np.float64)
        assert np.linalg.norm(got - exact) < error * np.linalg.norm(exact)
        s, wanted = singular_values(got), singular_values(exact)
        np.testing.assert_allclose(s, wanted, atol=2 * error)

"""Lanczos iteration, up to and beyond the end of its space."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_ext._core.lanczos import lanczos

RNG = np.random.default_rng(0)
EIGENVALUES = np.array([-3.0, -1.0, -0.1, 0.0, 0.5, 2.0, 10.0])
Q = np.linalg.qr(RNG.normal(size=(7, 7)))[0]
H = (Q * EIGENVALUES) @ Q.T
START = RNG.normal(size=7)


def run(h, start, rank):
    h = jnp.asarray(h, start.dtype)
    return jax.jit(lambda s: lanczos(lambda v: h @ v, s, rank))(start)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_the_basis_is_orthonormal_and_carries_the_matrix(x64, rank):
    v, t = run(H, jnp.asarray(START), rank)
    np.testing.assert_allclose(v @ v.T, np.eye(rank), atol=1e-14)
    np.testing.assert_allclose(t, v @ H @ v.T, atol=1e-13)
    np.testing.assert_allclose(v[0], START / np.linalg.norm(START), rtol=1e-15)
    # The space of the start, H start, H H start, ...
    krylov = np.stack([np.linalg.matrix_power(H, j) @ START for j in range(rank)])
    left = krylov - krylov @ v.T @ v
    assert np.linalg.norm(left) < 1e-12 * np.linalg.norm(krylov)


def test_all_of_the_space_has_all_eigenvalues(x64):
    _, t = run(H, jnp.asarray(START), 7)
    np.testing.assert_allclose(np.linalg.eigvalsh(t), EIGENVALUES, atol=1e-13)


def test_float32_keeps_the_basis_orthogonal():
    d = np.geomspace(1e-3, 1e3, 60)
    start = jnp.asarray(RNG.normal(size=60), jnp.float32)
    v, _ = run(np.diag(d), start, 30)
    np.testing.assert_allclose(v @ v.T, np.eye(30), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_exhausted_space_goes_on_with_zeros(x64, dtype):
    h = np.diag([1.0, 1.0, 1.0, 4.0, 4.0, 9.0])  # three eigenvalues, three dimensions
    v, t = run(h, jnp.ones(6, dtype), 6)
    np.testing.assert_array_equal(v[3:], np.zeros((3, 6)))
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(t[3:, 3:], float(t[0, 0]) * np.eye(3), rtol=1e-6)
    np.testing.assert_array_equal(t[3:, :3], np.zeros((3, 3)))
    extremes = np.linalg.eigvalsh(np.asarray(t, np.float64))[[0, -1]]
    np.testing.assert_allclose(extremes, [1, 9], rtol=100 * eps)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_the_length_of_the_start_does_not_matter(size):
    start = jnp.asarray(START, jnp.float32)
    want, _ = run(H, start, 3)
    got, _ = run(H, start * size, 3)
    # Some tens of roundings, times a condition of the third vector of about 10.
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_from_zero_there_is_nothing():
    v, t = run(H, jnp.zeros(7), 3)
    assert not v.any() and not t.any()

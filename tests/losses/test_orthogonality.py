"""Penalties of near-isometric layers, against the matrices that they speak of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ext as ox

CONV = ox.losses.orthogonal_conv_penalty
DENSE = ox.losses.orthogonal_dense_penalty


def kernel_of(seed, k, channels, filters):
    rng = np.random.default_rng(seed)
    return jnp.asarray(0.4 * rng.normal(size=(k, k, channels, filters)))


def circular_matrix(kernel, stride, outputs):
    """The matrix of a circular convolution to outputs x outputs, in NumPy."""
    kernel = np.asarray(kernel)
    k, _, channels, filters = kernel.shape
    size = stride * outputs
    matrix = np.zeros((outputs, outputs, filters, size, size, channels))
    for i, j, u, v in np.ndindex(outputs, outputs, k, k):
        row, column = (stride * i + u) % size, (stride * j + v) % size
        matrix[i, j, :, row, column, :] += kernel[u, v].T
    return matrix.reshape(outputs**2 * filters, size**2 * channels)


@pytest.mark.parametrize(
    ("k", "channels", "filters", "stride", "outputs"),
    [
        (3, 2, 2, 1, 5),
        (3, 3, 2, 1, 6),
        (3, 2, 5, 1, 5),
        (3, 2, 3, 2, 4),
        (3, 1, 6, 2, 4),
        (2, 2, 3, 1, 4),
        (4, 1, 2, 2, 4),
        (1, 3, 2, 1, 2),
        (1, 2, 5, 2, 2),
    ],
)
def test_penalty_is_that_of_the_circular_convolution_matrix(
    x64, k, channels, filters, stride, outputs
):
    kernel = kernel_of(0, k, channels, filters)
    a = circular_matrix(kernel, stride, outputs)
    rows = filters <= channels * stride**2
    gram = a @ a.T if rows else a.T @ a
    want = ((gram - np.eye(len(gram))) ** 2).sum() / outputs**2
    assert CONV(kernel, stride=stride) == pytest.approx(want, rel=1e-9)


def test_a_shift_of_an_orthogonal_map_has_no_penalty(x64):
    q = jnp.linalg.qr(jnp.asarray(np.random.default_rng(1).normal(size=(4, 4))))[0]
    for place in ((1, 1), (0, 2)):
        kernel = jnp.zeros((3, 3, 4, 4)).at[place].set(q)
        assert abs(CONV(kernel)) < 1e-28


@pytest.mark.parametrize(("filters", "stride"), [(2, 1), (4, 1), (4, 2)])
def test_descent_on_the_penalty_makes_the_layer_an_isometry(x64, filters, stride):
    kernel = kernel_of(2, 3, 2, filters)
    grad = jax.jit(jax.grad(lambda x: CONV(x, stride=stride)))
    for _ in range(3000):
        kernel = kernel - 0.02 * grad(kernel)
    assert CONV(kernel, stride=stride) < 1e-3
    singular = np.linalg.svd(circular_matrix(kernel, stride, 5), compute_uv=False)
    # L bounds the squares: sum of (s^2 - 1)^2 is 25 L.
    assert abs(singular**2 - 1).max() < (25 * 1e-3) ** 0.5


def test_a_convolution_of_size_one_is_a_dense_layer(x64):
    for shape in ((3, 5), (5, 3), (4, 4)):
        w = jnp.asarray(np.random.default_rng(3).normal(size=shape))
        got = CONV(w[None, None])
        assert DENSE(w) == pytest.approx(float(got), rel=1e-12)
        assert DENSE(w.T) == pytest.approx(float(DENSE(w)), rel=1e-12)
    assert DENSE(jnp.linalg.qr(w)[0]) < 1e-28


def test_gradients_at_zero_are_zero():
    for loss, shape in ((CONV, (3, 3, 2, 2)), (DENSE, (3, 2))):
        assert not jax.grad(loss)(jnp.zeros(shape)).any()


def test_bad_kernels_are_named():
    for loss in (CONV, DENSE):
        with pytest.raises(AssertionError, match="kernel"):
            loss(jnp.ones(3))
    with pytest.raises(AssertionError, match="kernel must be square, got 3 x 2"):
        CONV(jnp.ones((3, 2, 1, 1)))
    with pytest.raises(ValueError, match="stride must be an integer"):
        CONV(jnp.ones((3, 3, 1, 1)), stride=0)

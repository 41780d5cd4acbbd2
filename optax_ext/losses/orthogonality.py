r"""Penalties that make layers near-isometric.

A layer W with :math:`W W^T = I` (or :math:`W^T W = I`, if it widens) neither stretches
nor shrinks what it is given.

| layer | penalty | link |
|---|---|---|
| convolution [k, k, C, M] | `orthogonal_conv_penalty` | `add_orthogonal_regularizer` |
| dense [n_in, n_out] | `orthogonal_dense_penalty` | the same |

A convolution is a large sparse matrix. The inner product of two of its rows is that of
two shifted filters, so that the whole Gram matrix is one small convolution of the
kernel with itself.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_interval
from optax_ext.losses._numerics import working_floats

_TITLE = (
    "Existence, Stability and Scalability of Orthogonal Convolutional Neural Networks"
)


@catalogued(
    title=_TITLE,
    arxiv="2108.05623",
    kind="loss",
    needs=("kernel",),
    variant="deel-lip's, by authors of the paper; kernels of even size too",
    compared="golden orthogonal_conv_penalty; Gram matrices of circular convolutions",
    example=lambda: {"kernel": jnp.linspace(-0.5, 0.7, 36).reshape(3, 3, 2, 2)},
)
def orthogonal_conv_penalty(kernel: chex.Array, *, stride: int = 1) -> jax.Array:
    r"""How far a convolution is from an orthogonal one.

    With K * K the cross-correlation, at the layer's stride S, of the kernel with itself
    for all shifts at which the two meet, and :math:`I_0` the identity at shift 0,

    .. math:: L = |K * K - I_0|_F^2 - \max(0, M - C S^2).

    For circular convolutions to N x N outputs, with A the matrix of the layer,
    :math:`N^2 L = |A A^T - I|_F^2` if :math:`M \le C S^2`, and
    :math:`|A^T A - I|_F^2` else. The constant makes 0 the least value.

    Args:
      kernel: [k, k, C, M], from C channels to M, as in Flax.
      stride: S of the layer, both ways.

    Returns:
      L, a scalar.

    Raises:
      AssertionError: for another rank, a kernel that is not square, or no floats.
      ValueError: for a stride below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> delta = jnp.zeros((3, 3, 2, 2)).at[1, 1].set(jnp.eye(2))
      >>> print(ox.losses.orthogonal_conv_penalty(delta))
      0.0
    """
    check_interval("orthogonal_conv_penalty", stride=stride)
    (kernel,) = working_floats(kernel=kernel)
    chex.assert_rank(kernel, 4, custom_message="kernel")
    k, k2, channels, filters = kernel.shape
    assert k == k2, f"kernel must be square, got {k} x {k2}"

    reach = ((k - 1) // stride) * stride
    # Filters as a batch of k x k images, [M, k, k, C].
    shifted = jax.lax.conv_general_dilated(
        jnp.moveaxis(kernel, -1, 0),
        kernel,
        window_strides=(stride, stride),
        padding=((reach, reach), (reach, reach)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,
    )
    centre = reach // stride
    eye = jnp.eye(filters, dtype=kernel.dtype)
    gap = shifted.at[:, centre, centre, :].add(-eye)
    return jnp.sum(gap**2) - max(0, filters - channels * stride**2)


@catalogued(
    title=_TITLE,
    arxiv="2108.05623",
    kind="loss",
    needs=("kernel",),
    variant="the smaller of the two Gram matrices, as in deel-lip",
    compared="golden orthogonal_conv_penalty; a convolution of size 1",
    example=lambda: {"kernel": jnp.array([[0.5, 0.2], [-0.1, 0.8], [0.3, 0.3]])},
)
def orthogonal_dense_penalty(kernel: chex.Array) -> jax.Array:
    r"""How far a dense layer is from an orthogonal one.

    .. math:: L = |G - I|_F^2, \qquad G = W W^T \text{ or } W^T W,

    whichever is smaller.

    Args:
      kernel: W, [n_in, n_out].

    Returns:
      L, a scalar.

    Raises:
      AssertionError: for another rank, or no floats.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> print(ox.losses.orthogonal_dense_penalty(2 * jnp.eye(3)))
      27.0
    """
    (w,) = working_floats(kernel=kernel)
    chex.assert_rank(w, 2, custom_message="kernel")
    rows, columns = w.shape
    left, right = (w, w.T) if rows <= columns else (w.T, w)
    gram = jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum((gram - jnp.eye(len(gram), dtype=w.dtype)) ** 2)


def orthogonal_penalty(kernel: Any, stride: int) -> jax.Array:
    """The penalty of a kernel by its rank; 0 for other ranks."""
    if kernel.ndim == 4:
        return orthogonal_conv_penalty(kernel, stride=stride)
    if kernel.ndim == 2:
        return orthogonal_dense_penalty(kernel)
    return jnp.zeros((), kernel.dtype)

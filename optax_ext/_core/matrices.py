"""Leaves as matrices [fan_in, fan_out], in Flax's layout."""

import math

import jax


def as_matrix(x: jax.Array) -> jax.Array:
    """A leaf of rank 2 or more as one matrix: the last axis is the output features.

    A convolution [kh, kw, in, out] becomes [kh * kw * in, out]. Kernels whose heads are
    output axes, and stacks of layers, are for `optax_ext.as_matrices`, which knows more
    than a shape.

    Args:
      x: array of rank 2 or more.

    Returns:
      The same numbers, [prod(shape[:-1]), shape[-1]]; ``y.reshape(x.shape)`` goes back.
    """
    return x.reshape(matrix_shape(x.shape))


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of `as_matrix` of a leaf of this shape."""
    return math.prod(shape[:-1]), shape[-1]

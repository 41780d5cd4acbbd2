"""Lengths, inner products and projections, of one leaf and of a whole tree."""

from typing import Any

import jax
import jax.numpy as jnp

from optax_ext._core.trees import computing_dtype, flatten_like, is_hole


def length(x: jax.Array, axis: Any = None, keepdims: bool = False) -> jax.Array:
    """The Euclidean norm, scaled by the largest entry: 1e30 does not overflow."""
    largest = jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=0.0)
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    # 1/scale would be infinite for subnormal numbers.
    squares = jnp.sum((jnp.abs(x) / scale) ** 2, axis=axis, keepdims=True)
    norm = scale * jnp.sqrt(squares)
    return norm if keepdims else jnp.squeeze(norm, axis=axis)


def tangent(x: jax.Array, w: jax.Array, axis: Any = None) -> jax.Array:
    r"""The part of x orthogonal to w: :math:`x - w \langle w, x \rangle / |w|^2`.

    Along `axis` (default: the whole array). x itself where w is 0.
    """
    norm = length(w, axis, keepdims=True)
    unit = w / jnp.where(norm > 0, norm, 1)
    return x - unit * jnp.sum(unit * x, axis=axis, keepdims=True)


def to_sphere(
    u: jax.Array, w: jax.Array, radius: jax.Array, axis: Any = None, eps: float = 0.0
) -> jax.Array:
    r"""The update that takes w to :math:`r y / |y|`, where :math:`y = w + u`.

    u itself where the radius r or :math:`|y|` is at most eps: radius 0 means free.

    Args:
      u: an update of w.
      w: an array.
      radius: length along `axis`, with that axis kept; a scalar for the whole array.
      axis: axes of a length; None is the whole array.
      eps: smallest length that has a direction.
    """
    y = w + u
    norm = length(y, axis, keepdims=axis is not None)
    held = (radius > eps) & (norm > eps)
    return jnp.where(held, y / jnp.where(held, norm, 1) * radius - w, u)


def inner_product(a: Any, b: Any, owner: str = "update") -> jax.Array:
    """The real inner product of two trees, in float32 or wider.

    Leaves of `b` at the holes of `a` do not count.
    """
    leaves, (others,), _ = flatten_like(a, b, owner=owner)
    parts = []
    for x, y in zip(leaves, others, strict=True):
        if is_hole(x):
            continue
        for u, v in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
            dtype = computing_dtype(u, v)
            parts.append(jnp.vdot(u.astype(dtype), v.astype(dtype)).real)
    if not parts:
        return jnp.zeros((), jnp.float32)
    wide = computing_dtype(*parts)
    return jnp.sum(jnp.stack([part.astype(wide) for part in parts]))


def tree_length(tree: Any) -> jax.Array:
    """The Euclidean norm of a whole tree, in float32 or wider, without overflow."""
    lengths = [
        length(x.astype(computing_dtype(x))).reshape(()) for x in jax.tree.leaves(tree)
    ]
    if not lengths:
        return jnp.zeros((), jnp.float32)
    wide = computing_dtype(*lengths)
    return length(jnp.stack([n.astype(wide) for n in lengths]))

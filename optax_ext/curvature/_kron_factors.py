"""Kronecker factors of a preconditioner: one matrix or diagonal for each axis.

A preconditioner of a tensor is P = Q^T Q with Q a Kronecker product of factors Q_i, an
upper triangular [d, d] or, for a diagonal, its [d] numbers. Applying Q to a tensor is
applying each factor along its axis.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from optax_ext._core.matrices import matrix_shape

Factors = tuple[jax.Array, ...]


def view_shape(shape: tuple[int, ...], merge_dims: bool) -> tuple[int, ...]:
    """The tensor as which a leaf is seen: a scalar is a vector, of length 1."""
    if merge_dims and len(shape) > 2:
        return matrix_shape(shape)
    return shape or (1,)


def diagonal_axes(
    shape: tuple[int, ...], max_size: int, min_ndim: int, memory_save_mode: str | None
) -> list[bool]:
    """For each axis, whether its factor is a diagonal."""
    longest = max(range(len(shape)), key=lambda i: (shape[i], i))
    is_unique = len(shape) > 1 and shape.count(shape[longest]) == 1
    chosen = {
        None: (),
        "one_diag": (longest,),
        "smart_one_diag": (longest,) if is_unique else (),
        "all_diag": range(len(shape)),
    }[memory_save_mode]
    return [
        size == 1 or size > max_size or len(shape) < min_ndim or axis in chosen
        for axis, size in enumerate(shape)
    ]


def identity(x: jax.Array, is_diagonal: Sequence[bool], scale: float) -> Factors:
    """Factors whose product is scale times the identity, for a tensor like x."""
    each = scale ** (1 / x.ndim)
    factors = []
    for axis, diagonal in enumerate(is_diagonal):
        # Made of x, so that a diagonal lies on the devices on which the axis does.
        others = tuple(i for i in range(x.ndim) if i != axis)
        ones = jnp.sum(jnp.zeros_like(x), axis=others) + 1
        eye = ones if diagonal else jnp.eye(x.shape[axis], dtype=x.dtype)
        factors.append(each * eye)
    return tuple(factors)


def _unfold(x: jax.Array, axis: int) -> jax.Array:
    """The tensor as a matrix whose rows are those of an axis."""
    return jnp.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)


def _fold(m: jax.Array, axis: int, shape: tuple[int, ...]) -> jax.Array:
    others = [n for i, n in enumerate(shape) if i != axis]
    return jnp.moveaxis(m.reshape(shape[axis], *others), 0, axis)


def _along(q: jax.Array, x: jax.Array, axis: int) -> jax.Array:
    """Q applied along an axis."""
    rows = _unfold(x, axis)
    return _fold(q[:, None] * rows if q.ndim == 1 else q @ rows, axis, x.shape)


def _inverse_along(q: jax.Array, x: jax.Array, axis: int) -> jax.Array:
    """Q^-T applied along an axis."""
    rows = _unfold(x, axis)
    if q.ndim == 1:
        return _fold(rows / q[:, None], axis, x.shape)
    solved = jax.lax.linalg.triangular_solve(
        q, rows, left_side=True, lower=False, transpose_a=True
    )
    return _fold(solved, axis, x.shape)


def _gram(x: jax.Array, axis: int, like: jax.Array) -> jax.Array:
    """Inner products of the rows of an axis; squares alone for a diagonal factor."""
    rows = _unfold(x, axis)
    return jnp.sum(rows**2, axis=1) if like.ndim == 1 else rows @ rows.T


def _spectral_lower_bound(m: jax.Array) -> jax.Array:
    """A lower bound of the norm of a symmetric matrix, from its longest column."""
    largest = jnp.max(jnp.abs(m))
    m = m / jnp.where(largest > 0, largest, 1)
    y = m.T @ m[:, jnp.argmax(jnp.sum(m**2, axis=0))]
    norm = jnp.linalg.norm(y)
    return largest * jnp.linalg.norm(m @ (y / jnp.where(norm > 0, norm, 1)))


def apply(factors: Factors, x: jax.Array) -> jax.Array:
    """P x = Q^T Q x."""
    for axis, q in enumerate(factors):
        x = _along(q.T, _along(q, x, axis), axis)
    return x


def fit(factors: Factors, x: jax.Array, v: jax.Array, rate: float) -> Factors:
    """Factors one step nearer to P = E[x x^T]^-1, with a probe v."""
    a, b = x, v
    for axis, q in enumerate(factors):
        a, b = _along(q, a, axis), _inverse_along(q, b, axis)
    # A step does not depend on the scale of the pair; squares must not overflow.
    largest = jnp.maximum(jnp.max(jnp.abs(a)), jnp.max(jnp.abs(b)))
    size = jnp.where(largest > 0, largest, 1)
    a, b = a / size, b / size
    tiny, new = jnp.finfo(x.dtype).tiny, []
    for axis, q in enumerate(factors):
        t1, t2 = _gram(a, axis, q), _gram(b, axis, q)
        if q.ndim == 1:
            norm, change = jnp.max(jnp.abs(t1 + t2)), (t1 - t2) * q
        else:
            norm, change = _spectral_lower_bound(t1 + t2), jnp.triu(t1 - t2) @ q
        new.append(q - rate / jnp.maximum(norm, tiny) * change)
    return tuple(new)


def balanced(factors: Factors) -> Factors:
    """The same product, with factors whose largest entries are equal."""
    sizes = jnp.stack([jnp.max(jnp.abs(q)) for q in factors])
    logs = jnp.log(jnp.maximum(sizes, jnp.finfo(sizes.dtype).tiny))
    scales = jnp.exp(jnp.mean(logs) - logs)
    return tuple(q * scale for q, scale in zip(factors, scales, strict=True))

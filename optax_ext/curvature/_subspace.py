"""What the subspace rules share: sides of a matrix, cosines, Adam on a part."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.checks import check_choice
from optax_ext._core.geometry import length
from optax_ext._core.matrices import as_matrix, matrix_shape


def small_side(shape: tuple[int, ...]) -> tuple[int, int]:
    """The smaller and the larger side of a leaf's matrix."""
    rows, columns = sorted(matrix_shape(shape))
    return rows, columns


def small_side_first(
    x: jax.Array,
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """The matrix of a leaf with its smaller side (inputs on ties) as axis 0.

    Args:
      x: a leaf of rank 2 or more.

    Returns:
      The matrix, and the function that makes a leaf of such a matrix again.
    """
    matrix = as_matrix(x)
    if matrix.shape[0] <= matrix.shape[1]:
        return matrix, lambda y: y.reshape(x.shape)
    return matrix.T, lambda y: y.T.reshape(x.shape)


def adam_step(
    adam: optax.GradientTransformation,
    g: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    count: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One step of `optax.scale_by_adam` on one array, with a count of its own.

    Args:
      adam: from `adam_direction`.
      g: a gradient, or the part of one.
      mu: first moment.
      nu: second moment.
      count: steps that went into the moments before this one.

    Returns:
      The direction, the first and the second moment.
    """
    # optax mixes integer counts with floats, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard"):
        state = optax.ScaleByAdamState(count, mu, nu)
        direction, state = adam.update(g, state)
    new: Any = state
    return jnp.asarray(direction), new.mu, new.nu


def cosine_basis(basis: str, n: int, dtype: Any) -> jax.Array:
    """The orthogonal matrix [n, n] whose columns are to be chosen from."""
    i = jnp.arange(n, dtype=jnp.int32)
    # The cosine has a period of 4 n of these.
    steps = i[:, None] * (2 * i[None, :] + 1) % (4 * n)
    q = math.sqrt(2 / n) * jnp.cos(steps.astype(dtype) * (math.pi / (2 * n)))
    q = jnp.where(i[:, None] == 0, jnp.asarray(n**-0.5, dtype), q)
    return q if basis == "dct3" else q.T


def best_rows(s: jax.Array, rank: int, norm_ord: int) -> tuple[jax.Array, jax.Array]:
    """Sorted indices of the `rank` largest rows of s, and the largest size."""
    size = length(s, axis=1) if norm_ord == 2 else jnp.sum(jnp.abs(s), axis=1)
    best = jnp.sort(jax.lax.top_k(size, rank)[1])
    return best.astype(jnp.int32), jnp.max(size)


def check_cosines(owner: str, norm_ord: int, basis: str) -> None:
    """Check how cosine vectors are chosen."""
    check_choice(owner, "basis", basis, ("dct3", "dct2"))
    if norm_ord not in (1, 2):
        raise ValueError(f"{owner}: norm_ord must be 1 or 2, got {norm_ord!r}")

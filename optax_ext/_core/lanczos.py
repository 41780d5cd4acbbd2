"""Lanczos iteration: a symmetric matrix on the Krylov space of a vector."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from optax_ext._core.geometry import length

# A GPU's default is TF32, in which nothing stays orthogonal.
_dot = functools.partial(jnp.matmul, precision="highest")


def lanczos(
    matvec: Callable[[jax.Array], jax.Array], start: jax.Array, rank: int
) -> tuple[jax.Array, jax.Array]:
    """An orthonormal basis V of a Krylov space, and V H V'.

    Every new vector is orthogonalised twice against all others. Where the space is
    exhausted, the basis goes on with zeros, and the matrix with copies of its first
    entry: a Rayleigh quotient lies between the extreme eigenvalues, so that neither
    they nor a function of the matrix applied to `start` notice.

    Args:
      matvec: v -> H v for a symmetric H, [n] -> [n].
      start: first vector, of any length, [n].
      rank: size of the space, at most n.

    Returns:
      Basis [rank, n], its first row `start` over its length; matrix [rank, rank].
    """
    norm = length(start)
    basis = jnp.zeros((rank, start.size), start.dtype)
    basis = basis.at[0].set(start / jnp.where(norm > 0, norm, 1))
    zeros = jnp.zeros(rank, start.dtype)
    noise = 100 * jnp.finfo(start.dtype).eps

    def step(j, carry):
        basis, alpha, beta, largest = carry
        product = matvec(basis[j])
        largest = jnp.maximum(largest, length(product))
        rest = product
        for _ in range(2):
            rest = rest - _dot(_dot(basis, rest), basis)
        norm = length(rest)
        alive = norm > noise * largest
        new = jnp.where(alive, rest / jnp.where(alive, norm, 1), 0)
        basis = basis.at[j + 1].set(new, mode="drop")
        alpha = alpha.at[j].set(_dot(basis[j], product))
        return basis, alpha, beta.at[j].set(jnp.where(alive, norm, 0)), largest

    carry = (basis, zeros, zeros, jnp.zeros((), start.dtype))
    basis, alpha, beta, _ = jax.lax.fori_loop(0, rank, step, carry)
    alpha = jnp.where(jnp.any(basis != 0, axis=1), alpha, alpha[0])
    off = jnp.diag(beta[:-1], 1)
    return basis, jnp.diag(alpha) + off + off.T

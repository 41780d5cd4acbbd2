"""The groups in which PSGD's preconditioners move: an X, a diagonal plus low rank.

The lines are those of psgd_torch, a8616f1, with the second-order step size. A fit does
not change where q, w, v and h are all multiplied by one number, which is used to keep
every intermediate within the range of float32.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_ext._core.geometry import length


class XmatPreconditioner(NamedTuple):
    """Q = diag(a) + antidiag(b), over n parameters."""

    a: jax.Array
    b: jax.Array


class LraPreconditioner(NamedTuple):
    """Q = (I + U V^T) diag(d), over n parameters."""

    U: jax.Array
    V: jax.Array
    d: jax.Array


class Group(NamedTuple):
    """What a family of preconditioners must do.

    Attributes:
      start: (n, dtype, key) -> Q near the identity.
      scale: (Q, scale) -> scale * Q.
      fit: (Q, v, h, step size, number of the fit, key) -> Q.
      apply: (Q, x) -> Q^T Q x.
    """

    start: Callable[..., Any]
    scale: Callable[..., Any]
    fit: Callable[..., Any]
    apply: Callable[..., Any]


def _unit_pair(q: jax.Array, w: jax.Array, *others: jax.Array) -> tuple[Any, ...]:
    """All vectors over the largest entry of q and w: a fit is homogeneous in them."""
    largest = jnp.maximum(jnp.max(jnp.abs(q)), jnp.max(jnp.abs(w)))
    size = jnp.where(largest > 0, largest, 1)
    return tuple(x / size for x in (q, w, *others))


def xmat() -> Group:
    """Q = diag(a) + antidiag(b)."""
    flip = jnp.flip

    def start(n, dtype, key):
        del key
        return XmatPreconditioner(jnp.ones(n, dtype), jnp.zeros(n, dtype))

    def fit(precond, v, h, rate, number, key):
        del number, key
        a, b = precond
        q = a * h + b * flip(h)
        w = (flip(a) * v - flip(b) * flip(v)) / (a * flip(a) - b * flip(b))
        q, w = _unit_pair(q, w)
        along, across = q**2 - w**2, q * flip(q) - w * flip(w)
        if v.size % 2:  # the middle of the X belongs to the diagonal
            across = across.at[v.size // 2].set(0)
        step = rate / jnp.maximum(jnp.max(q**2 + w**2), jnp.finfo(v.dtype).tiny)
        return XmatPreconditioner(
            a - step * (along * a + across * flip(b)),
            b - step * (along * b + across * flip(a)),
        )

    def apply(precond, x):
        a, b = precond
        return (a**2 + flip(b) ** 2) * x + (a * b + flip(a * b)) * flip(x)

    def scale(precond, factor):
        return XmatPreconditioner(*(factor * x for x in precond))

    return Group(start, scale, fit, apply)


def lra(rank: int, uv_update: str, balance_interval: int) -> Group:
    """Q = (I + U V^T) diag(d)."""

    def start(n, dtype, key):
        each = jax.random.normal(key, (2, n, rank), dtype)
        u, v = each / jnp.sqrt(jnp.asarray(max(n, 1) * (rank + 10), dtype))
        return LraPreconditioner(u, v, jnp.ones(n, dtype))

    def balanced(u, v, number):
        is_due = (number > 0) & (number % balance_interval == 0)
        sizes = length(u), length(v)
        is_due &= (sizes[0] > 0) & (sizes[1] > 0)
        rho = jnp.sqrt(jnp.where(is_due, sizes[0] / sizes[1], 1))
        return u / rho, v * rho

    def fit(precond, v, h, rate, number, key):
        U, V, d = precond
        U, V = balanced(U, V, number)
        inner = jnp.eye(rank, dtype=d.dtype) + V.T @ U
        q = d * h + U @ (V.T @ (d * h))
        w = v / d
        w = w - V @ jnp.linalg.solve(inner.T, U.T @ w)
        q, w, h, v = _unit_pair(q, w, h, v)
        ph = d * (q + V @ (U.T @ q))
        pv = (w - U @ jnp.linalg.solve(inner, V.T @ w)) / d
        tiny = jnp.finfo(d.dtype).tiny
        largest = jnp.max(jnp.hypot(ph, v) * jnp.hypot(h, pv))
        d = d - rate / jnp.maximum(largest, tiny) * d * (ph * h - v * pv)

        def step(x, q_of, w_of):
            size = length(q) * length(x @ q_of) + length(w) * length(x @ w_of)
            return rate / jnp.maximum(size, tiny)

        def move_u():
            q_v, w_v = V.T @ q, V.T @ w
            change = (jnp.outer(q, q_v) - jnp.outer(w, w_v)) @ inner
            return U - step(V, q_v, w_v) * change, V

        def move_v():
            q_u, w_u = U.T @ q, U.T @ w
            change = jnp.outer(q + V @ q_u, q_u) - jnp.outer(w + V @ w_u, w_u)
            return U, V - step(U, q_u, w_u) * change

        is_u = jax.random.bernoulli(key) if uv_update == "random" else number % 2 == 0
        U, V = jax.lax.cond(is_u, move_u, move_v)
        return LraPreconditioner(U, V, d)

    def apply(precond, x):
        U, V, d = precond
        q = d * x + U @ (V.T @ (d * x))
        return d * (q + V @ (U.T @ q))

    def scale(precond, factor):
        return precond._replace(d=factor * precond.d)

    return Group(start, scale, fit, apply)

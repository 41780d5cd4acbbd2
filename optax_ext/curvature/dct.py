r"""Low-rank updates in the columns of a cosine matrix that fit the gradient best.

The discrete cosine transform is a fixed orthogonal matrix Q. The few columns of it that
carry most of a gradient take the place of singular vectors: to store the subspace is to
store indices, and to change it is to move rows. `scale_by_dct_adam` runs Adam in that
subspace; `scale_by_trion` (in its own module) orthogonalises the momentum there.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_interval
from optax_ext._core.leaves import init_leaves, map_leaves, next_count
from optax_ext._core.optimizers import adam_direction, finish
from optax_ext.curvature._subspace import (
    adam_step,
    best_rows,
    check_cosines,
    cosine_basis,
    small_side,
    small_side_first,
)

TITLE = (
    "FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large "
    "Language Models"
)


@catalogued(
    title=TITLE,
    arxiv="2505.17967",
    kind="helper",
    variant="orthogonal; angles are reduced to one turn in integers, so that float32 "
    "does not round them.",
    compared="closed form: its product with its transpose",
    example=lambda: {"n": 4},
)
def dct_matrix(n: int) -> jax.Array:
    r"""The orthogonal matrix of the discrete cosine transform (DCT-III).

    .. math:: Q_{ij} = \sqrt{2/n}\, \cos \frac{\pi i (2j + 1)}{2n}, \qquad
      Q_{0j} = 1 / \sqrt{n}

    Args:
      n: number of rows and columns, up to 32767.

    Returns:
      Q [n, n], float32, or float64 where jax has it enabled.

    Raises:
      ValueError: for `n` below 1 or above 32767, where the angles need more than int32.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> q = ox.dct_matrix(4)
      >>> print(abs(q.T @ q - jnp.eye(4)).max() < 1e-6)
      True
    """
    check_interval("dct_matrix", n=n)
    if n > 32767:
        raise ValueError(f"dct_matrix: n must be at most 32767, got {n}")
    return cosine_basis("dct3", n, jnp.zeros(0, float).dtype)


def _moved(x: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    """Row k of x belongs to old[k]: the rows for `new`, 0 for those not in old."""
    same = new[:, None] == old[None, :]
    return jnp.where(same.any(axis=1)[:, None], x[jnp.argmax(same, axis=1)], 0)


class DCTAdamState(NamedTuple):
    """State of `scale_by_dct_adam`.

    `indices` are the columns in use, None for a leaf that gets plain Adam; `residual`
    is () without error feedback.
    """

    count: jax.Array
    mu: optax.Updates
    nu: optax.Updates
    indices: optax.Updates
    residual: optax.Updates


@catalogued(
    title=TITLE,
    arxiv="2505.17967",
    kind="link",
    state="2 * rank / smaller side (+ 1 with error feedback); 2 for leaves that get "
    "plain Adam",
    slots=0.09375,
    variant="moments follow their basis vectors, as in the paper; the released class "
    "does not unless asked, and its rotation overwrites its own input.",
    compared="goldens dct_adamw, dct_adamw_ef",
    example=lambda: {"rank": 2},
)
def scale_by_dct_adam(
    rank: int,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    update_interval: int = 1,
    rotate: bool = True,
    error_feedback: bool = False,
    norm_ord: int = 1,
    basis: str = "dct3",
    max_dim: int = 32000,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam in the `rank` cosine vectors that fit each gradient best.

    With G the matrix of the leaf, turned so that its smaller side (the inputs on ties)
    is axis 0, and E = 0 without error feedback:

    .. math::
      A_t = G_t + E_{t-1}, \quad S = Q^T A_t, \quad
      I_t = \text{largest rows of } S, \quad
      u_t = Q_{:, I_t}\, \text{Adam}(S_{I_t}), \quad
      E_t = A_t - Q_{:, I_t} S_{I_t}

    Leaves of rank 0 and 1, those with a side of `max_dim` or more, and those whose
    smaller side is at most `rank` get plain Adam.

    Args:
      rank: number of cosine vectors a matrix.
      b1: decay rate of the first moment, in [0, 1) (official).
      b2: decay rate of the second moment, in [0, 1) (official).
      eps: added to the root of the second moment (official).
      update_interval: vectors are chosen at step 1 and at its multiples (official: 1).
      rotate: whether moments follow their vectors to new places, and those of new
        vectors start at 0. If not, they stay at their place among the sorted indices.
      error_feedback: whether to add what the subspace left out to the next gradient.
      norm_ord: 1 or 2, the norm that measures rows (official: 1).
      basis: "dct3", or "dct2" for its transpose (the official 'makhoul' mode).
      max_dim: sides from here on are too large to transform (official; for embeddings).

    Returns:
      A link that emits the un-negated direction.

    Raises:
      ValueError: for hyper-parameters outside their range.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> tx = ox.scale_by_dct_adam(rank=1)
      >>> g = 7.0 * ox.dct_matrix(4)[:, 2:3] * jnp.ones((1, 5))
      >>> updates, state = tx.update(g, tx.init(g))
      >>> print(state.indices, state.mu.shape, (updates / g).round(3)[0, 0])
      [2] (1, 5) 0.143
    """
    owner = "scale_by_dct_adam"
    adam = adam_direction(owner, b1, b2, eps, 0.0, None)
    check_interval(owner, rank=rank, update_interval=update_interval, max_dim=max_dim)
    check_cosines(owner, norm_ord, basis)

    def is_low(p):
        return p.ndim > 1 and (
            rank < small_side(p.shape)[0] and small_side(p.shape)[1] < max_dim
        )

    def init_leaf(p):
        if not is_low(p):
            return jnp.zeros_like(p), jnp.zeros_like(p), None
        low = jnp.zeros((rank, small_side(p.shape)[1]), p.dtype)
        return low, jnp.zeros_like(low), jnp.arange(rank, dtype=jnp.int32)

    def init_residual(p):
        return (jnp.zeros_like(p) if is_low(p) else None,)

    def init(params):
        mu, nu, indices = init_leaves(init_leaf, params, 3)
        residual = init_leaves(init_residual, params, 1)[0] if error_feedback else ()
        return DCTAdamState(jnp.zeros([], jnp.int32), mu, nu, indices, residual)

    def update(updates, state, params=None, **extra):
        del params, extra
        step = state.count + 1
        choosing = (step == 1) | (step % update_interval == 0)

        def rule(g, slots):
            m, v, old, *residual = slots
            if old is None:
                u, m, v = adam_step(adam, g, m, v, state.count)
                return u, (m, v, old, *residual)
            a, back = small_side_first(g + residual[0] if residual else g)
            q = cosine_basis(basis, a.shape[0], a.dtype)
            s = q.T @ a
            best, largest = best_rows(s, rank, norm_ord)
            # Rows of 0 tie, which is no reason to move.
            new = jnp.where(choosing & (largest > 0), best, old)
            if rotate:
                m, v = _moved(m, old, new), _moved(v, old, new)
            u, m, v = adam_step(adam, s[new], m, v, state.count)
            residual = [back(a - q[:, new] @ s[new]) for _ in residual]
            return back(q[:, new] @ u), (m, v, new, *residual)

        slots = (*state[1:4], *([state.residual] if error_feedback else []))
        out, slots = map_leaves(rule, updates, slots, owner=owner)
        mu, nu, indices, residual = slots if error_feedback else (*slots, ())
        count = next_count(state.count)
        return out, DCTAdamState(count, mu, nu, indices, residual)

    return optax.GradientTransformationExtraArgs(init, update)


@catalogued(
    title=TITLE,
    arxiv="2505.17967",
    kind="optimizer",
    needs=("params",),
    state="2 * rank / smaller side (+ 1 with error feedback); 2 for leaves that get "
    "plain Adam",
    slots=0.09375,
    variant="decay multiplied by the learning rate; moments follow their vectors.",
    compared="goldens dct_adamw, dct_adamw_ef",
    example=lambda: {"learning_rate": 0.01, "rank": 2},
)
def dct_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    weight_decay: float = 0.0,
    mask: Any = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    update_interval: int = 1,
    rotate: bool = True,
    error_feedback: bool = False,
    norm_ord: int = 1,
    basis: str = "dct3",
    max_dim: int = 32000,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW in the `rank` cosine vectors that fit each gradient best.

    .. math:: x_t = x_{t-1} - \eta_t (u_t + \lambda x_{t-1})

    with u of `scale_by_dct_adam`.

    Args:
      learning_rate: number or schedule.
      rank: number of cosine vectors a matrix.
      weight_decay: decoupled decay, multiplied by the learning rate.
      mask: which leaves decay, as in `optax.add_decayed_weights`.
      b1: decay rate of the first moment, in [0, 1).
      b2: decay rate of the second moment, in [0, 1).
      eps: added to the root of the second moment.
      update_interval: steps between choices of vectors.
      rotate: whether moments follow their vectors to new places.
      error_feedback: whether to add what was left out to the next gradient.
      norm_ord: 1 or 2, the norm that measures how well a vector fits.
      basis: "dct3", or "dct2" for its transpose.
      max_dim: leaves with a side of this or more get plain Adam.

    Returns:
      A finished optimizer.

    Raises:
      ValueError: for hyper-parameters outside their range.

    Example:
      >>> import optax_ext as ox
      >>> tx = ox.dct_adamw(1e-3, rank=64, weight_decay=0.1)
    """
    return finish(
        scale_by_dct_adam(
            rank,
            b1,
            b2,
            eps,
            update_interval,
            rotate,
            error_feedback,
            norm_ord,
            basis,
            max_dim,
        ),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        mask=mask,
        owner="dct_adamw",
    )

r"""Compressed gradients whose error is not lost.

A compressor is a link: `topk_compressor` keeps the largest entries,
`lowrank_compressor` a low-rank part, and any other link will do.
`compress_with_error_feedback` adds what it left out to the next gradient, so that
nothing is lost for good. How strongly each layer may be compressed is a knapsack, which
`select_levels_lgreco` solves on the host, every hundred steps or so.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam, check_interval
from optax_ext._core.keys import KeyState, key_state
from optax_ext._core.leaves import init_leaves, map_leaves
from optax_ext._core.matrices import as_matrix
from optax_ext._core.trees import computing_dtype

_PAPER: dict[str, Any] = {
    "title": "L-GreCo: Layerwise-Adaptive Gradient Compression for Efficient and "
    "Accurate Deep Learning",
    "arxiv": "2210.17357",
}


@catalogued(
    **_PAPER,
    kind="link",
    slots=0,
    variant="the largest entries of each leaf; of equal ones the first.",
    compared="golden error_feedback_topk",
    example=lambda: {"density": 0.5},
)
def topk_compressor(density: float) -> optax.GradientTransformationExtraArgs:
    r"""Keep the largest entries of each leaf, and set the others to zero.

    Of d entries the :math:`k = \max(1, \lfloor \text{density} \cdot d \rfloor)` of
    largest size; of equal ones those that come first in memory.

    Args:
      density: share of the entries to keep, in (0, 1]. It may be traced, so that levels
        can change without a new program; a Python number is exact at whole products.

    Returns:
      A link without state, to be wrapped in `compress_with_error_feedback`.

    Raises:
      TypeError: for a density that is no number.
      ValueError: for a density outside (0, 1].

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> tx = ox.topk_compressor(0.5)
      >>> g = jnp.array([1.0, -3.0, 2.0, 0.5])
      >>> print(tx.update(g, tx.init(g))[0])
      [ 0. -3.  2.  0.]
    """
    check_hyperparam(
        "topk_compressor", low=0.0, high=1.0, open_low=True, density=density
    )

    def rule(g, slots):
        k = density * g.size
        k = math.floor(k) if isinstance(k, float | int) else jnp.floor(k).astype(int)
        _, order = jax.lax.top_k(jnp.abs(g).ravel(), g.size)
        largest = jnp.arange(g.size) < jnp.maximum(k, 1)
        kept = jnp.zeros(g.size, bool).at[order].set(largest)
        return jnp.where(kept.reshape(g.shape), g, 0), slots

    def update(updates, state, params=None, **extra):
        del params, extra
        return map_leaves(rule, updates)[0], state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update
    )


@catalogued(
    **_PAPER,
    kind="link",
    slots=0,
    variant="PowerSGD without a warm start: each step draws the start of its power "
    "iteration anew, the same for all leaves of one width.",
    compared="the singular value decomposition",
    example=lambda: {"rank": 2},
)
def lowrank_compressor(
    rank: int, power_iters: int = 1, key: jax.Array | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Keep a low-rank part of each matrix, found by power iteration.

    With A a leaf of rank 2 or more as a matrix [fan_in, fan_out], and
    :math:`Q \sim N(0, 1)` [fan_out, r], repeat

    .. math:: P = \text{orth}(A Q), \qquad Q = A^\top P

    and emit :math:`P Q^\top`: the part of A in the span of P, exact where A has rank r
    or less. Vectors and scalars pass as they are.

    Args:
      rank: r, cut to the smaller side of a matrix. Sent are r * (rows + columns)
        numbers.
      power_iters: how often P is made; each time brings it nearer to the leading
        singular vectors.
      key: where Q is drawn from; None is ``jax.random.key(0)``. Workers must agree.

    Returns:
      A link whose state is a key, to be wrapped in `compress_with_error_feedback`.

    Raises:
      ValueError: for `rank` or `power_iters` below 1.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> tx = ox.lowrank_compressor(rank=1)
      >>> g = jnp.outer(jnp.array([1.0, 2.0]), jnp.array([3.0, 0.0, -1.0]))
      >>> bool(jnp.allclose(tx.update(g, tx.init(g))[0], g, atol=1e-5))
      True
    """
    check_interval("lowrank_compressor", rank=rank, power_iters=power_iters)
    data, impl = key_state(key)

    def init(params):
        del params
        return KeyState(jnp.array(data))

    def update(updates, state, params=None, **extra):
        del params, extra
        use, keep = jax.random.split(jax.random.wrap_key_data(state.key, impl=impl))

        def rule(g, slots):
            if g.ndim < 2:
                return g, slots
            a = as_matrix(g)
            largest = jnp.max(jnp.abs(a))
            a = a / jnp.where(largest > 0, largest, 1)  # its squares do not overflow
            q = jax.random.normal(use, (a.shape[1], min(rank, *a.shape)), a.dtype)
            for _ in range(power_iters):
                p, _ = jnp.linalg.qr(a @ q)
                q = a.conj().T @ p
            return (p @ q.conj().T * largest).reshape(g.shape), slots

        out, _ = map_leaves(rule, updates, owner="lowrank_compressor")
        return out, KeyState(jax.random.key_data(keep))

    return optax.GradientTransformationExtraArgs(init, update)


class ErrorFeedbackState(NamedTuple):
    """State of `compress_with_error_feedback`; `residual` is what was left out."""

    residual: optax.Updates
    compressor_state: optax.OptState


@catalogued(
    **_PAPER,
    kind="link",
    state="1 (what was left out), and that of the compressor",
    slots=1,
    variant="any link as a compressor; what rounding to bfloat16 takes is fed back.",
    compared="golden error_feedback_topk; what was sent and is left is what came",
    example=lambda: {"compressor": topk_compressor(0.5)},
)
def compress_with_error_feedback(
    compressor: optax.GradientTransformation, decay: float = 1.0
) -> optax.GradientTransformationExtraArgs:
    r"""Compress gradients, and add what was left out to the next ones.

    .. math::
      a = g + \gamma E, \qquad \text{out} = q = C(a), \qquad E \leftarrow a - q

    from :math:`E = 0`. With :math:`\gamma = 1` the sum of what went out, plus E, is the
    sum of what came in. Across workers, average q.

    Args:
      compressor: C, a link: `topk_compressor`, `lowrank_compressor`, or another.
      decay: gamma, in [0, 1]; 1 forgets nothing, 0 is C alone.

    Returns:
      A link.

    Raises:
      ValueError: for `decay` outside [0, 1].

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> tx = ox.compress_with_error_feedback(ox.topk_compressor(0.5))
      >>> g = jnp.array([3.0, 2.0])
      >>> q, state = tx.update(g, tx.init(g))
      >>> print(q, tx.update(g, state)[0])
      [3. 0.] [0. 4.]
    """
    check_hyperparam("compress_with_error_feedback", low=0.0, high=1.0, decay=decay)
    compressor = optax.with_extra_args_support(compressor)

    def nothing(p):
        return (jnp.zeros_like(p),)

    def init(params):
        (residual,) = init_leaves(nothing, params, 1)
        return ErrorFeedbackState(residual, compressor.init(params))

    def corrected(g, slots, residual):
        return g + jnp.asarray(decay, g.real.dtype) * residual, slots

    def sent(g, slots, q):
        del g
        return q, slots

    def left(out, slots, a):
        del slots
        return out, (a - out,)

    def update(updates, state, params=None, **extra):
        wide = jax.tree.map(lambda g: g.astype(computing_dtype(g)), updates)
        a, _ = map_leaves(corrected, wide, (), (state.residual,))
        q, inner = compressor.update(a, state.compressor_state, params, **extra)
        # In the dtype of the gradients, so that rounding is a part of the error.
        out, _ = map_leaves(sent, updates, (), (q,))
        _, (residual,) = map_leaves(left, out, (state.residual,), (a,))
        return out, ErrorFeedbackState(residual, inner)

    return optax.GradientTransformationExtraArgs(init, update)


@catalogued(
    **_PAPER,
    kind="helper",
    needs=("errors", "sizes", "reference_level"),
    variant="the official hook's table, with a fallback to the reference where "
    "rounding to bins leaves nothing.",
    compared="golden lgreco_levels; exhaustive search",
    example=lambda: {
        "errors": np.array([[0.1, 0.2], [0.3, 0.9]]),
        "sizes": np.array([[8, 4], [8, 4]]),
        "reference_level": np.array([0, 0]),
    },
)
def select_levels_lgreco(
    errors: Any,
    sizes: Any,
    reference_level: Any,
    alpha: float = 1.0,
    bins: int = 10000,
) -> np.ndarray:
    r"""Choose a compression level for each layer: least size within an error budget.

    .. math::
      \min_c \sum_l s_{l c_l} \quad\text{subject to}\quad
      \sum_l \left\lceil \frac{e_{l c_l}}{B / \text{bins}} \right\rceil
      \le \text{bins}, \qquad B = \alpha \sum_l e_{l\, \text{ref}_l}

    by dynamic programming over bins. Rounding up keeps the true error within B. Of
    equal sizes the least total cost wins, then the lower level. Where nothing fits, or
    nothing smaller than the reference, the result is the reference. It runs in NumPy,
    on the host: measure the errors on gradients added up over some ten steps, and
    choose again about every hundred. Under `jax.jit` each choice of levels is a new
    program.

    Args:
      errors: L2 norms of the compression errors, [layers, levels], 0 or more.
      sizes: numbers sent, [layers, levels]; for a rank r: r * (rows + columns).
      reference_level: level of each layer in the uniform reference, [layers].
      alpha: budget relative to the error of the reference, 0 or more.
      bins: resolution of the budget (official: 10000).

    Returns:
      Levels, integers [layers].

    Raises:
      ValueError: for shapes that do not fit, levels out of range, negative or NaN
        errors, a negative alpha, or bins below 1.

    Example:
      >>> import optax_ext as ox
      >>> errors = [[1.0, 2.0, 3.0], [1.0, 4.0, 9.0]]
      >>> sizes = [[9, 6, 1], [9, 6, 1]]
      >>> ox.select_levels_lgreco(errors, sizes, reference_level=[1, 1]).tolist()
      [2, 0]
    """
    owner = "select_levels_lgreco"
    check_hyperparam(owner, low=0.0, alpha=alpha)
    check_interval(owner, bins=bins)
    e, s = np.asarray(errors, np.float64), np.asarray(sizes, np.float64)
    reference = np.asarray(reference_level)
    _check_levels(owner, e, s, reference)
    layers = np.arange(len(e))
    budget = alpha * e[layers, reference].sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = np.where(e > 0, np.ceil(e / (budget / bins)), 0)
    # least[c]: size of the layers so far at a total cost of c.
    least, choices = np.full(bins + 1, np.inf), []
    least[0] = 0
    for layer_cost, layer_size in zip(cost, s, strict=True):
        table = np.full((len(layer_cost), bins + 1), np.inf)
        for row, c, size in zip(table, layer_cost, layer_size, strict=True):
            if c <= bins:
                row[int(c) :] = least[: bins + 1 - int(c)] + size
        choices.append(table.argmin(axis=0))
        least = table.min(axis=0)
    total = int(least.argmin())
    if not least[total] < s[layers, reference].sum():
        return reference.astype(int)
    levels = np.zeros(len(e), int)
    for layer in reversed(layers):
        levels[layer] = choices[layer][total]
        total -= int(cost[layer, levels[layer]])
    return levels


def _check_levels(
    owner: str, errors: np.ndarray, sizes: np.ndarray, reference: np.ndarray
) -> None:
    if errors.ndim != 2 or sizes.shape != errors.shape:
        raise ValueError(
            f"{owner}: errors and sizes must both be [layers, levels], got shapes "
            f"{errors.shape} and {sizes.shape}"
        )
    if reference.shape != errors.shape[:1] or reference.dtype.kind not in "iu":
        raise ValueError(
            f"{owner}: reference_level must be integers [{len(errors)}], got "
            f"{reference.dtype} {reference.shape}"
        )
    if not ((reference >= 0) & (reference < errors.shape[1])).all():
        raise ValueError(
            f"{owner}: reference_level must lie in [0, {errors.shape[1]}), got "
            f"{reference.tolist()}"
        )
    if not (errors >= 0).all():
        raise ValueError(f"{owner}: errors must be 0 or more, and no NaN")

r"""M-FAC: the inverse of the empirical Fisher matrix, without the matrix.

With the last m gradients as rows of G, the damped Fisher matrix
:math:`\lambda I + G^T G / m` differs from a multiple of the identity by rank m, so that
its inverse takes the m inner products of a vector with the rows, and the solution of an
m x m system. Nothing here ravels the parameters: inner products are sums over leaves.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam, check_interval, check_rate
from optax_ext._core.geometry import length, tree_length
from optax_ext._core.leaves import init_leaves, map_leaves, next_count
from optax_ext._core.states import scalar_dtype
from optax_ext._core.trees import Bucket, computing_dtype, is_hole, is_unit

_TITLE = "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information"


def _example() -> dict[str, Any]:
    grads = jnp.array([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]])
    return {"grads_matrix": grads, "damping": 0.1}


def _woodbury(
    owner: str, grads: Any, damping: float
) -> tuple[jax.Array, jax.Array, Any]:
    """The rows of G, a Cholesky factor of m damping I + G G^T, and the damping."""
    check_hyperparam(owner, low=0.0, open_low=True, damping=damping)
    if jnp.ndim(grads) != 2:
        raise ValueError(
            f"{owner}: grads_matrix must be [gradients, parameters], got shape "
            f"{jnp.shape(grads)}"
        )
    g = grads.astype(computing_dtype(grads))
    gram = g @ g.T + len(g) * damping * jnp.eye(len(g), dtype=g.dtype)
    return g, jnp.linalg.cholesky(gram), damping


@catalogued(
    title=_TITLE,
    arxiv="2107.03356",
    kind="helper",
    variant="mean over the given gradients; one Cholesky factor of size m.",
    compared="closed form: a dense solve",
    example=lambda: {**_example(), "x": jnp.array([1.0, 1.0, 1.0])},
)
def ihvp_empirical_fisher(
    grads_matrix: jax.Array, x: jax.Array, damping: float
) -> jax.Array:
    r"""The inverse of the damped empirical Fisher matrix, times a vector.

    .. math:: (\lambda I + G^T G / m)^{-1} x
      = \tfrac1\lambda \big( x - G^T (m \lambda I + G G^T)^{-1} G x \big)

    Args:
      grads_matrix: G, gradients of m examples or batches [m, d].
      x: a vector [d].
      damping: lambda, above 0.

    Returns:
      A vector [d], in float32 or wider.

    Raises:
      ValueError: for a damping of 0 or less, or a G that is no matrix.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> g, x = jnp.array([[2.0, 0.0]]), jnp.array([5.0, 3.0])
      >>> print(ox.ihvp_empirical_fisher(g, x, damping=1.0).round())
      [1. 3.]
    """
    g, factor, damping = _woodbury("ihvp_empirical_fisher", grads_matrix, damping)
    x = x.astype(g.dtype)
    return (x - g.T @ jax.scipy.linalg.cho_solve((factor, True), g @ x)) / damping


@catalogued(
    title=_TITLE,
    arxiv="2107.03356",
    kind="helper",
    variant="Optimal Brain Surgeon's score of single weights.",
    compared="closed form: the diagonal of a dense inverse",
    example=lambda: {**_example(), "params": jnp.array([1.0, 1.0, 1.0])},
)
def mfac_prune_scores(
    grads_matrix: jax.Array, params: jax.Array, damping: float
) -> jax.Array:
    r"""By how much the loss would grow if a weight were set to 0, for each weight.

    .. math:: \rho_i = \frac{w_i^2}{2 [F^{-1}]_{ii}}, \qquad
      F = \lambda I + G^T G / m

    Args:
      grads_matrix: G, gradients of m examples or batches [m, d].
      params: weights w [d].
      damping: lambda, above 0.

    Returns:
      Scores [d], in float32 or wider: the weights with the smallest are pruned.

    Raises:
      ValueError: for a damping of 0 or less, or a G that is no matrix.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> g, w = jnp.array([[2.0, 0.0]]), jnp.array([1.0, 1.0])
      >>> print(ox.mfac_prune_scores(g, w, damping=1.0).round(3))
      [2.5 0.5]
    """
    g, factor, damping = _woodbury("mfac_prune_scores", grads_matrix, damping)
    half = jax.scipy.linalg.solve_triangular(factor, g, lower=True)
    inverse = (1 - jnp.sum(half**2, axis=0)) / damping
    return params.astype(g.dtype) ** 2 / (2 * inverse)


class MFACState(NamedTuple):
    """State of `scale_by_mfac`.

    `history` holds the last gradients over their lengths, with a leading axis of the
    window; `norms` their lengths and `cosines` the inner products of those units (one
    of each, or a tree of them with ``blockwise``). `mu` is () without momentum.
    """

    count: jax.Array
    history: optax.Updates
    norms: Any
    cosines: Any
    mu: optax.Updates


def _weights(
    norms: jax.Array, cosines: jax.Array, slot: jax.Array, damping: float
) -> jax.Array:
    r"""Weights of the stored units in the direction.

    The newest gradient is row j of G, so that the direction is
    :math:`m G^T (m \lambda I + G G^T)^{-1} e_j`. It is computed with all rows scaled to
    a unit diagonal, in which nothing overflows, and what rounding makes of eigenvalues
    far below 1 is cut off.
    """
    window = len(norms)
    root = jnp.sqrt(jnp.asarray(window * damping, norms.dtype))
    scale = jnp.hypot(norms, root)
    share = norms / scale
    eye = jnp.eye(window, dtype=norms.dtype)
    scaled = jnp.where(eye > 0, 1, share[:, None] * share[None, :] * cosines)
    values, vectors = jnp.linalg.eigh(scaled)
    floor = window * jnp.finfo(norms.dtype).eps
    solution = vectors @ (vectors[slot] / jnp.maximum(values, floor))
    return share * solution * (window / scale[slot])


def _insert(
    fisher: Sequence[jax.Array], slot: jax.Array, norm: jax.Array, row: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Lengths and cosines with those of the newest gradient."""
    norms, cosines = fisher
    return norms.at[slot].set(norm), cosines.at[slot].set(row).at[:, slot].set(row)


def _products(history: jax.Array, slot: jax.Array) -> jax.Array:
    """Inner products of the newest array with all that are stored."""
    return jnp.tensordot(history, history[slot], history.ndim - 1)


def _tree_products(history: Any, slot: jax.Array, like: jax.Array) -> jax.Array:
    """The same for a whole tree, in the shape and dtype of `like`."""
    total = jnp.zeros_like(like)
    for leaf in jax.tree.leaves(history, is_leaf=is_unit):
        if is_hole(leaf):
            continue
        stack = leaf.stack if isinstance(leaf, Bucket) else leaf[None]
        stack = stack.astype(like.dtype)
        total += jnp.sum(jax.vmap(lambda h: _products(h, slot))(stack), axis=0)
    return total


@catalogued(
    title=_TITLE,
    arxiv="2107.03356",
    kind="link",
    state="window (+ 1 with momentum)",
    slots=4,
    variant="the official class: divisor always the window, the gradient stored before "
    "the product, momentum behind it without bias correction.",
    compared="golden mfac; a dense solve",
    example=lambda: {"window": 4, "damping": 10.0},
)
def scale_by_mfac(
    window: int = 32,
    damping: float = 1e-5,
    momentum: float = 0.0,
    blockwise: bool = False,
    history_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiply by the inverse of the damped Fisher matrix of the last gradients.

    With the last m gradients (zeros before there are m) as rows of G:

    .. math::
      u_t = (\lambda I + G_t^T G_t / m)^{-1} g_t, \qquad
      w_t = \mu w_{t-1} + (1 - \mu) u_t

    A direction that all gradients share is divided by its squared length, one that is
    new by damping: follow with a clip or a small learning rate. L2 decay goes before it
    (`optax.add_decayed_weights`), as in the official class.

    The system of size m has a condition of about the squared length of gradients over
    damping, and the result loses as many roundings: in float32 choose damping above
    1e-5 of that square, or enable float64. Eigenvalues that are all rounding are cut
    off, so that no gradient makes a NaN.

    Args:
      window: m, how many gradients are kept (official: 1024; 32 here, for each costs as
        much memory as the parameters).
      damping: lambda, above 0 (official), in units of squared gradients.
      momentum: mu, in [0, 1); 0 emits u and keeps no w.
      blockwise: True treats every leaf by itself; else there is one Fisher matrix.
      history_dtype: dtype of the stored gradients; None keeps float32. A narrower one
        also rounds the gradient that is emitted.

    Returns:
      A link that emits the un-negated direction.

    Raises:
      ValueError: for hyper-parameters outside their range.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> tx = ox.scale_by_mfac(window=1, damping=1.0)
      >>> g = jnp.array([3.0, 4.0])
      >>> print((26 * tx.update(g, tx.init(g))[0]).round())
      [3. 4.]
    """
    owner = "scale_by_mfac"
    check_interval(owner, window=window)
    check_hyperparam(owner, low=0.0, open_low=True, damping=damping)
    check_rate(owner, momentum=momentum)
    averages = not (isinstance(momentum, int | float) and momentum == 0)

    def init_history(p):
        return (jnp.zeros((window, *p.shape), history_dtype or p.dtype),)

    def init_fisher(p):
        return jnp.zeros(window, p.dtype), jnp.zeros((window, window), p.dtype)

    def init(params):
        (history,) = init_leaves(init_history, params, 1)
        norms, cosines = init_fisher(jnp.zeros((), scalar_dtype(params)))
        if blockwise:
            norms, cosines = init_leaves(init_fisher, params, 2)
        mu = init_leaves(lambda p: (jnp.zeros_like(p),), params, 1)[0]
        count = jnp.zeros([], jnp.int32)
        return MFACState(count, history, norms, cosines, mu if averages else ())

    def update(updates, state, params=None, **extra):
        del params, extra
        slot = state.count % window

        def store(g, slots, norm):
            unit = g / jnp.where(norm > 0, norm, 1).astype(g.dtype)
            unit = unit.astype(history_dtype or g.dtype).astype(g.dtype)
            return g, (slots[0].at[slot].set(unit),)

        def combine(g, slots, history):
            return jnp.tensordot(weights.astype(g.dtype), history, 1), slots

        def of_leaf(g, slots):
            history, *fisher = slots
            norm = length(g)
            _, (history,) = store(g, (history,), norm)
            fisher = _insert(fisher, slot, norm, _products(history, slot))
            weights = _weights(*fisher, slot, damping)
            return jnp.tensordot(weights, history, 1), (history, *fisher)

        def average(u, slots):
            w = momentum * slots[0] + (1 - momentum) * u
            return w, (w,)

        if blockwise:
            out, slots = map_leaves(of_leaf, updates, state[1:4], owner=owner)
            history, norms, cosines = slots
        else:
            norm = tree_length(updates)
            storing = functools.partial(store, norm=norm)
            slots = (state.history,)
            (history,) = map_leaves(storing, updates, slots, owner=owner)[1]
            row = _tree_products(history, slot, state.norms)
            norm = norm.astype(row.dtype)
            norms, cosines = _insert(state[2:4], slot, norm, row)
            weights = _weights(norms, cosines, slot, damping)
            out, _ = map_leaves(combine, updates, (), (history,), owner=owner)
        mu = state.mu
        if averages:
            out, (mu,) = map_leaves(average, out, (mu,), owner=owner)
        count = next_count(state.count)
        return out, MFACState(count, history, norms, cosines, mu)

    return optax.GradientTransformationExtraArgs(init, update)

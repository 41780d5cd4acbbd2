r"""Learning to rank: the NDCG itself, through a sort that has a gradient.

The discounted cumulative gain of a ranking multiplies gains with the permutation matrix
that sorts the scores. `neural_sort` relaxes that matrix: row i is a softmax whose
largest entry is at the i-th largest score. Its columns need not sum to 1;
`sinkhorn_normalize` sees to that. `neural_ndcg_loss` puts the two in place of sorting.

| you have | loss |
|---|---|
| graded labels, and NDCG is what counts | `neural_ndcg_loss` |
| graded labels, long lists, little time | `optax.losses.ranking_softmax_loss` |

An entry of the relaxed matrix costs as much as a pair of items: lists of hundreds.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam, check_interval
from optax_ext.losses._numerics import working_floats

_TITLE = (
    "NeuralNDCG: Direct Optimisation of a Ranking Metric via Differentiable Relaxation "
    "of Sorting"
)


def _flags(where: chex.Array | None, like: jax.Array) -> jax.Array:
    """The mask as booleans of the shape of the scores."""
    if where is None:
        return jnp.ones(like.shape, bool)
    chex.assert_shape(where, like.shape, custom_message="where must fit the scores")
    return jnp.asarray(where).astype(bool)


@catalogued(
    title=_TITLE,
    arxiv="2102.07831",
    kind="helper",
    needs=("scores",),
    variant="masked items anywhere in a list; allRank's mask is right at its end only",
    compared="golden neural_ndcg_loss; the permutation matrix at low temperature",
    example=lambda: {"scores": jnp.array([[0.3, 1.5, -0.2], [2.0, 0.1, 0.7]])},
)
def neural_sort(
    scores: chex.Array,
    *,
    temperature: chex.Numeric = 1.0,
    where: chex.Array | None = None,
) -> jax.Array:
    r"""A relaxed permutation matrix that sorts scores in descending order.

    Among n items that count, with :math:`b_j = \sum_k |s_j - s_k|`, the rows
    i = 1, ..., n are

    .. math:: P_i = \mathrm{softmax}_j\left(((n + 1 - 2i)\, s_j - b_j) / \tau\right).

    Args:
      scores: s, [..., L], with the items of a list along the last axis.
      temperature: tau > 0; as it goes to 0, P goes to the permutation matrix.
      where: which items count, [..., L]; by default all.

    Returns:
      P, [..., L, L]: rows are ranks, columns items. Rows sum to 1; the rows behind the
      first n and the columns of items that do not count are 0.

    Raises:
      AssertionError: for shapes that do not fit, or scores that are not floats.
      ValueError: for a temperature that is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> scores = jnp.array([1.0, 3.0, 2.0])
      >>> print(ox.losses.neural_sort(scores, temperature=0.01) @ scores)
      [3. 2. 1.]
    """
    check_hyperparam("neural_sort", low=0.0, open_low=True, temperature=temperature)
    (scores,) = working_floats(scores=scores)
    chex.assert_axis_dimension_gteq(scores, -1, 0, custom_message="scores")
    keep = _flags(where, scores)
    mask = keep.astype(scores.dtype)

    s = jnp.where(keep, scores, 0)
    both = mask[..., :, None] * mask[..., None, :]
    b = jnp.sum(jnp.abs(s[..., :, None] - s[..., None, :]) * both, -1)
    n = jnp.sum(mask, -1)[..., None]
    rank = jnp.arange(1, s.shape[-1] + 1, dtype=s.dtype)
    rank = jnp.broadcast_to(rank, s.shape)
    tau = jnp.asarray(temperature, s.dtype)
    slope = (n + 1 - 2 * rank)[..., :, None]
    logits = (slope * s[..., None, :] - b[..., None, :]) / tau
    # A list without items would be a softmax of nothing.
    keep = keep | ~jnp.any(keep, -1, keepdims=True)
    rows = jax.nn.softmax(jnp.where(keep[..., None, :], logits, -jnp.inf), axis=-1)
    return rows * (rank <= n).astype(s.dtype)[..., :, None]


@catalogued(
    title=_TITLE,
    arxiv="2102.07831",
    kind="helper",
    needs=("matrix",),
    variant="a fixed number of iterations; allRank stops when the whole batch is done",
    compared="golden neural_ndcg_loss; sums of rows and columns",
    example=lambda: {"matrix": jnp.array([[0.5, 1.0], [2.0, 0.3]])},
)
def sinkhorn_normalize(
    matrix: chex.Array, *, num_iters: int = 50, eps: chex.Numeric = 1e-10
) -> jax.Array:
    r"""Scale rows and columns in turn until both sum to 1.

    .. math::
      P_{ij} \leftarrow P_{ij} / \textstyle\sum_i P_{ij}, \qquad
      P_{ij} \leftarrow P_{ij} / \textstyle\sum_j P_{ij}

    Args:
      matrix: P with entries of 0 or more, [..., L, L].
      num_iters: how often both are done; 50 as in allRank.
      eps: least sum to divide by; 1e-10 as in allRank. Lines of zeros stay zeros.

    Returns:
      A matrix of the shape of `matrix`; its rows sum to 1 exactly, its columns nearly.

    Raises:
      AssertionError: if there is no matrix, or no floats.
      ValueError: for `num_iters` below 1, or an `eps` that is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> print(ox.losses.sinkhorn_normalize(jnp.array([[1.0, 2.0], [2.0, 1.0]])))
      [[0.33333334 0.6666667 ]
       [0.6666667  0.33333334]]
    """
    check_interval("sinkhorn_normalize", num_iters=num_iters)
    check_hyperparam("sinkhorn_normalize", low=0.0, open_low=True, eps=eps)
    (matrix,) = working_floats(matrix=matrix)
    chex.assert_axis_dimension_gteq(matrix, -2, 0, custom_message="matrix")
    eps = jnp.asarray(eps, matrix.dtype)

    def scaled(p: jax.Array, axis: int) -> jax.Array:
        total = jnp.sum(p, axis, keepdims=True)
        # Zeros over eps are zeros, too, but their gradient would overflow in the end.
        return p / jnp.where(total == 0, 1, jnp.maximum(total, eps))

    def both(p: jax.Array, _: None) -> tuple[jax.Array, None]:
        return scaled(scaled(p, -2), -1), None

    return jax.lax.scan(both, matrix, length=num_iters)[0]


def _three_lists() -> dict[str, Any]:
    return {
        "scores": jnp.array([[0.3, 1.5, -0.2, 0.8], [2.0, 0.1, 0.7, 0.4], [0.0] * 4]),
        "labels": jnp.array([[2, 0, 1, 0], [0, 1, 0, 3], [1, 0, 0, 0]]),
    }


@catalogued(
    title=_TITLE,
    arxiv="2102.07831",
    kind="loss",
    needs=("scores", "labels"),
    variant="allRank's with a fixed number of Sinkhorn iterations, masks anywhere, and "
    "one gain function for both NDCG and its ideal",
    compared="goldens neural_ndcg_loss, neural_ndcg_loss_transposed; exact NDCG at low "
    "temperature",
    example=_three_lists,
)
def neural_ndcg_loss(
    scores: chex.Array,
    labels: chex.Array,
    *,
    temperature: chex.Numeric = 1.0,
    k: int | None = None,
    transposed: bool = False,
    powered_relevancies: bool = True,
    sinkhorn_iters: int = 50,
    where: chex.Array | None = None,
    eps: chex.Numeric = 1e-10,
) -> jax.Array:
    r"""Minus a relaxed normalised discounted cumulative gain of each list.

    With P the relaxed sorting matrix of the scores, gains :math:`g = 2^y - 1` and
    discounts :math:`d_i = 1 / \log_2(1 + i)` of the first k ranks,

    .. math::
      \ell = -\frac{\sum_i d_i (P g)_i}{\mathrm{idcg} + \epsilon} \quad\text{or}\quad
      -\frac{\sum_j g_j (P^T d)_j}{\mathrm{idcg} + \epsilon},

    where idcg is the gain of the best order. A list whose gains are all 0 has loss 0;
    the mean over the others is the published scalar.

    Args:
      scores: [..., L], with the items of a list along the last axis.
      labels: y, graded relevance of 0 or more, integers or floats, [..., L].
      temperature: of `neural_sort`. 1 as in allRank.
      k: ranks that count; None counts all.
      transposed: whether to take the second form: the same sum in another order, and
        the same up to rounding.
      powered_relevancies: False takes g = y.
      sinkhorn_iters: iterations of `sinkhorn_normalize`; 50 as in allRank.
      where: which items count, [..., L]; by default all.
      eps: added to idcg, and least sum of a line; 1e-10 as in allRank.

    Returns:
      Losses of lists, [...], from -1 to 0.

    Raises:
      AssertionError: for shapes that do not fit, or scores that are not floats.
      ValueError: for a hyper-parameter outside its interval.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> labels = jnp.array([[2.0, 0.0, 1.0]])
      >>> for scores in ([[3.0, 1.0, 2.0]], [[1.0, 3.0, 2.0]]):
      ...     (loss,) = ox.losses.neural_ndcg_loss(
      ...         jnp.array(scores), labels, temperature=0.1)
      ...     print(f"{loss:.2f}")
      -1.00
      -0.59
    """
    if k is not None:
        check_interval("neural_ndcg_loss", k=k)
    (scores,) = working_floats(scores=scores)
    labels = jnp.asarray(labels)
    chex.assert_equal_shape([scores, labels], custom_message="scores, labels")
    keep = _flags(where, scores)

    y = jax.lax.stop_gradient(jnp.where(keep, labels, 0).astype(scores.dtype))
    gains = jnp.exp2(y) - 1 if powered_relevancies else y
    length = scores.shape[-1]
    ranks = jnp.arange(1, length + 1, dtype=scores.dtype)
    within = ranks <= (length if k is None else k)
    discounts = jnp.where(within, 1 / jnp.log2(1 + ranks), 0)
    p = neural_sort(scores, temperature=temperature, where=where)
    p = sinkhorn_normalize(p, num_iters=sinkhorn_iters, eps=eps)
    if transposed:
        received = jnp.einsum("...ij,i->...j", p, discounts)
        dcg = jnp.sum(gains * received, axis=-1)
    else:
        dcg = jnp.einsum("...ij,...j->...i", p, gains) @ discounts
    ideal = jnp.sort(gains, axis=-1, descending=True) @ discounts
    return jnp.where(ideal > 0, -dcg / (ideal + jnp.asarray(eps, ideal.dtype)), 0)

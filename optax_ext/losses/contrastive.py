r"""Contrastive losses: a positive against many negatives.

With s the similarities and :math:`\tau` a temperature, all of them are functions of one
number an anchor, the log-odds against its positive

.. math::
  d = \log \sum_{neg} e^{s_j / \tau} - s_{pos} / \tau = \log \frac{1 - p}{p},

where p is the softmax probability of the positive. InfoNCE (`optax.losses.ntxent`) is
:math:`-\log p = \mathrm{softplus}(d)`, with slope 1 - p: an anchor that is well
separated stops learning.

| loss | of d | when |
|---|---|---|
| `macl_loss` | softplus(d) / (1 - p), temperature follows training | few negatives |
| `macl_loss_from_similarities` | the same | negatives from a queue |
| `focal_info_nce` | (1 - p)^gamma softplus(d) | text retrieval, many easy pairs |
| `multi_similarity_loss` | softplus of mined pairs around a threshold | class labels |

The first weight keeps the slope at 1 for every anchor, the second (in `retrieval`) lets
go of easy ones earlier still.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam
from optax_ext.losses._numerics import unit_rows, working_floats

_MACL = "Model-Aware Contrastive Learning: Towards Escaping the Dilemmas"
_NEVER = -1e30  # log-odds where there is nothing to be confused with


def log_odds(positive: jax.Array, negatives: jax.Array, keep: jax.Array) -> jax.Array:
    """D of each row of kept logits against its positive; `_NEVER` without any."""
    some = jnp.any(keep, -1)
    # A row of -inf would have a NaN for its gradient.
    terms = jnp.where(keep, negatives, jnp.where(some, -jnp.inf, 0)[..., None])
    return jnp.where(some, jax.nn.logsumexp(terms, axis=-1) - positive, _NEVER)


def flags(where: chex.Array | None, shape: tuple[int, ...]) -> jax.Array:
    """The mask as booleans of a given shape."""
    if where is None:
        return jnp.ones(shape, bool)
    chex.assert_shape(where, shape, custom_message="where")
    return jnp.asarray(where).astype(bool)


def _macl(
    owner: str,
    positive: jax.Array,
    negatives: jax.Array,
    keep: jax.Array,
    temperature: Any,
    alpha: Any,
    a0: Any,
    reweight: bool,
) -> jax.Array:
    """MACL from the similarities of N anchors: positive [N], negatives [N, K]."""
    check_hyperparam(owner, low=0.0, open_low=True, temperature=temperature)
    check_hyperparam(owner, low=0.0, high=1.0, alpha=alpha)
    check_hyperparam(owner, a0=a0)
    temperature, alpha, a0 = (
        jnp.asarray(x, positive.dtype) for x in (temperature, alpha, a0)
    )

    alignment = jnp.mean(positive)
    tau = jax.lax.stop_gradient(temperature * (1 + alpha * (alignment - a0)))
    d = log_odds(positive / tau, negatives / tau, keep)
    if not reweight:
        return jax.nn.softplus(d)
    # softplus(d) / sigmoid(d) is 1 + e^d / 2 - ... far below 0, where both underflow.
    # The weight is detached, and what it divides by is the slope of softplus.
    safe = jnp.maximum(jax.lax.stop_gradient(d), -80)
    weighted = jax.nn.softplus(safe) / jax.nn.sigmoid(safe)
    return weighted + (d - jax.lax.stop_gradient(d))


@catalogued(
    title=_MACL,
    arxiv="2207.07874",
    kind="loss",
    needs=("positive", "negatives"),
    variant="the official code; 1 - p in log space",
    compared="golden macl_loss_from_similarities; closed form of the gradient",
    example=lambda: {
        "positive": jnp.array([0.9, 0.2, 0.5]),
        "negatives": jnp.array([[0.1, -0.3], [0.4, 0.0], [-0.2, 0.6]]),
    },
)
def macl_loss_from_similarities(
    positive: chex.Array,
    negatives: chex.Array,
    *,
    temperature: chex.Numeric = 0.1,
    alpha: chex.Numeric = 0.5,
    a0: chex.Numeric = 0.0,
    reweight: bool = True,
    where: chex.Array | None = None,
) -> jax.Array:
    r"""`macl_loss` from similarities, for negatives that come from a queue.

    .. math::
      \tau = \tau_0 (1 + \alpha (\mathrm{mean}(s_{pos}) - A_0)), \qquad
      \ell = \frac{-\log p}{1 - p}

    Nothing is normalised here.

    Args:
      positive: similarity of each anchor and its positive, [N].
      negatives: similarities of each anchor and its negatives, [N, K].
      temperature: tau_0 > 0, as in `macl_loss`.
      alpha: how far the temperature follows the alignment, in [0, 1].
      a0: A_0, the alignment at which the temperature is tau_0.
      reweight: whether to divide by 1 - p.
      where: which negatives count, [N, K]; by default all. An anchor without any has
        the gradient 0 and the loss of p = 1: 1, or 0 without `reweight`.

    Returns:
      Losses of anchors, [N]. They depend on the batch through its alignment.

    Raises:
      AssertionError: for shapes that do not fit, or arguments that are not floats.
      ValueError: for a hyper-parameter outside its interval.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import optax_ext as ox
      >>> positive = jnp.array([0.9, 0.1])
      >>> negatives = jnp.array([[0.0, 0.1, 0.2], [0.3, 0.2, 0.1]])
      >>> loss_fn = lambda s: ox.losses.macl_loss_from_similarities(
      ...     s, negatives, alpha=0.0).sum()
      >>> print(jax.grad(loss_fn)(positive))  # -1 / temperature, however easy
      [-10. -10.]
    """
    positive, negatives = working_floats(positive=positive, negatives=negatives)
    chex.assert_rank(positive, 1, custom_message="positive")
    chex.assert_shape(negatives, (*positive.shape, None), custom_message="negatives")
    chex.assert_axis_dimension_gt(negatives, 1, 0, custom_message="negatives")
    return _macl(
        "macl_loss_from_similarities",
        positive,
        negatives,
        flags(where, negatives.shape),
        temperature,
        alpha,
        a0,
        reweight,
    )


@catalogued(
    title=_MACL,
    arxiv="2207.07874",
    kind="loss",
    needs=("embeddings_a", "embeddings_b"),
    variant="both views are anchors, as in the official code",
    compared="golden macl_loss; optax.losses.ntxent for alpha = 0 without weights",
    example=lambda: {
        "embeddings_a": jnp.array([[1.0, 0.2], [-0.3, 1.0], [0.5, -1.0]]),
        "embeddings_b": jnp.array([[0.9, 0.1], [0.3, 1.0], [1.0, -1.5]]),
    },
)
def macl_loss(
    embeddings_a: chex.Array,
    embeddings_b: chex.Array,
    *,
    temperature: chex.Numeric = 0.1,
    alpha: chex.Numeric = 0.5,
    a0: chex.Numeric = 0.0,
    reweight: bool = True,
) -> jax.Array:
    r"""InfoNCE with a temperature and weights that follow the model.

    Each row of both views is an anchor; its positive is its other view, its negatives
    are the 2B - 2 rows of others. With cosine similarities s and p the softmax
    probability of the positive at temperature tau,

    .. math::
      \tau = \tau_0 (1 + \alpha (\mathrm{mean}(s_{pos}) - A_0)), \qquad
      \ell = \frac{-\log p}{1 - p}.

    The temperature rises as views align, so that near negatives, which are then likely
    to be of the same kind, are pushed away less. The weight makes up for 1 - p in the
    gradient, which is small with few negatives. Neither carries gradient. As p goes to
    1, the loss goes to 1.

    Args:
      embeddings_a: embeddings of one view, [B, D]; normalised here.
      embeddings_b: embeddings of the other, [B, D], row by row.
      temperature: tau_0 > 0. 0.1 as in lightly; the paper tunes it by task.
      alpha: how far the temperature follows the alignment, in [0, 1]; 0.5 as in
        lightly.
      a0: A_0, the alignment at which the temperature is tau_0. Below an alignment of
        A_0 - 1 / alpha the temperature is negative; the sources do not guard it.
      reweight: whether to divide by 1 - p.

    Returns:
      Losses of anchors, [2B], those of `embeddings_a` first; take their mean.

    Raises:
      AssertionError: for shapes that differ, or arguments that are not floats.
      ValueError: for a hyper-parameter outside its interval.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> a = jnp.eye(3)
      >>> print(ox.losses.macl_loss(a, a).round(2))  # p is nearly 1
      [1. 1. 1. 1. 1. 1.]
    """
    a, b = working_floats(embeddings_a=embeddings_a, embeddings_b=embeddings_b)
    chex.assert_rank(a, 2, custom_message="embeddings_a")
    chex.assert_equal_shape([a, b], custom_message="embeddings_a, embeddings_b")
    n = len(a)
    rows = unit_rows(jnp.concatenate([a, b]))
    similarities = rows @ rows.T
    itself = jnp.arange(2 * n)
    other_view = (itself + n) % (2 * n)
    keep = jnp.ones((2 * n, 2 * n), bool)
    keep = keep.at[itself, itself].set(False).at[itself, other_view].set(False)
    return _macl(
        "macl_loss",
        similarities[itself, other_view],
        similarities,
        keep,
        temperature,
        alpha,
        a0,
        reweight,
    )


@catalogued(
    title="Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning",
    arxiv="1904.06627",
    kind="loss",
    needs=("embeddings", "labels"),
    variant="constants of the official code; the paper is said to have scale_neg 50 "
    "and threshold 1",
    compared="golden multi_similarity_loss; the paper's pair weights; a loop",
    example=lambda: {
        "embeddings": jnp.array([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.96, 0.28]]),
        "labels": jnp.array([0, 0, 1, 1]),
    },
)
def multi_similarity_loss(
    embeddings: chex.Array,
    labels: chex.Array,
    *,
    scale_pos: chex.Numeric = 2.0,
    scale_neg: chex.Numeric = 40.0,
    threshold: chex.Numeric = 0.5,
    margin: chex.Numeric = 0.1,
    eps: chex.Numeric = 1e-5,
    where: chex.Array | None = None,
) -> jax.Array:
    r"""Metric learning from labels, with soft weights on pairs that are worth it.

    Of the similarities :math:`S = E E^T`, positives P of an anchor share its label
    (and are not its copies), negatives N do not. Kept are the negatives above the
    least similar positive, and the positives below the most similar negative, by more
    than minus the margin. With threshold t,

    .. math::
      \ell = \frac{1}{a} \log\left(1 + \sum_{P} e^{-a (S - t)}\right)
           + \frac{1}{b} \log\left(1 + \sum_{N} e^{b (S - t)}\right),

    and 0 where either set is empty.

    Args:
      embeddings: E, rows of length 1, [B, D]; they are not normalised here.
      labels: integers, [B].
      scale_pos: a > 0. These four constants are those of the official code.
      scale_neg: b > 0.
      threshold: t.
      margin: how far from the hardest of the other kind a pair may be.
      eps: positives whose similarity is 1 - eps or more count as copies.
      where: which rows count, [B]; by default all. The others are in no pair, and
        their loss is 0.

    Returns:
      Losses of anchors, [B]. The published loss is their mean, zeros included.

    Raises:
      AssertionError: for shapes that do not fit, embeddings that are not floats, or
        labels that are not integers.
      ValueError: for a scale that is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> embeddings = jnp.array([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]])
      >>> labels = jnp.array([0, 0, 1])
      >>> losses = ox.losses.multi_similarity_loss(embeddings, labels)
      >>> print([f"{x:.3f}" for x in losses])
      ['0.599', '0.759', '0.000']
    """
    owner = "multi_similarity_loss"
    check_hyperparam(
        owner, low=0.0, open_low=True, scale_pos=scale_pos, scale_neg=scale_neg
    )
    check_hyperparam(owner, threshold=threshold, margin=margin, eps=eps)
    (rows,) = working_floats(embeddings=embeddings)
    chex.assert_rank(rows, 2, custom_message="embeddings")
    labels = jnp.asarray(labels)
    chex.assert_type(labels, int, custom_message="labels must be integers")
    chex.assert_shape(labels, rows.shape[:1], custom_message="labels")
    counts = flags(where, labels.shape)
    a, b, t, margin, eps = (
        jnp.asarray(x, rows.dtype)
        for x in (scale_pos, scale_neg, threshold, margin, eps)
    )

    s = rows @ rows.T
    same = labels[:, None] == labels[None, :]
    pair = counts[:, None] & counts[None, :]
    positive, negative = pair & same & (s < 1 - eps), pair & ~same
    hardest_positive = jnp.min(s, 1, keepdims=True, where=positive, initial=jnp.inf)
    hardest_negative = jnp.max(s, 1, keepdims=True, where=negative, initial=-jnp.inf)
    kept_negative = negative & (s + margin > hardest_positive)
    kept_positive = positive & (s - margin < hardest_negative)
    none = jnp.zeros_like(s[0])
    pull = jax.nn.softplus(log_odds(none, -a * (s - t), kept_positive)) / a
    push = jax.nn.softplus(log_odds(none, b * (s - t), kept_negative)) / b
    mined = jnp.any(kept_positive, 1) & jnp.any(kept_negative, 1)
    return jnp.where(mined, pull + push, 0)

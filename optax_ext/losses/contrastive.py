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

The first weight keeps the slope at 1 for every anchor, the second lets go of easy ones
earlier still. `mix_hard_negatives` makes harder negatives of mined ones.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam, check_interval
from optax_ext.losses._numerics import unit_rows, working_floats

_MACL = "Model-Aware Contrastive Learning: Towards Escaping the Dilemmas"
_KALM = (
    "KaLM-Embedding-V2: Superior Training Techniques and Data Inspire A Versatile "
    "Embedding Model"
)
_NEVER = -1e30  # log-odds where there is nothing to be confused with


def _log_sum(terms: jax.Array, keep: jax.Array) -> jax.Array:
    """Log of the sum of exp over the kept terms of each row; `_NEVER` without any."""
    some = jnp.any(keep, -1)
    # A row of -inf would have a NaN for its gradient.
    terms = jnp.where(keep, terms, jnp.where(some, -jnp.inf, 0)[..., None])
    return jnp.where(some, jax.nn.logsumexp(terms, axis=-1), _NEVER)


def _flags(where: chex.Array | None, shape: tuple[int, ...]) -> jax.Array:
    """The mask as booleans of a given shape."""
    if where is None:
        return jnp.ones(shape, bool)
    chex.assert_shape(where, shape, custom_message="where")
    return jnp.asarray(where).astype(bool)


def _macl(
    owner: str, positive: Any, negatives: Any, keep: Any, reweight: bool, **given: Any
) -> jax.Array:
    """MACL from the similarities of N anchors: positive [N], negatives [N, K]."""
    check_hyperparam(owner, low=0.0, open_low=True, temperature=given["temperature"])
    check_hyperparam(owner, low=0.0, high=1.0, alpha=given["alpha"])
    check_hyperparam(owner, a0=given["a0"])
    temperature, alpha, a0 = (jnp.asarray(x, positive.dtype) for x in given.values())

    alignment = jnp.mean(positive)
    tau = jax.lax.stop_gradient(temperature * (1 + alpha * (alignment - a0)))
    d = _log_sum(negatives / tau, keep) - positive / tau
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
        _flags(where, negatives.shape),
        reweight,
        temperature=temperature,
        alpha=alpha,
        a0=a0,
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
        reweight,
        temperature=temperature,
        alpha=alpha,
        a0=a0,
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
      >>> print(ox.losses.multi_similarity_loss(embeddings, labels).round(3))
      [0.599 0.759 0.   ]
    """
    owner = "multi_similarity_loss"
    scales = {"scale_pos": scale_pos, "scale_neg": scale_neg}
    check_hyperparam(owner, low=0.0, open_low=True, **scales)
    check_hyperparam(owner, threshold=threshold, margin=margin, eps=eps)
    (rows,) = working_floats(embeddings=embeddings)
    chex.assert_rank(rows, 2, custom_message="embeddings")
    labels = jnp.asarray(labels)
    chex.assert_type(labels, int, custom_message="labels must be integers")
    chex.assert_shape(labels, rows.shape[:1], custom_message="labels")
    counts = _flags(where, labels.shape)
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
    pull = jax.nn.softplus(_log_sum(-a * (s - t), kept_positive)) / a
    push = jax.nn.softplus(_log_sum(b * (s - t), kept_negative)) / b
    mined = jnp.any(kept_positive, 1) & jnp.any(kept_negative, 1)
    return jnp.where(mined, pull + push, 0)


@catalogued(
    title=_KALM,
    arxiv="2506.20923",
    kind="loss",
    needs=("queries", "positives"),
    variant="focal weight as the paper describes it, detached; the released code has "
    "the plain loss only",
    compared="golden focal_info_nce; optax's cross-entropy for gamma = 0",
    example=lambda: {
        "queries": jnp.array([[1.0, 0.2], [-0.3, 1.0], [0.5, -1.0]]),
        "positives": jnp.array([[0.9, 0.1], [0.3, 1.0], [1.0, -1.5]]),
        "temperature": 0.2,
    },
)
def focal_info_nce(
    queries: chex.Array,
    positives: chex.Array,
    negatives: chex.Array | None = None,
    *,
    temperature: chex.Numeric = 0.01,
    gamma: chex.Numeric = 0.5,
    stop_gradient_weight: bool = True,
    where: chex.Array | None = None,
) -> jax.Array:
    r"""InfoNCE of queries and documents, with less weight on easy queries.

    With p_i the softmax probability, at temperature tau and of cosine similarities,
    of a query's positive among all positives and all negatives of the batch,

    .. math:: \ell_i = -(1 - p_i)^\gamma \log p_i.

    Args:
      queries: embeddings, [N, D]; normalised here, as all others.
      positives: embeddings of the documents they should find, [N, D].
      negatives: embeddings of mined hard negatives, [N, K, D]; all N K of them are
        negatives of every query.
      temperature: tau > 0. 0.01 as in the authors' script.
      gamma: 0 or more; 0 is InfoNCE. 0.5 is not confirmed by a source.
      stop_gradient_weight: whether the weight is detached.
      where: which queries count, [N]; by default all. The others have loss 0, and their
        documents are no negatives.

    Returns:
      Losses of queries, [N]. They depend on the batch through the negatives.

    Raises:
      AssertionError: for shapes that do not fit, or arguments that are not floats.
      ValueError: for a hyper-parameter outside its interval.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> queries, documents = jnp.eye(3), jnp.ones((3, 3))
      >>> loss = ox.losses.focal_info_nce(queries, documents, gamma=1.0)
      >>> print(loss.round(3))  # 2 / 3 * log(3)
      [0.732 0.732 0.732]
    """
    owner = "focal_info_nce"
    check_hyperparam(owner, low=0.0, open_low=True, temperature=temperature)
    check_hyperparam(owner, low=0.0, gamma=gamma)
    given = {} if negatives is None else {"negatives": negatives}
    queries, positives, *hard = working_floats(
        queries=queries, positives=positives, **given
    )
    chex.assert_rank(queries, 2, custom_message="queries")
    chex.assert_equal_shape([queries, positives], custom_message="queries, positives")
    n, size = queries.shape
    counts = _flags(where, (n,))
    documents, allowed = unit_rows(positives), ~jnp.eye(n, dtype=bool) & counts
    if hard:
        chex.assert_shape(hard[0], (n, None, size), custom_message="negatives")
        more = unit_rows(hard[0]).reshape(-1, size)
        documents = jnp.concatenate([documents, more])
        theirs = jnp.repeat(counts, hard[0].shape[1])
        theirs = jnp.broadcast_to(theirs, (n, theirs.size))
        allowed = jnp.concatenate([allowed, theirs], axis=1)

    tau, gamma = (jnp.asarray(x, queries.dtype) for x in (temperature, gamma))
    logits = unit_rows(queries) @ documents.T / tau
    d = _log_sum(logits, allowed) - jnp.diagonal(logits)
    weight = jnp.exp(gamma * jax.nn.log_sigmoid(d))  # (1 - p)^gamma
    if stop_gradient_weight:
        weight = jax.lax.stop_gradient(weight)
    return jnp.where(counts, weight * jax.nn.softplus(d), 0)


@catalogued(
    title=_KALM,
    arxiv="2506.20923",
    kind="helper",
    needs=("key", "negatives"),
    variant="mixtures of pairs; the constant of the Beta distribution is not confirmed "
    "by a source",
    compared="closed forms: length 1, similarity to the query",
    example=lambda: {
        "key": jax.random.key(0),
        "negatives": jnp.linspace(-1.0, 2.0, 18).reshape(3, 3, 2) ** 2,
        "num_mixed": 2,
    },
)
def mix_hard_negatives(
    key: chex.PRNGKey,
    negatives: chex.Array,
    num_mixed: int,
    *,
    concentration: chex.Numeric = 2.0,
) -> jax.Array:
    r"""Append mixtures of a query's mined negatives to them, which are harder.

    For pairs of different negatives a and b of one query, drawn at random,

    .. math::
      n = \frac{\lambda n_a + (1 - \lambda) n_b}{|\lambda n_a + (1 - \lambda) n_b|},
      \qquad \lambda \sim \mathrm{Beta}(c, c).

    Where both are as similar to the query, their mixture is more so.

    Args:
      key: for pairs and lambda.
      negatives: embeddings of mined negatives, [N, K, D] with K of 2 or more;
        normalised here.
      num_mixed: M, how many to append to each query's.
      concentration: c > 0; the larger, the nearer lambda is to 1 / 2.

    Returns:
      Unit rows [N, K + M, D], the given ones first, to pass to `focal_info_nce`.

    Raises:
      AssertionError: for another rank, fewer than two negatives, or no floats.
      ValueError: for a hyper-parameter outside its interval.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import optax_ext as ox
      >>> negatives = jnp.eye(4).reshape(2, 2, 4)
      >>> more = ox.losses.mix_hard_negatives(jax.random.key(0), negatives, 3)
      >>> print(more.shape)
      (2, 5, 4)
    """
    owner = "mix_hard_negatives"
    check_interval(owner, num_mixed=num_mixed)
    check_hyperparam(owner, low=0.0, open_low=True, concentration=concentration)
    (rows,) = working_floats(negatives=negatives)
    chex.assert_rank(rows, 3, custom_message="negatives")
    message = "negatives: a pair takes two"
    chex.assert_axis_dimension_gt(rows, 1, 1, custom_message=message)
    n, k, _ = rows.shape
    rows = unit_rows(rows)

    first, offset, lam = jax.random.split(key, 3)
    a = jax.random.randint(first, (n, num_mixed), 0, k)
    b = (a + jax.random.randint(offset, (n, num_mixed), 1, k)) % k
    c = jnp.asarray(concentration, rows.dtype)
    lam = jax.random.beta(lam, c, c, (n, num_mixed, 1), rows.dtype)
    n_a, n_b = (jnp.take_along_axis(rows, i[..., None], axis=1) for i in (a, b))
    return jnp.concatenate([rows, unit_rows(lam * n_a + (1 - lam) * n_b)], axis=1)

"""Contrastive losses of text retrieval: queries, documents, mined negatives.

`focal_info_nce` is InfoNCE with less weight on easy queries, on the log-odds of
`optax_ext.losses.contrastive`, which says when to reach for which contrastive loss.
`mix_hard_negatives` makes harder negatives of mined ones, to pass to it.
"""

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam, check_interval
from optax_ext.losses._numerics import unit_rows, working_floats
from optax_ext.losses.contrastive import flags, log_odds

_TITLE = (
    "KaLM-Embedding-V2: Superior Training Techniques and Data Inspire A Versatile "
    "Embedding Model"
)


@catalogued(
    title=_TITLE,
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
      >>> print(f"{loss[0]:.3f}")  # 2 / 3 * log(3)
      0.732
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
    counts = flags(where, (n,))
    documents, allowed = unit_rows(positives), ~jnp.eye(n, dtype=bool) & counts[None, :]
    if hard:
        chex.assert_shape(hard[0], (n, None, size), custom_message="negatives")
        more = unit_rows(hard[0]).reshape(-1, size)
        documents = jnp.concatenate([documents, more])
        theirs = jnp.repeat(counts, hard[0].shape[1])
        theirs = jnp.broadcast_to(theirs, (n, theirs.size))
        allowed = jnp.concatenate([allowed, theirs], axis=1)

    tau, gamma = (jnp.asarray(x, queries.dtype) for x in (temperature, gamma))
    logits = unit_rows(queries) @ documents.T / tau
    d = log_odds(jnp.diagonal(logits), logits, allowed)
    weight = jnp.exp(gamma * jax.nn.log_sigmoid(d))  # (1 - p)^gamma
    if stop_gradient_weight:
        weight = jax.lax.stop_gradient(weight)
    return jnp.where(counts, weight * jax.nn.softplus(d), 0)


@catalogued(
    title=_TITLE,
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

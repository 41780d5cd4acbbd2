"""Weights of training examples, for a sum or mean of their losses.

| function | what decides | in time |
|---|---|---|
| `curriculum_weight` | an easiness given from outside | fades to equal weights |
| `loss_based_weights` | the loss within its batch | `loss_based_reweighting` warms up |

Easiness comes from a ranker that needs no training: `reciprocal_rank_score` or
`normalized_score`, then `pairwise_easiness` for pairs and `pointwise_easiness` for
single items. Losses decide without bound in `optax_ext.losses.kl_dro_weights`.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_choice, check_hyperparam
from optax_ext.losses._numerics import mask_of, working_floats
from optax_ext.losses.robust import check_temperature, kl_dro_weights

_CURRICULUM: dict[str, Any] = {
    "title": "Training Curricula for Open Domain Answer Re-Ranking",
    "arxiv": "2004.14269",
    "compared": "golden `curriculum_weight`",
}
STRATEGIES = ("linupper", "quadratic", "extremes", "uniform")


@catalogued(
    **_CURRICULUM,
    kind="loss",
    needs=("difficulty", "step", "curriculum_steps"),
    variant="an example each, as in the paper; its code multiplies batch means",
    example=lambda: {
        "difficulty": jnp.array([0.2, 1.0, 0.6]),
        "step": jnp.int32(5),
        "curriculum_steps": 20,
    },
)
def curriculum_weight(
    difficulty: chex.Array, step: chex.Numeric, curriculum_steps: chex.Numeric
) -> jax.Array:
    r"""Count easy examples first, and all alike in the end.

    .. math:: D\, (1 - f) + f, \qquad f = \mathrm{clip}(t / T, 0, 1)

    Args:
      difficulty: D in [0, 1], of any shape; in spite of the name 1 is easy. No
        gradient flows into it.
      step: t, a scalar; 0 at the start.
      curriculum_steps: T, above 0: from there on all weights are 1. The official 20
        are epochs.

    Returns:
      Weights of the shape of `difficulty`, without gradient.

    Raises:
      AssertionError: if `difficulty` are not floats, or `step` is no scalar.
      ValueError: for `curriculum_steps` that is not above 0.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> print(ox.losses.curriculum_weight(jnp.array([0.0, 0.5, 1.0]), 5, 10))
      [0.5  0.75 1.  ]
    """
    owner = "curriculum_weight"
    check_hyperparam(owner, low=0.0, open_low=True, curriculum_steps=curriculum_steps)
    (easy,) = working_floats(difficulty=difficulty)
    t, total = (jnp.asarray(x).astype(easy.dtype) for x in (step, curriculum_steps))
    chex.assert_rank(t, 0, custom_message="step must be a scalar")
    f = jnp.clip(t / total, 0, 1)
    return jax.lax.stop_gradient(easy * (1 - f) + f)


@catalogued(
    **_CURRICULUM,
    kind="helper",
    needs=("rank",),
    variant="ranks from 1",
    example=lambda: {"rank": jnp.array([1, 2, 5])},
)
def reciprocal_rank_score(rank: chex.Array) -> jax.Array:
    """Score of an item by its place: 1 over the rank.

    Args:
      rank: places from 1 on, integers or floats, of any shape.

    Returns:
      Scores in (0, 1] of the shape of `rank`; of integers in the default float type.

    Raises:
      AssertionError: if `rank` are no numbers.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> print(ox.losses.reciprocal_rank_score(jnp.array([1, 2, 4])))
      [1.   0.5  0.25]
    """
    rank = jnp.asarray(rank)
    if jnp.issubdtype(rank.dtype, jnp.integer):
        rank = rank.astype(float)
    (rank,) = working_floats(rank=rank)
    return 1 / rank


@catalogued(
    **_CURRICULUM,
    kind="helper",
    needs=("scores",),
    variant="from 0 to 1 within a query",
    example=lambda: {"scores": jnp.array([[1.0, 4.0, 2.0], [3.0, 0.0, 9.0]])},
)
def normalized_score(
    scores: chex.Array, *, where: chex.Array | None = None
) -> jax.Array:
    """Scores stretched to go from 0 to 1 within their query.

    Args:
      scores: of a ranker, [..., items].
      where: which items there are, [..., items]; the others score 0.

    Returns:
      Scores in [0, 1] of the same shape; 0 for a query whose scores are equal.

    Raises:
      AssertionError: if `scores` are not floats, or `where` has another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> scores = jnp.array([[1.0, 4.0, 2.5], [7.0, 7.0, 7.0]])
      >>> print(ox.losses.normalized_score(scores))
      [[0.  1.  0.5]
       [0.  0.  0. ]]
    """
    (scores,) = working_floats(scores=scores)
    chex.assert_axis_dimension_gteq(scores, -1, 0, custom_message="scores need items")
    mask = mask_of(where, scores)
    low, high = _extremes(scores, mask > 0, -1)
    spread = high - low
    unequal = spread > 0
    return jnp.where(unequal, (scores - low) / jnp.where(unequal, spread, 1), 0) * mask


def _extremes(
    x: jax.Array, counts: jax.Array, axis: int
) -> tuple[jax.Array, jax.Array]:
    """The smallest and the largest of those that count, with their axis; 0 of none."""
    some = jnp.any(counts, axis, keepdims=True)
    low = jnp.min(x, axis, keepdims=True, initial=jnp.inf, where=counts)
    high = jnp.max(x, axis, keepdims=True, initial=-jnp.inf, where=counts)
    return jnp.where(some, low, 0), jnp.where(some, high, 0)


@catalogued(
    **_CURRICULUM,
    kind="helper",
    needs=("score_pos", "score_neg"),
    variant="of several negatives the one that is hardest to tell apart",
    example=lambda: {
        "score_pos": jnp.array([1.0, 0.5, 0.2]),
        "score_neg": jnp.array([0.5, 0.0, 1.0]),
    },
)
def pairwise_easiness(score_pos: chex.Array, score_neg: chex.Array) -> jax.Array:
    r"""How far a ranker already tells the right item from a wrong one.

    .. math:: (s_+ - s_- + 1) / 2

    Args:
      score_pos: scores in [0, 1] of the right items, [...].
      score_neg: of the wrong ones, [...] or [..., negatives].

    Returns:
      Easiness in [0, 1], [...]: the least over the negatives.

    Raises:
      AssertionError: for shapes that do not fit, or arguments that are not floats.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> negatives = jnp.array([[0.0, 0.5]])
      >>> print(ox.losses.pairwise_easiness(jnp.array([1.0]), negatives))
      [0.75]
    """
    score_pos, score_neg = working_floats(score_pos=score_pos, score_neg=score_neg)
    if score_neg.ndim == score_pos.ndim + 1:
        score_neg = jnp.max(score_neg, axis=-1)
    chex.assert_equal_shape(
        [score_pos, score_neg], custom_message="score_pos, score_neg[..., negatives]"
    )
    return (score_pos - score_neg + 1) / 2


@catalogued(
    **_CURRICULUM,
    kind="helper",
    needs=("score", "is_positive"),
    variant="the paper's",
    example=lambda: {
        "score": jnp.array([1.0, 0.5, 0.2]),
        "is_positive": jnp.array([True, False, True]),
    },
)
def pointwise_easiness(score: chex.Array, is_positive: chex.Array) -> jax.Array:
    """How right a ranker already is about single items.

    Args:
      score: scores in [0, 1], of any shape.
      is_positive: whether the item is relevant, booleans of that shape.

    Returns:
      The score of a relevant item, 1 less the score of any other.

    Raises:
      AssertionError: for shapes that do not fit, or arguments of the wrong type.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> score, is_positive = jnp.array([0.75, 0.75]), jnp.array([True, False])
      >>> print(ox.losses.pointwise_easiness(score, is_positive))
      [0.75 0.25]
    """
    (score,) = working_floats(score=score)
    is_positive = jnp.asarray(is_positive)
    chex.assert_type(is_positive, bool, custom_message="is_positive must be booleans")
    chex.assert_shape(is_positive, score.shape, custom_message="is_positive, score")
    return jnp.where(is_positive, score, 1 - score)


@catalogued(
    title="Dynamic Loss-Based Sample Reweighting for Improved Large Language Model "
    "Pretraining",
    kind="loss",
    needs=("losses",),
    variant="the README's functions, without the trainer's token shares; 'uniform' is "
    "uniform, which the README's is not",
    compared="goldens `loss_based_weights_linupper`, `loss_based_weights_quadratic`, "
    "`loss_based_weights_extremes`",
    example=lambda: {"losses": jnp.array([0.5, 2.0, 1.0])},
)
def loss_based_weights(
    losses: chex.Array,
    *,
    strategy: str = "linupper",
    delta: chex.Numeric = 1.0,
    temperature: chex.Numeric = 1.0,
    where: chex.Array | None = None,
) -> jax.Array:
    r"""Weights of sum 1 from where in the range of its batch a loss lies.

    With :math:`h = \delta\, (2 l - \max l - \min l) / (\max l - \min l)`:

    .. math::
      w = \mathrm{softmax}(s / T), \qquad
      s = \min(h + \delta, \delta), \quad 1 - h^2 / \delta^2, \quad |h|

    for "linupper" (play down the easy ones, all above mid-range alike), "quadratic"
    (play down both ends) and "extremes" (play up both ends). The ratio of two weights
    is bounded. The loss is ``sum(weights * losses)``, not the mean.

    Args:
      losses: one an example, [batch]: of the whole batch, over all devices. No gradient
        flows into them.
      strategy: "linupper", "quadratic", "extremes", or "uniform" for 1/n.
      delta: above 0; 1 is the paper's.
      temperature: T > 0; 1 is the trainer's default, its large models have 0.4.
      where: which examples count, [batch]; the others have weight 0 and take no part.

    Returns:
      Weights [batch], without gradient.

    Raises:
      AssertionError: if `losses` are no vector of floats, or `where` has another shape.
      ValueError: for hyper-parameters outside their range.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> import optax_ext as ox
      >>> losses = jnp.array([0.0, 2.0, 4.0])
      >>> print(np.asarray(ox.losses.loss_based_weights(losses)).round(3))
      [0.155 0.422 0.422]
    """
    owner = "loss_based_weights"
    check_choice(owner, "strategy", strategy, STRATEGIES)
    check_hyperparam(owner, low=0.0, open_low=True, delta=delta)
    check_temperature(owner, temperature)
    losses = jax.lax.stop_gradient(working_floats(losses=losses)[0])
    chex.assert_rank(
        losses, 1, custom_message="losses must be a vector, one value an example"
    )
    mask = mask_of(where, losses)
    low, high = _extremes(losses, mask > 0, 0)
    delta = jnp.asarray(delta, losses.dtype)
    span = jnp.maximum(high - low, jnp.asarray(1e-6, losses.dtype))
    h = delta * ((losses - low) - (high - losses)) / span
    score = {
        "linupper": jnp.minimum(h + delta, delta),
        "quadratic": 1 - (h / delta) ** 2,
        "extremes": jnp.abs(h),
        "uniform": jnp.zeros_like(h),
    }[strategy]
    weights = kl_dro_weights(score, temperature=temperature, where=where)
    return weights / jnp.maximum(jnp.sum(mask), 1)

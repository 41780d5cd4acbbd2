r"""Metrics of a confusion matrix as losses, for two classes.

`soft_confusion_matrix` counts true and false positives and negatives of a batch with a
steep sigmoid in place of the decision; `anyloss` is one minus a metric of these counts.
Reach for it when the F-score, say, is what you are judged by, after a warm-up with
cross-entropy. For more classes, and for losses of single examples, see `imbalance`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_choice, check_hyperparam
from optax_ext.losses._numerics import mask_of, working_floats

_ANYLOSS = (
    "AnyLoss: Transforming Classification Metrics into Loss Functions",
    "2405.14745",
)


def _two_classes() -> Mapping[str, Any]:
    return {
        "logits": jnp.array([0.05, -0.02, 0.01, -0.04]),
        "labels": jnp.array([1, 0, 1, 0]),
    }


@catalogued(
    title=_ANYLOSS[0],
    arxiv=_ANYLOSS[1],
    kind="helper",
    needs=("logits", "labels"),
    variant="of probabilities sigmoid(logit); the official network passes its last "
    "linear output as a probability",
    compared="goldens `anyloss_*`",
    example=_two_classes,
)
def soft_confusion_matrix(
    logits: chex.Array,
    labels: chex.Array,
    *,
    slope: chex.Numeric = 73.0,
    where: chex.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    r"""Counts of true and false positives and negatives that have a gradient.

    .. math::
      A = \sigma(\text{slope} (\sigma(z) - \tfrac12)), \quad
      TP = \sum y A, \; FP = \sum (1 - y) A, \; FN = \sum y (1 - A), \;
      TN = \sum (1 - y)(1 - A)

    Args:
      logits: z of the positive class, any shape.
      labels: y, 0 or 1, of the same shape; integers, booleans or floats.
      slope: how hard a decision is, above 0 (official code: 73). Where
        \|sigmoid(z) - 1/2\| is above 0.3, the gradient is below e^-22.
      where: which examples count; of the same shape.

    Returns:
      TP, FP, FN, TN: four scalars over the whole batch.

    Raises:
      AssertionError: for shapes that do not fit, or logits that are not floats.
      ValueError: if `slope` is not positive.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> z, y = jnp.array([9.0, 9.0, -9.0]), jnp.array([1, 0, 0])
      >>> tp, fp, fn, tn = ox.losses.soft_confusion_matrix(z, y)
      >>> print(tp, fp, fn.round(3), tn)
      1.0 1.0 0.0 1.0
    """
    check_hyperparam("soft_confusion_matrix", low=0.0, open_low=True, slope=slope)
    (logits,) = working_floats(logits=logits)
    labels = jnp.asarray(labels).astype(logits.dtype)
    message = "labels must have the shape of logits"
    chex.assert_shape(labels, logits.shape, custom_message=message)
    mask = mask_of(where, logits)

    sharp = jnp.asarray(slope, logits.dtype) * (jax.nn.sigmoid(logits) - 0.5)
    yes, no = jax.nn.sigmoid(sharp), jax.nn.sigmoid(-sharp)
    true, false = mask * labels, mask * (1 - labels)
    pairs = ((true, yes), (false, yes), (true, no), (false, no))
    tp, fp, fn, tn = (jnp.sum(kind * decided) for kind, decided in pairs)
    return tp, fp, fn, tn


def _share(part: jax.Array, whole: jax.Array) -> jax.Array:
    """The quotient, and 0 where there is nothing to have a share of."""
    return part / jnp.where(whole > 0, whole, 1)


def _root(x: jax.Array) -> jax.Array:
    """Square root whose gradient at 0 is 0."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)


def _accuracy(tp, fp, fn, tn) -> jax.Array:
    return _share(tp + tn, tp + fp + fn + tn)


def _gmean(tp, fp, fn, tn) -> jax.Array:
    return _root(_share(tp, tp + fn) * _share(tn, tn + fp))


def _balanced_accuracy(tp, fp, fn, tn) -> jax.Array:
    return (_share(tp, tp + fn) + _share(tn, tn + fp)) / 2


_METRICS: dict[str, Callable[..., jax.Array]] = {
    "accuracy": _accuracy,
    "gmean": _gmean,
    "balanced_accuracy": _balanced_accuracy,
}


@catalogued(
    title=_ANYLOSS[0],
    arxiv=_ANYLOSS[1],
    kind="loss",
    needs=("logits", "labels"),
    variant="of probabilities sigmoid(logit), a batch statistic; the gradient of gmean "
    "in the notebook is 4 times too large",
    compared="goldens `anyloss_*`; hard metrics at a steep slope",
    example=_two_classes,
)
def anyloss(
    logits: chex.Array,
    labels: chex.Array,
    *,
    metric: str | Callable[..., jax.Array] = "fbeta",
    beta: chex.Numeric = 1.0,
    slope: chex.Numeric = 73.0,
    where: chex.Array | None = None,
) -> jax.Array:
    r"""One minus a metric of a binary classifier, on a soft confusion matrix.

    .. math::
      F_\beta = \frac{(1 + \beta^2) TP}{(1 + \beta^2) TP + \beta^2 FN + FP}, \quad
      \text{accuracy} = \frac{TP + TN}{n}, \quad
      \text{gmean} = \sqrt{TPR \cdot TNR}, \quad
      \text{balanced} = \frac{TPR + TNR}{2}

    A statistic of the batch, not a mean over examples: micro-batches do not add up.
    Confident logits have no gradient, so warm up with cross-entropy.

    Args:
      logits: z of the positive class, any shape.
      labels: y, 0 or 1, of the same shape; integers, booleans or floats.
      metric: "fbeta", "accuracy", "gmean", "balanced_accuracy", or a function
        ``(tp, fp, fn, tn) -> metric``.
      beta: weight of recall in F-beta, above 0; 1 is the F-score.
      slope: as in `soft_confusion_matrix` (official code: 73).
      where: which examples count; of the same shape.

    Returns:
      A scalar. A rate with nothing to find is 0, so without examples the loss is 1.

    Raises:
      AssertionError: for shapes that do not fit, or logits that are not floats.
      ValueError: for an unknown metric, or hyper-parameters that are not positive.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> z, y = jnp.array([9.0, 9.0, -9.0]), jnp.array([1, 0, 0])
      >>> print(f"{ox.losses.anyloss(z, y):.3f}")  # precision 1/2, recall 1
      0.333
      >>> recall = lambda tp, fp, fn, tn: tp / (tp + fn)
      >>> print(f"{ox.losses.anyloss(z, y, metric=recall):.3f}")
      0.000
    """
    if not callable(metric):
        check_choice("anyloss", "metric", metric, ("fbeta", *_METRICS))
    check_hyperparam("anyloss", low=0.0, open_low=True, beta=beta)
    counts = soft_confusion_matrix(logits, labels, slope=slope, where=where)
    if callable(metric):
        return 1 - metric(*counts)
    if metric in _METRICS:
        return 1 - _METRICS[metric](*counts)
    tp, fp, fn, _ = counts
    square = jnp.asarray(beta, tp.dtype) ** 2
    return 1 - _share((1 + square) * tp, (1 + square) * tp + square * fn + fp)

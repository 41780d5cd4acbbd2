r"""Classification when some classes are rare.

| what you have | what to take | what it changes |
|---|---|---|
| a long tail, cosine logits | `ldam_loss` | the margin, larger for rare classes |
| that, in the last fifth | and `deferred_reweighting` | the weights of the examples |
| a long tail, any logits | `vector_scaling_loss` | scale and offset of each logit |
| two classes and a metric | `anyloss`, in `confusion` | the metric is the loss |

The first three are cross-entropies of changed logits and leave the prediction alone:
train with them, and predict the largest of the unchanged logits. For
`vector_scaling_loss` gamma = 0 is logit adjustment and tau = 0 class-dependent
temperatures. The margin of LDAM shrinks with the fourth root of a class's size;
`effective_number_weights` count what n examples of a class add to each other.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam, check_rate
from optax_ext.losses._labels import counts_like, labelled, over_rows, positive_counts
from optax_ext.losses._numerics import working_floats

_LDAM = (
    "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss",
    "1906.07413",
)
_cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels


def _long_tail() -> Mapping[str, Any]:
    return {
        "logits": jnp.array([[0.9, -0.2, 0.1], [0.3, 0.4, -0.5], [0.0, 0.2, 0.7]]),
        "labels": jnp.array([0, 1, 2]),
        "class_counts": jnp.array([100, 10, 1]),
    }


@catalogued(
    title=_LDAM[0],
    arxiv=_LDAM[1],
    kind="loss",
    needs=("logits", "labels", "class_counts"),
    variant="on logits as given: the paper normalises features and class vectors, so "
    "that logits are cosines; weights are a function of their own",
    compared="golden `ldam`; margins by hand",
    example=_long_tail,
)
def ldam_loss(
    logits: chex.Array,
    labels: chex.Array,
    class_counts: chex.Array,
    *,
    max_margin: chex.Numeric = 0.5,
    scale: chex.Numeric = 30.0,
) -> jax.Array:
    r"""Cross-entropy with a margin that is larger for rarer classes.

    .. math::
      m_j = \text{max\_margin} \left(\frac{\min_k n_k}{n_j}\right)^{1/4}, \qquad
      l = -\log \frac{\exp(s (z_y - m_y))}{\exp(s (z_y - m_y)) + \sum_{k \ne y}
      \exp(s z_k)}

    Args:
      logits: z, cosines of features and class vectors, [..., classes].
      labels: y, integers [...].
      class_counts: n, training examples of each class, above 0; [classes]. Integers
        or floats.
      max_margin: margin of the rarest class, 0 or more (official code: 0.5).
      scale: s > 0, the inverse temperature of the cosines (official code: 30).

    Returns:
      One loss a row, [...].

    Raises:
      AssertionError: for shapes that do not fit, logits that are not floats or labels
        that are not integers.
      ValueError: for a class without examples, or hyper-parameters out of range.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> cosines = jnp.array([[0.9, 0.8], [0.8, 0.9]])
      >>> counts = jnp.array([16, 1])  # margins 0.25 and 0.5
      >>> print(ox.losses.ldam_loss(cosines, jnp.array([0, 1]), counts).round(1))
      [ 4.5 12. ]
    """
    owner = "ldam_loss"
    check_hyperparam(owner, low=0.0, max_margin=max_margin)
    check_hyperparam(owner, low=0.0, open_low=True, scale=scale)
    logits, labels = labelled(logits, labels)
    counts = counts_like(owner, class_counts, logits)
    max_margin, scale = (jnp.asarray(x, logits.dtype) for x in (max_margin, scale))

    margins = max_margin * (jnp.min(counts) / counts) ** 0.25
    own = jax.nn.one_hot(labels, counts.size, dtype=logits.dtype)
    return _cross_entropy(scale * (logits - own * over_rows(margins, own)), labels)


@catalogued(
    title=_LDAM[0],
    arxiv=_LDAM[1],
    kind="helper",
    needs=("class_counts",),
    variant="rescaled to sum to the number of classes, as in the official code",
    compared="golden `ldam`; limits of beta",
    example=lambda: {"class_counts": jnp.array([100, 10, 1])},
)
def effective_number_weights(
    class_counts: chex.Array, *, beta: float = 0.9999
) -> jax.Array:
    r"""Weights of classes by the effective number of their examples.

    .. math::
      w_j \propto \frac{1 - \beta}{1 - \beta^{n_j}}, \qquad \sum_j w_j = \text{classes}

    beta = 0 weighs all classes alike, beta -> 1 by their inverse frequency.

    Args:
      class_counts: n, training examples of each class, above 0; [classes]. Integers
        or floats.
      beta: in [0, 1) (official code: 0.9999). A Python number.

    Returns:
      Weights [classes]. Take the mean of ``weights[labels] * losses``, or the official
      weighted mean ``sum(weights[labels] * losses) / sum(weights[labels])``.

    Raises:
      AssertionError: if `class_counts` is no vector.
      ValueError: for a class without examples, or `beta` out of range.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> weights = ox.losses.effective_number_weights(jnp.array([2, 1]), beta=0.5)
      >>> print(weights.round(3))
      [0.8 1.2]
    """
    owner = "effective_number_weights"
    check_rate(owner, beta=beta)
    counts = jnp.asarray(class_counts)
    if jnp.issubdtype(counts.dtype, jnp.floating):
        (counts,) = working_floats(class_counts=counts)
        counts = positive_counts(owner, counts, counts.dtype)
    else:
        counts = positive_counts(owner, counts, float)

    # In float64 and by expm1: 1 - 0.9999 has three digits in float32.
    log_beta = math.log(beta) if beta > 0 else -math.inf
    weights = 1 / -jnp.expm1(counts * log_beta)
    return weights * (counts.size / jnp.sum(weights))


@catalogued(
    title=_LDAM[0],
    arxiv=_LDAM[1],
    kind="helper",
    needs=("class_counts",),
    variant="the switch of LDAM-DRW; the official code also lowers the learning rate "
    "there",
    compared="`effective_number_weights` from the switch on",
    example=lambda: {"class_counts": (100, 10, 1), "start_step": 160},
)
def deferred_reweighting(
    class_counts: chex.Array, *, start_step: int, beta: float = 0.9999
) -> Callable[[chex.Numeric], jax.Array]:
    r"""Weights of classes that are all 1 first, and balance the classes at the end.

    .. math::
      w(t) = 1 \text{ for } t < \text{start\_step, then } \text{effective\_number\_
      weights}(n, \beta)

    Args:
      class_counts: n, training examples of each class, above 0; [classes].
      start_step: the first step (or epoch, whatever the caller counts) with balanced
        weights; the paper's is 160 of 200 epochs.
      beta: in [0, 1) (official code: 0.9999). A Python number.

    Returns:
      A function of the step, which may be traced, that returns weights [classes].

    Raises:
      AssertionError: if `class_counts` is no vector.
      ValueError: for a class without examples, or hyper-parameters out of range.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> weights = ox.losses.deferred_reweighting(
      ...     jnp.array([2, 1]), start_step=160, beta=0.5)
      >>> print(weights(159), weights(160).round(3))
      [1. 1.] [0.8 1.2]
    """
    check_hyperparam("deferred_reweighting", low=0, start_step=start_step)
    late = effective_number_weights(class_counts, beta=beta)

    def weights(step: chex.Numeric) -> jax.Array:
        return jnp.where(jnp.asarray(step) < start_step, jnp.ones_like(late), late)

    return weights


@catalogued(
    title="Label-Imbalanced and Group-Sensitive Classification under "
    "Overparameterization",
    arxiv="2103.01550",
    kind="loss",
    needs=("logits", "labels", "class_counts"),
    variant="the loss of both repositories; 'Escaping Saddle Points for Effective "
    "Generalization on Class-Imbalanced Data' (2212.13827) adds SAM to it",
    compared="golden `vector_scaling`; cross-entropy at gamma = tau = 0",
    example=_long_tail,
)
def vector_scaling_loss(
    logits: chex.Array,
    labels: chex.Array,
    class_counts: chex.Array,
    *,
    gamma: chex.Numeric = 0.3,
    tau: chex.Numeric = 1.0,
) -> jax.Array:
    r"""Cross-entropy of logits that are scaled and shifted by the class frequencies.

    .. math::
      l = \mathrm{CE}\left(z_k \left(\tfrac{n_k}{\max_j n_j}\right)^{\gamma}
      + \tau \log \tfrac{n_k}{\sum_j n_j},\; y\right)

    gamma = 0 is logit adjustment, tau = 0 class-dependent temperatures, both 0 plain
    cross-entropy. For training only: predict from z.

    Args:
      logits: z, [..., classes].
      labels: y, integers [...].
      class_counts: n, training examples of each class, above 0; [classes]. Integers
        or floats.
      gamma: exponent of the scaling, 0 or more (0.3 in both repositories).
      tau: strength of the shift, 0 or more (1 in both repositories).

    Returns:
      One loss a row, [...].

    Raises:
      AssertionError: for shapes that do not fit, logits that are not floats or labels
        that are not integers.
      ValueError: for a class without examples, or hyper-parameters out of range.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> counts = jnp.array([3, 1])
      >>> z, y = jnp.zeros((2, 2)), jnp.array([0, 1])
      >>> losses = ox.losses.vector_scaling_loss(z, y, counts)
      >>> print([f"{x:.3f}" for x in losses])  # -log 3/4, -log 1/4
      ['0.288', '1.386']
    """
    owner = "vector_scaling_loss"
    check_hyperparam(owner, low=0.0, gamma=gamma, tau=tau)
    logits, labels = labelled(logits, labels)
    counts = counts_like(owner, class_counts, logits)
    gamma, tau = (jnp.asarray(x, logits.dtype) for x in (gamma, tau))

    scale = (counts / jnp.max(counts)) ** gamma
    shift = tau * jnp.log(counts / jnp.sum(counts))
    changed = logits * over_rows(scale, logits) + over_rows(shift, logits)
    return _cross_entropy(changed, labels)

r"""Classification losses: cross-entropy that does not saturate.

Every cross-entropy is :math:`\log(1 + e^z) = -\log p` of one number an example: z, the
log-odds against the right class. The probability of error is :math:`1 - p =
\sigma(z)`, and so the gradient with respect to z. Softmax cross-entropy computed as a
log-sum-exp minus a logit loses both in float32 once z is below -17; computed from z
they stay exact down to -87.

| loss | z | what for |
|---|---|---|
| stablemax | of heavy-tailed scores | large logits keep a gradient |
| normalized | of the logits | divided by the mean error, steps do not fade |

They compute in float32 (float64 if the logits are) and return one value an example.
"""

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam
from optax_ext.losses._numerics import working_floats

_PERCEPTRON = (
    "From Logistic Regression to the Perceptron Algorithm: Exploring Gradient Descent "
    "with Large Step Sizes"
)


def log_odds_against(
    logits: jax.Array,
    labels: chex.Array,
    axis: int = -1,
    where: chex.Array | None = None,
) -> jax.Array:
    """The log-odds of all other classes against the labelled one, under a softmax.

    Args:
      logits: one value a class along `axis`.
      labels: integers, of the shape of `logits` without `axis`.
      axis: the axis of the classes.
      where: booleans, broadcastable to `logits`; other classes do not count.

    Returns:
      Values of the shape of `labels`; finite, and very negative, where no other class
      counts.
    """
    chex.assert_axis_dimension_gt(logits, axis, 0, custom_message="logits, axis")
    chex.assert_type(labels, int, custom_message="labels must be integers")
    axis = axis % logits.ndim
    chex.assert_shape(
        labels,
        logits.shape[:axis] + logits.shape[axis + 1 :],
        custom_message="labels must have the shape of the logits without axis",
    )
    labels = jnp.expand_dims(labels, axis)
    classes = jax.lax.broadcasted_iota(labels.dtype, logits.shape, axis)
    others = classes != labels
    own = jnp.sum(jnp.where(others, 0, logits), axis)
    if where is not None:
        chex.assert_is_broadcastable(
            jnp.shape(where), logits.shape, custom_message="where, logits"
        )
        others &= jnp.broadcast_to(where, logits.shape)
    # Not -inf: of nothing but that, a log-sum-exp has the gradient NaN.
    others &= logits > -jnp.inf
    lowest = jnp.finfo(logits.dtype).min
    return jax.nn.logsumexp(jnp.where(others, logits, lowest), axis) - own


def _logits_example() -> dict[str, jax.Array]:
    return {
        "logits": jnp.array([[2.0, -1.0, 0.0], [0.5, 1.0, -3.0]]),
        "labels": jnp.array([0, 2]),
    }


@catalogued(
    title="Grokking at the Edge of Numerical Stability",
    arxiv="2501.04697",
    kind="loss",
    needs=("logits", "labels"),
    variant="without the official code's 1e-30, which its unsafe branches need, and "
    "from log-odds, so that small losses keep their digits.",
    compared="golden stablemax_cross_entropy",
    example=_logits_example,
)
def stablemax_cross_entropy_with_integer_labels(
    logits: chex.Array,
    labels: chex.Array,
    *,
    axis: int = -1,
    where: chex.Array | None = None,
) -> jax.Array:
    r"""Cross-entropy with a softmax that grows like x, not like its exponential.

    .. math::
      \ell = \log \sum_j s(x_j) - \log s(x_y), \qquad
      s(x) = \begin{cases} x + 1 & x \ge 0 \\ 1 / (1 - x) & x < 0 \end{cases}

    Softmax cross-entropy has, in float32, a gradient of exactly 0 once the right logit
    leads by 17, and scaling logits up is the way to get there. Here the gradient falls
    with the square of the lead only.

    Args:
      logits: x, of any shape with the classes along `axis`.
      labels: y, integers in [0, classes), of the shape of `logits` without `axis`.
      axis: the axis of the classes.
      where: booleans, broadcastable to `logits`: classes that count. The labelled class
        must.

    Returns:
      Losses of the shape of `labels`.

    Raises:
      AssertionError: for shapes or types that do not fit.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> logits = jnp.array([[17.0, 0.0], [0.0, 0.0]])
      >>> labels = jnp.array([0, 1])
      >>> loss = ox.losses.stablemax_cross_entropy_with_integer_labels(logits, labels)
      >>> print(loss.round(4))
      [0.0541 0.6931]
    """
    (logits,) = working_floats(logits=logits)
    # where on the arguments: the branch not taken may be infinite, or halve at 0.
    above = jnp.log1p(jnp.where(logits >= 0, logits, 0))
    below = jnp.log1p(jnp.where(logits < 0, -logits, 0))
    log_s = jnp.where(logits >= 0, above, -below)
    return jax.nn.softplus(log_odds_against(log_s, labels, axis, where))


def _normalized(z: jax.Array, eps: chex.Numeric) -> jax.Array:
    """log(1 + e^z) over the batch's mean probability of error, held constant."""
    mass = jnp.mean(jax.nn.sigmoid(z))
    floor = jnp.asarray(eps, mass.dtype)
    return jax.nn.softplus(z) / jax.lax.stop_gradient(jnp.maximum(mass, floor))


@catalogued(
    title=_PERCEPTRON,
    arxiv="2412.08424",
    kind="loss",
    needs=("logits", "labels"),
    variant="the paper's normalised gradient descent as a loss; eps is ours.",
    compared="golden normalized_sigmoid_binary_cross_entropy; Table 1 of the paper",
    example=lambda: {
        "logits": jnp.array([2.0, -1.0, 0.5]),
        "labels": jnp.array([1, 1, 0]),
    },
)
def normalized_sigmoid_binary_cross_entropy(
    logits: chex.Array, labels: chex.Array, *, eps: chex.Numeric = 1e-12
) -> jax.Array:
    r"""Logistic loss over the batch's mean probability of error.

    With p_i the probability of the right class of element i,

    .. math:: \ell_i = \frac{-\log p_i}{\max(\text{mean}_j(1 - p_j),\ \epsilon)}

    and no gradient through the denominator. Gradient descent on the mean is then
    `optax_ext.scale_by_inverse_error_mass`: its steps do not fade as the errors do, and
    for a linear model are at most lr times the largest norm of an input.

    Args:
      logits: of class 1; any shape. All of them are one batch: the loss of a
        micro-batch is normalised by that micro-batch.
      labels: 0 or 1, of the same shape; integers, booleans or floats.
      eps: smallest mean to divide by, positive; ours.

    Returns:
      Losses of the shape of `logits`.

    Raises:
      AssertionError: for shapes or types that do not fit.
      ValueError: for `eps` that is not positive.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> loss_fn = ox.losses.normalized_sigmoid_binary_cross_entropy
      >>> print(loss_fn(jnp.array([0.0, 0.0]), jnp.array([0, 1])).round(4))
      [1.3863 1.3863]
    """
    owner = "normalized_sigmoid_binary_cross_entropy"
    check_hyperparam(owner, low=0.0, open_low=True, eps=eps)
    (logits,) = working_floats(logits=logits)
    chex.assert_equal_shape([logits, labels], custom_message="logits, labels")
    labels = jnp.asarray(labels, logits.dtype)
    return _normalized((1 - 2 * labels) * logits, eps)


@catalogued(
    title=_PERCEPTRON,
    arxiv="2412.08424",
    kind="loss",
    needs=("logits", "labels"),
    variant="our form for many classes; for two that of the paper. eps is ours.",
    compared="golden normalized_softmax_cross_entropy",
    example=_logits_example,
)
def normalized_softmax_cross_entropy_with_integer_labels(
    logits: chex.Array,
    labels: chex.Array,
    *,
    eps: chex.Numeric = 1e-12,
    axis: int = -1,
) -> jax.Array:
    r"""Softmax cross-entropy over the batch's mean probability of error.

    With p_i the probability of the right class of example i,

    .. math:: \ell_i = \frac{-\log p_i}{\max(\text{mean}_j(1 - p_j),\ \epsilon)}

    and no gradient through the denominator, as in
    `normalized_sigmoid_binary_cross_entropy`.

    Args:
      logits: of any shape with the classes along `axis`. All examples are one batch.
      labels: integers in [0, classes), of the shape of `logits` without `axis`.
      eps: smallest mean to divide by, positive; ours.
      axis: the axis of the classes.

    Returns:
      Losses of the shape of `labels`.

    Raises:
      AssertionError: for shapes or types that do not fit.
      ValueError: for `eps` that is not positive.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> loss_fn = ox.losses.normalized_softmax_cross_entropy_with_integer_labels
      >>> print(loss_fn(jnp.zeros((2, 4)), jnp.array([0, 3])).round(4))
      [1.8484 1.8484]
    """
    owner = "normalized_softmax_cross_entropy_with_integer_labels"
    check_hyperparam(owner, low=0.0, open_low=True, eps=eps)
    (logits,) = working_floats(logits=logits)
    return _normalized(log_odds_against(logits, labels, axis), eps)

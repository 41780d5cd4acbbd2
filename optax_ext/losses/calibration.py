"""Predictions whose confidence can be trusted: calibration and rejection.

| function | what it is for |
|---|---|
| `pit_calibration_loss` | regression: a regulariser that makes quantiles hold |
| `logit_norm_score` | a confidence that still ranks after label smoothing |
| `risk_coverage_curve` | error rate against how many predictions one keeps |
| `area_under_risk_coverage` | that curve in one number, lower is better |

The first is trained with; the others only read a trained model. For label smoothing
itself there is `optax.smooth_labels`.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_choice, check_hyperparam, check_interval
from optax_ext.losses._numerics import working_floats

_SELECTIVE: dict[str, Any] = {
    "title": "Understanding Why Label Smoothing Degrades Selective Classification and "
    "How to Fix It",
    "arxiv": "2403.14715",
}


def magnitude(x: jax.Array) -> jax.Array:
    """The absolute value, with slope 0 at 0, where that of jnp.abs is 1."""
    return x * jnp.sign(x)


@catalogued(
    title="A Large-Scale Study of Probabilistic Calibration in Neural Network "
    "Regression",
    arxiv="2306.02738",
    kind="loss",
    needs=("pit",),
    variant="p=1 as in the experiments; the sort is exact, where theirs was soft",
    compared="goldens `pit_calibration_kde`, `pit_calibration_sort`",
    example=lambda: {"pit": jnp.array([0.1, 0.6, 0.9])},
)
def pit_calibration_loss(
    pit: chex.Array,
    *,
    kind: str = "kde",
    levels: int = 100,
    slope: chex.Numeric = 100.0,
    p: chex.Numeric = 1,
) -> jax.Array:
    r"""Distance of the predicted quantiles of a batch from uniform ones.

    Of the probability integral transforms :math:`z_i = F_i(y_i)`, "kde" compares a
    smooth distribution function with the levels :math:`a_j = (j + 1/2) / M`, and
    "sort" the i-th smallest with what it should be:

    .. math::
      \mathrm{mean}_j |\mathrm{mean}_i\, \sigma(s (a_j - z_i)) - a_j|^p,
      \qquad
      \mathrm{mean}_i |z_{(i)} - \tfrac{i}{n + 1}|^p

    Add it to the negative log-likelihood; the paper searches its weight from 0 to 10.

    Args:
      pit: z, the predicted distribution functions at the targets, [batch], in [0, 1].
      kind: "kde" or "sort".
      levels: M of "kde"; 100 as in the experiments.
      slope: s of "kde", above 0: how sharp a step is; 100 as in the experiments.
      p: exponent, 1 or more; 1 as in the experiments.

    Returns:
      A scalar, a statistic of the whole batch.

    Raises:
      AssertionError: if `pit` is no vector of floats.
      ValueError: for hyper-parameters outside their range.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> pit = jnp.array([0.25, 0.5, 0.75])
      >>> print(ox.losses.pit_calibration_loss(pit, kind="sort"))
      0.0
    """
    owner = "pit_calibration_loss"
    check_choice(owner, "kind", kind, ("kde", "sort"))
    check_interval(owner, levels=levels)
    check_hyperparam(owner, low=0.0, open_low=True, slope=slope)
    check_hyperparam(owner, low=1.0, p=p)
    (z,) = working_floats(pit=pit)
    chex.assert_rank(z, 1, custom_message="pit must be a vector, one value an example")

    p = jnp.asarray(p, z.dtype)
    if kind == "sort":
        expected = jnp.arange(1, z.size + 1, dtype=z.dtype) / (z.size + 1)
        return jnp.mean(magnitude(jnp.sort(z) - expected) ** p)
    a = (jnp.arange(levels, dtype=z.dtype) + 0.5) / levels
    steps = jax.nn.sigmoid(jnp.asarray(slope, z.dtype) * (a[:, None] - z[None, :]))
    return jnp.mean(magnitude(jnp.mean(steps, axis=1) - a) ** p)


@catalogued(
    **_SELECTIVE,
    kind="diagnostic",
    needs=("logits",),
    variant="centred as in the official search for p; its final test forgets to",
    compared="golden `selective_classification`",
    example=lambda: {"logits": jnp.array([[1.0, 2.0], [0.0, -3.0], [4.0, 3.0]])},
)
def logit_norm_score(
    logits: chex.Array, *, p: chex.Numeric = 4.0, center: bool = True
) -> jax.Array:
    r"""Confidence that repairs rejection for networks trained with label smoothing.

    With the logits less their mean, v:

    .. math:: \max_k v_k \,/\, \|v\|_p

    Neither a factor nor a constant on the logits changes it.

    Args:
      logits: [..., classes].
      p: order of the norm, 1 or more. Search it on validation data, 1 to 10: the
        official ResNet-50 has 8, and 5 with smoothing. 4 is ours.
      center: whether to subtract the mean.

    Returns:
      Scores [...], higher where the model is surer; 0 for v = 0.

    Raises:
      AssertionError: if `logits` are not floats, or have no class axis.
      ValueError: for `p` below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> logits = jnp.array([[3.0, 1.0, -1.0], [30.0, 10.0, -10.0]])
      >>> print(ox.losses.logit_norm_score(logits, p=1.0))
      [0.5 0.5]
    """
    check_hyperparam("logit_norm_score", low=1.0, p=p)
    (v,) = working_floats(logits=logits)
    chex.assert_axis_dimension_gt(v, -1, 0, custom_message="logits need classes")
    if center:
        # Against the first, equal logits have no rounding error left to be normalised.
        v = v - v[..., :1]
        v = v - jnp.mean(v, axis=-1, keepdims=True)
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(v), axis=-1, keepdims=True))
    nonzero = largest > 0
    v = jnp.where(nonzero, v / jnp.where(nonzero, largest, 1), 0)
    p = jnp.asarray(p, v.dtype)
    powers = jnp.where(nonzero[..., 0], jnp.sum(magnitude(v) ** p, axis=-1), 1)
    return jnp.max(v, axis=-1) / powers ** (1 / p)


class RiskCoverage(NamedTuple):
    """Points of a risk-coverage curve.

    Attributes:
      coverage: share of the examples kept, [n]: 1/n, 2/n, ..., 1.
      risk: error rate among them, [n].
    """

    coverage: jax.Array
    risk: jax.Array


@catalogued(
    **_SELECTIVE,
    kind="diagnostic",
    needs=("scores", "correct"),
    variant="one point an example; equal scores are kept in the order given",
    compared="golden `selective_classification`",
    example=lambda: {
        "scores": jnp.array([0.9, 0.2, 0.6]),
        "correct": jnp.array([True, False, True]),
    },
)
def risk_coverage_curve(scores: chex.Array, correct: chex.Array) -> RiskCoverage:
    """Error rate among the k most confident predictions, for every k.

    Args:
      scores: confidences, [n], at least float32: rounding makes ties.
      correct: whether the predictions are right, booleans [n].

    Returns:
      A `RiskCoverage` of ``coverage`` and ``risk``, both [n], in order of falling
      confidence.

    Raises:
      AssertionError: if the arguments are not vectors of one length, or `correct` are
        not booleans.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> scores = jnp.array([0.9, 0.2, 0.6, 0.4])
      >>> correct = jnp.array([True, False, True, True])
      >>> print(ox.losses.risk_coverage_curve(scores, correct).risk)
      [0.   0.   0.   0.25]
    """
    (scores,) = working_floats(scores=scores)
    correct = jnp.asarray(correct)
    chex.assert_rank(scores, 1, custom_message="scores must be a vector")
    chex.assert_type(correct, bool, custom_message="correct must be booleans")
    chex.assert_shape(correct, scores.shape, custom_message="correct, scores")
    wrong = ~correct[jnp.argsort(scores, descending=True)]
    kept = jnp.arange(1, scores.size + 1, dtype=scores.dtype)
    errors = jnp.cumsum(wrong.astype(scores.dtype))
    return RiskCoverage(kept / scores.size, errors / kept)


@catalogued(
    **_SELECTIVE,
    kind="diagnostic",
    needs=("scores", "correct"),
    variant="the mean of the risks; rule='trapezoid' is what torch_uncertainty reports",
    compared="golden `selective_classification`; closed form of a perfect ranking",
    example=lambda: {
        "scores": jnp.array([0.9, 0.2, 0.6]),
        "correct": jnp.array([True, False, True]),
    },
)
def area_under_risk_coverage(
    scores: chex.Array, correct: chex.Array, *, rule: str = "mean"
) -> jax.Array:
    """Mean error rate over all coverages: how well confidence finds the errors.

    Args:
      scores: confidences, [n].
      correct: whether the predictions are right, booleans [n].
      rule: "mean" averages the n risks of `risk_coverage_curve`; "trapezoid"
        integrates them over coverage and divides by its range, 1 - 1/n.

    Returns:
      A scalar. An error rate that does not depend on confidence gives that rate.

    Raises:
      AssertionError: if the arguments are not vectors of one length, `correct` are not
        booleans, or there are fewer than two with the trapezoid rule.
      ValueError: for an unknown `rule`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> scores = jnp.array([0.9, 0.2, 0.6, 0.4])
      >>> correct = jnp.array([True, False, True, True])
      >>> print(ox.losses.area_under_risk_coverage(scores, correct))
      0.0625
    """
    check_choice("area_under_risk_coverage", "rule", rule, ("mean", "trapezoid"))
    coverage, risk = risk_coverage_curve(scores, correct)
    if rule == "mean":
        return jnp.mean(risk)
    chex.assert_axis_dimension_gt(
        risk, 0, 1, custom_message="scores: the trapezoid rule needs two"
    )
    return jnp.trapezoid(risk, coverage) / (coverage[-1] - coverage[0])

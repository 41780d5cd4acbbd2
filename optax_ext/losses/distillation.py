r"""Distillation: targets that another model, or the same one earlier, puts out.

| the teacher | what to take | labels |
|---|---|---|
| the same model, an epoch ago | `progressive_self_distillation` | less and less |
| the model of a finished run | `self_distillation_loss` | weight alpha |
| several larger models | `ensemble_distillation_loss` | none |

`optimal_distillation_weight` finds alpha on validation data without training again.
`distillation_discriminator_loss` tells a student's scores from its teachers', for the
adversarial part of MEAL V2. No loss has a gradient in a teacher.
"""

import math
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_choice, check_hyperparam, check_interval
from optax_ext._core.pairs import StatefulLoss
from optax_ext.losses._numerics import working_floats
from optax_ext.losses._tables import table_loss

_GUIDANCE = (
    "Even your Teacher Needs Guidance: Ground-Truth Targets Dampen Regularization "
    "Imposed by Self-Distillation",
    "2102.13088",
)
_MEAL = (
    "MEAL V2: Boosting Vanilla ResNet-50 to 80%+ Top-1 Accuracy on ImageNet without "
    "Tricks",
    "2009.08453",
)


@catalogued(
    title="Self-Knowledge Distillation with Progressive Refinement of Targets",
    arxiv="2006.12000",
    kind="loss",
    needs=("logits", "labels", "index", "epoch"),
    state="none; num_examples x num_classes floats of past predictions",
    variant="one-hot past at epoch 0 and alpha_final (epoch + 1) / total_epochs, as in "
    "the official code",
    compared="golden `progressive_self_distillation`; ratio of the gradients by hand",
    example=lambda: {"num_examples": 4, "num_classes": 3, "total_epochs": 10},
)
def progressive_self_distillation(
    num_examples: int,
    num_classes: int,
    *,
    total_epochs: int,
    alpha_final: chex.Numeric = 0.8,
) -> StatefulLoss:
    r"""Soften labels by the model's own predictions of the epoch before.

    With P the table of past predictions, and e the epoch, counted from 0,

    .. math::
      \alpha &= \alpha_{final} (e + 1) / \text{total\_epochs} \\
      q_i &= (1 - \alpha)\, \mathrm{onehot}(y_i) + \alpha P_i, \qquad
        P_i = \mathrm{onehot}(y_i) \text{ at } e = 0 \\
      l_i &= -\sum_k q_{ik} \log \mathrm{softmax}(z_i)_k, \qquad
      P_i \leftarrow \mathrm{softmax}(z_i)

    The past carries no gradient. An example whose gradient it shrinks is one that the
    model had right already, so that the hard ones gain weight.

    ``apply(state, logits, labels, index, epoch) -> (losses, state)`` takes logits z
    [..., classes], labels y, ``index``, which example each row is, integers [...], and
    the epoch, an integer that may be traced. The state is the table
    [num_examples, num_classes]; shard it over examples. Of duplicate indices in a batch
    each has its own loss from the old row, and one of them, it is not defined which,
    stays in the table. Rows of padding may have the index `num_examples`: they are not
    stored. Show every example in epoch 0: one without a past has zeros there, and a
    target that sums to 1 - alpha.

    Args:
      num_examples: rows of the table: training examples, numbered from 0.
      num_classes: columns of the table.
      total_epochs: epochs of the whole run, 1 or more.
      alpha_final: weight of the past in the last epoch, in [0, 1] (official code: 0.8).

    Returns:
      A ``StatefulLoss``; one loss a row.

    Raises:
      ValueError: for hyper-parameters out of range; in ``apply``, for an epoch that is
        not one of 0 to total_epochs - 1.
      AssertionError: in ``apply``, for shapes that do not fit, logits that are not
        floats, or labels or an index that are not integers.

    Example:
      >>> import jax, jax.numpy as jnp, optax_ext as ox
      >>> ps = ox.losses.progressive_self_distillation(3, 2, total_epochs=2)
      >>> z, y, index = jnp.zeros((1, 2)), jnp.array([0]), jnp.array([2])
      >>> _, state = ps.apply(ps.init(), z, y, index, epoch=0)
      >>> def loss_fn(z):  # now the target is 0.2 [1, 0] + 0.8 [0.5, 0.5]
      ...     return ps.apply(state, z, y, index, epoch=1)[0].mean()
      >>> print(state[2], jax.grad(loss_fn)(z).round(3))
      [0.5 0.5] [[-0.1  0.1]]
    """
    owner = "progressive_self_distillation"
    check_interval(owner, total_epochs=total_epochs)
    check_hyperparam(owner, low=0.0, high=1.0, alpha_final=alpha_final)

    def rule(past, logits, labels, epoch):
        check_hyperparam(owner, low=0, high=total_epochs - 1, epoch=epoch)
        epoch = jnp.asarray(epoch, logits.dtype)
        alpha = jnp.asarray(alpha_final, logits.dtype) * (epoch + 1) / total_epochs
        own = jax.nn.one_hot(labels, num_classes, dtype=logits.dtype)
        past = jnp.where(epoch == 0, own, past)
        targets = (1 - alpha) * own + alpha * past
        losses = optax.losses.softmax_cross_entropy(logits, targets)
        return losses, jax.nn.softmax(logits)

    return table_loss(owner, num_examples, num_classes, rule)


def _three_outputs() -> Mapping[str, Any]:
    return {
        "predictions": jnp.array([[0.5, 0.1], [0.2, 0.9], [0.4, 0.4]]),
        "targets": jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]),
        "teacher": jnp.array([[0.8, 0.3], [0.1, 0.7], [0.6, 0.2]]),
    }


@catalogued(
    title=_GUIDANCE[0],
    arxiv=_GUIDANCE[1],
    kind="loss",
    needs=("predictions", "targets", "teacher"),
    variant="sums over outputs, halves for 'squared', as in the paper; the official "
    "code takes the mean squared error of softmax outputs",
    compared="goldens `self_distillation_*`; the filter of kernel ridge regression",
    example=_three_outputs,
)
def self_distillation_loss(
    predictions: chex.Array,
    targets: chex.Array,
    teacher: chex.Array,
    *,
    alpha: chex.Numeric = 0.5,
    kind: str = "squared",
) -> jax.Array:
    r"""Fit labels and the outputs of the previous model at once.

    .. math::
      \text{squared:} \quad & l = \tfrac{\alpha}{2} |f - y|^2
      + \tfrac{1 - \alpha}{2} |f - t|^2 \\
      \text{cross\_entropy:} \quad & l = -\sum_k \left(\alpha y_k
      + (1 - \alpha)\, \mathrm{softmax}(t)_k\right) \log \mathrm{softmax}(f)_k

    Args:
      predictions: f, outputs (logits for "cross_entropy"), [..., K].
      targets: y, of the same shape; one-hot or soft labels for "cross_entropy".
      teacher: t, outputs of the previous model (logits for "cross_entropy"), of the
        same shape. Detached.
      alpha: weight of the labels in [0, 1]; 1 is no distillation. The default is ours:
        the authors' script has 1, their notebook 0.25 and 0.
      kind: "squared" or "cross_entropy".

    Returns:
      One loss a row, [...].

    Raises:
      AssertionError: for shapes that do not fit, or arguments that are not floats.
      ValueError: for an unknown `kind`, or `alpha` out of range.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> f, y, t = jnp.array([[1.0, 0.0]]), jnp.array([[1.0, 2.0]]), jnp.zeros((1, 2))
      >>> print(ox.losses.self_distillation_loss(f, y, t, alpha=0.25))
      [0.875]
    """
    owner = "self_distillation_loss"
    check_choice(owner, "kind", kind, ("squared", "cross_entropy"))
    check_hyperparam(owner, low=0.0, high=1.0, alpha=alpha)
    predictions, targets, teacher = working_floats(
        predictions=predictions, targets=targets, teacher=teacher
    )
    message = "targets must have the shape of predictions"
    chex.assert_equal_shape([targets, predictions], custom_message=message)
    message = "teacher must have the shape of predictions"
    chex.assert_equal_shape([teacher, predictions], custom_message=message)
    message = "predictions need an axis of outputs"
    chex.assert_rank(predictions, set(range(1, 33)), custom_message=message)

    teacher = jax.lax.stop_gradient(teacher)
    alpha = jnp.asarray(alpha, predictions.dtype)
    if kind == "cross_entropy":
        mixed = alpha * targets + (1 - alpha) * jax.nn.softmax(teacher)
        return optax.losses.softmax_cross_entropy(predictions, mixed)
    to_targets = jnp.sum((predictions - targets) ** 2, -1)
    to_teacher = jnp.sum((predictions - teacher) ** 2, -1)
    return alpha / 2 * to_targets + (1 - alpha) / 2 * to_teacher


@catalogued(
    title=_GUIDANCE[0],
    arxiv=_GUIDANCE[1],
    kind="helper",
    needs=("targets", "pred_ground_truth", "pred_teacher"),
    variant="closed form on held-out predictions; exact for learners that are "
    "linear in their targets",
    compared="goldens `self_distillation_*`; grid search",
    example=lambda: {
        "targets": jnp.array([1.0, 0.0, 2.0]),
        "pred_ground_truth": jnp.array([0.8, 0.3, 1.7]),
        "pred_teacher": jnp.array([0.6, 0.4, 1.2]),
    },
)
def optimal_distillation_weight(
    targets: chex.Array, pred_ground_truth: chex.Array, pred_teacher: chex.Array
) -> jax.Array:
    r"""Weight of the labels that is best on held-out data, without training again.

    With A the predictions of a learner trained on labels and B those of one trained on
    the teacher's outputs, alpha A + (1 - alpha) B comes closest to y for

    .. math::
      \alpha^* = \frac{\langle y - B, A - B \rangle}{|A - B|^2}.

    Args:
      targets: y, held-out targets, any shape.
      pred_ground_truth: A at the held-out inputs, of the same shape.
      pred_teacher: B at the held-out inputs, of the same shape.

    Returns:
      A scalar; it may leave [0, 1]. Where A = B every weight is as good, and it is 1.

    Raises:
      AssertionError: for shapes that do not fit, or arguments that are not floats.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> y, a, b = jnp.array([1.0, 2.0]), jnp.array([2.0, 2.0]), jnp.array([0.0, 2.0])
      >>> print(ox.losses.optimal_distillation_weight(y, a, b))
      0.5
    """
    targets, ours, theirs = working_floats(
        targets=targets, pred_ground_truth=pred_ground_truth, pred_teacher=pred_teacher
    )
    message = "targets, pred_ground_truth, pred_teacher must have one shape"
    chex.assert_equal_shape([targets, ours, theirs], custom_message=message)
    gap = ours - theirs
    square = jnp.sum(gap**2)
    aligned = jnp.sum((targets - theirs) * gap)
    differ = square > 0
    return jnp.where(differ, aligned / jnp.where(differ, square, 1), 1)


@catalogued(
    title=_MEAL[0],
    arxiv=_MEAL[1],
    kind="loss",
    needs=("student_logits", "teacher_logits"),
    variant="the divergence; the official code's cross-entropy differs from it by a "
    "constant. Use it without labels and without weight decay",
    compared="golden `ensemble_distillation`; closed form of the gradient",
    example=lambda: {
        "student_logits": jnp.array([[0.5, -0.5], [0.1, 0.3], [1.0, 2.0]]),
        "teacher_logits": jnp.array([[[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]]] * 2),
    },
)
def ensemble_distillation_loss(
    student_logits: chex.Array,
    teacher_logits: chex.Array,
    *,
    temperature: chex.Numeric = 1.0,
) -> jax.Array:
    r"""Fit the averaged probabilities of several teachers.

    .. math::
      p = \tfrac1M \sum_m \mathrm{softmax}(z_m / T), \qquad
      l = T^2\, \mathrm{KL}(p \,\|\, \mathrm{softmax}(z_S / T))

    Args:
      student_logits: z_S, [..., classes].
      teacher_logits: z_m, [models, ..., classes]. Detached. One teacher has a leading
        axis of length 1.
      temperature: T > 0 (paper: 1). T^2 keeps the size of the gradient.

    Returns:
      One loss a row, [...].

    Raises:
      AssertionError: for shapes that do not fit, or arguments that are not floats.
      ValueError: if `temperature` is not positive.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> teachers = jnp.array([[[40.0, 0.0]], [[0.0, 40.0]]])  # they disagree
      >>> print(ox.losses.ensemble_distillation_loss(jnp.zeros((1, 2)), teachers))
      [0.]
    """
    owner = "ensemble_distillation_loss"
    check_hyperparam(owner, low=0.0, open_low=True, temperature=temperature)
    student, teachers = working_floats(
        student_logits=student_logits, teacher_logits=teacher_logits
    )
    message = "student_logits need an axis of classes"
    chex.assert_rank(student, set(range(1, 33)), custom_message=message)
    message = "teacher_logits must be [models, *the shape of student_logits]"
    chex.assert_shape(teachers, (None, *student.shape), custom_message=message)

    temperature = jnp.asarray(temperature, student.dtype)
    each = jax.nn.log_softmax(jax.lax.stop_gradient(teachers) / temperature)
    log_p = jax.nn.logsumexp(each, axis=0) - math.log(len(teachers))
    log_q = jax.nn.log_softmax(student / temperature)
    kl = optax.losses.kl_divergence_with_log_targets(log_q, log_p)
    return temperature**2 * kl


@catalogued(
    title=_MEAL[0],
    arxiv=_MEAL[1],
    kind="loss",
    needs=("student_scores", "teacher_scores"),
    variant="the discriminator's own loss; in the official code the student "
    "descends it too; in the paper it is to fool the discriminator: negate it there",
    compared="golden `ensemble_distillation`",
    example=lambda: {
        "student_scores": jnp.array([[0.5, -0.5], [0.1, 0.3], [1.0, 2.0]]),
        "teacher_scores": jnp.array([[-1.0, 0.5], [0.2, 0.8], [0.0, 1.0]]),
    },
)
def distillation_discriminator_loss(
    student_scores: chex.Array, teacher_scores: chex.Array
) -> jax.Array:
    r"""Tell the outputs of a student from those of its teachers.

    .. math::
      L = \tfrac12 \left( \overline{\mathrm{BCE}(s_S, (1, 0))}
      + \overline{\mathrm{BCE}(s_T, (0, 1))} \right)

    A statistic of the batch: with a sigmoid on each score, averaged over both.

    Args:
      student_scores: s_S, the discriminator's two outputs for the student's, [..., 2].
      teacher_scores: s_T, the same for the teachers' averaged outputs, of the same
        shape. Gradients flow into both.

    Returns:
      A scalar.

    Raises:
      AssertionError: for shapes that do not fit, or scores that are not floats.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> student, teacher = jnp.array([[9.0, -9.0]]), jnp.array([[-9.0, 9.0]])
      >>> loss = ox.losses.distillation_discriminator_loss(student, teacher)
      >>> print(f"{loss:.5f}")
      0.00012
    """
    student, teacher = working_floats(
        student_scores=student_scores, teacher_scores=teacher_scores
    )
    message = "student_scores, teacher_scores must have one shape"
    chex.assert_equal_shape([student, teacher], custom_message=message)
    message = "student_scores must end in an axis of 2"
    chex.assert_axis_dimension(student, -1, 2, custom_message=message)

    # BCE with target 1 is softplus(-score), with target 0 softplus(score).
    sign = jnp.broadcast_to(jnp.array([-1, 1], student.dtype), student.shape)
    right = jax.nn.softplus(sign * student) + jax.nn.softplus(-sign * teacher)
    return jnp.mean(right) / 2

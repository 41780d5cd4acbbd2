"""LENS: GRPO that also learns from questions to which no answer was right.

With rewards of 0 and 1, a group without a right answer has no advantages in GRPO. LENS
lets a wrong answer cost the more, the surer the policy was of it. A drop-in for
rewards and `group_relative_advantages`:

| you have | function |
|---|---|
| your own normalisation of rewards | `lens_rewards` |
| `optax_ext.losses.grpo_loss`, unchanged | `lens_advantages` |

Groups with right answers hardly change: there the difficulty is far above the
probability of a single long answer, and a wrong one costs next to nothing.
"""

import math
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam
from optax_ext.losses._numerics import working_floats
from optax_ext.losses.policy import group_relative_advantages

_LENS = "Don't Waste Mistakes: Leveraging Negative RL-Groups via Confidence Reweighting"


def _two_groups() -> Mapping[str, Any]:
    return {
        "correct": jnp.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]),
        "old_log_probs": jnp.array(
            [[-2.0, -6.0, -9.0], [-3.0, -2.0, -8.0], [-1.0, -2.0, -3.0]]
        ),
        "lengths": jnp.array([[4, 5, 6], [3, 4, 5], [2, 2, 4]]),
    }


@catalogued(
    title=_LENS,
    arxiv="2510.08696",
    kind="helper",
    needs=("correct", "old_log_probs", "lengths"),
    variant="the sequence's raw probability in the difficulty, as the paper prints it",
    compared="golden `lens_rewards`",
    example=_two_groups,
)
def lens_rewards(
    correct: chex.Array,
    old_log_probs: chex.Array,
    lengths: chex.Array,
    *,
    scale_by_group: bool = True,
    normalize_difficulty: bool = False,
) -> jax.Array:
    r"""Rewards of 1 for right answers, and below 0 for confident wrong ones.

    With the mean probability of a token :math:`c_i = \pi_i^{1/|o_i|}`

    .. math::
      D &= \max\left(2 \max_j c_j,\; 1 / \mathrm{mean}_i(\mathrm{correct}_i / \pi_i)
        \right) \text{ if any is correct, else } 2 \max_j c_j \\
      R_i &= 1 \text{ if correct, else } -\frac{1}{G} \frac{c_i}{D - c_i}
        \in [-1/G, 0].

    Args:
      correct: whether an answer is right, [..., G] with the group last; booleans, or
        numbers that are positive for right answers.
      old_log_probs: log pi, summed over the tokens of an answer, under the policy that
        drew it, [..., G].
      lengths: number of tokens of each answer, [..., G]; integers or floats.
      scale_by_group: False leaves out the 1/G.
      normalize_difficulty: True puts c for pi into the difficulty D.

    Returns:
      Rewards [..., G]. No gradient flows through them.

    Raises:
      AssertionError: for shapes that do not fit, or log-probabilities that are not
        floats.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> correct = jnp.array([False, False, False])
      >>> old_log_probs = 2 * jnp.log(jnp.array([0.9, 0.6, 0.1]))
      >>> rewards = ox.losses.lens_rewards(correct, old_log_probs, jnp.full(3, 2))
      >>> print([f"{reward:.3f}" for reward in rewards])
      ['-0.333', '-0.167', '-0.020']
    """
    correct, lengths = jnp.asarray(correct), jnp.asarray(lengths)
    (log_pi,) = working_floats(old_log_probs=old_log_probs)
    chex.assert_equal_shape(
        [correct, log_pi, lengths], custom_message="correct, old_log_probs, lengths"
    )
    message = "old_log_probs must have an axis of answers"
    chex.assert_axis_dimension_gt(log_pi, -1, 0, custom_message=message)

    log_pi = jax.lax.stop_gradient(log_pi)
    correct, group = correct > 0, log_pi.shape[-1]
    lengths = jax.lax.stop_gradient(lengths).astype(log_pi.dtype)
    log_c = log_pi / jnp.maximum(lengths, 1)
    # mean(correct / pi) is a sum of exp(-log pi), which overflows for long answers.
    inverse = jnp.where(correct, -(log_c if normalize_difficulty else log_pi), -jnp.inf)
    importance = math.log(group) - jax.nn.logsumexp(inverse, axis=-1, keepdims=True)
    log_d = math.log(2) + jnp.max(log_c, axis=-1, keepdims=True)
    some = jnp.any(correct, axis=-1, keepdims=True)
    log_d = jnp.where(some, jnp.maximum(log_d, importance), log_d)
    z = jnp.exp(log_c - log_d)
    return jnp.where(correct, 1, -z / (1 - z) / (group if scale_by_group else 1))


@catalogued(
    title=_LENS,
    arxiv="2510.08696",
    kind="helper",
    needs=("correct", "old_log_probs", "lengths"),
    variant="groups without a right answer are centred, not divided by their standard "
    "deviation, and weighted",
    compared="golden `lens_rewards`",
    example=_two_groups,
)
def lens_advantages(
    correct: chex.Array,
    old_log_probs: chex.Array,
    lengths: chex.Array,
    *,
    negative_weight: chex.Numeric = 0.25,
    ddof: int = 1,
    eps: chex.Numeric = 1e-4,
    scale_by_group: bool = True,
    normalize_difficulty: bool = False,
) -> jax.Array:
    r"""Advantages for `grpo_loss` that are not 0 in groups without a right answer.

    With R of `lens_rewards`

    .. math::
      A = \frac{R - \mathrm{mean}(R)}{\mathrm{std}(R) + \epsilon}
      \text{ if any is correct, else } w\, (R - \mathrm{mean}(R)).

    Groups in which all are right have advantages of exactly 0.

    Args:
      correct: whether an answer is right, [..., G], as in `lens_rewards`.
      old_log_probs: log pi of each answer, [..., G].
      lengths: number of tokens of each answer, [..., G].
      negative_weight: w, 0 or more: the weight of groups without a right answer. 0.25
        is the paper's for G = 16.
      ddof: the standard deviation divides by G - ddof; as in
        `group_relative_advantages`.
      eps: added to the standard deviation; 1e-4 as in trl.
      scale_by_group: as in `lens_rewards`.
      normalize_difficulty: as in `lens_rewards`.

    Returns:
      Advantages [..., G]. No gradient flows through them.

    Raises:
      AssertionError: for shapes that do not fit, or log-probabilities that are not
        floats.
      ValueError: for a hyper-parameter outside its interval.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> correct = jnp.array([False, False])
      >>> old_log_probs = 2 * jnp.log(jnp.array([0.9, 0.6]))
      >>> advantages = ox.losses.lens_advantages(
      ...     correct, old_log_probs, jnp.full(2, 2))
      >>> print([f"{advantage:.5f}" for advantage in advantages])
      ['-0.03125', '0.03125']
    """
    owner = "lens_advantages"
    check_hyperparam(owner, low=0.0, negative_weight=negative_weight)
    rewards = lens_rewards(
        correct,
        old_log_probs,
        lengths,
        scale_by_group=scale_by_group,
        normalize_difficulty=normalize_difficulty,
    )
    weight = jnp.asarray(negative_weight, rewards.dtype)
    some = jnp.any(jnp.asarray(correct) > 0, axis=-1, keepdims=True)
    return jnp.where(
        some,
        group_relative_advantages(rewards, ddof=ddof, eps=eps),
        weight * group_relative_advantages(rewards, scale="none"),
    )

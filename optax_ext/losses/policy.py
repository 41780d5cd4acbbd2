"""Losses for policies: from PPO's clip to what GRPO makes of it.

All of them maximise E[r A], where the importance ratio r = p(x) / p_old(x) corrects
for samples x drawn from a slightly older policy and A is an advantage. They differ in
what they put in for r and A:

| method | log r | A | when |
|---|---|---|---|
| PPO | log p - log p_old | from a critic | you have a critic |
| GRPO | the same, per token | reward against its group | many samples a prompt |
| Flow-GRPO | the same, mean over dimensions | as GRPO | the model is a flow |
| GRPO-Guard | centred, without noise scale | as GRPO, bounded | that clip never acts |

`clipped_surrogate_loss` is the piece they share: it takes a log-ratio, wherever that
comes from. `ppo_clip_loss` feeds it a difference of log-probabilities, and
`group_relative_advantages` makes advantages without a critic. The two for denoising
steps are one function, in `grpo_guard`; the sampler that makes such steps a policy is
in `flow_policy`.

All functions compute in float32 (float64 if an argument is float64) and return that
dtype, also for bfloat16 arguments: ratios differ from 1 by less than bfloat16 resolves.
"""

from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_choice, check_hyperparam
from optax_ext.losses._numerics import working_floats


def _surrogate_example() -> Mapping[str, Any]:
    return {
        "log_ratio": jnp.array([0.0, 0.4, 0.4]),
        "advantages": jnp.array([1.0, 2.0, -2.0]),
    }


@catalogued(
    title="Proximal Policy Optimization Algorithms",
    arxiv="1707.06347",
    kind="loss",
    needs=("log_ratio", "advantages"),
    variant="elementwise and from a log-ratio, with separate lower and upper bounds; "
    "no entropy or value term",
    compared="golden `ppo_clip`; hand-computed values and gradients",
    example=_surrogate_example,
)
def clipped_surrogate_loss(
    log_ratio: chex.Array,
    advantages: chex.Numeric,
    *,
    clip_range: chex.Numeric = 0.2,
    clip_range_high: chex.Numeric | None = None,
) -> jax.Array:
    r"""Pessimistic clipped policy loss on a given log-ratio.

    With :math:`r = \exp(\text{log\_ratio})`, per element

    .. math::
      \ell = \max(-A r,\; -A\,\mathrm{clip}(r, 1 - c, 1 + c_{high})).

    Its gradient is :math:`-A r` times that of the log-ratio, and exactly 0 where
    :math:`A > 0, r > 1 + c_{high}` or :math:`A < 0, r < 1 - c`. Which of the two it is
    gets decided on the log-ratio: near 1, float32 resolves a ratio to 1e-7 only, but
    its logarithm to 1e-7 of itself.

    Args:
      log_ratio: log p(x) - log p_old(x), or what takes its place; any shape.
      advantages: A, of the same rank and broadcastable to `log_ratio`, or a scalar. No
        gradient flows into them. Where they are 0 so are loss and gradient, whatever
        the ratio.
      clip_range: c, in (0, 1). 0.2 is the paper's.
      clip_range_high: c_high > 0, by default `clip_range`. DAPO uses 0.28 with a
        `clip_range` of 0.2; infinity leaves the ratio unbounded above.

    Returns:
      Losses of the shape of `log_ratio`.

    Raises:
      AssertionError: for shapes that do not fit, or arguments that are not floats.
      ValueError: for a clip range outside its interval.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> log_ratio = jnp.log(jnp.array([1.0, 1.5, 1.5]))
      >>> advantages = jnp.array([2.0, 2.0, -2.0])
      >>> print(ox.losses.clipped_surrogate_loss(log_ratio, advantages))
      [-2.  -2.4  3. ]
    """
    owner = "clipped_surrogate_loss"
    bounds: dict[str, Any] = {"low": 0.0, "open_low": True}
    check_hyperparam(owner, high=1.0, open_high=True, clip_range=clip_range, **bounds)
    check_hyperparam(owner, clip_range_high=clip_range_high, **bounds)
    log_ratio, advantages = working_floats(log_ratio=log_ratio, advantages=advantages)
    chex.assert_rank(
        advantages,
        {0, log_ratio.ndim},
        custom_message="advantages must have as many axes as the log-ratio: "
        "for one advantage a sample, pass advantages[:, None]",
    )
    chex.assert_is_broadcastable(
        advantages.shape, log_ratio.shape, custom_message="advantages, log-ratio"
    )

    advantages = jax.lax.stop_gradient(advantages)
    low = jnp.asarray(clip_range, log_ratio.dtype)
    high = jnp.asarray(
        clip_range if clip_range_high is None else clip_range_high, log_ratio.dtype
    )
    clipped = (
        ((advantages > 0) & (log_ratio > jnp.log1p(high)))
        | ((advantages < 0) & (log_ratio < jnp.log1p(-low)))
        | (advantages == 0)  # the ratio may overflow, and 0 * inf is no loss
    )
    bound = jnp.where(advantages > 0, 1 + high, 1 - low)
    # exp of what the clip removes may be inf, whose gradient times 0 would be NaN.
    ratio = jnp.exp(jnp.where(clipped, 0.0, log_ratio))
    return -advantages * jnp.where(clipped, bound, ratio)


@catalogued(
    title="Proximal Policy Optimization Algorithms",
    arxiv="1707.06347",
    kind="loss",
    needs=("log_probs", "old_log_probs", "advantages"),
    variant="the clipped surrogate alone, elementwise; advantages are taken as given",
    compared="golden `ppo_clip`",
    example=lambda: {
        "log_probs": jnp.array([-1.0, -0.6, -0.6]),
        "old_log_probs": jnp.array([-1.0, -1.0, -1.0]),
        "advantages": jnp.array([1.0, 2.0, -2.0]),
    },
)
def ppo_clip_loss(
    log_probs: chex.Array,
    old_log_probs: chex.Array,
    advantages: chex.Numeric,
    *,
    clip_range: chex.Numeric = 0.2,
    clip_range_high: chex.Numeric | None = None,
) -> jax.Array:
    r"""PPO's clipped loss from the log-probabilities of the actions taken.

    .. math::
      \ell = \max(-A r,\; -A\,\mathrm{clip}(r, 1 - c, 1 + c_{high})), \qquad
      r = p(x) / p_{old}(x).

    Args:
      log_probs: log p(x) under the policy that learns; any shape.
      old_log_probs: log p_old(x) under the policy that drew x, of the same shape. No
        gradient flows into them.
      advantages: A, as in `clipped_surrogate_loss`.
      clip_range: c, in (0, 1). 0.2 is the paper's.
      clip_range_high: c_high > 0, by default `clip_range`.

    Returns:
      Losses of the shape of `log_probs`.

    Raises:
      AssertionError: for shapes that do not fit, or arguments that are not floats.
      ValueError: for a clip range outside its interval.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import optax_ext as ox
      >>> old, advantages = jnp.array([-1.0, -2.0]), jnp.array([1.0, -0.5])
      >>> def loss_fn(log_probs):
      ...     return ox.losses.ppo_clip_loss(log_probs, old, advantages).mean()
      >>> print(jax.grad(loss_fn)(old))
      [-0.5   0.25]
    """
    log_probs, old_log_probs = working_floats(
        log_probs=log_probs, old_log_probs=old_log_probs
    )
    chex.assert_equal_shape(
        [log_probs, old_log_probs], custom_message="log_probs, old_log_probs"
    )
    return clipped_surrogate_loss(
        log_probs - jax.lax.stop_gradient(old_log_probs),
        advantages,
        clip_range=clip_range,
        clip_range_high=clip_range_high,
    )


@catalogued(
    title="DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language "
    "Models",
    arxiv="2402.03300",
    kind="helper",
    needs=("rewards",),
    variant="sample standard deviation (ddof=1) as in trl; Flow-GRPO's code has ddof=0",
    compared="goldens `grpo_advantages`, `grpo_advantages_batch`",
    example=lambda: {"rewards": jnp.array([[0.0, 1.0, 0.5], [2.0, 2.0, 2.0]])},
)
def group_relative_advantages(
    rewards: chex.Array,
    *,
    axis: int = -1,
    scale: str = "group",
    ddof: int = 1,
    eps: chex.Numeric = 1e-4,
) -> jax.Array:
    r"""Advantages without a critic: each reward against the others of its group.

    With mean and standard deviation over the samples of one prompt

    .. math::
      A = \frac{R - \mathrm{mean}(R)}{\mathrm{std}(R) + \epsilon}.

    Equal rewards give exactly 0, and so does a group of one.

    Args:
      rewards: R, with the samples of a group along `axis`, for example [prompts, G].
      axis: the axis of the group.
      scale: "group" divides by the standard deviation of the group, "batch" by that of
        all rewards, "none" not at all (Dr. GRPO).
      ddof: the standard deviation divides by G - ddof, and counts as 0 where that is
        not positive. 1 as in trl; Flow-GRPO uses 0.
      eps: added to the standard deviation. 1e-4 as in trl and Flow-GRPO.

    Returns:
      Advantages of the shape of `rewards`. No gradient flows through them.

    Raises:
      AssertionError: if `rewards` are not floats, or have no such axis.
      ValueError: for an unknown `scale`, a negative `ddof`, or an `eps` that is not
        positive.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> rewards = jnp.array([[0.0, 1.0, 2.0], [5.0, 5.0, 5.0]])
      >>> print(ox.losses.group_relative_advantages(rewards).round(3))
      [[-1.  0.  1.]
       [ 0.  0.  0.]]
    """
    owner = "group_relative_advantages"
    check_choice(owner, "scale", scale, ("group", "batch", "none"))
    check_hyperparam(owner, low=0.0, ddof=ddof)
    check_hyperparam(owner, low=0.0, open_low=True, eps=eps)
    (rewards,) = working_floats(rewards=rewards)
    chex.assert_axis_dimension_gt(rewards, axis, 0, custom_message="rewards, axis")

    rewards = jax.lax.stop_gradient(rewards)
    # Against the first reward, the mean of equal rewards has no rounding error, which
    # the division by eps would blow up.
    first = jax.lax.slice_in_dim(rewards, 0, 1, axis=axis)
    advantages = rewards - first - jnp.mean(rewards - first, axis, keepdims=True)
    if scale == "none":
        return advantages
    count = rewards.shape[axis] if scale == "group" else rewards.size
    over = axis if scale == "group" else None
    std = jnp.std(rewards, over, ddof=ddof, keepdims=True) if count > ddof else 0.0
    return advantages / (std + jnp.asarray(eps, rewards.dtype))

r"""Policy gradients where a step is worth only what it adds.

In submodular reinforcement learning the value of a trajectory is a set function F of
what it visited, so that going where one has been adds nothing. The gain of a step,
:math:`F(s_0, \dots, s_{t+1}) - F(s_0, \dots, s_t)`, takes the place of a reward, and
the rest is REINFORCE:

| you have | function |
|---|---|
| gains of steps, or plain rewards | `reward_to_go` |
| those and log-probabilities | `submodular_policy_loss` |

For additive F it is REINFORCE with reward-to-go. With samples of an older policy, put
`reward_to_go` minus a baseline into `optax_ext.losses.ppo_clip_loss`.
"""

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam
from optax_ext.losses._numerics import mask_of, working_floats
from optax_ext.losses.tokens import ArrayOrParts

_SUBMODULAR = "Submodular Reinforcement Learning"


@catalogued(
    title=_SUBMODULAR,
    arxiv="2307.13372",
    kind="helper",
    needs=("gains",),
    variant="with a discount, which the paper does not have",
    compared="golden `submodular_policy`",
    example=lambda: {"gains": jnp.array([[1.0, 0.0, 2.0], [3.0, 1.0, 0.5], [0.0] * 3])},
)
def reward_to_go(gains: chex.Array, *, gamma: chex.Numeric = 1.0) -> jax.Array:
    r"""What is still to come at each step.

    .. math:: G_i = \sum_{j \ge i} \gamma^{j - i} g_j

    Args:
      gains: g, or rewards, [..., H] with time last. Gradients flow.
      gamma: discount in [0, 1]; 1 as in the paper, whose horizon is finite.

    Returns:
      Sums of the shape of `gains`.

    Raises:
      AssertionError: if `gains` are not floats, or have no axis.
      ValueError: for a discount outside its interval.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> print(ox.losses.reward_to_go(jnp.array([1.0, 0.0, 2.0]), gamma=0.5))
      [1.5 1.  2. ]
    """
    check_hyperparam("reward_to_go", low=0.0, high=1.0, gamma=gamma)
    (gains,) = working_floats(gains=gains)
    message = "gains must have an axis of time"
    chex.assert_axis_dimension_gteq(gains, -1, 0, custom_message=message)
    discount = jnp.asarray(gamma, gains.dtype)

    def step(later, gain):
        now = gain + discount * later
        return now, now

    steps = jnp.moveaxis(gains, -1, 0)
    start = jnp.zeros(gains.shape[:-1], gains.dtype)
    return jnp.moveaxis(jax.lax.scan(step, start, steps, reverse=True)[1], 0, -1)


@catalogued(
    title=_SUBMODULAR,
    arxiv="2307.13372",
    kind="loss",
    needs=("log_probs", "gains"),
    variant="the policy gradient of the paper's theorem; the published code weighs "
    "with what was gained so far, which is biased",
    compared="golden `submodular_policy`; exact gradient of a coverage problem",
    example=lambda: {
        "log_probs": jnp.array([[-0.5, -1.0], [-0.2, -0.7], [-1.0, -1.0]]),
        "gains": jnp.array([[1.0, 0.0], [1.0, 2.0], [0.5, 0.5]]),
    },
)
def submodular_policy_loss(
    log_probs: chex.Array,
    gains: chex.Array,
    *,
    baseline: chex.Array | None = None,
    gamma: chex.Numeric = 1.0,
    where: chex.Array | None = None,
    return_parts: bool = False,
) -> ArrayOrParts:
    r"""REINFORCE with the marginal gains of a set function.

    .. math::
      \ell = -\sum_i m_i (G_i - b_i) \log \pi(a_i), \qquad
      G_i = \sum_{j \ge i} \gamma^{j - i} m_j g_j

    Args:
      log_probs: log pi of the actions taken, [..., H].
      gains: g, what each step added, [..., H]: ``jnp.diff(set_values, axis=-1)`` for
        values of the sets visited. Detached.
      baseline: b, [..., H]; may depend on the history of a step, not on its action.
        Detached. By default 0.
      gamma: discount in [0, 1], as in `reward_to_go`.
      where: m, the steps that count, [..., H]; by default all. Others still take time.
      return_parts: whether to return numerator and denominator instead.

    Returns:
      Losses of trajectories, [...]. With `return_parts`, these sums and the numbers of
      steps, both [...].

    Raises:
      AssertionError: for shapes that do not fit, or arguments that are not floats.
      ValueError: for a discount outside its interval.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> covered = jnp.array([[1.0, 2.0, 2.0, 3.0]])  # the second step is in vain
      >>> log_probs = jnp.array([[-1.0, -0.5, -2.0]])
      >>> gains = jnp.diff(covered, axis=-1)
      >>> print(ox.losses.submodular_policy_loss(log_probs, gains))
      [4.5]
    """
    given = {} if baseline is None else {"baseline": baseline}
    log_probs, gains, *given = working_floats(log_probs=log_probs, gains=gains, **given)
    chex.assert_equal_shape(
        [log_probs, gains, *given], custom_message="log_probs, gains, baseline"
    )
    mask = mask_of(where, log_probs)
    returns = reward_to_go(gains * mask, gamma=gamma)
    advantages = jax.lax.stop_gradient(returns - given[0] if given else returns)
    losses = -jnp.sum(advantages * log_probs * mask, axis=-1)
    return (losses, jnp.sum(mask, -1)) if return_parts else losses

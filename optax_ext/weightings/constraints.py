r"""Weights of several rewards, each to be raised only so far.

A reward model is a good proxy up to a point, beyond which the policy games it. Make
that point a constraint, and let Lagrange multipliers be the weights: a reward below its
threshold counts for more and more, one above it for less.

| you have | function |
|---|---|
| the mean reward of each model in a batch | `lagrangian_reward_weights` |
| the advantages of each model, and weights | `constrained_advantage` |

The mixed advantages go into any policy loss, as `optax_ext.losses.ppo_clip_loss`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_choice, check_hyperparam, check_rate
from optax_ext._core.pairs import Weighting
from optax_ext.losses._numerics import working_floats

_CONSTRAINED = (
    "Confronting Reward Model Overoptimization with Constrained RLHF",
    "2310.04373",
)


class LagrangianRewardWeightsState(NamedTuple):
    """State of `lagrangian_reward_weights`.

    Attributes:
      multipliers: before they are squashed, [C].
      momentum: the running sum of their gradients, [C].
    """

    multipliers: jax.Array
    momentum: jax.Array


@catalogued(
    title=_CONSTRAINED[0],
    arxiv=_CONSTRAINED[1],
    kind="weighting",
    needs=("losses",),
    state="2 floats a constraint",
    variant="all multipliers without a bound, where the official code drops the first",
    compared="goldens `lagrangian_weights_inequality`, `lagrangian_weights_equality`, "
    "`lagrangian_weights_unbounded`; the multiplier of a quadratic",
    example=lambda: {"thresholds": [0.4, 0.2]},
)
def lagrangian_reward_weights(
    thresholds: Sequence[float] | chex.Array,
    *,
    learning_rate: chex.Numeric = 0.1,
    mode: str = "inequality",
    bounded: bool = True,
    momentum: chex.Numeric = 0.1,
    max_norm: chex.Numeric = 0.5,
    init: chex.Numeric = 0.01,
) -> Weighting:
    r"""Weights that raise each reward to its threshold, and no further.

    With raw multipliers u, and :math:`\mu = \sigma(u)` for inequalities
    :math:`r_i \ge \theta_i`, :math:`\tanh(u)` for equalities, or u without a bound,
    the weights of the KL reward and of the C models are

    .. math::
      w = \left(C - \textstyle\sum_i \mu_i,\; \mu_1, \dots, \mu_C\right)
      \text{ bounded, else } (1, \mu_1, \dots, \mu_C).

    After them, u descends :math:`\sum_i \mu_i(u) (\bar r_i - \theta_i)`:

    .. math::
      g = \mu'(u) (\bar r - \theta) \min(1, c / |\cdot|), \qquad
      v \leftarrow \beta v + g, \qquad u \leftarrow u - \eta v,

    and stays at 0 or above for inequalities without a bound.

    Args:
      thresholds: theta, [C], one a reward model: from where on it is no good proxy.
      learning_rate: eta, 0 or more; 0.1 as in the released configurations.
      mode: "inequality" or "equality".
      bounded: whether to squash the multipliers.
      momentum: beta, in [0, 1); 0.1 as in the official code.
      max_norm: c > 0, the bound on the gradient of all multipliers together; 0.5 as in
        the official code.
      init: u at the start. The official code draws it from N(0, 0.01^2), and takes 0.5
        without a bound.

    Returns:
      A `Weighting`: ``init() -> state`` and
      ``update(mean_rewards, state) -> (weights, state)`` with mean rewards [C] of a
      batch of episodes and weights [1 + C], for `constrained_advantage`. No gradient
      flows through them.

    Raises:
      AssertionError: for thresholds or mean rewards of another shape.
      ValueError: for an unknown mode, or a hyper-parameter outside its interval.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> weighting = ox.lagrangian_reward_weights([0.5, 0.5], init=0.0)
      >>> state = weighting.init()
      >>> for _ in range(3):  # the first constraint is violated
      ...     weights, state = weighting.update(jnp.array([0.0, 1.0]), state)
      >>> print([f"{weight:.3f}" for weight in weights])
      ['1.000', '0.507', '0.493']
    """
    owner = "lagrangian_reward_weights"
    check_choice(owner, "mode", mode, ("inequality", "equality"))
    check_hyperparam(owner, low=0.0, learning_rate=learning_rate)
    check_hyperparam(owner, low=0.0, open_low=True, max_norm=max_norm)
    check_hyperparam(owner, init=init)
    check_rate(owner, momentum=momentum)
    goals = jnp.asarray(thresholds, float)
    message = "thresholds must be one number a reward model"
    chex.assert_rank(goals, 1, custom_message=message)

    def squash(raw):
        if not bounded:
            return raw
        return jax.nn.sigmoid(raw) if mode == "inequality" else jnp.tanh(raw)

    def init_fn() -> LagrangianRewardWeightsState:
        start = jnp.full_like(goals, init)
        return LagrangianRewardWeightsState(start, jnp.zeros_like(goals))

    def update_fn(
        losses: chex.Array, state: LagrangianRewardWeightsState, **extra: Any
    ) -> tuple[jax.Array, LagrangianRewardWeightsState]:
        del extra
        raw, velocity = state
        (rewards,) = working_floats(mean_rewards=losses)
        message = "mean_rewards must be one number a threshold"
        chex.assert_shape(rewards, goals.shape, custom_message=message)
        rewards = jax.lax.stop_gradient(rewards).astype(raw.dtype)
        eta, beta, limit = (
            jnp.asarray(x, raw.dtype) for x in (learning_rate, momentum, max_norm)
        )

        mu, slope = jax.jvp(squash, (raw,), (jnp.ones_like(raw),))
        first = raw.size - jnp.sum(mu) if bounded else jnp.ones((), raw.dtype)
        weights = jnp.concatenate([first[None], mu])

        gradient = slope * (rewards - goals.astype(raw.dtype))
        gradient *= jnp.minimum(1, limit / jnp.linalg.norm(gradient))
        velocity = beta * velocity + gradient
        raw = raw - eta * velocity
        if mode == "inequality" and not bounded:
            raw = jnp.maximum(raw, 0)
        return weights, LagrangianRewardWeightsState(raw, velocity)

    return Weighting(init_fn, update_fn)


def _three_samples() -> Mapping[str, Any]:
    return {
        "kl_advantages": jnp.array([0.1, -0.2, 0.3]),
        "reward_advantages": jnp.array([[1.0, -1.0], [0.5, 0.0], [-2.0, 1.0]]),
        "weights": jnp.array([1.0, 0.75, 0.25]),
    }


@catalogued(
    title=_CONSTRAINED[0],
    arxiv=_CONSTRAINED[1],
    kind="helper",
    needs=("kl_advantages", "reward_advantages", "weights"),
    variant="mixes what it is given; the official code first divides each model's "
    "advantages by their standard deviation",
    compared="goldens `lagrangian_weights_inequality`, `lagrangian_weights_equality`, "
    "`lagrangian_weights_unbounded`",
    example=_three_samples,
)
def constrained_advantage(
    kl_advantages: chex.Array, reward_advantages: chex.Array, weights: chex.Array
) -> jax.Array:
    r"""Advantages of several rewards, mixed by the weights of their constraints.

    .. math:: A = w_0 A_{KL} + \sum_i w_i A_i

    Args:
      kl_advantages: A_KL of the reward for staying near the reference, [...].
      reward_advantages: A_i of each reward model, [..., C].
      weights: w, [1 + C], as `lagrangian_reward_weights` returns them.

    Returns:
      Advantages [...]. No gradient flows through them.

    Raises:
      AssertionError: for shapes that do not fit, or arguments that are not floats.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> kl, rewards = jnp.array([1.0, 2.0]), jnp.array([[1.0, 0.0], [0.0, 4.0]])
      >>> print(ox.constrained_advantage(kl, rewards, jnp.array([1.0, 0.75, 0.25])))
      [1.75 3.  ]
    """
    kl_advantages, reward_advantages, weights = working_floats(
        kl_advantages=kl_advantages,
        reward_advantages=reward_advantages,
        weights=weights,
    )
    message = "weights must be one number, and one more a reward model"
    chex.assert_rank(weights, 1, custom_message=message)
    chex.assert_shape(
        reward_advantages,
        (*kl_advantages.shape, weights.size - 1),
        custom_message="reward_advantages must have the shape of kl_advantages, "
        "and one axis more for the reward models",
    )
    rewards = jnp.einsum(
        "...c,c->...", reward_advantages, weights[1:], precision="highest"
    )
    return jax.lax.stop_gradient(weights[0] * kl_advantages + rewards)

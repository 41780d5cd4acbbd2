"""Policy losses of language models, from the log-probabilities of their tokens.

All of them raise the log-probability of answers in proportion to an advantage, and
differ in where the answers come from and in what the advantage is measured against:

| loss | answers from | against | when |
|---|---|---|---|
| `grpo_loss` | a recent policy | others of their group | several samples a prompt |
| `remax_loss` | the policy itself | its greedy answer | two decodes a prompt |
| `a_lol_loss` (`offline_policy`) | a data set | a value estimate | no sampling |

`grpo_loss` is `clipped_surrogate_loss` (PPO's) a token or a sequence, with a penalty
for leaving a reference policy and a choice of how tokens are averaged: over each
answer (GRPO), over the batch (DAPO), or by a constant length (Dr. GRPO); a ratio a
sequence makes it GSPO. Its advantages come from `group_relative_advantages`, or from
`optax_ext.losses.lens`, which learns from groups without a right answer, too.
For steps whose worth is what they add, see `optax_ext.losses.submodular`.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_choice, check_hyperparam
from optax_ext.losses._numerics import mask_of, masked_mean, working_floats
from optax_ext.losses.policy import clipped_surrogate_loss
from optax_ext.losses.tokens import ArrayOrParts, check_per_sequence

_REMAX = (
    "ReMax: A Simple, Effective, and Efficient Reinforcement Learning Method for "
    "Aligning Large Language Models"
)


def _compared(
    owner: str, name: str, coefficient: Any, **log_probs: chex.Array | None
) -> dict[str, chex.Array]:
    """What a penalty compares, by name; nothing where its coefficient is 0.

    Raises:
      ValueError: if something is missing.
    """
    if isinstance(coefficient, int | float) and coefficient == 0:
        return {}
    given = {argument: x for argument, x in log_probs.items() if x is not None}
    if missing := log_probs.keys() - given:
        raise ValueError(
            f"{owner}: {name} is not 0, so pass {' and '.join(sorted(missing))}"
        )
    return given


def _grpo_example() -> dict[str, Any]:
    old = jnp.array([[-1.0, -0.5, -2.0, -0.1], [-0.2, -1.5, -1.0, -0.7], [-1.0] * 4])
    return {
        "log_probs": old + jnp.linspace(-0.3, 0.3, 12).reshape(3, 4),
        "old_log_probs": old,
        "advantages": jnp.array([1.0, -0.5, 0.25]),
    }


@catalogued(
    title="DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language "
    "Models",
    arxiv="2402.03300",
    kind="loss",
    needs=("log_probs", "old_log_probs", "advantages"),
    variant="aggregations of DAPO (2503.14476) and Dr. GRPO (2503.20783), ratio of "
    "GSPO (2507.18071); the KL term is not multiplied by the ratio",
    compared="goldens `grpo_loss`, `grpo_loss_token_mean`, `grpo_loss_constant`, "
    "`grpo_loss_sequence_level`",
    example=_grpo_example,
)
def grpo_loss(
    log_probs: chex.Array,
    old_log_probs: chex.Array,
    advantages: chex.Array,
    *,
    where: chex.Array | None = None,
    ref_log_probs: chex.Array | None = None,
    clip_range: chex.Numeric = 0.2,
    clip_range_high: chex.Numeric | None = None,
    beta: chex.Numeric = 0.0,
    level: str = "token",
    aggregate: str = "sequence",
    max_length: chex.Numeric | None = None,
    return_parts: bool = False,
) -> ArrayOrParts:
    r"""Clipped policy loss of answers, with a penalty for leaving a reference.

    With the clipped surrogate :math:`\ell` on the log-ratio
    :math:`\log p_t - \log p_{old,t}`, or on its mean over the answer's tokens for the
    level "sequence",

    .. math::
      \ell_t &= \ell(\log r_t, A) + \beta (e^{d_t} - d_t - 1), \qquad
        d_t = \log p_{ref,t} - \log p_t \\
      \text{sequence: } & \sum_t m_t \ell_t / \sum_t m_t, \quad
      \text{token: } B \sum_t m_t \ell_t / \sum_{b,t} m_{b,t}, \quad
      \text{constant: } \sum_t m_t \ell_t / L_{max}.

    For answers of the policy itself, the penalty estimates KL(policy || reference).

    Args:
      log_probs: log p of the tokens under the policy that learns, [..., L]; see
        `token_log_probs`.
      old_log_probs: the same under the policy that drew them. Detached.
      advantages: A, one a sequence, [...]. Detached.
      where: m, the tokens of the answer, [..., L]; by default all.
      ref_log_probs: log p under the reference policy, [..., L]. Detached. Needed where
        `beta` is not 0.
      clip_range: c, in (0, 1). 0.2 is the paper's.
      clip_range_high: c_high > 0, by default `clip_range`; DAPO's is 0.28. GSPO clips
        at 3e-4 and 4e-4.
      beta: weight of the penalty; 0 as in trl, the paper has 0.04. e^d overflows where
        the policy gives a token e^88 times less than the reference.
      level: "token" has a ratio a token, "sequence" one a sequence (GSPO).
      aggregate: "sequence" is GRPO's mean over each answer, "token" DAPO's mean over
        all tokens of the batch, "constant" Dr. GRPO's division by `max_length`.
      max_length: L_max > 0, for the aggregation "constant".
      return_parts: whether to return numerator and denominator instead.

    Returns:
      Losses [...], whose mean is the loss of the batch. Those of the aggregation
      "token" depend on the whole batch, by its number of tokens. With `return_parts`,
      the sums over tokens and what divides them (the number of tokens, or `max_length`
      for "constant"), both [...]: over micro-batches of any size, the quotient of their
      sums is the loss of the whole batch for "token" and "constant".

    Raises:
      AssertionError: for shapes that do not fit, or arguments that are not floats.
      ValueError: for a hyper-parameter outside its interval, an unknown choice, or if
        `ref_log_probs` or `max_length` are missing where they are needed.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> log_probs = jnp.array([[-1.0, -2.0, -1.0], [-1.0, -1.0, -1.0]])
      >>> rewards = jnp.array([1.0, 0.0])
      >>> advantages = ox.losses.group_relative_advantages(rewards)
      >>> where = jnp.array([[True, True, False], [True, True, True]])
      >>> loss = ox.losses.grpo_loss(log_probs, log_probs, advantages, where=where)
      >>> print(loss.round(3))
      [-0.707  0.707]
    """
    owner = "grpo_loss"
    check_choice(owner, "level", level, ("token", "sequence"))
    check_choice(owner, "aggregate", aggregate, ("sequence", "token", "constant"))
    check_hyperparam(owner, low=0.0, beta=beta)
    check_hyperparam(owner, low=0.0, open_low=True, max_length=max_length)
    compared = _compared(owner, "beta", beta, ref_log_probs=ref_log_probs)
    log_probs, old_log_probs, advantages, *reference = working_floats(
        log_probs=log_probs,
        old_log_probs=old_log_probs,
        advantages=advantages,
        **compared,
    )
    chex.assert_equal_shape(
        [log_probs, old_log_probs, *reference],
        custom_message="log_probs, old_log_probs, ref_log_probs",
    )
    check_per_sequence(log_probs.shape, advantages=advantages)

    mask = mask_of(where, log_probs)
    kept = mask > 0
    # Where it does not count, a ratio must not overflow either.
    log_ratio = jnp.where(kept, log_probs - jax.lax.stop_gradient(old_log_probs), 0)
    if level == "sequence":
        log_ratio = masked_mean(log_ratio, where)[..., None]
    losses = clipped_surrogate_loss(
        log_ratio,
        advantages[..., None],
        clip_range=clip_range,
        clip_range_high=clip_range_high,
    )
    if reference:
        d = jnp.where(kept, jax.lax.stop_gradient(reference[0]) - log_probs, 0)
        losses = losses + jnp.asarray(beta, d.dtype) * (jnp.expm1(d) - d)

    total, count = jnp.sum(losses * mask, -1), jnp.sum(mask, -1)
    if aggregate == "constant":
        if max_length is None:
            raise ValueError(f"{owner}: the aggregation 'constant' needs max_length")
        length = jnp.asarray(max_length, total.dtype)
        return (total, jnp.full_like(count, length)) if return_parts else total / length
    if return_parts:
        return total, count
    if aggregate == "token":
        return count.size * total / jnp.maximum(jnp.sum(count), 1)
    return total / jnp.maximum(count, 1)


@catalogued(
    title=_REMAX,
    arxiv="2310.10505",
    kind="helper",
    needs=("rewards", "greedy_rewards", "where"),
    variant="clip, discount and one-step KL of the official code; by default only its "
    "clip, and the paper's plain form otherwise",
    compared="golden `remax`",
    example=lambda: {
        "rewards": jnp.array([1.0, 0.0, 0.5]),
        "greedy_rewards": jnp.array([0.5, 0.5, 0.5]),
        "where": jnp.array([[True, True], [True, False], [True, True]]),
    },
)
def remax_advantages(
    rewards: chex.Array,
    greedy_rewards: chex.Array,
    where: chex.Array,
    log_probs: chex.Array | None = None,
    ref_log_probs: chex.Array | None = None,
    *,
    kl_coef: chex.Numeric = 0.0,
    gamma: chex.Numeric = 1.0,
    reward_clip: chex.Numeric = 5.0,
) -> jax.Array:
    r"""Advantages of tokens against the policy's own greedy answer.

    With n tokens that count, for the j-th of them, j = 0, ..., n - 1,

    .. math::
      A_j = \mathrm{clip}(R - R_{greedy}, -c, c)\, \gamma^{n - j}
            - \kappa (\log p_j - \log p_{ref,j}).

    Args:
      rewards: R of the sampled answers, [...].
      greedy_rewards: R_greedy of the greedy answers to the same prompts, [...].
      where: the tokens of the sampled answer, [..., L].
      log_probs: log p of the tokens under the policy that drew them, [..., L]. Needed
        where `kl_coef` is not 0.
      ref_log_probs: the same under the reference policy. Needed where `kl_coef` is
        not 0.
      kl_coef: kappa, 0 or more; the penalty of a token is its own, not summed to go.
        Official scripts: 0.05.
      gamma: discount in (0, 1], which acts once even on the last token. Official
        scripts: 0.99.
      reward_clip: c > 0; 5 as in the official code.

    Returns:
      Advantages [..., L], 0 where `where` is False. No gradient flows through them.

    Raises:
      AssertionError: for shapes that do not fit, or rewards or log-probabilities that
        are not floats.
      ValueError: for a hyper-parameter outside its interval, or if log-probabilities
        are missing where they are needed.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> where = jnp.array([[True, True, False]])
      >>> reward, greedy = jnp.array([3.0]), jnp.array([1.0])
      >>> print(ox.losses.remax_advantages(reward, greedy, where, gamma=0.5))
      [[0.5 1.  0. ]]
    """
    owner = "remax_advantages"
    check_hyperparam(owner, low=0.0, kl_coef=kl_coef)
    check_hyperparam(owner, low=0.0, open_low=True, high=1.0, gamma=gamma)
    check_hyperparam(owner, low=0.0, open_low=True, reward_clip=reward_clip)
    compared = _compared(
        owner, "kl_coef", kl_coef, log_probs=log_probs, ref_log_probs=ref_log_probs
    )
    rewards, greedy_rewards, *both = working_floats(
        rewards=rewards, greedy_rewards=greedy_rewards, **compared
    )
    where = jnp.asarray(where)
    check_per_sequence(where.shape, rewards=rewards, greedy_rewards=greedy_rewards)
    for name, x in zip(compared, both, strict=True):
        chex.assert_shape(x, where.shape, custom_message=f"{name}, where")

    mask = where.astype(rewards.dtype)
    limit = jnp.asarray(reward_clip, rewards.dtype)
    reward = jnp.clip(rewards - greedy_rewards, -limit, limit)[..., None]
    remaining = jnp.cumsum(mask[..., ::-1], -1)[..., ::-1]  # n - j
    advantages = reward * jnp.asarray(gamma, reward.dtype) ** remaining
    if both:
        now, reference = both
        advantages -= jnp.asarray(kl_coef, reward.dtype) * (now - reference)
    return jax.lax.stop_gradient(jnp.where(mask > 0, advantages, 0))


@catalogued(
    title=_REMAX,
    arxiv="2310.10505",
    kind="loss",
    needs=("log_probs", "rewards", "greedy_rewards"),
    variant="per token; the paper's estimator is the sum over each sequence, the "
    "official scalar the mean over all tokens",
    compared="golden `remax`; exact gradient of a softmax bandit",
    example=lambda: {
        "log_probs": jnp.array([[-1.0, -0.5], [-0.2, -1.5], [-1.0, -1.0]]),
        "rewards": jnp.array([1.0, 0.0, 0.5]),
        "greedy_rewards": jnp.array([0.5, 0.5, 0.0]),
    },
)
def remax_loss(
    log_probs: chex.Array,
    rewards: chex.Array,
    greedy_rewards: chex.Array,
    *,
    where: chex.Array | None = None,
    old_log_probs: chex.Array | None = None,
    ref_log_probs: chex.Array | None = None,
    kl_coef: chex.Numeric = 0.0,
    gamma: chex.Numeric = 1.0,
    reward_clip: chex.Numeric = 5.0,
    return_parts: bool = False,
) -> ArrayOrParts:
    r"""REINFORCE with the reward of the greedy answer as baseline.

    .. math:: \ell_j = -A_j \log p_j

    with the advantages of `remax_advantages`. Answers must come from the policy itself:
    there is no ratio to correct for another.

    Args:
      log_probs: log p of the tokens under the policy that learns, [..., L].
      rewards: R of the sampled answers, [...]. Detached.
      greedy_rewards: R_greedy of the greedy answers to the same prompts, [...].
        Detached.
      where: the tokens of the answer, [..., L]; by default all.
      old_log_probs: log p that enters the penalty, [..., L]; by default `log_probs`.
        Detached.
      ref_log_probs: log p under the reference policy, [..., L]. Detached. Needed where
        `kl_coef` is not 0.
      kl_coef: weight of the penalty, as in `remax_advantages`.
      gamma: discount in (0, 1], as in `remax_advantages`.
      reward_clip: bound of the reward difference; 5 as in the official code.
      return_parts: whether to return numerator and denominator instead.

    Returns:
      Losses of tokens, [..., L]. With `return_parts`, their sums over each sequence and
      the numbers of tokens, both [...]: over micro-batches of any size, the quotient of
      their sums is the official scalar.

    Raises:
      AssertionError: for shapes that do not fit, or arguments that are not floats.
      ValueError: for a hyper-parameter outside its interval, or if `ref_log_probs` is
        missing where it is needed.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> log_probs = jnp.array([[-1.0, -2.0]])
      >>> print(ox.losses.remax_loss(log_probs, jnp.array([3.0]), jnp.array([1.0])))
      [[2. 4.]]
    """
    given = {"old_log_probs": old_log_probs, "ref_log_probs": ref_log_probs}
    given = {name: x for name, x in given.items() if x is not None}
    log_probs, rewards, greedy_rewards, *more = working_floats(
        log_probs=log_probs, rewards=rewards, greedy_rewards=greedy_rewards, **given
    )
    given = dict(zip(given, more, strict=True))
    mask = mask_of(where, log_probs)
    advantages = remax_advantages(
        rewards,
        greedy_rewards,
        mask,
        given.get("old_log_probs", log_probs),
        given.get("ref_log_probs"),
        kl_coef=kl_coef,
        gamma=gamma,
        reward_clip=reward_clip,
    )
    losses = -advantages * log_probs
    if return_parts:
        return jnp.sum(losses, -1), jnp.sum(mask, -1)
    return losses

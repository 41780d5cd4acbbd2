"""Policy gradients from a fixed data set of answers and their rewards.

`a_lol_loss` is a weighted negative log-likelihood. Where the rewards are preferences
between two answers, reach for `optax_ext.losses.preference`; where the policy can be
sampled while it learns, for `optax_ext.losses.language_policy`. Its variants:

| variant | weight of an answer | use it |
|---|---|---|
| "sequence" | advantage times bounded ratio | by default |
| "token" | the same, with a ratio a token | for long answers |
| "ref_free" | advantage | without log-probabilities of the reference |
| "kl" | advantage, and a penalty | as a baseline |
| "reward" | reward times bounded ratio | without a value estimate (R-LoL) |
"""

from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_choice, check_hyperparam
from optax_ext.losses._numerics import mask_of, working_floats
from optax_ext.losses.tokens import ArrayOrParts, check_per_sequence


def _three_answers() -> Mapping[str, Any]:
    reference = jnp.array([[-1.0, -0.5, -2.0], [-0.2, -1.5, -1.0], [-1.0, -1.0, -0.7]])
    return {
        "log_probs": reference + jnp.linspace(-0.3, 0.3, 9).reshape(3, 3),
        "ref_log_probs": reference,
        "rewards": jnp.array([1.0, 0.2, 0.9]),
        "values": jnp.array([0.5, 0.6, 0.1]),
    }


@catalogued(
    title="Improving Language Models with Advantage-based Offline Policy Gradients",
    arxiv="2305.14718",
    kind="loss",
    needs=("log_probs", "ref_log_probs", "rewards", "values"),
    variant="A-LoL, its per-token, reference-free and KL forms, and R-LoL; the ratio "
    "carries no gradient, as in the official code",
    compared="goldens `a_lol_sequence`, `a_lol_token`, `a_lol_ref_free`, `a_lol_kl`, "
    "`a_lol_reward`; a two-armed bandit",
    example=_three_answers,
)
def a_lol_loss(
    log_probs: chex.Array,
    ref_log_probs: chex.Array,
    rewards: chex.Array,
    values: chex.Array,
    *,
    where: chex.Array | None = None,
    variant: str = "sequence",
    clip_range: chex.Numeric = 0.9,
    kl_beta: chex.Numeric = 0.0,
    return_parts: bool = False,
) -> ArrayOrParts:
    r"""Offline policy gradient from answers better than the reference expects.

    With :math:`A = \max(R - V, 0)`, sums S over the tokens of an answer and
    :math:`\rho = \mathrm{clip}(p / p_{ref}, 1 - c, 1 + c)`, which carries no gradient,

    .. math::
      \text{sequence: } & -A \rho(S) S, \qquad
      \text{token: } -A \textstyle\sum_t \rho_t \log p_t, \\
      \text{ref\_free: } & -A S, \qquad
      \text{kl: } -A S + \kappa (S - S_{ref}), \qquad
      \text{reward: } -R \rho(S) S.

    Args:
      log_probs: log p of the tokens under the policy that learns, [..., L].
      ref_log_probs: the same under the reference policy. Detached.
      rewards: R, [...]. Detached.
      values: V, what the reference policy can expect for the prompt, [...]. Detached.
      where: the tokens of the answer, [..., L]; by default all.
      variant: one of the five above. "token" has the smallest weights far from the
        reference; "reward" (R-LoL) ignores `values`.
      clip_range: c, 0 or more; 0.9 is the official script's.
      kl_beta: kappa, 0 or more, for the variant "kl".
      return_parts: whether to return numerator and denominator instead.

    Returns:
      Losses [...]: sums over tokens, whose mean over answers is the official loss. With
      `return_parts`, these sums and the numbers of tokens, both [...].

    Raises:
      AssertionError: for shapes that do not fit, or arguments that are not floats.
      ValueError: for an unknown variant, or a hyper-parameter outside its interval.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> log_probs = jnp.array([[-1.0, -2.0], [-1.0, -1.0]])
      >>> rewards, values = jnp.array([1.0, 0.0]), jnp.array([0.5, 0.5])
      >>> print(ox.losses.a_lol_loss(log_probs, log_probs, rewards, values))
      [1.5 0. ]
    """
    owner = "a_lol_loss"
    variants = ("sequence", "token", "ref_free", "kl", "reward")
    check_choice(owner, "variant", variant, variants)
    check_hyperparam(owner, low=0.0, clip_range=clip_range, kl_beta=kl_beta)
    log_probs, ref_log_probs, rewards, values = working_floats(
        log_probs=log_probs, ref_log_probs=ref_log_probs, rewards=rewards, values=values
    )
    chex.assert_equal_shape(
        [log_probs, ref_log_probs], custom_message="log_probs, ref_log_probs"
    )
    check_per_sequence(log_probs.shape, rewards=rewards, values=values)

    ref_log_probs, rewards, values = jax.lax.stop_gradient(
        (ref_log_probs, rewards, values)
    )
    bound = jnp.asarray(clip_range, log_probs.dtype)

    def weight(log_ratio):
        ratio = jnp.exp(jax.lax.stop_gradient(log_ratio))
        return jnp.clip(ratio, 1 - bound, 1 + bound)

    mask = mask_of(where, log_probs)
    total, ref_total = jnp.sum(log_probs * mask, -1), jnp.sum(ref_log_probs * mask, -1)
    advantage = rewards if variant == "reward" else jnp.maximum(rewards - values, 0)
    if variant == "token":
        weighted = jnp.sum(weight(log_probs - ref_log_probs) * log_probs * mask, -1)
    elif variant in ("ref_free", "kl"):
        weighted = total
    else:
        weighted = weight(total - ref_total) * total
    losses = -advantage * weighted
    if variant == "kl":
        losses += jnp.asarray(kl_beta, total.dtype) * (total - ref_total)
    return (losses, jnp.sum(mask, -1)) if return_parts else losses

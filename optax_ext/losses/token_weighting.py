"""Cross-entropies whose token weights come from the token's own probability.

| function | weight of a token of probability p | to |
|---|---|---|
| `talr_cross_entropy` | p^(1/tau), above a floor | fine-tune without forgetting |
| `tldr_cross_entropy` | cos(pi p) + 1, or (1-p)^gamma | repeat less in generation |

They pull in opposite directions: the one counts easy tokens, the other hard ones. With
weight 1 both are the cross-entropy; evaluate with that. TALR's weights carry no
gradient, TLDR's do, as in focal loss.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_choice, check_hyperparam
from optax_ext.losses._numerics import mask_of, masked_mean, working_floats
from optax_ext.losses.stability import token_cross_entropy


def _example() -> dict[str, Any]:
    return {
        "logits": jnp.array(
            [[[1.0, 2.0], [0.0, -3.0]], [[4.0, 4.0], [1.0, 0.0]], [[0.0, 2.0]] * 2]
        ),
        "labels": jnp.array([[1, 1], [0, 1], [0, 1]]),
    }


def _kept_tokens(
    logits: chex.Array, labels: chex.Array, where: chex.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropies of the tokens, 0 where they do not count, and the mask."""
    (logits,) = working_floats(logits=logits)
    chex.assert_axis_dimension_gt(
        logits, -2, 0, custom_message="logits must be [..., tokens, classes]"
    )
    mask = mask_of(where, logits[..., 0])
    # Padding often has labels outside the classes, such as -100.
    labels = jnp.asarray(labels)
    chex.assert_shape(
        labels, mask.shape, custom_message="labels must be [..., tokens], a token each"
    )
    return token_cross_entropy(logits, jnp.where(mask > 0, labels, 0)) * mask, mask


def _reduced(losses: jax.Array, mask: jax.Array, return_parts: bool) -> Any:
    return (jnp.sum(losses, -1), jnp.sum(mask, -1)) if return_parts else losses


@catalogued(
    title="SFT Doesn't Always Hurt General Capabilities: Revisiting Domain-Specific "
    "Fine-Tuning in LLMs",
    arxiv="2509.20758",
    kind="loss",
    needs=("logits", "labels"),
    variant="the mean goes over tokens, not over the sum of the weights",
    compared="goldens `talr`, `talr_fixed_tau` (a third party's implementation)",
    example=_example,
)
def talr_cross_entropy(
    logits: chex.Array,
    labels: chex.Array,
    *,
    where: chex.Array | None = None,
    tau: chex.Numeric | str = "median",
    min_weight: chex.Numeric = 0.01,
    return_parts: bool = False,
) -> Any:
    r"""Cross-entropy that counts tokens less the more they surprise the model.

    With the token's cross-entropy :math:`l`, and no gradient through the weight:

    .. math:: w\, l, \qquad w = \max(e^{-l / \tau}, w_{min})

    :math:`e^{-l/\tau}` is, up to its normaliser, the minimiser of
    :math:`\sum w l + \tau \sum w \log w` on the simplex.

    Args:
      logits: [..., tokens, classes].
      labels: integers [..., tokens].
      where: which tokens count, [..., tokens]; the labels of others may be anything.
      tau: temperature, above 0. "median" takes the median over the sequences of the
        batch of their mean cross-entropy, at least 1e-6; sequences without a token do
        not vote, and of an even number the two in the middle are averaged.
      min_weight: smallest weight, in [0, 1]; 1 is the cross-entropy.
      return_parts: True gives ``(numerator, denominator)`` of each sequence: the sum of
        its losses and how many tokens it has. Sums of both over micro-batches divide
        to the mean over all tokens (with a fixed `tau`: the median is that of a batch).

    Returns:
      Losses [..., tokens], 0 where `where` is not; or the two parts, each [...].

    Raises:
      AssertionError: for shapes that do not fit, logits that are not floats, or labels
        that are not integers.
      ValueError: for hyper-parameters outside their range.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> logits = jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.75]]))
      >>> labels = jnp.array([0, 0])
      >>> print(ox.losses.talr_cross_entropy(logits, labels, tau=1.0).round(4))
      [0.3466 0.3466]
    """
    owner = "talr_cross_entropy"
    if isinstance(tau, str):
        check_choice(owner, "tau", tau, ("median",))
    else:
        check_hyperparam(owner, low=0.0, open_low=True, tau=tau)
    check_hyperparam(owner, low=0.0, high=1.0, min_weight=min_weight)
    losses, mask = _kept_tokens(logits, labels, where)

    detached = jax.lax.stop_gradient(losses)
    if isinstance(tau, str):
        means = jnp.where(jnp.any(mask > 0, -1), masked_mean(detached, mask), jnp.nan)
        tau = jnp.fmax(jnp.nanmedian(means), 1e-6)
    tau, floor = (jnp.asarray(x, losses.dtype) for x in (tau, min_weight))
    weights = jnp.maximum(jnp.exp(-detached / tau), floor)
    return _reduced(weights * losses, mask, return_parts)


@catalogued(
    title="TLDR: Token Loss Dynamic Reweighting for Reducing Repetitive Utterance "
    "Generation",
    arxiv="2003.11963",
    kind="loss",
    needs=("logits", "labels"),
    variant="token level, the official default; its sequence level is left out",
    compared="goldens `tldr_cosine`, `tldr_focal`",
    example=_example,
)
def tldr_cross_entropy(
    logits: chex.Array,
    labels: chex.Array,
    *,
    where: chex.Array | None = None,
    weight: str = "cosine",
    gamma: chex.Numeric = 2.0,
    stop_gradient: bool = False,
    return_parts: bool = False,
) -> Any:
    r"""Cross-entropy that counts tokens more the less probable they are.

    With the probability p of the label, "cosine" and "focal" weights:

    .. math:: -w \log p, \qquad w = \cos(\pi p) + 1 \quad\text{or}\quad (1 - p)^\gamma

    Args:
      logits: [..., tokens, classes].
      labels: integers [..., tokens].
      where: which tokens count, [..., tokens]; the labels of others may be anything.
      weight: "cosine", from 2 at p = 0 to 0 at p = 1, or "focal".
      gamma: exponent of the focal weight, 0 or more; 2 is the official default.
      stop_gradient: True takes the weight as a constant; the official code lets the
        gradient through.
      return_parts: True gives ``(numerator, denominator)`` of each sequence: the sum of
        its losses and how many tokens it has. Sums of both over micro-batches divide
        to the mean over all tokens.

    Returns:
      Losses [..., tokens], 0 where `where` is not; or the two parts, each [...].

    Raises:
      AssertionError: for shapes that do not fit, logits that are not floats, or labels
        that are not integers.
      ValueError: for an unknown `weight` or a negative `gamma`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> logits = jnp.log(jnp.array([[0.5, 0.5], [0.999, 0.001]]))
      >>> labels = jnp.array([0, 0])
      >>> print(ox.losses.tldr_cross_entropy(logits, labels).round(4))
      [0.6931 0.    ]
    """
    owner = "tldr_cross_entropy"
    check_choice(owner, "weight", weight, ("cosine", "focal"))
    check_hyperparam(owner, low=0.0, gamma=gamma)
    losses, mask = _kept_tokens(logits, labels, where)

    miss = -jnp.expm1(-losses)  # 1 - p, exact also near p = 1
    if weight == "cosine":
        weights = 2 * jnp.sin(jnp.pi / 2 * miss) ** 2
    else:
        # The slope of a root is infinite at 0, where the loss is 0 anyway.
        base = jnp.where(miss > 0, miss, 1)
        weights = jnp.where(miss > 0, base ** jnp.asarray(gamma, miss.dtype), 0)
    if stop_gradient:
        weights = jax.lax.stop_gradient(weights)
    return _reduced(weights * losses, mask, return_parts)

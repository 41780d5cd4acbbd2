"""Log-probabilities of tokens and sequences, which the losses of language models take.

| you want | function | for |
|---|---|---|
| log p of each token | `token_log_probs` | `grpo_loss`, `remax_loss`, `a_lol_loss` |
| their sum over a sequence | `sequence_log_probs` | `dpo_loss` |
| their mean over it | the same, `average=True` | `simpo_loss`, `dpo_loss` as IPO |
| KL from the reference, by token | `token_kl` | `sparse_po_loss` |

Nothing is shifted here: ``logits[..., t, :]`` must score ``labels[..., t]``. For a
causal model that reads tokens, pass ``logits[:, :-1]`` and ``tokens[:, 1:]``.
"""

from typing import Any, TypeAlias

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext.losses._numerics import mask_of, working_floats

ArrayOrParts: TypeAlias = Any
"""An array, or numerator and denominator with `return_parts`."""

_DPO = (
    "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
    "2305.18290",
)


def check_per_sequence(shape: tuple[int, ...], **arguments: jax.Array) -> None:
    """Check that arguments have the shape of tokens, [..., L], without the last axis.

    Raises:
      AssertionError: with the name of one that has not.
    """
    for name, x in arguments.items():
        message = f"{name} must have one value a sequence"
        chex.assert_shape(x, shape[:-1], custom_message=message)


@catalogued(
    title=_DPO[0],
    arxiv=_DPO[1],
    kind="helper",
    needs=("logits", "labels"),
    variant="no shift of the labels",
    compared="goldens `sequence_log_probs`, `sparse_po`",
    example=lambda: {
        "logits": jnp.array([[1.0, 0.0, -1.0], [0.5, 2.0, 0.0], [0.0, 0.0, 1.5]]),
        "labels": jnp.array([0, 2, 1]),
    },
)
def token_log_probs(logits: chex.Array, labels: chex.Array) -> jax.Array:
    r"""Log-probability of each token under its logits.

    .. math:: \log p_t = z_{t, y_t} - \log \sum_v \exp z_{t, v}

    Args:
      logits: z, [..., V], with the vocabulary along the last axis.
      labels: y, integers in [0, V), [...]. ``logits[..., t, :]`` scores
        ``labels[..., t]``: the caller aligns them.

    Returns:
      Log-probabilities of the shape of `labels`.

    Raises:
      AssertionError: for shapes that do not fit, logits that are not floats, or labels
        that are not integers.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75]]))
      >>> log_probs = ox.losses.token_log_probs(logits, jnp.array([1, 2]))
      >>> print([f"{p:.2f}" for p in jnp.exp(log_probs)])
      ['0.25', '0.75']
    """
    (logits,) = working_floats(logits=logits)
    labels = jnp.asarray(labels)
    chex.assert_type(labels, int, custom_message="labels must be integers")
    message = "labels must have the shape of logits without the vocabulary"
    chex.assert_shape(labels, logits.shape[:-1], custom_message=message)

    log_probs = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]


@catalogued(
    title="Token-level Direct Preference Optimization",
    arxiv="2404.11999",
    kind="helper",
    needs=("ref_logits", "logits"),
    variant="KL(reference || policy), as SparsePO and TDPO need it; exact, not sampled",
    compared="golden `sparse_po`; `optax.losses.kl_divergence_with_log_targets`",
    example=lambda: {
        "ref_logits": jnp.array([[1.0, 0.0, -1.0], [0.5, 2.0, 0.0], [0.0, 0.0, 1.5]]),
        "logits": jnp.array([[0.0, 0.5, -1.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.5]]),
    },
)
def token_kl(ref_logits: chex.Array, logits: chex.Array) -> jax.Array:
    r"""Divergence of the policy's next token from the reference's, at each position.

    .. math::
      KL_t = \sum_v p_{ref}(v) \left(\log p_{ref}(v) - \log p(v)\right)

    Args:
      ref_logits: logits of the reference policy, [..., V]. Detached.
      logits: logits of the policy, of the same shape. Gradients flow.

    Returns:
      Divergences [...], 0 or more. A token of probability 0 under the reference adds 0.

    Raises:
      AssertionError: for shapes that differ, or arguments that are not floats.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> logits = jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.75]]))
      >>> reference = jnp.log(jnp.array([[0.5, 0.5], [0.5, 0.5]]))
      >>> kl = ox.losses.token_kl(reference, logits)
      >>> print([f"{x:.3f}" for x in abs(kl)])  # log(4 / 3) / 2
      ['0.000', '0.144']
    """
    ref_logits, logits = working_floats(ref_logits=ref_logits, logits=logits)
    chex.assert_equal_shape([ref_logits, logits], custom_message="ref_logits, logits")

    ref_log_p = jax.nn.log_softmax(jax.lax.stop_gradient(ref_logits))
    log_p = jax.nn.log_softmax(logits)
    # Tokens that both forbid with a logit of -inf would give inf - inf.
    possible = ref_log_p > -jnp.inf
    log_ratio = jnp.where(possible, ref_log_p - log_p, 0)
    return jnp.sum(jnp.exp(ref_log_p) * log_ratio, axis=-1)


@catalogued(
    title=_DPO[0],
    arxiv=_DPO[1],
    kind="helper",
    needs=("logits", "labels"),
    variant="no shift of the labels; the mean over tokens that SimPO needs on request",
    compared="golden `sequence_log_probs`",
    example=lambda: {
        "logits": jnp.linspace(-1.0, 2.0, 24).reshape(3, 4, 2) ** 2,
        "labels": jnp.array([[0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1]]),
    },
)
def sequence_log_probs(
    logits: chex.Array,
    labels: chex.Array,
    *,
    where: chex.Array | None = None,
    average: bool = False,
    return_parts: bool = False,
) -> ArrayOrParts:
    r"""Log-probability of each sequence, in all or per token.

    .. math::
      \log p(y) = \sum_t m_t \log p_t, \qquad
      \text{average: } \log p(y) / \max(1, \textstyle\sum_t m_t)

    Args:
      logits: [..., L, V]; ``logits[..., t, :]`` scores ``labels[..., t]``.
      labels: integers, [..., L]. Where `where` is False they may be anything, such as
        the -100 by which some data loaders mark padding.
      where: m, the tokens that count, [..., L]; by default all. Leave out the prompt.
      average: whether to divide by the number of tokens that count.
      return_parts: whether to return numerator and denominator instead.

    Returns:
      Log-probabilities [...]; 0 for a sequence without tokens. With `return_parts`, the
      sums and the numbers of tokens, both [...]: over micro-batches of any size, the
      quotient of their sums is the mean over all tokens.

    Raises:
      AssertionError: for shapes that do not fit, logits that are not floats, or labels
        that are not integers.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> logits = jnp.log(jnp.array([[[0.5, 0.5], [0.25, 0.75]]]))
      >>> labels = jnp.array([[0, 1]])
      >>> (log_prob,) = ox.losses.sequence_log_probs(logits, labels)
      >>> print(f"{jnp.exp(log_prob):.3f}")  # 0.5 * 0.75
      0.375
    """
    labels = jnp.asarray(labels)
    if where is not None:
        chex.assert_shape(where, labels.shape, custom_message="where, labels")
        labels = jnp.where(jnp.asarray(where).astype(bool), labels, 0)
    log_probs = token_log_probs(logits, labels)
    message = "logits must have an axis of tokens"
    chex.assert_axis_dimension_gteq(log_probs, -1, 0, custom_message=message)

    mask = mask_of(where, log_probs)
    total, count = jnp.sum(log_probs * mask, -1), jnp.sum(mask, -1)
    if return_parts:
        return total, count
    return total / jnp.maximum(count, 1) if average else total

r"""SparsePO: DPO with a weight a token.

DPO counts all tokens of an answer alike. SparsePO weighs their log-ratios to the
reference (reward mask) and their divergence from it (KL mask). Special cases:

| reward mask | KL mask | is |
|---|---|---|
| ones | zeros, or no KL given | DPO |
| ones | ones | TDPO1 (2404.11999) |
| activations of the reference | the same | MaPO: `activation_token_mask` |
| a network on its hidden states | the same or another | SparsePO: `sparse_token_mask` |

Masks are weights, 0 or more; `chosen_where` and `rejected_where` say which positions
are tokens of the answer at all.
"""

from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam
from optax_ext.losses._numerics import mask_of, working_floats

_SPARSE = (
    "SparsePO: Controlling Preference Alignment of LLMs via Sparse Token Masks",
    "2410.05102",
)


def _absolute(x: jax.Array) -> jax.Array:
    """|x| with derivative 0 at 0, where that of `jnp.abs` is 1."""
    return x * jax.lax.stop_gradient(jnp.sign(x))


def _example() -> Mapping[str, Any]:
    chosen = jnp.array([[-1.0, -0.5, -0.7], [-0.3, -1.2, -0.1], [-2.0, -0.4, -0.9]])
    rejected = jnp.array([[-1.5, -0.5], [-0.2, -1.0], [-0.6, -0.8]])
    return {
        "chosen_log_probs": chosen,
        "rejected_log_probs": rejected,
        "ref_chosen_log_probs": chosen - 0.1,
        "ref_rejected_log_probs": rejected + 0.2,
        "chosen_kl": -0.1 * chosen,
        "rejected_kl": -0.1 * rejected,
    }


@catalogued(
    title=_SPARSE[0],
    arxiv=_SPARSE[1],
    kind="loss",
    needs=(
        "chosen_log_probs",
        "rejected_log_probs",
        "ref_chosen_log_probs",
        "ref_rejected_log_probs",
    ),
    variant="separate masks for reward and KL, with KL(reference || policy); L1 "
    "penalties in full, where the code halves them for a common mask",
    compared="golden `sparse_po`; DPO and TDPO1 for masks of ones",
    example=_example,
)
def sparse_po_loss(
    chosen_log_probs: chex.Array,
    rejected_log_probs: chex.Array,
    ref_chosen_log_probs: chex.Array,
    ref_rejected_log_probs: chex.Array,
    chosen_kl: chex.Array | None = None,
    rejected_kl: chex.Array | None = None,
    *,
    chosen_where: chex.Array | None = None,
    rejected_where: chex.Array | None = None,
    chosen_reward_mask: chex.Array | None = None,
    rejected_reward_mask: chex.Array | None = None,
    chosen_kl_mask: chex.Array | None = None,
    rejected_kl_mask: chex.Array | None = None,
    beta: chex.Numeric = 0.1,
    l1_reward: chex.Numeric = 0.0,
    l1_kl: chex.Numeric = 0.0,
) -> jax.Array:
    r"""Preference loss with weights :math:`m^r, m^k` of tokens.

    .. math::
      u &= \sum_t m^r_t (\log p_t - \log p_{ref,t})
        \text{ on the chosen, minus the same on the rejected} \\
      d &= \sum_t m^k_t KL_t \text{ on the rejected, minus the same on the chosen} \\
      \ell &= -\log \sigma(\beta (u - d))
        + \lambda_r |m^r|_1 + \lambda_k |m^k|_1

    with the norms over both answers.

    Args:
      chosen_log_probs: log p of the tokens of the chosen answers, [..., L_w]; see
        `token_log_probs`.
      rejected_log_probs: the same of the rejected ones, [..., L_l].
      ref_chosen_log_probs: log p of the chosen's under the reference. Detached.
      ref_rejected_log_probs: and of the rejected's. Detached.
      chosen_kl: KL(reference || policy) at each position, [..., L_w], as `token_kl`
        returns it. Gradients flow. By default 0.
      rejected_kl: the same on the rejected answers, [..., L_l].
      chosen_where: tokens of the chosen answers, [..., L_w]; by default all.
      rejected_where: tokens of the rejected answers, [..., L_l]; by default all.
      chosen_reward_mask: m^r on the chosen, [..., L_w]; by default 1. Gradients flow
        into all four masks.
      rejected_reward_mask: m^r on the rejected, [..., L_l].
      chosen_kl_mask: m^k on the chosen, [..., L_w]; by default 1.
      rejected_kl_mask: m^k on the rejected, [..., L_l].
      beta: beta > 0. 0.1 as in DPO; the paper's experiments have 0.1 or 0.8.
      l1_reward: lambda_r, 0 or more; the paper has 0 or 0.001.
      l1_kl: lambda_k, 0 or more.

    Returns:
      Losses of pairs, [...].

    Raises:
      AssertionError: for shapes that do not fit, or arguments that are not floats.
      ValueError: for a hyper-parameter outside its interval.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> chosen, rejected = jnp.array([[-1.0, -2.0]]), jnp.array([[-3.0]])
      >>> (loss,) = ox.losses.sparse_po_loss(
      ...     chosen, rejected, chosen - 2.0, rejected,
      ...     chosen_reward_mask=jnp.array([[1.0, 0.0]]), beta=0.5)
      >>> print(f"{loss:.3f}")  # log(1 + exp(-1))
      0.313
    """
    owner = "sparse_po_loss"
    check_hyperparam(owner, low=0.0, open_low=True, beta=beta)
    check_hyperparam(owner, low=0.0, l1_reward=l1_reward, l1_kl=l1_kl)
    required = {
        "chosen_log_probs": chosen_log_probs,
        "rejected_log_probs": rejected_log_probs,
        "ref_chosen_log_probs": ref_chosen_log_probs,
        "ref_rejected_log_probs": ref_rejected_log_probs,
    }
    optional = {
        "chosen_kl": chosen_kl,
        "rejected_kl": rejected_kl,
        "chosen_reward_mask": chosen_reward_mask,
        "rejected_reward_mask": rejected_reward_mask,
        "chosen_kl_mask": chosen_kl_mask,
        "rejected_kl_mask": rejected_kl_mask,
    }
    given = required | {k: x for k, x in optional.items() if x is not None}
    given = dict(zip(given, working_floats(**given), strict=True))

    u_w, kl_w, *sizes_w = _sums("chosen", given, chosen_where)
    u_l, kl_l, *sizes_l = _sums("rejected", given, rejected_where)
    message = "chosen_log_probs and rejected_log_probs must hold as many answers"
    chex.assert_equal_shape([u_w, u_l], custom_message=message)

    u, d = u_w - u_l, kl_l - kl_w
    loss = -jax.nn.log_sigmoid(jnp.asarray(beta, u.dtype) * (u - d))
    for strength, of_w, of_l in zip((l1_reward, l1_kl), sizes_w, sizes_l, strict=True):
        loss += jnp.asarray(strength, u.dtype) * (of_w + of_l)
    return loss


def _sums(
    side: str, given: Mapping[str, jax.Array], where: chex.Array | None
) -> list[jax.Array]:
    """Of one side: weighted log-ratio and KL, and the sizes of both masks."""
    log_probs = given[f"{side}_log_probs"]
    names = [f"ref_{side}_log_probs"]
    names += [f"{side}_{what}" for what in ("kl", "reward_mask", "kl_mask")]
    for name in names:
        if name in given:
            message = f"{name} must have the shape of {side}_log_probs"
            chex.assert_shape(given[name], log_probs.shape, custom_message=message)
    if where is not None:
        message = f"{side}_where must have the shape of {side}_log_probs"
        chex.assert_shape(where, log_probs.shape, custom_message=message)

    tokens = mask_of(where, log_probs)
    reward_mask = given.get(f"{side}_reward_mask", jnp.ones_like(log_probs)) * tokens
    kl_mask = given.get(f"{side}_kl_mask", jnp.ones_like(log_probs)) * tokens
    log_ratio = log_probs - jax.lax.stop_gradient(given[f"ref_{side}_log_probs"])
    kl = given.get(f"{side}_kl", jnp.zeros_like(log_probs))
    terms = reward_mask * log_ratio, kl_mask * kl
    sizes = _absolute(reward_mask), _absolute(kl_mask)
    return [jnp.sum(x, axis=-1) for x in (*terms, *sizes)]


@catalogued(
    title=_SPARSE[0],
    arxiv=_SPARSE[1],
    kind="helper",
    needs=("activations", "where"),
    variant="without the z-normalisation before the rescaling, which cancels out",
    compared="closed form",
    example=lambda: {
        "activations": jnp.linspace(-1.0, 1.0, 24).reshape(3, 4, 2) ** 2,
        "where": jnp.arange(4)[None] < jnp.array([[4], [3], [2]]),
    },
)
def activation_token_mask(activations: chex.Array, where: chex.Array) -> jax.Array:
    r"""Weights of tokens from how active the reference model is on them (MaPO).

    With the mean activation :math:`a_t` of a token, and minimum and maximum over the
    tokens of its sequence,

    .. math:: m_t = (a_t - \min a) / (\max a - \min a).

    Args:
      activations: of the reference model, [..., L, ...]: what follows the axes of
        `where` (layers, units) is averaged. Detached.
      where: the tokens of the answer, [..., L].

    Returns:
      Weights in [0, 1] of the shape of `where`, for both masks of `sparse_po_loss`; 0
      where `where` is False, and on sequences whose tokens are all alike.

    Raises:
      AssertionError: for shapes that do not fit, or activations that are not floats.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> activations = jnp.array([[[1.0, 3.0], [4.0, 4.0], [2.0, 4.0], [9.0, 9.0]]])
      >>> where = jnp.array([[True, True, True, False]])
      >>> print(ox.losses.activation_token_mask(activations, where))
      [[0.  1.  0.5 0. ]]
    """
    (activations,) = working_floats(activations=activations)
    where = jnp.asarray(where)
    message = "activations must start with the axes of where"
    chex.assert_equal_shape_prefix(
        [where, activations], where.ndim, custom_message=message
    )

    where = where.astype(bool)
    axes = tuple(range(where.ndim, activations.ndim))
    mean = jnp.mean(jax.lax.stop_gradient(activations), axes)
    low = jnp.min(mean, -1, keepdims=True, where=where, initial=jnp.inf)
    high = jnp.max(mean, -1, keepdims=True, where=where, initial=-jnp.inf)
    varied = where & (high > low)
    return jnp.where(varied, mean - low, 0) / jnp.where(high > low, high - low, 1)


@catalogued(
    title=_SPARSE[0],
    arxiv=_SPARSE[1],
    kind="helper",
    needs=("hidden_states", "kernels", "biases", "mixer"),
    variant="layer normalisation without scale and shift, which kernels and biases "
    "contain; dropout (0.01 in the paper) is the caller's",
    compared="`jax.nn` in a loop over layers",
    example=lambda: {
        "hidden_states": jnp.sin(jnp.arange(72.0)).reshape(2, 3, 4, 3),
        "kernels": jnp.array([[1.0, -0.5, 0.2], [0.3, 0.8, -1.0]]),
        "biases": jnp.array([0.1, 0.2]),
        "mixer": jnp.array([1.0, 0.5]),
    },
)
def sparse_token_mask(
    hidden_states: chex.Array,
    kernels: chex.Array,
    biases: chex.Array,
    mixer: chex.Array,
) -> jax.Array:
    r"""Learned weights of tokens from the hidden states of the reference model.

    .. math::
      h_l = \mathrm{relu}(\mathrm{LN}(H_l) \cdot w_l + b_l), \qquad
      m = \mathrm{relu}\left(\sum_l \alpha_l h_l\right)

    with LN the layer normalisation over the last axis (1e-5 added to the variance).

    Args:
      hidden_states: H, [layers, ..., L, width], of the frozen reference. Detached.
      kernels: w, [layers, width]. The paper's weight decay on w, b and alpha is 0.01.
      biases: b, [layers].
      mixer: alpha, [layers].

    Returns:
      Weights, 0 or more, [..., L], for the masks of `sparse_po_loss`. Gradients flow
      into `kernels`, `biases` and `mixer`.

    Raises:
      AssertionError: for shapes that do not fit, or arguments that are not floats.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> states = jnp.array([[[1.0, -1.0], [-1.0, 1.0]]])  # 1 layer, 2 tokens
      >>> kernels, biases = jnp.array([[0.5, 0.0]]), jnp.array([0.25])
      >>> mask = ox.losses.sparse_token_mask(states, kernels, biases, jnp.array([2.0]))
      >>> print([f"{weight:.3f}" for weight in mask])
      ['1.500', '0.000']
    """
    hidden, kernels, biases, mixer = working_floats(
        hidden_states=hidden_states, kernels=kernels, biases=biases, mixer=mixer
    )
    message = "hidden_states must have axes of layers, tokens and width"
    chex.assert_rank(hidden, set(range(3, 9)), custom_message=message)
    layers, width = hidden.shape[0], hidden.shape[-1]
    chex.assert_shape(kernels, (layers, width), custom_message="kernels, hidden_states")
    for name, x in {"biases": biases, "mixer": mixer}.items():
        chex.assert_shape(x, (layers,), custom_message=f"{name}, hidden_states")

    normal = jax.nn.standardize(jax.lax.stop_gradient(hidden), axis=-1, epsilon=1e-5)
    bias = biases.reshape(-1, *[1] * (hidden.ndim - 2))
    scores = jnp.einsum("l...d,ld->l...", normal, kernels, precision="highest") + bias
    mixed = jnp.einsum("l...,l->...", jax.nn.relu(scores), mixer, precision="highest")
    return jax.nn.relu(mixed)

r"""Losses that learn from pairs: this answer rather than that one.

Each is a classification loss of a margin between the chosen and the rejected answer,
:math:`-\log \sigma(m)` by default, and they differ in the margin:

| loss | margin | reach for it |
|---|---|---|
| `dpo_loss` | beta (log-ratio to a reference, chosen minus rejected) | by default |
| the same, "ipo" | a squared distance to 1 / (2 beta) | when pairs are few or certain |
| the same, "hinge" | as DPO, bounded below | to leave pairs alone that are right |
| `simpo_loss` | beta (log p a token, chosen minus rejected) - gamma | no reference |
| `sparse_po_loss` (`sparse_po`) | as DPO, with weights of tokens | few tokens matter |

DPO sums log-probabilities over an answer, so its gradient on a token does not know how
long the answer is; SimPO averages them, and divides the gradient by the length. Both
can lower the probability of the chosen answer with that of the rejected one:
`gradient_entanglement` tells when.
"""

from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_choice, check_hyperparam
from optax_ext.losses._numerics import working_floats


def _classified(margin: jax.Array, label_smoothing: chex.Numeric) -> jax.Array:
    """Cross-entropy of a margin whose label is wrong with a given probability."""
    wrong = jnp.asarray(label_smoothing, margin.dtype)
    right = -(1 - wrong) * jax.nn.log_sigmoid(margin)
    return right - wrong * jax.nn.log_sigmoid(-margin)


def _three_pairs() -> Mapping[str, Any]:
    return {
        "chosen_logps": jnp.array([-1.0, -2.5, -0.5]),
        "rejected_logps": jnp.array([-1.5, -2.0, -3.0]),
    }


@catalogued(
    title="Direct Preference Optimization: Your Language Model is Secretly a Reward "
    "Model",
    arxiv="2305.18290",
    kind="loss",
    needs=(
        "chosen_logps",
        "rejected_logps",
        "ref_chosen_logps",
        "ref_rejected_logps",
    ),
    variant="with the label smoothing of cDPO, and the losses of IPO (2310.12036) and "
    "SLiC (2305.10425)",
    compared="goldens `dpo`, `dpo_ipo`, `dpo_hinge`",
    example=lambda: {
        **_three_pairs(),
        "ref_chosen_logps": jnp.array([-1.2, -2.2, -1.0]),
        "ref_rejected_logps": jnp.array([-1.3, -2.1, -2.0]),
    },
)
def dpo_loss(
    chosen_logps: chex.Array,
    rejected_logps: chex.Array,
    ref_chosen_logps: chex.Array,
    ref_rejected_logps: chex.Array,
    *,
    beta: chex.Numeric = 0.1,
    label_smoothing: chex.Numeric = 0.0,
    loss_type: str = "sigmoid",
) -> jax.Array:
    r"""Preference loss of the policy's log-ratio to a reference.

    .. math::
      x &= (\log p_w - \log p_l) - (\log p_{ref,w} - \log p_{ref,l}) \\
      \text{sigmoid: } & -(1 - e) \log \sigma(\beta x) - e \log \sigma(-\beta x), \quad
      \text{hinge: } \max(0, 1 - \beta x), \quad
      \text{ipo: } \left(x - \frac{1}{2 \beta}\right)^2

    Args:
      chosen_logps: log p of the answers that were preferred, summed over tokens, [...];
        see `sequence_log_probs`. For "ipo" trl takes means over tokens, as its authors
        advise.
      rejected_logps: log p of the others, [...].
      ref_chosen_logps: the same of the chosen under the reference, [...]. Detached.
      ref_rejected_logps: and of the rejected. Detached.
      beta: beta > 0: how strongly to stay near the reference. 0.1 is the paper's.
      label_smoothing: e, in [0, 1]: the share of pairs whose label is wrong (cDPO), for
        "sigmoid".
      loss_type: "sigmoid", "hinge" or "ipo".

    Returns:
      Losses of pairs, [...].

    Raises:
      AssertionError: for shapes that differ, or arguments that are not floats.
      ValueError: for a hyper-parameter outside its interval, or an unknown type.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> reference = jnp.array([-20.0]), jnp.array([-20.0])
      >>> chosen, rejected = jnp.array([-18.0]), jnp.array([-24.0])
      >>> (loss,) = ox.losses.dpo_loss(chosen, rejected, *reference)
      >>> print(f"{loss:.3f}")  # log(1 + exp(-0.6))
      0.437
    """
    owner = "dpo_loss"
    check_choice(owner, "loss_type", loss_type, ("sigmoid", "hinge", "ipo"))
    check_hyperparam(owner, low=0.0, open_low=True, beta=beta)
    check_hyperparam(owner, low=0.0, high=1.0, label_smoothing=label_smoothing)
    chosen, rejected, ref_chosen, ref_rejected = working_floats(
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    chex.assert_equal_shape(
        [chosen, rejected, ref_chosen, ref_rejected],
        custom_message="chosen_logps, rejected_logps, ref_chosen_logps, "
        "ref_rejected_logps",
    )

    x = (chosen - rejected) - jax.lax.stop_gradient(ref_chosen - ref_rejected)
    strength = jnp.asarray(beta, x.dtype)
    if loss_type == "ipo":
        return (x - 1 / (2 * strength)) ** 2
    if loss_type == "hinge":
        return jax.nn.relu(1 - strength * x)
    return _classified(strength * x, label_smoothing)


@catalogued(
    title="SimPO: Simple Preference Optimization with a Reference-Free Reward",
    arxiv="2405.14734",
    kind="loss",
    needs=("chosen_logps", "rejected_logps"),
    variant="gamma itself, not its ratio to beta, which the official code takes",
    compared="goldens `simpo`, `simpo_hinge`",
    example=_three_pairs,
)
def simpo_loss(
    chosen_logps: chex.Array,
    rejected_logps: chex.Array,
    *,
    beta: chex.Numeric = 2.0,
    gamma: chex.Numeric = 0.5,
    label_smoothing: chex.Numeric = 0.0,
    loss_type: str = "sigmoid",
) -> jax.Array:
    r"""Preference loss of log-probabilities a token, without a reference.

    .. math::
      m &= \beta \left(\frac{\log p_w}{|y_w|} - \frac{\log p_l}{|y_l|}\right) - \gamma
      \\
      \text{sigmoid: } & -(1 - e) \log \sigma(m) - e \log \sigma(-m), \qquad
      \text{hinge: } \max(0, 1 - m)

    Args:
      chosen_logps: log p of the answers that were preferred, averaged over tokens,
        [...]: ``sequence_log_probs(..., average=True)``.
      rejected_logps: the same of the others, [...].
      beta: beta > 0. 2 as in the official configuration; released models have 2 to 10.
      gamma: the margin to reach, 0 or more. 0.5 is the official quarter of beta; its
        README suggests to start at half.
      label_smoothing: e, in [0, 1]: the share of pairs whose label is wrong, for
        "sigmoid".
      loss_type: "sigmoid" or "hinge".

    Returns:
      Losses of pairs, [...].

    Raises:
      AssertionError: for shapes that differ, or arguments that are not floats.
      ValueError: for a hyper-parameter outside its interval, or an unknown type.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> chosen, rejected = jnp.array([-1.0]), jnp.array([-1.5])
      >>> (loss,) = ox.losses.simpo_loss(chosen, rejected)
      >>> print(f"{loss:.3f}")  # log(1 + exp(-0.5))
      0.474
    """
    owner = "simpo_loss"
    check_choice(owner, "loss_type", loss_type, ("sigmoid", "hinge"))
    check_hyperparam(owner, low=0.0, open_low=True, beta=beta)
    check_hyperparam(owner, low=0.0, gamma=gamma)
    check_hyperparam(owner, low=0.0, high=1.0, label_smoothing=label_smoothing)
    chosen, rejected = working_floats(
        chosen_logps=chosen_logps, rejected_logps=rejected_logps
    )
    message = "chosen_logps, rejected_logps"
    chex.assert_equal_shape([chosen, rejected], custom_message=message)

    strength, target = (jnp.asarray(x, chosen.dtype) for x in (beta, gamma))
    margin = strength * (chosen - rejected) - target
    if loss_type == "hinge":
        return jax.nn.relu(1 - margin)
    return _classified(margin, label_smoothing)

r"""Gradient entanglement: why a preference loss can lower the chosen answer too.

A margin loss steps along :math:`d_w \nabla \log \pi(y_w) - d_l \nabla \log \pi(y_l)`.
Where the two gradients point in similar directions, what lowers the rejected answer
also lowers the chosen one, or what raises the chosen also raises the rejected.

| you want | function |
|---|---|
| to know whether that happens | `gradient_entanglement` |
| a direction that does neither | `pairwise_normalized_gradient` |

Both take the gradients of the two log-probabilities, trees like the parameters. The
weights :math:`d_w, d_l` that a loss of `optax_ext.losses.preference` puts on them:

| loss | d_w | d_l |
|---|---|---|
| DPO | beta sigmoid(-beta x) | the same |
| DPO as IPO | 1 / beta - 2 x | the same |
| DPO as hinge | beta, or 0 if beta x > 1 | the same |
| SimPO, m its margin | beta sigmoid(-m) / tokens chosen | the same / tokens rejected |
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam
from optax_ext._core.geometry import tree_length
from optax_ext._core.trees import computing_dtype

_PITFALL = (
    "A Common Pitfall of Margin-based Language Model Alignment: Gradient Entanglement",
    "2410.13828",
)


class GradientEntanglement(NamedTuple):
    """What `gradient_entanglement` found; scalars.

    Attributes:
      inner: inner product of the two gradients.
      norm_chosen: length of the chosen answer's gradient.
      norm_rejected: length of the rejected answer's gradient.
      cosine: of their angle; NaN where one of them is 0.
      delta_chosen: change of log pi(chosen) per unit of step size.
      delta_rejected: change of log pi(rejected) per unit of step size.
      threshold: the inner product from which on one of them goes the wrong way; NaN if
        both weights are 0, as there is no step.
      entangled: whether the inner product has reached it; boolean.
    """

    inner: jax.Array
    norm_chosen: jax.Array
    norm_rejected: jax.Array
    cosine: jax.Array
    delta_chosen: jax.Array
    delta_rejected: jax.Array
    threshold: jax.Array
    entangled: jax.Array


def _two_gradients() -> dict[str, Any]:
    return {
        "grad_chosen": jnp.array([1.0, 2.0, 0.0]),
        "grad_rejected": jnp.array([1.0, 1.0, 1.0]),
    }


@catalogued(
    title=_PITFALL[0],
    arxiv=_PITFALL[1],
    kind="diagnostic",
    needs=("grad_chosen", "grad_rejected"),
    variant="both conditions of the paper; its code takes the chosen norm twice",
    compared="golden `gradient_entanglement`; measured changes of a softmax policy",
    example=_two_gradients,
)
def gradient_entanglement(
    grad_chosen: chex.ArrayTree,
    grad_rejected: chex.ArrayTree,
    *,
    d_chosen: chex.Numeric = 1.0,
    d_rejected: chex.Numeric = 1.0,
) -> GradientEntanglement:
    r"""Whether a step of a margin loss moves chosen up and rejected down.

    With :math:`a = |g_w|^2`, :math:`b = |g_l|^2`, :math:`i = \langle g_w, g_l \rangle`
    over the whole trees, a step :math:`\eta (d_w g_w - d_l g_l)` changes

    .. math::
      \log \pi(y_w) \text{ by } \eta (d_w a - d_l i), \qquad
      \log \pi(y_l) \text{ by } \eta (d_w i - d_l b)

    to first order. One of them goes the wrong way, or stays, if
    :math:`i \ge \min(a\, d_w / d_l,\; b\, d_l / d_w)`.

    Args:
      grad_chosen: g_w, the gradient of log pi(chosen), a tree like the parameters.
      grad_rejected: g_l, that of log pi(rejected), a tree of the same structure.
      d_chosen: d_w, 0 or more: the weight that the loss puts on g_w.
      d_rejected: d_l, 0 or more: that on g_l.

    Returns:
      A `GradientEntanglement` of scalars, in float32 or wider.

    Raises:
      AssertionError: for trees that differ.
      ValueError: for a negative weight.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> chosen, rejected = {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([2.0, 1.0])}
      >>> found = ox.losses.gradient_entanglement(chosen, rejected)
      >>> print(found.entangled, found.delta_chosen)  # the chosen answer goes down
      True -1.0
    """
    owner = "gradient_entanglement"
    check_hyperparam(owner, low=0.0, d_chosen=d_chosen, d_rejected=d_rejected)
    chex.assert_trees_all_equal_shapes(
        grad_chosen, grad_rejected, custom_message="grad_chosen, grad_rejected"
    )
    dtype = computing_dtype(*jax.tree.leaves((grad_chosen, grad_rejected)))
    g_w, g_l = (optax.tree.cast(g, dtype) for g in (grad_chosen, grad_rejected))
    inner = jnp.asarray(optax.tree.vdot(g_w, g_l), dtype)
    norm_w, norm_l = tree_length(g_w), tree_length(g_l)
    d_w, d_l = (jnp.asarray(d, dtype) for d in (d_chosen, d_rejected))
    a, b = norm_w**2, norm_l**2
    threshold = jnp.minimum(d_w / d_l * a, d_l / d_w * b)
    return GradientEntanglement(
        inner=inner,
        norm_chosen=norm_w,
        norm_rejected=norm_l,
        cosine=inner / (norm_w * norm_l),
        delta_chosen=d_w * a - d_l * inner,
        delta_rejected=d_w * inner - d_l * b,
        threshold=threshold,
        entangled=inner >= threshold,
    )


@catalogued(
    title=_PITFALL[0],
    arxiv=_PITFALL[1],
    kind="helper",
    needs=("grad_chosen", "grad_rejected"),
    variant="an ascent direction of the margin; a gradient of 0 adds 0",
    compared="golden `gradient_entanglement`",
    example=_two_gradients,
)
def pairwise_normalized_gradient(
    grad_chosen: chex.ArrayTree,
    grad_rejected: chex.ArrayTree,
    *,
    eps: chex.Numeric = 0.0,
) -> chex.ArrayTree:
    r"""A direction that raises the chosen and lowers the rejected answer.

    .. math:: \frac{g_w}{|g_w| + \epsilon} - \frac{g_l}{|g_l| + \epsilon}

    with norms over the whole trees. With :math:`\epsilon = 0` it does both, to first
    order, whenever the two are not parallel. It points uphill: negate it for optax.

    Args:
      grad_chosen: g_w, the gradient of log pi(chosen), a tree like the parameters.
      grad_rejected: g_l, that of log pi(rejected), a tree of the same structure.
      eps: added to the norms, 0 or more.

    Returns:
      A tree like `grad_chosen`, in the dtypes of its leaves.

    Raises:
      AssertionError: for trees that differ.
      ValueError: for a negative `eps`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> chosen, rejected = jnp.array([3.0, 4.0]), jnp.array([2.0, 0.0])
      >>> up = ox.losses.pairwise_normalized_gradient(chosen, rejected)
      >>> print([f"{x:.1f}" for x in up])
      ['-0.4', '0.8']
    """
    check_hyperparam("pairwise_normalized_gradient", low=0.0, eps=eps)
    chex.assert_trees_all_equal_shapes(
        grad_chosen, grad_rejected, custom_message="grad_chosen, grad_rejected"
    )

    def scale(grad):
        length = tree_length(grad)
        length = length + jnp.asarray(eps, length.dtype)
        return jnp.where(length > 0, length, 1)

    scale_w, scale_l = scale(grad_chosen), scale(grad_rejected)

    def leaf(w, l):
        dtype = computing_dtype(w, l)
        w_unit = w.astype(dtype) / scale_w.astype(dtype)
        return (w_unit - l.astype(dtype) / scale_l.astype(dtype)).astype(w.dtype)

    return jax.tree.map(leaf, grad_chosen, grad_rejected)

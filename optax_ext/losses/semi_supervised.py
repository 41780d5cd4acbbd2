r"""Learning from examples without labels, from the model's own certain predictions.

`shrinkmatch_loss` has FixMatch inside: where a weakly augmented view is predicted with
certainty, the strongly augmented view must be predicted the same. FixMatch throws all
other examples away; ShrinkMatch drops the classes that make them uncertain and uses
what is left. `optax_ext.certain_ratio` weighs the second part.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam
from optax_ext.losses._numerics import working_floats


class ShrinkMatchLosses(NamedTuple):
    """What `shrinkmatch_loss` returns, each one value an example.

    Attributes:
      certain: the loss of FixMatch, 0 for uncertain examples.
      shrink: the loss on fewer classes, 0 for certain examples.
      mask: 1 for certain examples, else 0.
      removed: how many classes were dropped, or tried to be dropped in vain.
    """

    certain: jax.Array
    shrink: jax.Array
    mask: jax.Array
    removed: jax.Array


@catalogued(
    title="Shrinking Class Space for Enhanced Certainty in Semi-Supervised Learning",
    arxiv="2308.06777",
    kind="loss",
    needs=("weak_probs", "strong_logits", "aux_logits"),
    variant="soft_labels=True is the CIFAR and ImageNet code, False that for STL-10 "
    "and SVHN; by one sort instead of a loop over classes",
    compared="golden `shrinkmatch`; a loop over the classes; FixMatch where certain",
    example=lambda: {
        "weak_probs": jnp.array([[0.98, 0.01, 0.01], [0.5, 0.5, 0.0], [0.4, 0.3, 0.3]]),
        "strong_logits": jnp.array([[1.0, 0.2, 0.0], [0.3, 0.1, 0.2], [0.0, 0.5, 0.1]]),
        "aux_logits": jnp.array([[0.5, 0.1, 0.0], [0.6, 0.2, 0.4], [0.1, 0.7, 0.2]]),
    },
)
def shrinkmatch_loss(
    weak_probs: chex.Array,
    strong_logits: chex.Array,
    *,
    aux_logits: chex.Array | None = None,
    threshold: chex.Numeric = 0.95,
    soft_labels: bool = True,
) -> ShrinkMatchLosses:
    r"""FixMatch, and for uncertain examples a loss on fewer classes.

    Let p_0 >= p_1 >= ... be the sorted weak probabilities. Where p_0 >= threshold, the
    example is certain:

    .. math:: l_{certain} = -\sum_k q_k \log \mathrm{softmax}(z)_k.

    Elsewhere classes of rank 1 to c - 1 are dropped, with the smallest c that gives

    .. math:: \frac{p_0}{p_0 + \sum_{j \ge c} p_j} \ge \text{threshold},

    and with a the auxiliary logits of the K - c + 1 classes that are left

    .. math:: l_{shrink} = -p_0 \log \mathrm{softmax}(a)_0.

    Where even c = K - 1, one competitor, does not suffice, it is 0.

    Args:
      weak_probs: p, probabilities of the weakly augmented view, [..., classes].
        Detached.
      strong_logits: z, of the strongly augmented view, of the same shape.
      aux_logits: a, of the same view from a second head, of the same shape; by default
        `strong_logits`. The paper's second head keeps the two losses apart.
      threshold: in (0, 1] (official code: 0.95; ImageNet: 0.7).
      soft_labels: whether q is `weak_probs`, or its largest class one-hot.

    Returns:
      `ShrinkMatchLosses`, one value an example each. The loss of a batch is
      ``mean(certain) + ratio * mean(shrink)``, with ``ratio`` from
      `optax_ext.certain_ratio` of ``mask``.

    Raises:
      AssertionError: for shapes that do not fit, or arguments that are not floats.
      ValueError: if `threshold` is out of range.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> weak = jnp.array([[0.97, 0.02, 0.01], [0.5, 0.48, 0.02]])
      >>> out = ox.losses.shrinkmatch_loss(weak, jnp.zeros((2, 3)))
      >>> print(out.certain, out.shrink)  # log 3; 0.5 log 2 without the second class
      [1.0986123 0.       ] [0.        0.3465736]
    """
    owner = "shrinkmatch_loss"
    check_hyperparam(owner, low=0.0, high=1.0, open_low=True, threshold=threshold)
    given = strong_logits if aux_logits is None else aux_logits
    probs, strong, aux = working_floats(
        weak_probs=weak_probs, strong_logits=strong_logits, aux_logits=given
    )
    for name, logits in {"strong_logits": strong, "aux_logits": aux}.items():
        message = f"{name} must have the shape of weak_probs"
        chex.assert_equal_shape([logits, probs], custom_message=message)
    message = "weak_probs need an axis of classes"
    chex.assert_rank(probs, set(range(1, 33)), custom_message=message)

    probs = jax.lax.stop_gradient(probs)
    threshold = jnp.asarray(threshold, probs.dtype)
    classes = probs.shape[-1]
    order = jnp.argsort(probs, axis=-1, descending=True)
    ranked = jnp.take_along_axis(probs, order, -1)
    top, largest = ranked[..., 0], ranked[..., :1]
    certain = top >= threshold

    top_class = jax.nn.one_hot(order[..., 0], classes, dtype=probs.dtype)
    q = probs if soft_labels else top_class
    certain_losses = -jnp.sum(q * jax.nn.log_softmax(strong), -1)

    # Rank 1 is always dropped; from rank K - 1 on there is nothing more to drop.
    tails = jnp.flip(jnp.cumsum(jnp.flip(ranked, -1), -1), -1)[..., 2:]
    enough = largest >= threshold * (largest + tails)
    reached = jnp.any(enough, -1) & ~certain
    tried = jnp.sum(~enough, -1, keepdims=True, dtype=order.dtype)
    cut = jnp.minimum(2 + tried, max(classes - 1, 1))
    rank = jnp.broadcast_to(jnp.arange(classes, dtype=order.dtype), probs.shape)
    kept = (rank == 0) | (rank >= jnp.broadcast_to(cut, probs.shape))
    left = jnp.take_along_axis(aux, order, -1)
    shrink_losses = top * (jax.nn.logsumexp(left, -1, where=kept) - left[..., 0])

    return ShrinkMatchLosses(
        certain=jnp.where(certain, certain_losses, 0),
        shrink=jnp.where(reached, shrink_losses, 0),
        mask=certain.astype(probs.dtype),
        removed=jnp.where(certain, 0, cut[..., 0] - 1).astype(probs.dtype),
    )

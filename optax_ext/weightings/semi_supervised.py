"""Weights of what is learnt from examples without labels."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_rate
from optax_ext._core.pairs import Weighting


class CertainRatioState(NamedTuple):
    """State of `certain_ratio`; `count` batches have been averaged into `ratio`."""

    count: jax.Array
    ratio: jax.Array


@catalogued(
    title="Shrinking Class Space for Enhanced Certainty in Semi-Supervised Learning",
    arxiv="2308.06777",
    kind="weighting",
    needs=("losses",),
    state="none; a scalar and a counter",
    variant="one average over the whole run; the official trainer begins anew every "
    "epoch: call init again",
    compared="the recursion by hand",
    example=lambda: {"decay": 0.9},
)
def certain_ratio(*, decay: chex.Numeric = 0.999) -> Weighting:
    r"""Weigh uncertain examples by the share of certain ones.

    .. math::
      r_1 = \bar m_1, \qquad r_t = \text{decay}\; r_{t-1}
      + (1 - \text{decay})\, \bar m_t

    with m the mask of certain examples of a batch. Early, when few examples are
    certain, the rest counts little.

    ``update(losses, state) -> (ratio, state)`` takes the ``mask`` of
    `optax_ext.losses.shrinkmatch_loss` in place of losses, [...], and returns the ratio
    that has seen it already, a scalar without gradient. Other arguments are ignored.

    Args:
      decay: decay rate of the average, in [0, 1) (official code: 0.999).

    Returns:
      A ``Weighting``.

    Raises:
      ValueError: if `decay` is out of range.
      AssertionError: in ``update``, if the mask is no array of floats.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> weighting = ox.certain_ratio(decay=0.5)
      >>> ratio, state = weighting.update(jnp.array([1.0, 0.0]), weighting.init())
      >>> ratio, state = weighting.update(jnp.array([1.0, 1.0]), state)
      >>> print(ratio)
      0.75
    """
    check_rate("certain_ratio", decay=decay)

    def init() -> CertainRatioState:
        return CertainRatioState(jnp.zeros((), jnp.int32), jnp.zeros(()))

    def update(
        losses: chex.Array, state: CertainRatioState, **extra: Any
    ) -> tuple[jax.Array, CertainRatioState]:
        del extra
        losses = jnp.asarray(losses)
        message = "losses must be the mask of shrinkmatch_loss, floating point"
        chex.assert_type(losses, float, custom_message=message)
        dtype = state.ratio.dtype
        share = jax.lax.stop_gradient(jnp.mean(losses.astype(dtype)))
        rate = jnp.asarray(decay, dtype)
        rate = jnp.where(state.count == 0, 0, rate)
        ratio = rate * state.ratio + (1 - rate) * share
        count = jnp.asarray(optax.safe_increment(state.count))
        return ratio, CertainRatioState(count, ratio)

    return Weighting(init, update)

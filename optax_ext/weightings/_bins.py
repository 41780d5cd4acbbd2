"""A running average for each bin of an interval, which some weightings keep."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp


class BinsState(NamedTuple):
    """State of the weightings that average over bins of noise levels.

    Attributes:
      bins: running average of each bin, [num_bins]; 1 at the start.
    """

    bins: jax.Array


def bin_of(
    x: jax.Array, low: chex.Numeric, high: chex.Numeric, num_bins: int
) -> jax.Array:
    """The bin of each value; what is outside the interval goes to the end bins."""
    low, high = (jnp.asarray(bound, x.dtype) for bound in (low, high))
    at = jnp.floor((x - low) / ((high - low) / num_bins))
    return jnp.clip(at, 0, num_bins - 1).astype(jnp.int32)


def averaged(
    bins: jax.Array,
    index: jax.Array,
    values: jax.Array,
    decay: chex.Numeric,
    eps: chex.Numeric = 0.0,
) -> jax.Array:
    """The bins after a step towards the mean of their values, if they have any."""
    decay, eps = (jnp.asarray(h, bins.dtype) for h in (decay, eps))
    index, values = index.ravel(), values.ravel().astype(bins.dtype)
    total = jnp.zeros_like(bins).at[index].add(values)
    count = jnp.zeros_like(bins).at[index].add(1)
    mean = total / (jnp.maximum(count, 1) + eps)
    return jnp.where(count > 0, decay * bins + (1 - decay) * mean, bins)

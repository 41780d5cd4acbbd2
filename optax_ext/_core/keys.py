"""Random keys in states."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class KeyState(NamedTuple):
    """State of a random method: raw key data, which serialises as an array."""

    key: jax.Array


def key_state(key: jax.Array | None) -> tuple[jax.Array, Any]:
    """Key data to store, and the implementation to wrap it with.

    Args:
      key: a typed or an old-style key; None is ``jax.random.key(0)``.
    """
    typed = jax.random.key(0) if key is None else key
    if not jnp.issubdtype(typed.dtype, jax.dtypes.prng_key):
        typed = jax.random.wrap_key_data(typed)
    return jax.random.key_data(typed), jax.random.key_impl(typed)

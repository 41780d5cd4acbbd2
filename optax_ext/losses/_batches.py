"""What losses of whole examples share: a batch axis first, the example's axes after."""

import chex
import jax
import jax.numpy as jnp


def per_example(batch: int, **arguments: jax.Array) -> list[jax.Array]:
    """The arguments as [batch]; a scalar counts for every example.

    Raises:
      AssertionError: for any other shape, with the name.
    """
    for name, x in arguments.items():
        message = f"{name} must be a scalar or one value an example"
        chex.assert_is_broadcastable(x.shape, (batch,), custom_message=message)
    return [jnp.broadcast_to(x, (batch,)) for x in arguments.values()]


def over_example(x: jax.Array, like: jax.Array) -> jax.Array:
    """`x` with axes of length 1 behind it, to broadcast over the axes of `like`."""
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))


def example_axes(x: jax.Array) -> tuple[int, ...]:
    """All axes but the first."""
    return tuple(range(1, x.ndim))


def sum_of_squares(x: jax.Array) -> jax.Array:
    """The squared length of every example, [batch]."""
    return jnp.sum(x * x, example_axes(x))


def check_batch(name: str, x: jax.Array) -> None:
    """Check that `x` has a batch axis.

    Raises:
      AssertionError: for a scalar.
    """
    message = f"{name} needs a batch axis first"
    chex.assert_rank(x, set(range(1, 33)), custom_message=message)

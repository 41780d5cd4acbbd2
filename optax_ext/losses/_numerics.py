"""What the losses share: dtypes, masks, norms."""

from typing import Any

import chex
import jax
import jax.numpy as jnp


def working_floats(**arguments: chex.Numeric) -> tuple[jax.Array, ...]:
    """The arguments in one dtype: float64 if one of them is, else float32."""
    arrays = {name: jnp.asarray(value) for name, value in arguments.items()}
    for name, x in arrays.items():
        chex.assert_type(x, float, custom_message=f"{name} must be floating point")
    # Under x64 a Python number is a weak float64 and must not widen float32 arrays.
    strong = [x for x in arrays.values() if not x.weak_type] or arrays.values()
    wide = any(x.dtype == jnp.float64 for x in strong)
    return tuple(x.astype("float64" if wide else "float32") for x in arrays.values())


def mask_of(where: chex.Array | None, like: jax.Array) -> jax.Array:
    """The mask as 0 and 1 in the dtype and shape of `like`; ones without a mask.

    Raises:
      AssertionError: if `where` has another shape, or is neither boolean nor a number.
    """
    if where is None:
        return jnp.ones_like(like)
    where = jnp.asarray(where)
    chex.assert_shape(
        where, like.shape, custom_message="where must have a flag a value"
    )
    return where.astype(like.dtype)


def masked_mean(
    values: jax.Array, where: chex.Array | None = None, axis: Any = -1
) -> jax.Array:
    """Mean of the values that count; 0 where none does."""
    mask = mask_of(where, values)
    return jnp.sum(values * mask, axis) / jnp.maximum(jnp.sum(mask, axis), 1)


def norm_of(x: jax.Array, axis: Any = -1, keepdims: bool = False) -> jax.Array:
    """Euclidean norm whose gradient is 0 at 0, where that of the root is infinite."""
    squares = jnp.sum(x * x, axis=axis, keepdims=keepdims)
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)


def unit_rows(x: jax.Array, axis: Any = -1) -> jax.Array:
    """Rows of length 1; a row of zeros stays one, with gradient 0."""
    norm = norm_of(x, axis, keepdims=True)
    return x / jnp.where(norm > 0, norm, 1)

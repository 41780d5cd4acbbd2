"""Checks of what callers pass, with messages that say what to do.

Values that are traced (`optax.inject_hyperparams`, `jax.vmap` over hyper-parameters)
cannot be looked at, so only their dtype is checked.
"""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

_INF = float("inf")


def check_hyperparam(
    owner: str,
    *,
    low: float = -_INF,
    high: float = _INF,
    open_low: bool = False,
    open_high: bool = False,
    **values: Any,
) -> None:
    """Check scalar hyper-parameters against an interval; callables and None pass.

    Args:
      owner: name of the method, for the message.
      low: smallest value allowed.
      high: largest value allowed.
      open_low: True where `low` itself is not allowed.
      open_high: True where `high` itself is not allowed.
      **values: the hyper-parameters by name.

    Raises:
      TypeError: for a value that is not a number.
      ValueError: for a value outside the interval, not a scalar, or of a 16-bit type.
    """
    for name, value in values.items():
        if value is None or callable(value):
            continue
        if not isinstance(value, int | float | np.ndarray | np.generic | jax.Array):
            raise TypeError(
                f"{owner}: {name} must be a number, got {type(value).__name__}"
            )
        if np.ndim(value):
            raise ValueError(
                f"{owner}: {name} must be a scalar, got shape {np.shape(value)}"
            )
        dtype = jnp.result_type(value)
        if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
            raise ValueError(
                f"{owner}: {name} came as {dtype}, which rounds 0.999 to 1. "
                "optax.inject_hyperparams casts to the parameters' dtype: use "
                "optax_ext.inject_hyperparams, or pass hyperparam_dtype=jnp.float32"
            )
        if isinstance(value, Tracer):
            continue
        number = float(value)
        below = number < low or (open_low and number == low)
        above = number > high or (open_high and number == high)
        if below or above or number != number:
            left, right = "[("[open_low], "])"[open_high]
            raise ValueError(
                f"{owner}: {name} must lie in {left}{low}, {high}{right}, got {number}"
            )


def check_rate(owner: str, **values: Any) -> None:
    """Check decay rates of averages (b1, b2, ...): they lie in [0, 1)."""
    check_hyperparam(owner, low=0.0, high=1.0, open_high=True, **values)


def check_interval(owner: str, **values: Any) -> None:
    """Check step intervals and counts: Python integers, 1 or more.

    They decide control flow, so they are static.

    Raises:
      ValueError: for anything else.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"{owner}: {name} must be an integer of 1 or more, got {value!r}"
                + (
                    f"; name it in static_args=('{name}',) of inject_hyperparams"
                    if isinstance(value, jax.Array)
                    else ""
                )
            )


def check_choice(owner: str, name: str, value: Any, choices: Collection[str]) -> None:
    """Check that `value` is one of `choices`.

    Raises:
      ValueError: with the choices.
    """
    if not isinstance(value, str) or value not in choices:
        allowed = ", ".join(map(repr, choices))
        raise ValueError(f"{owner}: {name} must be one of {allowed}, got {value!r}")


def check_params(owner: str, params: Any) -> None:
    """Check that `update` was given params.

    Raises:
      ValueError: if `params` is None.
    """
    if params is None:
        raise ValueError(
            f"{owner} needs the parameters: call tx.update(grads, state, params)"
        )

"""The learning-rate range test."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued


@catalogued(
    title="A disciplined approach to neural network hyper-parameters: Part 1 -- "
    "learning rate, batch size, momentum, and weight decay",
    arxiv="1803.09820",
    kind="diagnostic",
    variant="linear range; the last rate whose loss is within 4 times the smallest, so "
    "that an early oscillation is no false alarm.",
    compared="the stability limit of heavy ball on a quadratic",
    example=lambda: {
        "value_fn": lambda x: jnp.sum(x**2),
        "params": jnp.ones(2),
        "tx_fn": optax.sgd,
        "low": 0.0,
        "high": 2.0,
        "num_steps": 20,
    },
)
def lr_range_test(
    value_fn: Callable[[Any], jax.Array],
    params: Any,
    tx_fn: Callable[[Any], optax.GradientTransformation],
    low: float,
    high: float,
    num_steps: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""Train with a growing learning rate, and see where it breaks.

    .. math::
      \eta_t = \text{low} + \frac{t}{n - 1} (\text{high} - \text{low}), \qquad
      \text{last stable} = \max \{ \eta_t : f(x_t) \le 4 \min_q f(x_q) \}

    with :math:`x_{t+1}` the parameters after a step at :math:`\eta_t`. A loss that is
    not finite never counts. The loss should be positive, as a cross-entropy is.

    Args:
      value_fn: params -> loss.
      params: where to start.
      tx_fn: learning rate, a traced scalar -> optimizer, such as
        ``lambda lr: optax.sgd(lr, momentum=0.9)``.
      low: learning rate of the first step.
      high: learning rate of the last step, above `low`.
      num_steps: n, 2 or more.

    Returns:
      Learning rates [n], losses before each step [n], and the last stable learning rate
      (NaN if no loss was finite).

    Raises:
      ValueError: for an empty range or fewer than 2 steps.

    Example:
      >>> import jax.numpy as jnp, optax, optax_ext as ox
      >>> curvatures = jnp.array([10.0, 1.0])  # momentum 0.9 is stable below 0.38
      >>> lrs, losses, stable = ox.lr_range_test(
      ...     lambda x: jnp.sum(curvatures * x**2) / 2, jnp.ones(2),
      ...     lambda lr: optax.sgd(lr, 0.9), low=0.0, high=0.8, num_steps=201)
      >>> bool(0.35 < stable < 0.41)
      True
    """
    if not 0 <= low < high < float("inf"):
        raise ValueError(
            f"lr_range_test: low = {low} must be 0 or more and below high = {high}"
        )
    if not isinstance(num_steps, int) or num_steps < 2:
        raise ValueError(
            "lr_range_test: num_steps must be an integer of 2 or more, got "
            f"{num_steps!r}"
        )
    lrs = jnp.linspace(low, high, num_steps, dtype=float)

    def step(carry, lr):
        params, state = carry
        value, grads = jax.value_and_grad(value_fn)(params)
        updates, state = optax.with_extra_args_support(tx_fn(lr)).update(
            grads, state, params, value=value, grad=grads, value_fn=value_fn
        )
        return (optax.apply_updates(params, updates), state), value

    state = tx_fn(lrs[0]).init(params)
    _, losses = jax.lax.scan(step, (params, state), lrs)
    smallest = jnp.min(jnp.where(jnp.isfinite(losses), losses, jnp.inf))
    # Below zero, 4 times the smallest loss is out of reach.
    stable = losses <= jnp.maximum(4 * smallest, smallest)
    stable &= jnp.isfinite(losses)
    last = jnp.max(jnp.where(stable, lrs, -jnp.inf))
    return lrs, losses, jnp.where(jnp.isfinite(last), last, jnp.nan)

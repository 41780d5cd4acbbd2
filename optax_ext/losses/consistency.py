r"""Consistency training: a generator that needs one step, learnt from data alone.

The network maps a noisy example straight to a clean one, and is trained to give the
same answer at two neighbouring noise levels of the same example and the same noise.
The pieces, in the order of a training step:

| function | what |
|---|---|
| `ict_discretization_schedule` | how many noise levels there are by now |
| `karras_sigmas` | the levels |
| `lognormal_timestep_probs` | which interval to draw |
| `consistency_scalings` | makes the network the identity at the least noise |
| `consistency_training_loss` | the loss; weighs intervals by `ict_weights` |
| `pseudo_huber_loss` | its distance: squared where small, a norm where large |

The first three are in `consistency_levels`, which says how to train with a number of
levels that changes.
"""

import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam
from optax_ext.losses._batches import (
    check_batch,
    example_axes,
    over_example,
    per_example,
)
from optax_ext.losses._numerics import working_floats

_ICT = "Improved Techniques for Training Consistency Models"


@catalogued(
    title=_ICT,
    arxiv="2310.14189",
    kind="loss",
    needs=("predictions", "targets"),
    variant="of the vector's norm, as in the paper; one repository has it elementwise",
    compared="golden `pseudo_huber_loss`",
    example=lambda: {
        "predictions": jnp.array([[0.0, 0.1], [1.0, 2.0], [-3.0, 0.5]]),
        "targets": jnp.array([[0.0, 0.1], [1.1, 2.0], [3.0, -0.5]]),
    },
)
def pseudo_huber_loss(
    predictions: chex.Array,
    targets: chex.Array | None = None,
    *,
    c: chex.Numeric | None = None,
    axis: int | tuple[int, ...] | None = None,
) -> jax.Array:
    r"""Distance that is quadratic where it is small and a norm where it is large.

    .. math:: d = \sqrt{|p - y|^2 + c^2} - c

    About :math:`|p - y|^2 / (2c)` below c and :math:`|p - y| - c` above; its gradient
    is 0 at 0 and shorter than 1 everywhere. `optax.losses.huber_loss` is elementwise
    and of two pieces.

    Args:
      predictions: p, [batch, ...].
      targets: y, of the same shape; 0 by default.
      c: where it turns from one to the other, positive; 0.00054 sqrt(D) for D reduced
        elements, as in the paper.
      axis: the axes of the norm; by default all but the first.

    Returns:
      Distances, [batch] or of the axes that are left.

    Raises:
      AssertionError: for shapes that do not fit, or arguments that are not floats.
      ValueError: if `c` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> residuals = jnp.array([[3.0, 4.0], [0.0, 0.0]])
      >>> print(ox.losses.pseudo_huber_loss(residuals, c=12.0))
      [1. 0.]
    """
    check_hyperparam("pseudo_huber_loss", low=0.0, open_low=True, c=c)
    targets = jnp.zeros_like(predictions) if targets is None else targets
    predictions, targets = working_floats(predictions=predictions, targets=targets)
    chex.assert_equal_shape([predictions, targets], custom_message="targets")
    if axis is None:
        check_batch("predictions", predictions)
        axis = example_axes(predictions)

    squares = jnp.sum((predictions - targets) ** 2, axis)
    if c is None:
        c = 0.00054 * math.sqrt(predictions.size / max(squares.size, 1))
    c = jnp.asarray(c, squares.dtype)
    # sqrt(s + c^2) - c without the cancellation where s is small.
    return squares / (jnp.sqrt(squares + c**2) + c)


def _pair_of_levels() -> dict[str, Any]:
    return {
        "model_fn": lambda scale, x, sigma: scale.astype(x.dtype) * x,
        "params": jnp.float32(0.7),
        "x": jnp.array([[1.0, -0.5], [0.2, 0.4], [-1.0, 0.3]]),
        "noise": jnp.array([[0.3, 0.8], [-1.2, 0.1], [0.5, -0.6]]),
        "sigma": jnp.array([0.1, 0.5, 1.0]),
        "next_sigma": jnp.array([0.2, 0.7, 1.5]),
    }


@catalogued(
    title=_ICT,
    arxiv="2310.14189",
    kind="loss",
    needs=("x", "noise", "sigma", "next_sigma"),
    variant="without an averaged teacher, as in the paper",
    compared="golden `consistency_training_loss`",
    example=_pair_of_levels,
)
def consistency_training_loss(
    model_fn: Callable[[Any, jax.Array, jax.Array], jax.Array],
    params: Any,
    x: chex.Array,
    noise: chex.Array,
    sigma: chex.Numeric,
    next_sigma: chex.Numeric,
    *,
    c: chex.Numeric | None = None,
    weight: chex.Numeric | None = None,
) -> jax.Array:
    r"""Disagreement of a network with itself at the next lower noise level.

    .. math::
      \ell = w\, d\big(f(x + \sigma_{i+1} \epsilon, \sigma_{i+1}),\;
      \mathrm{stop\_grad}\, f(x + \sigma_i \epsilon, \sigma_i)\big), \qquad
      w = 1 / (\sigma_{i+1} - \sigma_i)

    with d of `pseudo_huber_loss`. Both branches have the same parameters, the same
    noise, and must have the same dropout mask: close over one key. Costs two forward
    passes and one backward pass.

    Args:
      model_fn: f(params, x, sigma) for a batch: x [batch, ...] and sigma [batch] in
        float32 (float64 if `x` is). It must be the identity at the least noise level:
        see `consistency_scalings`.
      params: of the network.
      x: clean examples, [batch, ...].
      noise: epsilon, standard normal, of the same shape.
      sigma: sigma_i, the lower noise level, [batch] or a scalar.
      next_sigma: sigma_{i+1}, the higher one, [batch] or a scalar.
      c: of `pseudo_huber_loss`; by default 0.00054 sqrt(D).
      weight: w, [batch] or a scalar; by default that of `ict_weights`.

    Returns:
      Losses [batch].

    Raises:
      AssertionError: for shapes that do not fit, or arrays that are not floats.
      ValueError: if `c` is not positive.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import optax_ext as ox
      >>> def model_fn(params, x, sigma):
      ...     skip, out = ox.losses.consistency_scalings(sigma)
      ...     return skip[:, None] * x + out[:, None] * jnp.tanh(params * x)
      >>> x, noise = jnp.ones((4, 3)), jnp.ones((4, 3))
      >>> sigmas = ox.losses.karras_sigmas(5)
      >>> losses = ox.losses.consistency_training_loss(
      ...     model_fn, 0.5, x, noise, sigmas[:-1], sigmas[1:])
      >>> print(losses.shape)
      (4,)
    """
    x, noise, sigma, next_sigma = working_floats(
        x=x, noise=noise, sigma=sigma, next_sigma=next_sigma
    )
    check_batch("x", x)
    chex.assert_equal_shape([x, noise], custom_message="x, noise")
    sigma, next_sigma = per_example(len(x), sigma=sigma, next_sigma=next_sigma)

    student = model_fn(params, x + over_example(next_sigma, x) * noise, next_sigma)
    teacher = model_fn(params, x + over_example(sigma, x) * noise, sigma)
    distance = pseudo_huber_loss(student, jax.lax.stop_gradient(teacher), c=c)
    if weight is None:
        return distance / (next_sigma - sigma)
    distance, weight = working_floats(distance=distance, weight=weight)
    (weight,) = per_example(len(x), weight=weight)
    return weight * distance


@catalogued(
    title="Consistency Models",
    arxiv="2303.01469",
    kind="helper",
    needs=("sigma",),
    variant="as in the official code",
    compared="golden `ict_schedules`",
    example=lambda: {"sigma": jnp.array([0.002, 0.5, 80.0])},
)
def consistency_scalings(
    sigma: chex.Array,
    *,
    sigma_data: chex.Numeric = 0.5,
    sigma_min: chex.Numeric = 0.002,
) -> tuple[jax.Array, jax.Array]:
    r"""Scalings that make a network the identity at the least noise level.

    .. math::
      f(x, \sigma) = c_{skip}\, x + c_{out}\, F(x, \sigma), \quad
      c_{skip} = \frac{\sigma_d^2}{(\sigma - \sigma_{min})^2 + \sigma_d^2}, \quad
      c_{out} = \frac{\sigma_d (\sigma - \sigma_{min})}{\sqrt{\sigma^2 + \sigma_d^2}}

    Args:
      sigma: noise levels; any shape.
      sigma_data: sigma_d > 0, the standard deviation of the data; 0.5 in the paper.
      sigma_min: the least noise level, where c_skip = 1 and c_out = 0.

    Returns:
      c_skip and c_out, of the shape of `sigma`.

    Raises:
      AssertionError: if `sigma` are not floats.
      ValueError: for a `sigma_data` that is not positive or a negative `sigma_min`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> skip, out = ox.losses.consistency_scalings(
      ...     jnp.array([1.0, 4.0]), sigma_data=3.0, sigma_min=1.0)
      >>> print(skip, out)
      [1.  0.5] [0.  1.8]
    """
    owner = "consistency_scalings"
    check_hyperparam(owner, low=0.0, open_low=True, sigma_data=sigma_data)
    check_hyperparam(owner, low=0.0, sigma_min=sigma_min)
    (sigma,) = working_floats(sigma=sigma)
    data, least = (jnp.asarray(h, sigma.dtype) for h in (sigma_data, sigma_min))
    c_skip = data**2 / ((sigma - least) ** 2 + data**2)
    c_out = data * (sigma - least) / jnp.sqrt(sigma**2 + data**2)
    return c_skip, c_out

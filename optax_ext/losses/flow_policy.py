r"""The policy of Flow-GRPO: a flow-matching sampler whose steps have a likelihood.

A flow-matching model samples with an ODE, which offers no ratio of probabilities.
Flow-GRPO draws from an SDE with the same marginals instead (`flow_sde_step`), whose
step k is a Gaussian policy :math:`N(\mu_k, s_k^2 I)` with
:math:`s_k = \sigma_k \sqrt{dt_k}`. `gaussian_step_log_prob` scores the stored samples
again while the model learns, and `optax_ext.losses.grpo_guard_loss` is the loss.
"""

import math
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_choice, check_hyperparam
from optax_ext.losses._numerics import working_floats

_FLOW_GRPO = "Flow-GRPO: Training Flow Matching Models via Online RL"


def reduce_event(x: jax.Array, batch_ndim: int, reduction: str) -> jax.Array:
    """The mean or sum over all axes behind the first `batch_ndim`."""
    axes = tuple(range(batch_ndim, x.ndim))
    return jnp.mean(x, axes) if reduction == "mean" else jnp.sum(x, axes)


def over_event(x: jax.Array, event_ndim: int) -> jax.Array:
    """`x` with `event_ndim` axes of length 1 behind it."""
    return x.reshape(x.shape + (1,) * event_ndim)


def spread(shape: tuple[int, ...], **arguments: jax.Array) -> list[jax.Array]:
    """The arguments broadcast to `shape`, the one of the log-probabilities."""
    for name, x in arguments.items():
        message = f"{name} must broadcast to the log-probabilities"
        chex.assert_is_broadcastable(x.shape, shape, custom_message=message)
    return [jnp.broadcast_to(x, shape) for x in arguments.values()]


def _one_step() -> Mapping[str, Any]:
    """One SDE step for two samples in three dimensions."""
    return {
        "velocity": jnp.ones((2, 3)),
        "sample": jnp.zeros((2, 3)),
        "sigma": jnp.float32(0.5),
        "next_sigma": jnp.float32(0.25),
        "sigma_max": jnp.float32(0.75),
        "noise": jnp.full((2, 3), 0.5),
    }


@catalogued(
    title=_FLOW_GRPO,
    arxiv="2505.05470",
    kind="helper",
    needs=("sample", "mean", "std"),
    variant="averaged over the latent dimensions as Flow-GRPO's code does; "
    "reduction='sum' is the density",
    compared="golden `flow_sde_step`; jax.scipy.stats.norm",
    example=lambda: {
        "sample": jnp.ones((2, 3)),
        "mean": jnp.zeros((2, 3)),
        "std": jnp.float32(0.5),
    },
)
def gaussian_step_log_prob(
    sample: chex.Array,
    mean: chex.Array,
    std: chex.Numeric,
    *,
    event_ndim: int | None = None,
    reduction: str = "mean",
) -> jax.Array:
    r"""Log-probability of a denoising step.

    .. math::
      \log p = \mathrm{reduce}_d \left[-\frac{(x_d - \mu_d)^2}{2 s^2} - \log s
      - \tfrac{1}{2} \log 2\pi\right]

    Args:
      sample: x, the sample after the step, [batch..., event...].
      mean: mu, its mean, of the same shape.
      std: s = sigma_k sqrt(dt_k), the standard deviation of the step; broadcastable to
        [batch...]. Not sigma_k.
      event_ndim: how many axes at the end are latent dimensions; by default all but the
        first.
      reduction: "mean" or "sum" over the latent dimensions. "mean" is Flow-GRPO's; only
        "sum" is the logarithm of a density.

    Returns:
      Log-probabilities, [batch...].

    Raises:
      AssertionError: for shapes that do not fit, or arguments that are not floats.
      ValueError: for an unknown `reduction`, or more event axes than there are.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> x = jnp.array([[0.0, 0.0], [1.0, 2.0]])
      >>> print(ox.losses.gaussian_step_log_prob(x, jnp.zeros((2, 2)), 1.0))
      [-0.9189385 -2.1689386]
    """
    owner = "gaussian_step_log_prob"
    check_choice(owner, "reduction", reduction, ("mean", "sum"))
    sample, mean, std = working_floats(sample=sample, mean=mean, std=std)
    chex.assert_equal_shape([sample, mean], custom_message="sample, mean")
    if event_ndim is None:
        message = "sample needs a batch axis before its latent axes, or event_ndim"
        chex.assert_rank(sample, set(range(2, 33)), custom_message=message)
    check_hyperparam(owner, low=0, high=sample.ndim, event_ndim=event_ndim)

    batch_ndim = 1 if event_ndim is None else sample.ndim - event_ndim
    (std,) = spread(sample.shape[:batch_ndim], std=std)
    std = over_event(std, sample.ndim - batch_ndim)
    log_prob = (
        -(((sample - mean) / std) ** 2) / 2 - jnp.log(std) - math.log(2 * math.pi) / 2
    )
    return reduce_event(log_prob, batch_ndim, reduction)


@catalogued(
    title=_FLOW_GRPO,
    arxiv="2505.05470",
    kind="helper",
    needs=("velocity", "sample", "sigma", "next_sigma", "sigma_max", "noise"),
    variant="as in the official code, where the paper's formula is singular at sigma = "
    "1; log-probabilities are averaged over the latent dimensions",
    compared="golden `flow_sde_step`",
    example=_one_step,
)
def flow_sde_step(
    velocity: chex.Array,
    sample: chex.Array,
    sigma: chex.Numeric,
    next_sigma: chex.Numeric,
    sigma_max: chex.Numeric,
    noise: chex.Array,
    *,
    noise_level: chex.Numeric = 0.7,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    r"""One step of the SDE that samples from a flow-matching model.

    For paths :math:`x_\sigma = (1 - \sigma)\,\text{data} + \sigma\,\text{noise}`, whose
    velocity v estimates noise - data, with :math:`dt = \sigma - \sigma_{next}`

    .. math::
      \sigma_k &= a \sqrt{\sigma / (1 - \sigma)} \\
      \mu &= x \left(1 - \tfrac{\sigma_k^2}{2\sigma} dt\right)
        - v \left(1 + \tfrac{\sigma_k^2 (1 - \sigma)}{2\sigma}\right) dt \\
      x_{next} &= \mu + \sigma_k \sqrt{dt}\, \epsilon.

    Args:
      velocity: v, the model's output at `sample`, [batch, event...].
      sample: x, of the same shape.
      sigma: the present noise level of the grid, in (0, 1]; a scalar or [batch].
      next_sigma: the next one, below `sigma`; a scalar or [batch].
      sigma_max: the second value of the grid; it replaces `sigma` under the root where
        that is 1, the start of the sampler.
      noise: epsilon, standard normal, of the shape of `sample`. For the mean of a new
        policy at stored samples it does not matter.
      noise_level: a > 0, 0.7 in Flow-GRPO. Without noise there is no policy: take
        Euler steps ``sample - dt * velocity``.

    Returns:
      The next sample; its log-probability [batch], in which it counts as data; its
      mean mu; and sigma_k, which `grpo_guard_loss` calls `std_devs`. The standard
      deviation of the step is sigma_k sqrt(dt).

    Raises:
      AssertionError: for shapes that do not fit, or arguments that are not floats.
      ValueError: if `noise_level` is not positive.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import optax_ext as ox
      >>> grid = jnp.linspace(1.0, 0.0, 5)
      >>> x = jnp.ones((2, 3))
      >>> for sigma, next_sigma in zip(grid[:-1], grid[1:]):
      ...     velocity = x  # of a model that holds all data to be at 0, times sigma
      ...     x, log_prob, mean, sigma_k = ox.losses.flow_sde_step(
      ...         velocity, x, sigma, next_sigma, grid[1], jnp.zeros_like(x))
      >>> print(log_prob.shape, mean.shape, sigma_k.shape)
      (2,) (2, 3) ()
    """
    owner = "flow_sde_step"
    check_hyperparam(owner, low=0.0, open_low=True, noise_level=noise_level)
    velocity, sample, sigma, next_sigma, sigma_max, noise = working_floats(
        velocity=velocity,
        sample=sample,
        sigma=sigma,
        next_sigma=next_sigma,
        sigma_max=sigma_max,
        noise=noise,
    )
    chex.assert_equal_shape([velocity, sample], custom_message="velocity, sample")
    chex.assert_equal_shape([noise, sample], custom_message="noise, sample")
    for name, x in {
        "sigma": sigma,
        "next_sigma": next_sigma,
        "sigma_max": sigma_max,
    }.items():
        message = f"{name} must be a scalar or one value a sample"
        chex.assert_is_broadcastable(x.shape, sample.shape[:1], custom_message=message)

    def times(coefficient: jax.Array, x: jax.Array) -> jax.Array:
        return over_event(coefficient, x.ndim - coefficient.ndim) * x

    dt = sigma - next_sigma
    level = jnp.asarray(noise_level, sample.dtype)
    sigma_k = level * jnp.sqrt(sigma / (1 - jnp.where(sigma == 1, sigma_max, sigma)))
    pull = sigma_k**2 / (2 * sigma)
    mean = times(1 - pull * dt, sample) - times((1 + pull * (1 - sigma)) * dt, velocity)
    std = sigma_k * jnp.sqrt(dt)
    next_sample = mean + times(std, noise)
    log_prob = gaussian_step_log_prob(jax.lax.stop_gradient(next_sample), mean, std)
    return next_sample, log_prob, mean, sigma_k

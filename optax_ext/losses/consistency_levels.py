r"""Noise levels of consistency training: how many, where, and how often each is drawn.

`ict_discretization_schedule` says how many noise levels there are at a step,
`karras_sigmas` where they are, `lognormal_timestep_probs` how often to draw each
interval between two of them, and `ict_weights` how much it counts in
`optax_ext.losses.consistency_training_loss`.

The number of levels changes while training, and under `jax.jit` arrays have one length.
`karras_sigmas` takes a Python integer, so make the levels and probabilities for each of
the few numbers that there will be, pad them to s1 + 1, stack them, and index the stack
by the stage; an interval of probability 0 is never drawn.
"""

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax.scipy.special import erf

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam, check_interval
from optax_ext.losses._numerics import working_floats

_ICT = "Improved Techniques for Training Consistency Models"


@catalogued(
    title=_ICT,
    arxiv="2310.14189",
    kind="helper",
    variant="the exponential curriculum of the paper; counts levels, not intervals",
    compared="golden `ict_schedules`",
    example=lambda: {"total_steps": 800},
)
def ict_discretization_schedule(
    total_steps: int, *, s0: int = 10, s1: int = 1280
) -> optax.Schedule:
    r"""Number of noise levels by step: it doubles until there are s1 intervals.

    .. math::
      K' = \left\lfloor \frac{K}{\log_2 \lfloor s_1/s_0 \rfloor + 1} \right\rfloor,
      \qquad N(k) = \min(s_0 2^{\lfloor k/K' \rfloor}, s_1) + 1

    Args:
      total_steps: K, the length of training; at least the number of doublings.
      s0: intervals at the start; 10 in the paper.
      s1: intervals at the end, s0 or more; 1280 in the paper.

    Returns:
      A schedule: step k, which may be traced, -> N(k), an int32 scalar. There are N - 1
      intervals.

    Raises:
      ValueError: for counts below 1, an `s1` below `s0`, or too few steps.

    Example:
      >>> import optax_ext as ox
      >>> schedule = ox.losses.ict_discretization_schedule(800)
      >>> print([int(schedule(k)) for k in (0, 99, 100, 799)])
      [11, 11, 21, 1281]
    """
    owner = "ict_discretization_schedule"
    check_interval(owner, total_steps=total_steps, s0=s0, s1=s1)
    check_hyperparam(owner, low=s0, s1=s1)
    length = math.floor(total_steps / (math.log2(s1 // s0) + 1))
    check_interval(f"{owner}, steps a stage", total_steps=length)
    last = math.ceil(math.log2(s1 / s0))

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        stage = jnp.minimum(jnp.asarray(count, jnp.int32) // length, last)
        return jnp.minimum(s0 * 2**stage, s1) + 1

    return schedule


@catalogued(
    title="Elucidating the Design Space of Diffusion-Based Generative Models",
    arxiv="2206.00364",
    kind="helper",
    variant="increasing, as consistency models count them",
    compared="golden `ict_schedules`",
    example=lambda: {"num": 5},
)
def karras_sigmas(
    num: int,
    *,
    sigma_min: chex.Numeric = 0.002,
    sigma_max: chex.Numeric = 80.0,
    rho: chex.Numeric = 7.0,
) -> jax.Array:
    r"""Noise levels that are evenly spaced after a root.

    .. math::
      \sigma_i = \left(\sigma_{min}^{1/\rho} + \frac{i}{N-1}
      (\sigma_{max}^{1/\rho} - \sigma_{min}^{1/\rho})\right)^\rho, \quad i = 0..N-1

    Args:
      num: N, 2 or more, a Python integer.
      sigma_min: the least noise level, positive; this and the next as in the paper, for
        data of standard deviation 0.5.
      sigma_max: the greatest.
      rho: 1 spaces them evenly, more puts more of them at the low end; 7 in the paper.

    Returns:
      Levels [N], increasing, in JAX's default float dtype.

    Raises:
      ValueError: for a `num` below 2, or another argument that is not positive.

    Example:
      >>> import optax_ext as ox
      >>> print(ox.losses.karras_sigmas(3, sigma_min=1.0, sigma_max=9.0, rho=2.0))
      [1. 4. 9.]
    """
    owner = "karras_sigmas"
    check_interval(owner, num=num)
    check_hyperparam(owner, low=2, num=num)
    positive: dict[str, Any] = {"low": 0.0, "open_low": True}
    check_hyperparam(owner, sigma_min=sigma_min, sigma_max=sigma_max, **positive)
    check_hyperparam(owner, rho=rho, **positive)
    ramp = jnp.linspace(0.0, 1.0, num)
    sigma_min, sigma_max, rho = (
        jnp.asarray(h, ramp.dtype) for h in (sigma_min, sigma_max, rho)
    )
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (low + ramp * (high - low)) ** rho


@catalogued(
    title=_ICT,
    arxiv="2310.14189",
    kind="helper",
    needs=("sigmas",),
    variant="normalised to 1 over the given levels",
    compared="golden `ict_schedules`",
    example=lambda: {"sigmas": jnp.array([0.002, 0.1, 1.0, 80.0])},
)
def lognormal_timestep_probs(
    sigmas: chex.Array, *, mean: chex.Numeric = -1.1, std: chex.Numeric = 2.0
) -> jax.Array:
    r"""Probabilities of the intervals between noise levels under a log-normal.

    .. math::
      p_i \propto \mathrm{erf}\frac{\log \sigma_{i+1} - m}{\sqrt 2 s}
      - \mathrm{erf}\frac{\log \sigma_i - m}{\sqrt 2 s}

    Draw intervals with ``jax.random.choice(key, len(p), (batch,), p=p)``.

    Args:
      sigmas: increasing positive noise levels, [N].
      mean: m, of log sigma; -1.1 in the paper.
      std: s > 0; 2 in the paper.

    Returns:
      Probabilities [N - 1].

    Raises:
      AssertionError: if `sigmas` are not a vector of at least 2 floats.
      ValueError: if `std` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> sigmas = jnp.exp(jnp.array([-2.0, 0.0, 2.0]))
      >>> print(ox.losses.lognormal_timestep_probs(sigmas, mean=0.0))
      [0.5 0.5]
    """
    owner = "lognormal_timestep_probs"
    check_hyperparam(owner, mean=mean)
    check_hyperparam(owner, low=0.0, open_low=True, std=std)
    (sigmas,) = working_floats(sigmas=sigmas)
    _check_levels(sigmas)
    mean, std = (jnp.asarray(h, sigmas.dtype) for h in (mean, std))
    mass = jnp.diff(erf((jnp.log(sigmas) - mean) / (math.sqrt(2) * std)))
    return mass / jnp.sum(mass)


@catalogued(
    title=_ICT,
    arxiv="2310.14189",
    kind="helper",
    needs=("sigmas",),
    variant="as in the paper",
    compared="golden `ict_schedules`",
    example=lambda: {"sigmas": jnp.array([0.002, 0.1, 1.0, 80.0])},
)
def ict_weights(sigmas: chex.Array) -> jax.Array:
    r"""Weights of the intervals between noise levels: small steps count more.

    .. math:: w_i = 1 / (\sigma_{i+1} - \sigma_i)

    Args:
      sigmas: increasing noise levels, [N].

    Returns:
      Weights [N - 1].

    Raises:
      AssertionError: if `sigmas` are not a vector of at least 2 floats.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> print(ox.losses.ict_weights(jnp.array([1.0, 1.5, 3.5])))
      [2.  0.5]
    """
    (sigmas,) = working_floats(sigmas=sigmas)
    _check_levels(sigmas)
    return 1 / jnp.diff(sigmas)


def _check_levels(sigmas: jax.Array) -> None:
    chex.assert_rank(sigmas, 1, custom_message="sigmas must be a vector of levels")
    message = "sigmas must hold at least 2 levels"
    chex.assert_axis_dimension_gt(sigmas, 0, 1, custom_message=message)

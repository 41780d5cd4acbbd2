r"""Inverse problems: recover x from a measurement y = f(x) + noise, with a prior.

| function | the prior is | trains | when |
|---|---|---|---|
| `red_diff_loss` | a diffusion model, as it is | the image itself | there is one |
| `proximal_matching_loss` | the network that you train | a network | there is none |

`red_diff_loss` is minimised over the image, one noise level a step, without
back-propagation through the denoiser. `proximal_matching_loss` trains a denoiser that
returns the mode of the posterior instead of its mean, which makes it the proximal
operator that plug-and-play iterations assume.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_choice, check_hyperparam, check_interval
from optax_ext.losses._batches import (
    check_batch,
    example_axes,
    over_example,
    per_example,
)
from optax_ext.losses._numerics import working_floats

# Of z = sqrt((1 - alpha_bar) / alpha_bar), the noise in units of the signal.
_WEIGHTINGS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda z: z,
    "sqrt": jnp.sqrt,
    "square": jnp.square,
    "log": jnp.log1p,
    "trunc_linear": lambda z: jnp.minimum(z, 1.0),
    "power2over3": lambda z: z ** (2 / 3),
    "const": jnp.ones_like,
}
_PROXIMAL = "What's in a Prior? Learned Proximal Networks for Inverse Problems"


@catalogued(
    title="A Variational Perspective on Solving Inverse Problems with Diffusion Models",
    arxiv="2305.04391",
    kind="loss",
    needs=("mu", "y", "alpha_bar", "noise"),
    variant="as in the official code: each term is a mean over its own elements",
    compared="golden `red_diff_loss`, 25 steps of Adam",
    example=lambda: {
        "mu": jnp.array([[0.5, -0.2], [1.0, 0.3], [0.0, 0.8]]),
        "y": jnp.array([[0.4], [1.1], [0.7]]),
        "alpha_bar": jnp.float32(0.6),
        "noise": jnp.array([[0.3, 0.8], [-1.2, 0.1], [0.5, -0.6]]),
        "denoiser_fn": lambda x, alpha_bar: x * jnp.sqrt(1 - alpha_bar),
        "forward_fn": lambda x: jnp.sum(x, -1, keepdims=True),
    },
)
def red_diff_loss(
    mu: chex.Array,
    y: chex.Array,
    alpha_bar: chex.Numeric,
    noise: chex.Array,
    denoiser_fn: Callable[[jax.Array, jax.Array], jax.Array],
    forward_fn: Callable[[jax.Array], jax.Array],
    *,
    reg_weight: chex.Numeric = 0.25,
    obs_weight: chex.Numeric = 1.0,
    weighting: str = "linear",
) -> jax.Array:
    r"""Measurement loss of an image, plus the pull of a diffusion model on it.

    With :math:`x_t = \sqrt{\bar\alpha}\, \mu + \sqrt{1 - \bar\alpha}\, \epsilon` and
    :math:`z = \sqrt{(1 - \bar\alpha) / \bar\alpha}`

    .. math::
      e &= \mathrm{stop\_grad}(\hat\epsilon(x_t, \bar\alpha) - \epsilon) \\
      \ell &= \rho\, w(z)\, \mathrm{mean}(e\, \mu)
        + \tfrac{1}{2} \eta\, \mathrm{mean}\,(y - f(\mu))^2.

    Its value means little, its gradient in mu is rho w e / n plus that of the
    measurement. Minimise with ``optax.adam(0.1, b1=0.9, b2=0.99)``, alpha_bar from
    noisy to clean, fresh noise at every step, from a pseudo-inverse of y.

    Args:
      mu: images, [batch, ...], which are optimised.
      y: measurements, [batch, ...].
      alpha_bar: signal power at this step's noise level, in (0, 1]; a scalar or
        [batch].
      noise: epsilon, standard normal, of the shape of `mu`.
      denoiser_fn: (x_t, alpha_bar) -> estimate of the noise, of the shape of `mu`. No
        gradient flows through it.
      forward_fn: f, images -> measurements of the shape of `y`.
      reg_weight: rho; 0.25 in the official code.
      obs_weight: eta; 1 in the official code.
      weighting: w(z): "linear" z, "sqrt", "square", "log" log(1 + z), "trunc_linear"
        min(z, 1), "power2over3" z^(2/3), "const" 1.

    Returns:
      Losses [batch]; the means go over the axes of an image and of a measurement.

    Raises:
      AssertionError: for shapes that do not fit, or arrays that are not floats.
      ValueError: for an unknown `weighting`, or a negative weight.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import optax_ext as ox
      >>> mu, noise = jnp.zeros((1, 2)), jnp.full((1, 2), 2.0)
      >>> y = jnp.array([[1.0]])
      >>> loss = lambda mu: ox.losses.red_diff_loss(
      ...     mu, y, 0.5, noise, lambda x, alpha_bar: 0 * x, lambda x: x[:, :1]).sum()
      >>> print(jax.grad(loss)(mu))
      [[-1.25 -0.25]]
    """
    owner = "red_diff_loss"
    check_choice(owner, "weighting", weighting, _WEIGHTINGS)
    check_hyperparam(owner, low=0.0, reg_weight=reg_weight, obs_weight=obs_weight)
    mu, y, alpha_bar, noise = working_floats(
        mu=mu, y=y, alpha_bar=alpha_bar, noise=noise
    )
    check_batch("mu", mu)
    chex.assert_equal_shape([mu, noise], custom_message="mu, noise")
    (levels,) = per_example(len(mu), alpha_bar=alpha_bar)
    reg_weight, obs_weight = (
        jnp.asarray(h, mu.dtype) for h in (reg_weight, obs_weight)
    )

    signal = over_example(levels, mu)
    x_t = jnp.sqrt(signal) * mu + jnp.sqrt(1 - signal) * noise
    estimate = denoiser_fn(x_t, alpha_bar)
    chex.assert_equal_shape([estimate, mu], custom_message="denoiser_fn's result, mu")
    error = jax.lax.stop_gradient(estimate - noise)
    measured = forward_fn(mu)
    chex.assert_equal_shape([measured, y], custom_message="forward_fn's result, y")

    weight = _WEIGHTINGS[weighting](jnp.sqrt((1 - levels) / levels))
    prior = reg_weight * weight * jnp.mean(error * mu, example_axes(mu))
    return prior + obs_weight * jnp.mean((y - measured) ** 2, example_axes(y)) / 2


@catalogued(
    title=_PROXIMAL,
    arxiv="2310.14344",
    kind="loss",
    needs=("predictions", "targets"),
    variant="without the paper's constant, as in the official code",
    compared="golden `proximal_matching_loss`",
    example=lambda: {
        "predictions": jnp.array([[0.0, 0.1], [1.0, 2.0], [-3.0, 0.5]]),
        "targets": jnp.array([[0.0, 0.1], [1.1, 2.0], [3.0, -0.5]]),
        "gamma": 0.8,
    },
)
def proximal_matching_loss(
    predictions: chex.Array,
    targets: chex.Array,
    gamma: chex.Numeric,
    *,
    axis: int | tuple[int, ...] | None = None,
) -> jax.Array:
    r"""Loss whose minimiser goes to the mode of the posterior as gamma goes to 0.

    .. math:: \ell = 1 - \exp(-|p - y|^2 / \gamma^2)

    For a large gamma, :math:`\gamma^2 \ell` is the squared error. Where the residual is
    much longer than gamma the gradient vanishes, so train with an l1 loss first and let
    gamma fall slowly: `proximal_matching_gamma_schedule`.

    Args:
      predictions: p, [batch, ...].
      targets: y, of the same shape.
      gamma: width, positive. It is compared with the whole example's distance, so it
        grows with the square root of the number of elements.
      axis: the axes of the norm; by default all but the first.

    Returns:
      Losses in [0, 1], [batch] or of the axes that are left.

    Raises:
      AssertionError: for shapes that do not fit, or arguments that are not floats.
      ValueError: if `gamma` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> predictions = jnp.array([[0.0, 0.0], [0.3, 0.4], [30.0, 40.0]])
      >>> print(ox.losses.proximal_matching_loss(
      ...     predictions, jnp.zeros((3, 2)), gamma=0.5).round(3))
      [0.    0.632 1.   ]
    """
    check_hyperparam("proximal_matching_loss", low=0.0, open_low=True, gamma=gamma)
    predictions, targets = working_floats(predictions=predictions, targets=targets)
    chex.assert_equal_shape([predictions, targets], custom_message="targets")
    if axis is None:
        check_batch("predictions", predictions)
        axis = example_axes(predictions)
    gamma = jnp.asarray(gamma, predictions.dtype)
    return -jnp.expm1(-jnp.sum(((predictions - targets) / gamma) ** 2, axis))


@catalogued(
    title=_PROXIMAL,
    arxiv="2310.14344",
    kind="schedule",
    variant="as in the official code",
    compared="golden `proximal_matching_gamma_schedule`",
    example=lambda: {"gamma_min": 0.5, "total_steps": 20},
)
def proximal_matching_gamma_schedule(
    gamma_min: chex.Numeric, total_steps: int, *, num_stages: int = 4
) -> optax.Schedule:
    r"""Gamma that halves from stage to stage, down to its least value.

    .. math::
      \gamma = \gamma_{min}\, 2^{S - 1 - s}, \qquad
      s = \min(\lfloor k / \lfloor K / S \rfloor \rfloor, S - 1)

    Args:
      gamma_min: the last value; the authors take 0.08 sqrt(D) for D elements.
      total_steps: K, the length of training.
      num_stages: S; 4 in the official code. Steps left over are in the last stage.

    Returns:
      A schedule: step k -> gamma.

    Raises:
      ValueError: for a `gamma_min` that is not positive, counts below 1, or fewer steps
        than stages.

    Example:
      >>> import optax_ext as ox
      >>> gamma = ox.losses.proximal_matching_gamma_schedule(0.5, total_steps=8)
      >>> print([float(gamma(k)) for k in (0, 1, 2, 4, 6, 9)])
      [4.0, 4.0, 2.0, 1.0, 0.5, 0.5]
    """
    owner = "proximal_matching_gamma_schedule"
    check_hyperparam(owner, low=0.0, open_low=True, gamma_min=gamma_min)
    check_interval(owner, total_steps=total_steps, num_stages=num_stages)
    check_hyperparam(owner, low=num_stages, total_steps=total_steps)
    stage_steps = total_steps // num_stages

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        gammas = gamma_min * 2.0 ** jnp.arange(num_stages - 1.0, -1.0, -1.0)
        return gammas[
            jnp.minimum(jnp.asarray(count, jnp.int32) // stage_steps, num_stages - 1)
        ]

    return schedule

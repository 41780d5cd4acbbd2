r"""The loss of GRPO-Guard, for policies that denoise.

Flow-GRPO averages the log-probabilities of a denoising step over its D dimensions.
Then samples of the old policy have

.. math::
  E[\log r] = -KL/D, \qquad E[r] = \exp(-KL/D + KL/D^2), \qquad
  KL = |\mu - \mu_{old}|^2 / (2 s^2),

so ratios sit below 1, the more so the less noise a step has, and an upper clip hardly
ever acts. `normalized_log_ratio` takes the mean out and the noise scale off: what is
left has mean 0 whatever the two policies are, and a spread that only their distance
decides. `denoising_step_weights` evens out the gradients of the steps.
`grpo_guard_loss` does both; with both switched off it is Flow-GRPO.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_choice, check_hyperparam
from optax_ext.losses._numerics import working_floats
from optax_ext.losses.flow_policy import (
    gaussian_step_log_prob,
    over_event,
    reduce_event,
    spread,
)
from optax_ext.losses.policy import clipped_surrogate_loss

_GUARD = (
    "GRPO-Guard: Mitigating Implicit Over-Optimization in Flow Matching via Regulated "
    "Clipping"
)


def _two_steps() -> dict[str, Any]:
    """Two samples of two denoising steps in three dimensions."""
    old_means, means = jnp.zeros((2, 2, 3)), jnp.full((2, 2, 3), 0.1)
    std_devs, dts = jnp.array([1.5, 0.5]), jnp.array([0.1, 0.2])
    std = std_devs * jnp.sqrt(dts)
    noise = jnp.linspace(-1.0, 1.0, 12).reshape(2, 2, 3)
    samples = old_means + std[None, :, None] * noise
    return {
        "log_probs": gaussian_step_log_prob(samples, means, std, event_ndim=1),
        "old_log_probs": gaussian_step_log_prob(samples, old_means, std, event_ndim=1),
        "means": means,
        "old_means": old_means,
        "std_devs": std_devs,
        "dts": dts,
    }


@catalogued(
    title=_GUARD,
    arxiv="2510.22319",
    kind="helper",
    needs=("dts",),
    variant="1 / dt as in the official code, which leaves out the normalisation",
    compared="golden `grpo_guard`",
    example=lambda: {"dts": jnp.array([0.2, 0.1])},
)
def denoising_step_weights(dts: chex.Array, *, normalize: bool = False) -> jax.Array:
    r"""Weights that give the denoising steps gradients of one size.

    .. math:: w_k = 1 / dt_k

    The normalised log-ratio changes with the velocity in proportion to dt_k, at every
    step but the first by the same factor.

    Args:
      dts: dt_k > 0, the steps of the noise-level grid; any shape.
      normalize: whether to divide by the mean weight. It keeps the scale of the loss,
        and so the learning rate, comparable.

    Returns:
      Weights of the shape of `dts`.

    Raises:
      AssertionError: if `dts` are not floats.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> dts = jnp.array([1.0, 1.0, 0.5, 0.25])
      >>> print(ox.losses.denoising_step_weights(dts))
      [1. 1. 2. 4.]
      >>> print(ox.losses.denoising_step_weights(dts, normalize=True))
      [0.5 0.5 1.  2. ]
    """
    (dts,) = working_floats(dts=dts)
    weights = 1 / dts
    return weights / jnp.mean(weights) if normalize else weights


@catalogued(
    title=_GUARD,
    arxiv="2510.22319",
    kind="helper",
    needs=("log_probs", "old_log_probs", "means", "old_means", "std_devs", "dts"),
    variant="bias per sample, as the paper and its author say; the official code "
    "averages it over the batch",
    compared="goldens `grpo_guard`, `grpo_guard_tiny_clip`, `grpo_guard_sum`; closed "
    "form of the identity below",
    example=_two_steps,
)
def normalized_log_ratio(
    log_probs: chex.Array,
    old_log_probs: chex.Array,
    means: chex.Array,
    old_means: chex.Array,
    std_devs: chex.Numeric,
    dts: chex.Numeric,
    *,
    reduction: str = "mean",
) -> jax.Array:
    r"""Log-ratio of denoising steps, centred and free of the step's noise scale.

    With :math:`s = \sigma_k \sqrt{dt}`

    .. math::
      \log \tilde r = s \left(\log p - \log p_{old}
      + \mathrm{reduce}_d \frac{(\mu - \mu_{old})_d^2}{2 s^2}\right)
      = \mathrm{reduce}_d\; (\mu - \mu_{old})_d\, \epsilon_d

    for :math:`x = \mu_{old} + s \epsilon`. Under the old policy its mean is 0; that of
    its exponential is :math:`\exp(|\mu - \mu_{old}|^2 / (2 D^2))` with the reduction
    "mean", still above 1 by the square of a small number.

    Args:
      log_probs: log p of the stored samples under the policy that learns, [..., S],
        for example samples x steps.
      old_log_probs: the same under the policy that drew them. Detached.
      means: mu of the policy that learns, [..., S, event...]. Gradients flow.
      old_means: mu of the policy that drew them, of the same shape. Detached.
      std_devs: sigma_k, broadcastable to `log_probs`; as `flow_sde_step` returns it.
      dts: dt_k > 0, broadcastable to `log_probs`. Steps without noise are no policy:
        leave them out.
      reduction: "mean" or "sum" over the event axes, whichever `log_probs` were made
        with.

    Returns:
      Log-ratios of the shape of `log_probs`. In float32 they are right to about
      1e-7 s times the size of the log-probabilities, which is 5% of a clip range of
      2e-6: do not store log-probabilities in less.

    Raises:
      AssertionError: for shapes that do not fit, or arguments that are not floats.
      ValueError: for an unknown `reduction`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> mean, old_mean, x = jnp.array([[0.2]]), jnp.array([[0.0]]), jnp.array([[1.0]])
      >>> log_prob, old_log_prob = (
      ...     ox.losses.gaussian_step_log_prob(x, m, 2.0) for m in (mean, old_mean))
      >>> log_ratio = ox.losses.normalized_log_ratio(
      ...     log_prob, old_log_prob, mean, old_mean, 2.0, 1.0)
      >>> print(f"{log_ratio.item():.3f}")  # 0.2 times epsilon = 1 / 2
      0.100
    """
    check_choice("normalized_log_ratio", "reduction", reduction, ("mean", "sum"))
    log_probs, old_log_probs, means, old_means, std_devs, dts = working_floats(
        log_probs=log_probs,
        old_log_probs=old_log_probs,
        means=means,
        old_means=old_means,
        std_devs=std_devs,
        dts=dts,
    )
    chex.assert_equal_shape(
        [log_probs, old_log_probs], custom_message="log_probs, old_log_probs"
    )
    chex.assert_equal_shape([means, old_means], custom_message="means, old_means")
    message = "means must start with the axes of log_probs"
    chex.assert_equal_shape_prefix(
        [log_probs, means], log_probs.ndim, custom_message=message
    )

    old_log_probs, old_means = jax.lax.stop_gradient((old_log_probs, old_means))
    std_devs, dts = spread(log_probs.shape, std_devs=std_devs, dts=dts)
    std = std_devs * jnp.sqrt(dts)
    shift = (means - old_means) / over_event(std, means.ndim - std.ndim)
    bias = reduce_event(shift**2 / 2, log_probs.ndim, reduction)
    return (log_probs - old_log_probs + bias) * std


@catalogued(
    title=_GUARD,
    arxiv="2510.22319",
    kind="loss",
    needs=(
        "log_probs",
        "old_log_probs",
        "means",
        "old_means",
        "std_devs",
        "dts",
        "advantages",
    ),
    variant="bias per sample, as the paper and its author say; the official code "
    "averages it over the batch",
    compared="goldens `grpo_guard`, `grpo_guard_tiny_clip`, `grpo_guard_sum`, "
    "`flow_grpo_clip`",
    example=lambda: {**_two_steps(), "advantages": jnp.array([[1.0], [-1.0]])},
)
def grpo_guard_loss(
    log_probs: chex.Array,
    old_log_probs: chex.Array,
    means: chex.Array,
    old_means: chex.Array,
    std_devs: chex.Numeric,
    dts: chex.Numeric,
    advantages: chex.Numeric,
    *,
    clip_range: chex.Numeric = 2e-6,
    clip_range_high: chex.Numeric | None = None,
    adv_clip_max: chex.Numeric = 5.0,
    ratio_norm: bool = True,
    reweight: bool = True,
    reduction: str = "mean",
) -> jax.Array:
    r"""Clipped policy loss of denoising steps, on normalised ratios.

    .. math::
      A_c &= \mathrm{clip}(A, -A_{max}, A_{max}) \\
      \ell_k &= \max(-A_c \tilde r_k,\; -A_c\,\mathrm{clip}(\tilde r_k,
        1 - c, 1 + c_{high})) / dt_k

    with the ratio :math:`\tilde r_k` of `normalized_log_ratio`. A penalty that keeps
    the policy near a reference is the caller's to add: Flow-GRPO's is the mean over the
    latent dimensions of :math:`(\mu - \mu_{ref})^2 / (2 \sigma_k^2)`.

    Args:
      log_probs: log p of the stored samples under the policy that learns, [..., S],
        for example samples x steps.
      old_log_probs: the same under the policy that drew them. Detached.
      means: mu of the policy that learns, [..., S, event...]. Gradients flow.
      old_means: mu of the policy that drew them, of the same shape. Detached.
      std_devs: sigma_k, broadcastable to `log_probs`; as `flow_sde_step` returns it.
      dts: dt_k > 0, broadcastable to `log_probs`.
      advantages: A, of as many axes as `log_probs` and broadcastable to it, or a
        scalar. Detached.
      clip_range: c, in (0, 1). 2e-6 is that of the GRPO-Guard recipes for images; it
        depends on the task. Aim at 10 to 30% clipped samples of positive advantage.
      clip_range_high: c_high > 0, by default `clip_range`.
      adv_clip_max: A_max > 0; 5 as in the recipes.
      ratio_norm: False takes Flow-GRPO's plain ratio, for which 1e-4 is its clip range.
      reweight: False leaves out the division by dt_k.
      reduction: "mean" or "sum" over the event axes, whichever `log_probs` were made
        with.

    Returns:
      Losses of the shape of `log_probs`.

    Raises:
      AssertionError: for shapes that do not fit, or arguments that are not floats.
      ValueError: for a hyper-parameter outside its interval, or an unknown `reduction`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> old_mean, x = jnp.zeros((2, 1, 3)), jnp.ones((2, 1, 3))
      >>> sigma, dt, advantages = 2.0, 0.25, jnp.array([[1.0], [-1.0]])
      >>> def log_prob(mean):
      ...     return ox.losses.gaussian_step_log_prob(
      ...         x, mean, sigma * dt**0.5, event_ndim=1)
      >>> mean = old_mean + 0.1
      >>> losses = ox.losses.grpo_guard_loss(
      ...     log_prob(mean), log_prob(old_mean), mean, old_mean, sigma, dt,
      ...     advantages, clip_range=0.05)
      >>> print([f"{loss:.3f}" for loss in losses[:, 0]])  # clipped at 1.05; exp(0.1)
      ['-4.200', '4.421']
    """
    owner = "grpo_guard_loss"
    check_choice(owner, "reduction", reduction, ("mean", "sum"))
    check_hyperparam(owner, low=0.0, open_low=True, adv_clip_max=adv_clip_max)
    log_probs, old_log_probs, means, old_means, std_devs, dts, advantages = (
        working_floats(
            log_probs=log_probs,
            old_log_probs=old_log_probs,
            means=means,
            old_means=old_means,
            std_devs=std_devs,
            dts=dts,
            advantages=advantages,
        )
    )
    chex.assert_equal_shape(
        [log_probs, old_log_probs], custom_message="log_probs, old_log_probs"
    )

    if ratio_norm:
        log_ratio = normalized_log_ratio(
            log_probs,
            old_log_probs,
            means,
            old_means,
            std_devs,
            dts,
            reduction=reduction,
        )
    else:
        log_ratio = log_probs - jax.lax.stop_gradient(old_log_probs)
    limit = jnp.asarray(adv_clip_max, advantages.dtype)
    loss = clipped_surrogate_loss(
        log_ratio,
        jnp.clip(advantages, -limit, limit),
        clip_range=clip_range,
        clip_range_high=clip_range_high,
    )
    if reweight:
        (dts,) = spread(loss.shape, dts=dts)
        loss *= denoising_step_weights(dts)
    return loss

r"""Weightings that keep an average for each range of noise levels.

| weighting | averages | for |
|---|---|---|
| `adaptive_noise_schedule` | the loss | drawing noise levels where the loss is |
| `f_distill_weighting` | the density ratio | comparing samples of one level |
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam, check_interval
from optax_ext._core.pairs import Weighting
from optax_ext.losses._numerics import working_floats
from optax_ext.losses.distribution_matching import (
    check_f_divergence,
    clipped_ratio,
    weight_of_ratio,
)
from optax_ext.weightings._bins import BinsState, averaged, bin_of


class NoiseSchedule(NamedTuple):
    """A weighting of noise levels, and a way to draw them.

    Attributes:
      init: ``init() -> state``.
      update: ``update(losses, state, *, logsnr) -> (weights, state)``.
      quantile: ``quantile(state, u) -> logsnr`` for u in [0, 1].
    """

    init: Callable[[], BinsState]
    update: Callable[..., tuple[jax.Array, BinsState]]
    quantile: Callable[[BinsState, chex.Array], jax.Array]


@catalogued(
    title="Understanding Diffusion Objectives as the ELBO with Simple Data "
    "Augmentation",
    arxiv="2303.00848",
    kind="weighting",
    needs=("losses", "logsnr"),
    variant="the paper's average over bins of log-SNR; the details of bins are ours",
    compared="golden `adaptive_noise_schedule`",
    state="one float a bin",
)
def adaptive_noise_schedule(
    *,
    num_bins: int = 100,
    logsnr_min: float = -20.0,
    logsnr_max: float = 20.0,
    decay: chex.Numeric = 0.999,
) -> NoiseSchedule:
    r"""Noise levels drawn where the loss is, and weights that leave it unbiased.

    Bins of log-SNR keep a running average e of the weighted loss. Levels are drawn from

    .. math:: p(\lambda) = e_b / (\textstyle\sum e \cdot \text{bin width})

    and the weights are :math:`1 / p(\lambda)`, with which the expectation of the loss
    stays that of `optax_ext.losses.weighted_diffusion_loss`. The loss changes little
    from one level to the next then, and its gradient is less noisy.

    A training step: ``logsnr = quantile(state, u)`` for stratified uniforms u; losses
    :math:`w(\lambda) |\epsilon - \hat\epsilon|^2`; ``weights, state = update(losses,
    state, logsnr=logsnr)``; minimise the mean of 0.5 weights losses.

    Args:
      num_bins: how many bins; 100 is our choice.
      logsnr_min: lower end of the interval. What is outside goes to the end bins.
      logsnr_max: upper end.
      decay: of the averages, in [0, 1]; 0.999 is our choice.

    Returns:
      A triple of functions. ``init()``; ``update(losses, state, *, logsnr)`` with
      per-example losses and their log-SNR, both [batch], which returns the weights
      under the density before the update, detached; ``quantile(state, u)``, the
      piecewise linear inverse of the cumulative density.

    Raises:
      AssertionError: from `update`, for shapes that do not fit or arguments that are
        not floats.
      ValueError: for a `num_bins` below 1, an empty interval, or a `decay` outside
        [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> schedule = ox.adaptive_noise_schedule(
      ...     num_bins=2, logsnr_min=-4.0, logsnr_max=4.0, decay=0.0)
      >>> state = schedule.init()
      >>> logsnr = jnp.array([-1.0, 1.0])
      >>> weights, state = schedule.update(jnp.array([3.0, 1.0]), state, logsnr=logsnr)
      >>> print(weights, state.bins)
      [8. 8.] [3. 1.]
      >>> print(schedule.quantile(state, jnp.array([0.0, 0.375, 0.75, 1.0])))
      [-4. -2.  0.  4.]
    """
    owner = "adaptive_noise_schedule"
    check_interval(owner, num_bins=num_bins)
    check_hyperparam(owner, logsnr_min=logsnr_min)
    check_hyperparam(owner, low=logsnr_min, open_low=True, logsnr_max=logsnr_max)
    check_hyperparam(owner, low=0.0, high=1.0, decay=decay)
    width = (logsnr_max - logsnr_min) / num_bins

    def masses(state: BinsState) -> jax.Array:
        # A bin whose loss has gone to 0 must keep a chance to be drawn.
        bins = jnp.maximum(state.bins, 1e-20)
        return bins / jnp.sum(bins)

    def init() -> BinsState:
        return BinsState(jnp.ones(num_bins))

    def update(
        losses: chex.Array, state: BinsState, *, logsnr: chex.Array, **extra: Any
    ) -> tuple[jax.Array, BinsState]:
        del extra
        losses, logsnr = working_floats(losses=losses, logsnr=logsnr)
        chex.assert_equal_shape([losses, logsnr], custom_message="losses, logsnr")
        losses, logsnr = jax.lax.stop_gradient((losses, logsnr))
        index = bin_of(logsnr, logsnr_min, logsnr_max, num_bins)
        weights = width / masses(state)[index]
        bins = averaged(state.bins, index, losses, decay)
        return weights.astype(losses.dtype), BinsState(bins)

    def quantile(state: BinsState, u: chex.Array) -> jax.Array:
        (u,) = working_floats(u=u)
        cumulative = jnp.cumsum(masses(state))
        # The last sum may miss 1 by rounding, and u = 1 must give the upper end.
        cumulative = jnp.append(jnp.zeros(1, cumulative.dtype), cumulative)
        edges = jnp.linspace(logsnr_min, logsnr_max, num_bins + 1)
        at = u.astype(cumulative.dtype) * cumulative[-1]
        return jnp.interp(at, cumulative, edges.astype(at.dtype)).astype(u.dtype)

    return NoiseSchedule(init, update, quantile)


@catalogued(
    title="One-step Diffusion Models with f-Divergence Distribution Matching",
    arxiv="2502.15681",
    kind="weighting",
    needs=("log_ratio", "t"),
    variant="as in FastGen, with its ratio normalisation",
    compared="golden `f_distill_weighting`",
    state="one float a bin",
)
def f_distill_weighting(
    *,
    f: str = "js",
    ratio_min: chex.Numeric = 0.1,
    ratio_max: chex.Numeric = 20.0,
    num_bins: int = 10,
    t_min: float = 0.0,
    t_max: float = 1.0,
    decay: chex.Numeric = 0.0,
    eps: chex.Numeric = 1e-6,
) -> Weighting:
    r"""Weights of an f-divergence, on ratios evened out over noise levels.

    The ratio r of teacher to student is large at all samples of some noise levels and
    small at those of others. Bins of the time t keep its running average b, and

    .. math:: w = h(r / (b + \epsilon)) / (\mathrm{mean}\, h + \epsilon)

    with h of `optax_ext.losses.f_divergence_weight` and the bins after their update.
    Give the weights to `optax_ext.losses.f_distill_loss`.

    Args:
      f: the divergence, a name of `optax_ext.losses.f_divergence_weight`.
      ratio_min: lower bound of r, positive; 0.1 in FastGen.
      ratio_max: upper bound of r; 20 in FastGen.
      num_bins: how many bins; 10 in FastGen.
      t_min: lower end of the times. What is outside goes to the end bins.
      t_max: upper end.
      decay: of the averages, in [0, 1]; 0 in FastGen, 0.5 in its configuration for
        ImageNet.
      eps: keeps the divisions finite; 1e-6 in FastGen.

    Returns:
      A weighting. ``init()``; ``update(losses, state, *, log_ratio, t)`` with the
      discriminator's logits and the times, both [batch], which ignores the losses and
      returns detached weights of mean 1.

    Raises:
      AssertionError: from `update`, for shapes that do not fit or arguments that are
        not floats.
      ValueError: for an unknown `f`, or a number outside its interval.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> weighting = ox.f_distill_weighting(f="kl", num_bins=2)
      >>> log_ratio = jnp.log(jnp.array([1.0, 3.0, 10.0, 10.0]))
      >>> weights, state = weighting.update(
      ...     None, weighting.init(), log_ratio=log_ratio, t=jnp.linspace(0.0, 1.0, 4))
      >>> print([f"{w:.2f}" for w in weights], state.bins.round(3))
      ['0.50', '1.50', '1.00', '1.00'] [ 2. 10.]
    """
    owner = "f_distill_weighting"
    check_f_divergence(owner, f, ratio_min, ratio_max, eps)
    check_interval(owner, num_bins=num_bins)
    check_hyperparam(owner, t_min=t_min)
    check_hyperparam(owner, low=t_min, open_low=True, t_max=t_max)
    check_hyperparam(owner, low=0.0, high=1.0, decay=decay)

    def init() -> BinsState:
        return BinsState(jnp.ones(num_bins))

    def update(
        losses: Any,
        state: BinsState,
        *,
        log_ratio: chex.Array,
        t: chex.Array,
        **extra: Any,
    ) -> tuple[jax.Array, BinsState]:
        del losses, extra
        log_ratio, t = working_floats(log_ratio=log_ratio, t=t)
        chex.assert_equal_shape([log_ratio, t], custom_message="log_ratio, t")
        ratio = clipped_ratio(log_ratio, ratio_min, ratio_max)
        index = bin_of(jax.lax.stop_gradient(t), t_min, t_max, num_bins)
        bins = averaged(state.bins, index, ratio, decay, eps)
        scale = bins.astype(ratio.dtype)[index] + jnp.asarray(eps, ratio.dtype)
        return weight_of_ratio(ratio / scale, f, eps), BinsState(bins)

    return Weighting(init, update)

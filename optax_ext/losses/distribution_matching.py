r"""Learning another distribution than that of the data, by way of a density ratio.

A discriminator on noisy samples tells by its logit how much more likely one
distribution makes a sample than the other. Two things to do with it:

| loss | from | to | the ratio |
|---|---|---|---|
| `tiw_dsm_loss` | biased data | the unbiased score | weighs and shifts score matching |
| `f_distill_loss` | a diffusion model | a generator of one step | weighs the gradient |

The gradient of `f_distill_loss` is distribution-matching distillation. The weight
decides which f-divergence it descends: `f_divergence_weight` for one batch,
`optax_ext.f_distill_weighting` with ratios evened out over noise levels first.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_choice, check_hyperparam
from optax_ext.losses._batches import (
    check_batch,
    example_axes,
    over_example,
    per_example,
    sum_of_squares,
)
from optax_ext.losses._numerics import working_floats

_TIW = "Training Unbiased Diffusion Models From Biased Dataset"
_F_DISTILL = "One-step Diffusion Models with f-Divergence Distribution Matching"

# h(r) = f''(r) r^2 up to a factor, for the ratio r = p_teacher / q_student.
F_WEIGHTS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "rkl": jnp.ones_like,
    "kl": lambda r: r,
    "js": lambda r: r / (1 + r),
    "softened_rkl": lambda r: 1 / (1 + r),
    "neyman": lambda r: 1 / jnp.maximum(r, 1e-8),
    "hellinger": jnp.sqrt,
    "jeffreys": lambda r: 1 + r,
}


def _biased_batch() -> dict[str, Any]:
    return {
        "score": jnp.array([[0.1, 0.2], [0.3, -0.4], [1.0, 0.0]]),
        "cond_score": jnp.array([[0.0, 0.5], [0.2, -0.1], [0.8, 0.3]]),
        "log_ratio": jnp.array([0.3, -0.2, 0.0]),
        "grad_log_ratio": jnp.array([[0.1, 0.0], [0.0, -0.2], [0.3, 0.1]]),
    }


@catalogued(
    title=_TIW,
    arxiv="2403.01189",
    kind="loss",
    needs=("score", "cond_score", "log_ratio", "grad_log_ratio"),
    variant="the paper's objective; the released code has another correction term",
    compared="golden `tiw_dsm_loss`; minimised by the unbiased score",
    example=_biased_batch,
)
def tiw_dsm_loss(
    score: chex.Array,
    cond_score: chex.Array,
    log_ratio: chex.Numeric,
    grad_log_ratio: chex.Array,
    *,
    weighting: chex.Numeric = 1.0,
) -> jax.Array:
    r"""Denoising score matching on biased data that learns the unbiased score.

    With :math:`\log w_t(x_t) = \log q_{unbiased,t}(x_t) - \log q_{biased,t}(x_t)`

    .. math::
      \ell = \tfrac{1}{2}\, \lambda\, w_t \left| s - \nabla \log p(x_t | x_0)
      - \nabla \log w_t \right|^2.

    Whatever positive weight stands before the square, the minimiser is the score of the
    unbiased distribution. For a denoiser, whose
    :math:`s = (D - x_t) / \sigma^2` (EDM), the target is
    :math:`x_0 + \sigma^2 \nabla \log w_t`.

    Args:
      score: s, the network's output at x_t, [batch, ...].
      cond_score: grad log p(x_t | x_0) = -(x_t - alpha x_0) / sigma^2, of the same
        shape.
      log_ratio: log w_t, [batch] or a scalar; detached. It is not clipped, and its
        exponential may overflow: clip it where the discriminator is that sure.
      grad_log_ratio: its gradient in x_t, of the shape of `score`; detached.
        `log_ratio_and_grad` gives both.
      weighting: lambda, a weight of the noise level, [batch] or a scalar.

    Returns:
      Losses [batch], sums over the axes of an example.

    Raises:
      AssertionError: for shapes that do not fit, or arguments that are not floats.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> score, zero = jnp.array([[1.0, 1.0], [2.0, 0.0]]), jnp.zeros((2, 2))
      >>> log_ratio = jnp.log(jnp.array([1.0, 3.0]))
      >>> print(ox.losses.tiw_dsm_loss(score, zero, log_ratio, zero).round(4))
      [1. 6.]
    """
    score, cond_score, log_ratio, grad_log_ratio, weighting = working_floats(
        score=score,
        cond_score=cond_score,
        log_ratio=log_ratio,
        grad_log_ratio=grad_log_ratio,
        weighting=weighting,
    )
    check_batch("score", score)
    chex.assert_equal_shape([score, cond_score], custom_message="cond_score")
    chex.assert_equal_shape([score, grad_log_ratio], custom_message="grad_log_ratio")
    log_ratio, weighting = per_example(
        len(score), log_ratio=log_ratio, weighting=weighting
    )

    log_ratio, grad_log_ratio = jax.lax.stop_gradient((log_ratio, grad_log_ratio))
    error = score - cond_score - grad_log_ratio
    return weighting * jnp.exp(log_ratio) * sum_of_squares(error) / 2


@catalogued(
    title=_TIW,
    arxiv="2403.01189",
    kind="helper",
    needs=("x_t", "t"),
    variant="the logit and its own gradient, as the objective has them",
    compared="closed form for Gaussians",
    example=lambda: {
        "log_ratio_fn": lambda x, t: jnp.sum(x * x) * t,
        "x_t": jnp.array([[1.0, 2.0], [0.5, -0.5], [0.0, 1.0]]),
        "t": jnp.array([0.1, 0.5, 0.9]),
    },
)
def log_ratio_and_grad(
    log_ratio_fn: Callable[[jax.Array, jax.Array], jax.Array],
    x_t: chex.Array,
    t: chex.Numeric,
) -> tuple[jax.Array, jax.Array]:
    r"""A discriminator's log density ratio and its gradient, example by example.

    For a discriminator D trained to tell unbiased (1) from biased (0) noisy data, the
    logit is :math:`\log D / (1 - D) = \log q_{unbiased,t} - \log q_{biased,t}`. If the
    training data are the union of both sets in equal parts, the ratio to the mixture is
    :math:`2 D`: pass ``lambda x, t: jnp.log(2.0) + jax.nn.log_sigmoid(logit(x, t))``.

    Args:
      log_ratio_fn: (x, t) -> scalar for ONE example and its noise level, both in
        float32 (float64 if an argument is).
      x_t: noisy examples, [batch, ...].
      t: their noise levels, [batch] or a scalar.

    Returns:
      The log-ratio [batch], and its gradient of the shape of `x_t`.

    Raises:
      AssertionError: for shapes that do not fit, or arguments that are not floats.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> log_ratio, grad = ox.losses.log_ratio_and_grad(
      ...     lambda x, t: t * (x**2).sum() / 2, x, 0.5)
      >>> print(log_ratio, grad.tolist())
      [1.25 6.25] [[0.5, 1.0], [1.5, 2.0]]
    """
    x_t, t = working_floats(x_t=x_t, t=t)
    check_batch("x_t", x_t)
    (t,) = per_example(len(x_t), t=t)
    return jax.vmap(jax.value_and_grad(log_ratio_fn))(x_t, t)


def clipped_ratio(
    log_ratio: jax.Array, ratio_min: chex.Numeric, ratio_max: chex.Numeric
) -> jax.Array:
    """The ratio between two bounds, detached."""
    ratio = jnp.exp(jnp.clip(jax.lax.stop_gradient(log_ratio), -10.0, 10.0))
    low, high = (jnp.asarray(h, ratio.dtype) for h in (ratio_min, ratio_max))
    return jnp.clip(ratio, low, high)


def check_f_divergence(
    owner: str, f: str, ratio_min: chex.Numeric, ratio_max: chex.Numeric, eps: Any
) -> None:
    """Check what the weights of f-divergences share.

    Raises:
      ValueError: for an unknown f, or a number outside its interval.
    """
    check_choice(owner, "f", f, F_WEIGHTS)
    positive: dict[str, Any] = {"low": 0.0, "open_low": True}
    check_hyperparam(owner, ratio_min=ratio_min, ratio_max=ratio_max, **positive)
    check_hyperparam(owner, low=0.0, eps=eps)


def weight_of_ratio(
    ratio: jax.Array, f: str, eps: chex.Numeric, normalize: bool = True
) -> jax.Array:
    """h(r), divided by its mean over the batch if asked."""
    weight = F_WEIGHTS[f](ratio)
    scale = jnp.mean(weight) + jnp.asarray(eps, weight.dtype)
    return weight / scale if normalize else weight


@catalogued(
    title=_F_DISTILL,
    arxiv="2502.15681",
    kind="helper",
    needs=("log_ratio",),
    variant="as in FastGen, without its running averages",
    compared="golden `f_divergence_weight`; f''(r) r^2 by automatic differentiation",
    example=lambda: {"log_ratio": jnp.array([-1.0, 0.0, 2.0])},
)
def f_divergence_weight(
    log_ratio: chex.Array,
    *,
    f: str = "js",
    ratio_min: chex.Numeric = 0.1,
    ratio_max: chex.Numeric = 20.0,
    normalize: bool = True,
    eps: chex.Numeric = 1e-6,
) -> jax.Array:
    r"""Weight of a sample when a generator descends an f-divergence.

    With :math:`r = p_{teacher} / q_{student}`, clipped, the gradient of the divergence
    is that of the reverse KL with each sample weighed by
    :math:`h(r) \propto f''(r)\, r^2`:

    ================  ===========  ============================================
    f                 h(r)         divergence
    ================  ===========  ============================================
    "rkl"             1            reverse KL: seeks modes
    "softened_rkl"    1 / (1 + r)  between it and its mixture
    "js"              r / (1 + r)  Jensen-Shannon
    "hellinger"       sqrt(r)      squared Hellinger
    "kl"              r            forward KL: covers modes
    "jeffreys"        1 + r        sum of both KL
    "neyman"          1 / r        Neyman's chi-square
    ================  ===========  ============================================

    Args:
      log_ratio: log p_teacher - log q_student, the discriminator's logit at (x_t, t);
        any shape. Detached, and clipped to [-10, 10].
      f: a name of the table; "js" in FastGen.
      ratio_min: lower bound of r, positive; 0.1 in FastGen.
      ratio_max: upper bound of r; 20 in FastGen.
      normalize: whether to divide by the mean over the batch.
      eps: added to that mean; 1e-6 in FastGen.

    Returns:
      Weights of the shape of `log_ratio`, with mean 1 where normalised.

    Raises:
      AssertionError: if `log_ratio` are not floats.
      ValueError: for an unknown `f`, or a number outside its interval.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> log_ratio = jnp.log(jnp.array([1.0, 3.0, 100.0]))
      >>> weights = ox.losses.f_divergence_weight(log_ratio, f="kl")
      >>> print([f"{weight:.3f}" for weight in weights])
      ['0.125', '0.375', '2.500']
    """
    check_f_divergence("f_divergence_weight", f, ratio_min, ratio_max, eps)
    (log_ratio,) = working_floats(log_ratio=log_ratio)
    ratio = clipped_ratio(log_ratio, ratio_min, ratio_max)
    return weight_of_ratio(ratio, f, eps, normalize)


@catalogued(
    title=_F_DISTILL,
    arxiv="2502.15681",
    kind="loss",
    needs=("samples", "teacher_x0", "fake_x0"),
    variant="as in FastGen",
    compared="golden `f_distill_loss`",
    example=lambda: {
        "samples": jnp.array([[0.1, 0.2], [0.3, -0.4], [1.0, 0.0]]),
        "teacher_x0": jnp.array([[0.0, 0.5], [0.2, -0.1], [0.8, 0.3]]),
        "fake_x0": jnp.array([[0.1, 0.3], [0.3, -0.1], [0.9, 0.1]]),
    },
)
def f_distill_loss(
    samples: chex.Array,
    teacher_x0: chex.Array,
    fake_x0: chex.Array,
    *,
    weight: chex.Numeric = 1.0,
    eps: chex.Numeric = 1e-6,
) -> jax.Array:
    r"""Moves a generator's samples from the fake score to the teacher's.

    .. math::
      g = w\, \frac{\hat x_{fake} - \hat x_{teacher}}
      {\mathrm{mean} |x - \hat x_{teacher}| + \epsilon}, \qquad
      \ell = \tfrac{1}{2}\, \mathrm{mean}\,(x - \mathrm{stop\_grad}(x - g))^2

    with means over the axes of an example. The gradient of :math:`\ell` in x is g
    divided by the number of elements of an example; everything else is detached.

    Args:
      samples: x, what the generator puts out, [batch, ...].
      teacher_x0: the teacher's estimate of x from a noised sample, of the same shape.
      fake_x0: that of the network trained on the generator's samples.
      weight: w, [batch] or a scalar, from `f_divergence_weight`; 1 is
        distribution-matching distillation.
      eps: keeps the normalisation finite; 1e-6 in FastGen.

    Returns:
      Losses [batch]. Their value says how far the two scores are apart, not how good
      the samples are.

    Raises:
      AssertionError: for shapes that do not fit, or arguments that are not floats.
      ValueError: for a negative `eps`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import optax_ext as ox
      >>> samples, teacher = jnp.array([[2.0, 0.0]]), jnp.array([[0.0, 0.0]])
      >>> fake = jnp.array([[1.0, -3.0]])
      >>> print(jax.grad(lambda x: ox.losses.f_distill_loss(
      ...     x, teacher, fake, eps=0.0).sum())(samples))
      [[ 0.5 -1.5]]
    """
    check_hyperparam("f_distill_loss", low=0.0, eps=eps)
    samples, teacher_x0, fake_x0, weight = working_floats(
        samples=samples, teacher_x0=teacher_x0, fake_x0=fake_x0, weight=weight
    )
    check_batch("samples", samples)
    chex.assert_equal_shape([samples, teacher_x0], custom_message="teacher_x0")
    chex.assert_equal_shape([samples, fake_x0], custom_message="fake_x0")
    (weight,) = per_example(len(samples), weight=weight)

    fixed = jax.lax.stop_gradient(samples)
    distance = jnp.mean(jnp.abs(fixed - teacher_x0), example_axes(samples))
    scale = weight / (distance + jnp.asarray(eps, samples.dtype))
    g = jax.lax.stop_gradient(over_example(scale, samples) * (fake_x0 - teacher_x0))
    # x - (x - g) in this order is g without the rounding error of x.
    return jnp.mean((g + (samples - fixed)) ** 2, example_axes(samples)) / 2

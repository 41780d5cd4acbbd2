"""A scoring rule that is descended along its natural gradient.

The gradient with respect to a scale, a log-scale or a variance asks for different steps
in the same distribution; the natural gradient asks for one. `natural_gradient_loss` has
the value of the score and hands this gradient back, so that any optimizer and network
can follow it. Plain scores are in `optax.losses` and `jax.scipy.stats`.
"""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_choice, check_hyperparam
from optax_ext.losses._numerics import working_floats
from optax_ext.losses.stability import token_cross_entropy

Parts = tuple[jax.Array, tuple[jax.Array, ...]]
"""A score, and its natural gradient with respect to each parameter."""

_SCORES = {
    "normal": ("log", "crps"),
    "lognormal": ("log",),
    "categorical": ("log",),
}


def _normal_log(
    parameters: tuple[jax.Array, ...], y: jax.Array, damping: jax.Array
) -> Parts:
    loc, log_scale = parameters
    s = jnp.exp(log_scale)
    z = (y - loc) / s
    score = z**2 / 2 + log_scale + jnp.log(2 * jnp.pi) / 2
    # Gradient (-z/s, 1 - z^2), metric (1/s^2, 2); the first times s^2 above and below.
    return score, ((loc - y) / (1 + damping * s**2), (1 - z**2) / (2 + damping))


def _normal_crps(
    parameters: tuple[jax.Array, ...], y: jax.Array, damping: jax.Array
) -> Parts:
    loc, log_scale = parameters
    s, root_pi = jnp.exp(log_scale), jnp.sqrt(jnp.pi).astype(y.dtype)
    z = (y - loc) / s
    centred = jax.lax.erf(z / jnp.sqrt(2.0).astype(y.dtype))  # 2 Phi(z) - 1
    at_scale = s * (2 * jax.scipy.stats.norm.pdf(z) - 1 / root_pi)
    score = (y - loc) * centred + at_scale
    # Metric (1/(sqrt(pi) s), s/(2 sqrt(pi))).
    to_loc = -centred * root_pi * s / (1 + damping * root_pi * s)
    return score, (to_loc, at_scale / (s / (2 * root_pi) + damping))


def _lognormal_log(
    parameters: tuple[jax.Array, ...], y: jax.Array, damping: jax.Array
) -> Parts:
    score, naturals = _normal_log(parameters, jnp.log(y), damping)
    return score + jnp.log(y), naturals


def _categorical_log(
    parameters: tuple[jax.Array, ...], y: jax.Array, damping: jax.Array
) -> Parts:
    (logits,) = parameters
    score = token_cross_entropy(logits, y)
    # (diag(p) - pp' + damping)^-1 (p - e_y) by Sherman-Morrison; without damping the
    # pseudo-inverse, where every class has the same share.
    p, damped = jax.nn.softmax(logits), jax.nn.softmax(logits) + damping
    shares = jnp.where(damped > 0, p / jnp.where(damped > 0, damped, 1), 1)
    shares = shares / jnp.sum(shares, axis=-1, keepdims=True)
    tiny = jnp.asarray(jnp.finfo(p.dtype).tiny, p.dtype)
    of_label = jnp.maximum(jnp.exp(-score) + damping, tiny)[..., None]
    label = jax.nn.one_hot(y, logits.shape[-1], dtype=p.dtype)
    return score, ((shares - label) / of_label,)


_RULES: dict[tuple[str, str], Callable[..., Parts]] = {
    ("normal", "log"): _normal_log,
    ("normal", "crps"): _normal_crps,
    ("lognormal", "log"): _lognormal_log,
    ("categorical", "log"): _categorical_log,
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scored(
    rule: Callable[..., Parts],
    parameters: tuple[jax.Array, ...],
    targets: jax.Array,
    damping: jax.Array,
) -> jax.Array:
    return rule(parameters, targets, damping)[0]


def _forward(
    rule: Callable[..., Parts],
    parameters: tuple[jax.Array, ...],
    targets: jax.Array,
    damping: jax.Array,
) -> Parts:
    return rule(parameters, targets, damping)


def _backward(
    rule: Callable[..., Parts], naturals: tuple[jax.Array, ...], ct: jax.Array
) -> tuple[Any, None, None]:
    del rule

    def times(natural):
        return natural * ct.reshape(ct.shape + (1,) * (natural.ndim - ct.ndim))

    return tuple(map(times, naturals)), None, None


_scored.defvjp(_forward, _backward)


@catalogued(
    title="NGBoost: Natural Gradient Boosting for Probabilistic Prediction",
    arxiv="1910.03225",
    kind="loss",
    needs=("parameters_and_targets",),
    variant="the loss alone, without boosting. The metric of the CRPS is the derived "
    "one; NGBoost's code has s times it, and its gradients are 1/s times ours",
    compared="goldens `natural_gradient_normal_log`, `natural_gradient_normal_crps`, "
    "`natural_gradient_categorical`",
    example=lambda: {"dist": "normal"},
)
def natural_gradient_loss(
    *parameters_and_targets: chex.Array,
    dist: str = "normal",
    score: str = "log",
    damping: chex.Numeric = 0.0,
) -> jax.Array:
    r"""A proper score whose gradient is the natural one.

    Value S, and for a cotangent c, with the Riemannian metric I of the score:

    .. math:: c\, (I + \text{damping})^{-1}\, \nabla S

    * normal, log: :math:`(loc - y,\; (1 - z^2) / 2)` with :math:`z = (y - loc) / s`
    * normal, crps: metric :math:`\mathrm{diag}(1/(\sqrt\pi s),\; s/(2\sqrt\pi))`
    * categorical: :math:`(1/K - e_y) / p_y`, with the pseudo-inverse of the metric. It
      grows as :math:`1 / p_y`: give it some damping

    Args:
      *parameters_and_targets: all by position, parameters first. "normal" and
        "lognormal": loc, log_scale, targets, arrays of one shape. "categorical":
        logits [..., classes] and integer targets [...]. No gradient flows into the
        targets.
      dist: "normal", "lognormal" (a normal for log y; targets are positive) or
        "categorical".
      score: "log", minus the log-likelihood, or "crps" (normal only), which forgives
        outliers.
      damping: added to the diagonal of the metric, 0 or more; 0 as in the paper.

    Returns:
      Scores of the shape of the targets. Their gradient is no derivative: finite
      differences do not agree with it.

    Raises:
      AssertionError: for shapes that do not fit, or arguments of the wrong type.
      TypeError: for another number of arrays than `dist` has.
      ValueError: for an unknown `dist`, a score it does not have, or negative damping.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import optax_ext as ox
      >>> def loss_fn(loc, log_scale):
      ...     y = jnp.array([1.0, 2.0])
      ...     return ox.losses.natural_gradient_loss(loc, log_scale, y).sum()
      >>> print(jax.grad(loss_fn)(jnp.zeros(2), jnp.array([0.0, 3.0])))
      [-1. -2.]
    """
    owner = "natural_gradient_loss"
    check_choice(owner, "dist", dist, _SCORES)
    check_choice(owner, f"score (of {dist!r})", score, _SCORES[dist])
    check_hyperparam(owner, low=0.0, damping=damping)
    names = ("logits",) if dist == "categorical" else ("loc", "log_scale")
    if len(parameters_and_targets) != len(names) + 1:
        raise TypeError(
            f"{owner}: {dist!r} takes {', '.join(names)}, targets by position, got "
            f"{len(parameters_and_targets)} arrays"
        )
    *parameters, targets = parameters_and_targets
    if dist == "categorical":
        parameters = working_floats(logits=parameters[0])
    else:
        arrays = dict(zip(names, parameters, strict=True))
        *parameters, targets = working_floats(**arrays, targets=targets)
        chex.assert_equal_shape(
            [*parameters, targets], custom_message=f"{', '.join(names)}, targets"
        )
    damping = jnp.asarray(damping, parameters[0].dtype)
    rule = _RULES[dist, score]
    return _scored(rule, tuple(parameters), jnp.asarray(targets), damping)

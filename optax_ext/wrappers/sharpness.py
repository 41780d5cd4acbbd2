r"""Gradients at a worse point nearby: sharpness-aware minimisation, and AWP.

Both wrappers move the parameters uphill along the incoming gradient, take the gradient
there, and hand it to the optimizer inside, which sees the parameters where they were.

| wrapper | how far uphill | norm |
|---|---|---|
| `sharpness_aware` | rho, for all parameters together | of the whole gradient |
| `adversarial_weight_perturbation` | a share of each kernel's norm | of each leaf |

The first depends on how layers are scaled, the second does not. The incoming updates
must be the raw gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam, check_params
from optax_ext._core.extra_args import require
from optax_ext._core.geometry import tree_length
from optax_ext._core.leaves import at_step, next_count
from optax_ext._core.points import on_trainable, plus, trainable
from optax_ext._core.views import full_precision
from optax_ext.losses.perturbation import layerwise_ascent


class AscentState(NamedTuple):
    """State of `sharpness_aware` and `adversarial_weight_perturbation`."""

    count: jax.Array
    inner_state: optax.OptState


def _uphill(
    owner: str,
    inner: optax.GradientTransformation,
    ascend: Callable[[Any, Any, jax.Array], Any],
    start_step: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """`inner` on gradients at ascend(x, gradient at x, step), from `start_step` on."""
    inner = optax.with_extra_args_support(inner)

    def init(params):
        return AscentState(jnp.zeros([], jnp.int32), inner.init(params))

    def update(updates, state, params=None, **extra):
        check_params(owner, params)
        f = on_trainable(require(owner, extra, "value_fn"), params, owner)
        x, count = trainable(updates, params, owner), next_count(state.count)

        def there():
            return jax.grad(f)(ascend(x, updates, count))

        grads = (
            there()
            if start_step == 0
            else jax.lax.cond(state.count < start_step, lambda: updates, there)
        )
        out, inner_state = inner.update(grads, state.inner_state, params, **extra)
        return out, AscentState(count, inner_state)

    return full_precision(optax.GradientTransformationExtraArgs(init, update))


@catalogued(
    title="Escaping Saddle Points for Effective Generalization on Class-Imbalanced "
    "Data",
    arxiv="2212.13827",
    kind="wrapper",
    needs=("params", "value_fn"),
    state="that of inner",
    variant="SAM, or ASAM with adaptive; one norm over all leaves. Decay and momentum "
    "act at the unperturbed parameters. optax.contrib.sam(opaque_mode=True) gives the "
    "same numbers, but wants grad_fn, divides 0 by 0 at a zero gradient, and has "
    "neither a schedule of rho nor the adaptive form.",
    compared="goldens sam, sam_adaptive; optax.contrib.sam",
    example=lambda: {"inner": optax.trace(0.9)},
)
def sharpness_aware(
    inner: optax.GradientTransformation,
    rho: optax.ScalarOrSchedule = 0.05,
    adaptive: bool = False,
    eps: float = 1e-12,
) -> optax.GradientTransformationExtraArgs:
    r"""Sharpness-aware minimisation: the gradient from a step uphill.

    .. math::
      e = \frac{\rho\, g}{\|g\| + \epsilon}, \qquad
      \text{or adaptive } e = \frac{\rho\, x^2 g}{\||x|\, g\| + \epsilon}, \qquad
      \text{out} = \text{inner}(\nabla L(x + e))

    For long-tailed classes the paper takes this with a large rho and re-weighted losses
    (`optax_ext.losses.ldam_loss`, `vector_scaling_loss`): on CIFAR-10-LT 0.1 with the
    cross-entropy, 0.5 with deferred re-weighting, 0.8 with LDAM; on iNaturalist steps
    0.05, 0.1, 0.5 by `optax.piecewise_constant_schedule`.

    Args:
      inner: an optimizer, or a link that emits a direction.
      rho: how far to go uphill, 0 or more; a number or a schedule (official: 0.05).
      adaptive: whether to scale the step with the parameters (then rho is larger, 0.5
        to 2).
      eps: added to the norm of the gradient (official).

    Returns:
      A link with the state of `inner` and a count. It needs params and ``value_fn``,
      and costs one gradient.

    Raises:
      ValueError: for a negative `rho` or `eps`; at trace time without params or
        ``value_fn``.

    Example:
      >>> import jax.numpy as jnp, optax, optax_ext as ox
      >>> f = lambda x: jnp.sum(x**2) / 2
      >>> tx = ox.sharpness_aware(optax.sgd(1.0), rho=0.5)
      >>> x = jnp.array([3.0, 4.0])
      >>> print(tx.update(x, tx.init(x), x, value_fn=f)[0])
      [-3.3 -4.4]
    """
    owner = "sharpness_aware"
    check_hyperparam(owner, low=0.0, rho=rho, eps=eps)

    def ascend(x, g, t):
        scaled = jax.tree.map(lambda p, g: jnp.abs(p) * g, x, g) if adaptive else g
        norm = tree_length(scaled)
        radius = at_step(rho, t.astype(norm.dtype))
        # Without eps a zero gradient would be 0 / 0.
        floor = jnp.where(norm + eps > 0, norm + eps, 1)
        if adaptive:
            scaled = jax.tree.map(lambda p, s: jnp.abs(p) * s, x, scaled)
        return plus(
            x, radius, jax.tree.map(lambda s: s / floor.astype(s.dtype), scaled)
        )

    return _uphill(owner, inner, ascend)


@catalogued(
    title="Adversarial Weight Perturbation Helps Robust Generalization",
    arxiv="2004.05884",
    kind="wrapper",
    needs=("params", "value_fn"),
    state="that of inner",
    variant="one ascent step, whose size cancels; leaves of rank 2 and more. The "
    "official loop decays weights at the perturbed point, here inner decays them where "
    "they are.",
    compared="golden awp; `optax_ext.losses.awp_value_and_grad`",
    example=lambda: {"inner": optax.trace(0.9)},
)
def adversarial_weight_perturbation(
    inner: optax.GradientTransformation,
    gamma: float = 0.01,
    start_step: int = 0,
    mask: Any = None,
    eps: float = 1e-20,
) -> optax.GradientTransformationExtraArgs:
    r"""Take the gradient at weights moved uphill, each kernel by a share of its norm.

    For each kernel w with gradient g:

    .. math::
      v = \gamma\, \|w\| \frac{g}{\|g\| + \epsilon}, \qquad
      \text{out} = \text{inner}(\nabla L(w + v))

    Other leaves are not moved. The loss that is climbed is the training loss itself; to
    climb another, or without an optimizer, use `optax_ext.losses.awp_value_and_grad`.
    Running statistics (BatchNorm) must not be updated in the evaluation at w + v.

    Args:
      inner: an optimizer, or a link that emits a direction.
      gamma: how far each leaf moves, as a share of its norm, 0 or more. 0.01 is the
        official default, 0.005 that for TRADES.
      start_step: steps with the plain gradient before it starts (TRADES: 10 epochs);
        they cost no second gradient.
      mask: which leaves move: a tree of booleans, a function of params that returns
        one, or None for those of rank 2 and more.
      eps: added to the norm of a gradient (official).

    Returns:
      A link with the state of `inner` and a count. It needs params and ``value_fn``,
      and costs one gradient.

    Raises:
      ValueError: for negative hyper-parameters; at trace time without params or
        ``value_fn``.

    Example:
      >>> import jax.numpy as jnp, optax, optax_ext as ox
      >>> f = lambda w: jnp.sum(w**2) / 2
      >>> tx = ox.adversarial_weight_perturbation(optax.sgd(1.0), gamma=0.5)
      >>> w = jnp.array([[3.0, 4.0]])
      >>> print(tx.update(w, tx.init(w), w, value_fn=f)[0])
      [[-4.5 -6. ]]
    """
    owner = "adversarial_weight_perturbation"
    check_hyperparam(owner, low=0.0, gamma=gamma, eps=eps)
    if (
        isinstance(start_step, bool)
        or not isinstance(start_step, int)
        or start_step < 0
    ):
        raise ValueError(
            f"{owner}: start_step must be an integer of 0 or more, got {start_step!r}"
        )

    def ascend(w, g, t):
        del t
        return layerwise_ascent(w, g, gamma=gamma, mask=mask, eps=eps)

    return _uphill(owner, inner, ascend, start_step)

r"""Updates without their radial part, for weights in front of a normalisation.

A weight w whose output is normalised has no scale: its gradient is orthogonal to it. A
momentum is not, and every orthogonal step makes w longer all the same, so that the
angle a step turns w by shrinks faster than the schedule says. `project_radial` finds
such weights by the cosine between w and the raw gradient, and takes out of the update
what is parallel to w. `adamp` and `sgdp` are that link behind Adam and behind momentum.
"""

from typing import Any

import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam, check_params, check_rate
from optax_ext._core.extra_args import require
from optax_ext._core.geometry import length
from optax_ext._core.leaves import map_leaves
from optax_ext._core.optimizers import adam_direction, finish, with_raw_gradient
from optax_ext._core.trees import treated

_ADAMP = (
    "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant "
    "Weights"
)


@catalogued(
    title=_ADAMP,
    arxiv="2006.08217",
    kind="link",
    needs=("params", "grad"),
    slots=0,
    variant="tests the cosine of the raw gradient, projects the update, and leaves the "
    "stored momentum alone, as in the paper.",
    compared="goldens adamp, adamp_nesterov, sgdp, sgdp_nesterov",
)
def project_radial(
    delta: float = 0.1,
    wd_ratio: float = 0.1,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    channel_axis: int = -1,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Take the part parallel to the weights out of updates of scale-free weights.

    For a leaf p of rank 2 or more with update u and raw gradient g, once with each
    output channel as a row of D entries, and then with the whole leaf as one row:

    .. math::
      \max_\text{rows} \frac{|\langle g, p \rangle|}{|g|\,|p|}
        < \frac{\delta}{\sqrt D} \implies
      u \leftarrow u - n \langle n, u \rangle, \quad n = \frac{p}{|p| + \epsilon}, \quad
      \rho = \text{wd\_ratio}

    The first view that passes is used; otherwise, and for leaves of lower rank, u stays
    and rho = 1. The output is :math:`u + \lambda \rho p`. A zero gradient passes.

    Args:
      delta: bound on the cosine, before the division by the root of D (official code).
      wd_ratio: decay of a projected leaf relative to `weight_decay` (official code).
      eps: smallest norm that is divided by; the optimizer's eps.
      weight_decay: decoupled decay, multiplied by the learning rate that follows.
      channel_axis: axis of the output channels; the last one in Flax layouts.
      mask: which leaves decay: tree of booleans, or function of params. All leaves are
        projected.

    Returns:
      A link without state, for the place between the direction and the learning rate.

    Raises:
      ValueError: for hyper-parameters outside their range; at trace time without params
        or the extra argument ``grad``.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> tx, p = ox.project_radial(), jnp.array([[3.0], [4.0]])
      >>> u, g = jnp.array([[1.0], [0.0]]), jnp.array([[4.0], [-3.0]])
      >>> print(tx.update(u, tx.init(p), p, grad=g)[0].round(2))
      [[ 0.64]
       [-0.48]]
    """
    check_hyperparam("project_radial", low=0.0, delta=delta, wd_ratio=wd_ratio)
    check_hyperparam("project_radial", low=0.0, open_low=True, eps=eps)
    check_hyperparam("project_radial", weight_decay=weight_decay)

    def other_axes(p):
        if not -p.ndim <= channel_axis < p.ndim:
            raise ValueError(f"channel_axis is {channel_axis}, the rank {p.ndim}")
        return tuple(i for i in range(p.ndim) if i != channel_axis % p.ndim)

    def is_scale_free(g, p, axis):
        entries = p.size if axis is None else p.size // p.shape[channel_axis]
        unit_g = g / jnp.maximum(length(g, axis, keepdims=True), eps)
        unit_p = p / jnp.maximum(length(p, axis, keepdims=True), eps)
        cosine = jnp.abs(jnp.sum(unit_g * unit_p, axis=axis))
        return jnp.max(cosine) < delta / entries**0.5

    def without_radial(u, p, axis):
        n = p / (length(p, axis, keepdims=True) + eps)
        return u - n * jnp.sum(n * u, axis=axis, keepdims=True)

    def rule(u, slots, g, p, decays):
        ratio = 1.0
        if p.ndim >= 2:
            rows = other_axes(p)
            channel, layer = is_scale_free(g, p, rows), is_scale_free(g, p, None)
            of_layer = jnp.where(layer, without_radial(u, p, None), u)
            u = jnp.where(channel, without_radial(u, p, rows), of_layer)
            ratio = jnp.where(channel | layer, wd_ratio, 1.0).astype(u.dtype)
        return (u + weight_decay * ratio * p if decays else u), slots

    def update(updates, state, params: Any = None, **extra):
        check_params("project_radial", params)
        grad = require("project_radial", extra, "grad")
        decays = treated(True if mask is None else mask, params)
        return map_leaves(rule, updates, (), (grad, params, decays))[0], state

    return optax.GradientTransformationExtraArgs(optax.identity().init, update)


@catalogued(
    title=_ADAMP,
    arxiv="2006.08217",
    kind="optimizer",
    needs=("params",),
    state="2 (Adam's moments)",
    slots=2,
    variant="the official Nesterov form, with one bias correction for momentum and "
    "gradient, which is not that of optax.nadam.",
    compared="goldens adamp, adamp_nesterov; equals optax.adamw on vectors",
    example=lambda: {"learning_rate": 0.01},
)
def adamp(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
    nesterov: bool = False,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW whose steps do not lengthen scale-free weights: `project_radial` on Adam.

    .. math::
      u_t = \frac{m_t / (1 - b_1^t)}{\sqrt{\hat v_t} + \epsilon}, \qquad
      x_t = x_{t-1} - \eta_t (\text{project}(u_t) + \lambda \rho_t x_{t-1})

    with :math:`b_1 m_t + (1 - b_1) g_t` for m where `nesterov` is set.

    Args:
      learning_rate: number or schedule.
      b1: decay rate of the first moment, in [0, 1); Adam's default.
      b2: decay rate of the second moment, in [0, 1); Adam's default.
      eps: added to the root of the second moment, and the smallest norm of the test.
      weight_decay: decoupled decay, multiplied by the learning rate.
      delta: bound on the cosine, as in `project_radial`.
      wd_ratio: relative decay of projected leaves.
      nesterov: whether to look one momentum step ahead.
      mask: which leaves decay.

    Returns:
      A finished optimizer.

    Raises:
      ValueError: for hyper-parameters outside their range, or without params.

    Example:
      >>> import optax_ext as ox
      >>> tx = ox.adamp(1e-3, weight_decay=1e-2)
    """
    adam: Any = adam_direction("adamp", b1, b2, eps, 0.0, None)

    def look_ahead(updates, state, params=None):
        # The same step from the moment that it leads to: its numerator becomes
        # b1 m_t + (1 - b1) g_t, and its denominators stay.
        _, new = adam.update(updates, state, params)
        ahead, _ = adam.update(updates, state._replace(mu=new.mu), params)
        return ahead, new

    if nesterov:
        direction = optax.GradientTransformation(adam.init, look_ahead)
    else:
        direction = adam
    return with_raw_gradient(
        finish(
            direction,
            project_radial(delta, wd_ratio, eps, weight_decay, mask=mask),
            learning_rate=learning_rate,
            owner="adamp",
        )
    )


@catalogued(
    title=_ADAMP,
    arxiv="2006.08217",
    kind="optimizer",
    needs=("params",),
    state="1 (momentum)",
    slots=1,
    variant="the stored momentum is not projected, as in the paper; the official file "
    "projects it too unless nesterov is set.",
    compared="goldens sgdp, sgdp_nesterov; equals SGD with momentum on vectors",
    example=lambda: {"learning_rate": 0.01},
)
def sgdp(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float = 0.9,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    eps: float = 1e-8,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SGD with momentum and `project_radial`.

    .. math::
      m_t = \mu m_{t-1} + (1 - \tau) g_t, \qquad
      x_t = x_{t-1} - \eta_t \big(\text{project}(u_t) +
        \tfrac{\lambda}{1 - \mu} \rho_t x_{t-1}\big)

    with :math:`u_t = m_t`, or :math:`g_t + \mu m_t` where `nesterov` is set.

    Args:
      learning_rate: number or schedule.
      momentum: decay rate mu of the momentum, in [0, 1); the official usage example's
        (its class has 0).
      dampening: share tau of the gradient that the momentum does not take.
      weight_decay: decay, multiplied by the learning rate over 1 - momentum.
      nesterov: whether to look one momentum step ahead.
      eps: smallest norm that is divided by.
      delta: bound on the cosine, as in `project_radial`.
      wd_ratio: relative decay of projected leaves.
      mask: which leaves decay.

    Returns:
      A finished optimizer.

    Raises:
      ValueError: for hyper-parameters outside their range, or without params.

    Example:
      >>> import optax_ext as ox
      >>> tx = ox.sgdp(0.1, weight_decay=1e-4, nesterov=True)
    """
    check_rate("sgdp", momentum=momentum)
    check_hyperparam("sgdp", dampening=dampening, weight_decay=weight_decay)
    trace = optax.trace(momentum)

    def update(updates, state, params=None):
        damped = optax.tree.scale(1 - dampening, updates)
        direction, state = trace.update(damped, state, params)
        if nesterov:
            direction, _ = trace.update(updates, state, params)
        return direction, state

    decay = weight_decay / (1 - momentum)
    return with_raw_gradient(
        finish(
            optax.GradientTransformation(trace.init, update),
            project_radial(delta, wd_ratio, eps, decay, mask=mask),
            learning_rate=learning_rate,
            owner="sgdp",
        )
    )

r"""Steps by the gradient's signal-to-noise ratio: small where examples disagree.

At a large batch most entries of the gradient could take a larger learning rate, and a
few, whose examples contradict each other, could not. `scale_by_gsnr` measures for each
entry how the square of its mean compares with its variance over the examples (or
devices, or micro-batches), and shrinks the entries below their leaf's average. Put
before any optimizer it makes the VR optimizers of the paper: before SGD `vr_sgd`, with
momentum `vr_momentum`, before Adam `vr_adam`, before LAMB `vr_lamb`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam, check_params, check_rate
from optax_ext._core.extra_args import require
from optax_ext._core.geometry import length
from optax_ext._core.leaves import init_leaves, leafwise, map_leaves, next_count
from optax_ext._core.optimizers import adam_direction, finish

_TITLE = "Accelerating Large Batch Training via Gradient Signal to Noise Ratio (GSNR)"


class GsnrState(NamedTuple):
    """State of `scale_by_gsnr` with an average over time."""

    count: jax.Array
    ratio: optax.Updates


@catalogued(
    title=_TITLE,
    arxiv="2309.13681",
    kind="link",
    needs=("per_example_grads",),
    state="none; 1 (average of the ratio) with b3",
    slots=0,
    variant="normalised by the leaf's mean, then clipped, then averaged over time; eps "
    "is ours, the paper divides by the bare variance.",
    compared="goldens gsnr_sgd, vr_adam",
)
def scale_by_gsnr(
    gamma: float = 0.1, b3: float | None = None, eps: float = 1e-12
) -> optax.GradientTransformationExtraArgs:
    r"""Multiply each entry by its signal-to-noise ratio, relative to its leaf's mean.

    With g_i the gradients of k examples, m their mean (the incoming updates), for each
    entry

    .. math::
      v = \tfrac1k \textstyle\sum_i (g_i - m)^2, \qquad
      r = \frac{m^2}{v + \epsilon}, \qquad
      r \leftarrow \text{clip}(r / \text{mean}(r), \gamma, 1), \qquad
      \text{out} = r\, m

    the mean over one leaf. With b3, :math:`p_t = b_3 p_{t-1} + (1 - b_3) r_t` and
    :math:`p_t / (1 - b_3^t)` takes the place of r. Nothing changes if all gradients are
    multiplied by one number, but through eps. A leaf of zeros stays zero.

    Squares are those of g over its leaf's largest entry, so that 1e30 does not
    overflow. Entries 1e-19 times smaller than that (float32) count as noise, and so
    does a smaller deviation as zero.

    Args:
      gamma: smallest multiplier, in [0, 1] (paper's default, from memory).
      b3: decay rate of the average of r over time, in [0, 1); None has no average.
      eps: added to the variance, positive. It is in units of the gradient squared:
        leaves whose gradients are far below its root get multipliers by m^2 alone.

    Returns:
      A link that needs the extra argument ``per_example_grads``: the k stacked
      gradients, k >= 8 advised. Takes ``grad_sq_mean`` instead: mean of g_i^2, for
      example from `jax.lax.pmean`; v is then its difference to m^2, which in float32
      has no digits left where v is 1e-7 of m^2.

    Raises:
      ValueError: for arguments outside their range; in `update` with neither of the
        extra arguments.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> each = jnp.array([[1.0, 3.0], [1.2, -1.0]])  # examples
      >>> g, tx = each.mean(axis=0), ox.scale_by_gsnr()
      >>> print(tx.update(g, tx.init(g), per_example_grads=each)[0])
      [1.1 0.1]
    """
    check_hyperparam("scale_by_gsnr", low=0.0, high=1.0, gamma=gamma)
    check_hyperparam("scale_by_gsnr", low=0.0, open_low=True, eps=eps)
    check_rate("scale_by_gsnr", b3=b3)

    def init(params):
        if b3 is None:
            return optax.EmptyState()
        slot = init_leaves(lambda p: (jnp.zeros_like(jnp.abs(p)),), params, 1)
        return GsnrState(jnp.zeros([], jnp.int32), *slot)

    def update(updates, state, params=None, **extra):
        del params
        squares = extra.get("grad_sq_mean")
        if squares is None or extra.get("per_example_grads") is not None:
            squares, each = None, require("scale_by_gsnr", extra, "per_example_grads")
        else:
            each = None

        count = None if b3 is None else next_count(state.count)

        def rule(m, slots, each, squares):
            r = jnp.clip(_ratio(m, each, squares, eps), gamma, 1)
            if b3 is not None and count is not None:
                p = b3 * slots[0] + (1 - b3) * r
                slots, r = (p,), p / (1 - b3 ** count.astype(r.dtype))
            return r * m, slots

        slots, others = () if count is None else (state.ratio,), (each, squares)
        out, slots = map_leaves(rule, updates, slots, others, owner="scale_by_gsnr")
        return out, state if count is None else GsnrState(count, *slots)

    return optax.GradientTransformationExtraArgs(init, update)


def _ratio(m: jax.Array, each: Any, squares: Any, eps: float) -> jax.Array:
    """m^2 / (variance + eps) over its mean, of one leaf."""
    if each is not None and each.shape[1:] != m.shape:
        raise ValueError(
            f"per_example_grads has shape {each.shape}, needs (examples, *{m.shape})"
        )
    size = jnp.max(jnp.sqrt(squares) if each is None else jnp.abs(each))
    size = jnp.maximum(size, jnp.max(jnp.abs(m)))
    size = jnp.where(size > 0, size, 1)
    signal = jnp.abs(m / size) ** 2
    if each is None:
        variance = jnp.maximum(squares / size / size - signal, 0)
    else:
        variance = jnp.mean(jnp.abs(each / size - (m / size)[None]) ** 2, axis=0)
    # Variance and eps in the proportion size^2 to eps, which may be 0 or infinite.
    root = eps**0.5
    noise = variance / (1 + (root / size) ** 2) + 1 / (1 + (size / root) ** 2)
    r = signal / jnp.maximum(noise, jnp.finfo(noise.dtype).tiny ** 0.5)
    mean = jnp.mean(r)
    return r / jnp.where(mean > 0, mean, 1)


@catalogued(
    title=_TITLE,
    arxiv="2309.13681",
    kind="optimizer",
    needs=("per_example_grads",),
    slots=0,
    variant="`scale_by_gsnr` before SGD.",
    compared="golden gsnr_sgd",
    example=lambda: {"learning_rate": 0.1},
)
def vr_sgd(
    learning_rate: optax.ScalarOrSchedule,
    b3: float | None = None,
    gamma: float = 0.1,
    gsnr_eps: float = 1e-12,
) -> optax.GradientTransformationExtraArgs:
    r"""SGD on gradients scaled by their signal-to-noise ratio r.

    .. math:: x_t = x_{t-1} - \eta_t\, r_t m_t

    Args:
      learning_rate: number or schedule.
      b3: decay rate of the average of r over time; None has no average.
      gamma: smallest r.
      gsnr_eps: added to the variance, as in `scale_by_gsnr`.

    Returns:
      A finished optimizer that needs ``per_example_grads`` or ``grad_sq_mean``.

    Example:
      >>> import optax_ext as ox
      >>> tx = ox.vr_sgd(0.1)
    """
    return finish(
        scale_by_gsnr(gamma, b3, gsnr_eps), learning_rate=learning_rate, owner="vr_sgd"
    )


@catalogued(
    title=_TITLE,
    arxiv="2309.13681",
    kind="optimizer",
    needs=("per_example_grads",),
    state="1 (momentum)",
    slots=1,
    variant="`scale_by_gsnr` before heavy-ball momentum.",
    compared="closed form: the chain of its parts",
    example=lambda: {"learning_rate": 0.1},
)
def vr_momentum(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float = 0.9,
    b3: float | None = None,
    gamma: float = 0.1,
    gsnr_eps: float = 1e-12,
) -> optax.GradientTransformationExtraArgs:
    r"""SGD with momentum on gradients scaled by their signal-to-noise ratio r.

    .. math:: u_t = \mu u_{t-1} + r_t m_t, \qquad x_t = x_{t-1} - \eta_t u_t

    Args:
      learning_rate: number or schedule.
      momentum: mu, in [0, 1).
      b3: decay rate of the average of r over time; None has no average.
      gamma: smallest r.
      gsnr_eps: added to the variance, as in `scale_by_gsnr`.

    Returns:
      A finished optimizer that needs ``per_example_grads`` or ``grad_sq_mean``.

    Example:
      >>> import optax_ext as ox
      >>> tx = ox.vr_momentum(0.1, momentum=0.95)
    """
    check_rate("vr_momentum", momentum=momentum)
    return finish(
        scale_by_gsnr(gamma, b3, gsnr_eps),
        optax.trace(momentum),
        learning_rate=learning_rate,
        owner="vr_momentum",
    )


@catalogued(
    title=_TITLE,
    arxiv="2309.13681",
    kind="optimizer",
    needs=("per_example_grads",),
    state="3 (Adam's moments, average of the ratio); 2 with b3=None",
    slots=3,
    variant="both moments are of the scaled gradient.",
    compared="golden vr_adam",
    example=lambda: {"learning_rate": 0.01},
)
def vr_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    b3: float | None = 0.9,
    eps: float = 1e-8,
    gamma: float = 0.1,
    gsnr_eps: float = 1e-12,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam on gradients scaled by their signal-to-noise ratio.

    Args:
      learning_rate: number or schedule.
      b1: decay rate of the first moment, in [0, 1).
      b2: decay rate of the second moment, in [0, 1).
      b3: decay rate of the average of the ratio (paper's default, from memory); None
        has no average.
      eps: added to the root of the second moment.
      gamma: smallest ratio.
      gsnr_eps: added to the variance, as in `scale_by_gsnr`.

    Returns:
      A finished optimizer that needs ``per_example_grads`` or ``grad_sq_mean``.

    Example:
      >>> import optax_ext as ox
      >>> tx = ox.vr_adam(1e-3)
    """
    return finish(
        scale_by_gsnr(gamma, b3, gsnr_eps),
        adam_direction("vr_adam", b1, b2, eps, 0.0, None),
        learning_rate=learning_rate,
        owner="vr_adam",
    )


@catalogued(
    title=_TITLE,
    arxiv="2309.13681",
    kind="optimizer",
    needs=("params", "per_example_grads"),
    state="3 (Adam's moments, average of the ratio); 2 with b3=None",
    slots=3,
    variant="`optax.lamb` on the scaled gradient.",
    compared="closed form: optax.lamb where the ratio is 1",
    example=lambda: {"learning_rate": 0.01},
)
def vr_lamb(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    b3: float | None = 0.9,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    mask: Any = None,
    gamma: float = 0.1,
    gsnr_eps: float = 1e-12,
) -> optax.GradientTransformationExtraArgs:
    r"""LAMB on gradients scaled by their signal-to-noise ratio.

    Args:
      learning_rate: number or schedule.
      b1: decay rate of the first moment, in [0, 1).
      b2: decay rate of the second moment, in [0, 1).
      b3: decay rate of the average of the ratio (paper's default, from memory); None
        has no average.
      eps: added to the root of the second moment (optax.lamb's default).
      weight_decay: decay, before the trust ratio (optax.lamb's default).
      mask: which leaves decay, as in `optax.add_decayed_weights`.
      gamma: smallest ratio.
      gsnr_eps: added to the variance, as in `scale_by_gsnr`.

    Returns:
      A finished optimizer that needs params, and ``per_example_grads`` or
      ``grad_sq_mean``.

    Raises:
      ValueError: if `update` is called without params.

    Example:
      >>> import optax_ext as ox
      >>> tx = ox.vr_lamb(1e-3, weight_decay=0.01)
    """
    check_hyperparam("vr_lamb", weight_decay=weight_decay)

    def trusted(u, slots, p, t):
        del t
        weight, step = length(p), length(u)
        ratio = weight / jnp.where(step > 0, step, 1)
        return jnp.where((weight > 0) & (step > 0), ratio, 1) * u, slots

    tx = finish(
        scale_by_gsnr(gamma, b3, gsnr_eps),
        adam_direction("vr_lamb", b1, b2, eps, 0.0, None),
        optax.add_decayed_weights(weight_decay, mask),
        leafwise(optax.EmptyState, lambda p: (), trusted, needs_params=True),
        learning_rate=learning_rate,
        owner="vr_lamb",
    )

    def update(updates, state, params=None, **extra):
        check_params("vr_lamb", params)
        return tx.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update)

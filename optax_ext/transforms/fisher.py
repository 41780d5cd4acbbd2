"""FAdam: Adam read as a natural gradient with a diagonal empirical Fisher matrix.

Adam averages gradients and divides the average by the root of the Fisher's diagonal.
As a natural gradient the division comes first: each gradient is preconditioned, then
averaged. Decay is a gradient too, of the squared weights, so that it is preconditioned
by the same matrix. What preconditioning blows up is cut to a root-mean-square.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam, check_rate
from optax_ext._core.geometry import length
from optax_ext._core.optimizers import finish
from optax_ext.transforms._inner_decay import decaying_leafwise

_FADAM = "FAdam: Adam is a natural gradient optimizer using diagonal empirical Fisher "
FADAM_TITLE = _FADAM + "information"


class FAdamState(NamedTuple):
    """State of `scale_by_fadam`; `fisher` is Adam's second moment without its bias."""

    count: jax.Array
    mu: optax.Updates
    fisher: optax.Updates


def _rms(x: jax.Array) -> jax.Array:
    return length(x) / x.size**0.5


def _natural(x: jax.Array, metric: jax.Array, clip: float) -> jax.Array:
    """The quotient x / metric, cut to the root-mean-square `clip`.

    The least entry of the metric is divided by last, together with the cut, because
    the quotient alone may overflow.
    """
    least = jnp.min(metric)
    scaled = x * (least / metric)
    return scaled / jnp.maximum(least, _rms(scaled) / clip)


@catalogued(
    title=FADAM_TITLE,
    arxiv="2405.12807",
    kind="link",
    state="2 (momentum, Fisher)",
    slots=2,
    variant="eps adapted by min(eps, eps2 RMS(g)), as pytorch_optimizer 4.1.0; the "
    "public port's eps changed with the versions of the paper.",
    compared="golden fadam; its Fisher is Adam's corrected second moment",
)
def scale_by_fadam(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps2: float = 0.01,
    clip: float = 1.0,
    rho: float = 0.5,
    weight_decay: float = 0.0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Precondition by the Fisher, cut, average, and decay in the same metric.

    .. math::
      F_t = b_{2,t} F_{t-1} + (1 - b_{2,t}) g_t^2, \quad
      b_{2,t} = b_2 \frac{1 - b_2^{t-1}}{1 - b_2^t}, \quad
      D_t = F_t^\rho + \min(\epsilon, \epsilon_2 \text{RMS}(g_t))^{2 \rho}

    .. math::
      m_t = b_1 m_{t-1} + (1 - b_1) \text{cut}(g_t / D_t), \quad
      u_t = m_t + \lambda\, \text{cut}(x_{t-1} / D_t), \quad
      \text{cut}(a) = \frac{a}{\max(1, \text{RMS}(a) / c)}

    Root-mean-squares are over one leaf. Where RMS(g) is 0, eps is taken as it is. An
    entry whose gradients were all zero has D = eps^(2 rho), so its quotient x / D takes
    the whole cut: one dead row in a leaf switches decay off for its live rows. Leave
    such leaves (embeddings) out with `mask`.

    Args:
      b1: decay rate of the momentum, in [0, 1); not corrected for its bias.
      b2: decay rate of the Fisher, in [0, 1).
      eps: largest damping of the metric.
      eps2: damping relative to the root-mean-square of the gradient.
      clip: c, the largest root-mean-square of a preconditioned leaf; above 0.
      rho: power of the Fisher; 1/2 is Adam's root.
      weight_decay: rate of decay in the metric, multiplied by the learning rate that
        follows.
      mask: which leaves decay: tree of booleans, or function of params.

    Returns:
      A link that emits the un-negated direction.

    Raises:
      ValueError: for hyper-parameters outside their range; if `update` is called
        without params although `weight_decay` is not 0.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> tx, g = ox.scale_by_fadam(), jnp.array([2.0, -3.0])
      >>> print(tx.update(g, tx.init(g))[0])
      [ 0.1 -0.1]
    """
    owner = "scale_by_fadam"
    check_rate(owner, b1=b1, b2=b2)
    check_hyperparam(owner, low=0.0, eps=eps, eps2=eps2)
    check_hyperparam(owner, low=0.0, open_low=True, clip=clip, rho=rho)
    check_hyperparam(owner, weight_decay=weight_decay)
    has_decay = not (isinstance(weight_decay, int | float) and weight_decay == 0)

    def init(p):
        return jnp.zeros_like(p), jnp.zeros_like(p)

    def update(g, slots, p, t, decay):
        m, fisher = slots
        b2_t = b2 * (1 - b2 ** (t - 1)) / (1 - b2**t)
        fisher = b2_t * fisher + (1 - b2_t) * jnp.abs(g) ** 2
        size = _rms(g)
        e = jnp.where(size > 0, jnp.minimum(eps, eps2 * size), eps)
        # Squares of huge gradients overflow, powers of tiny ones underflow.
        limits = jnp.finfo(fisher.dtype)
        metric = jnp.clip(fisher**rho + e ** (2 * rho), limits.tiny, limits.max)
        m = b1 * m + (1 - b1) * _natural(g, metric, clip)
        if not has_decay:
            return m, (m, fisher)
        return m + decay * _natural(p, metric, clip), (m, fisher)

    return decaying_leafwise(
        FAdamState,
        init,
        update,
        weight_decay=weight_decay,
        mask=mask,
        needs_params=has_decay,
    )


@catalogued(
    title=FADAM_TITLE,
    arxiv="2405.12807",
    kind="optimizer",
    needs=("params",),
    state="2 (momentum, Fisher)",
    slots=2,
    variant="that of scale_by_fadam.",
    compared="golden fadam",
    example=lambda: {"learning_rate": 0.01},
)
def fadam(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float = 1e-3,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps2: float = 0.01,
    clip: float = 1.0,
    rho: float = 0.5,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""FAdam: a natural gradient with Adam's memory, and natural decay.

    .. math:: x_t = x_{t-1} - \eta_t u_t

    with u from `scale_by_fadam`, decay included.

    Args:
      learning_rate: number or schedule.
      weight_decay: rate of decay in the metric of the Fisher, multiplied by the
        learning rate (the paper's; both PyTorch ports have 0.1 today).
      b1: decay rate of the momentum, in [0, 1).
      b2: decay rate of the Fisher, in [0, 1).
      eps: largest damping of the metric.
      eps2: damping relative to the root-mean-square of the gradient.
      clip: largest root-mean-square of a preconditioned leaf; above 0.
      rho: power of the Fisher.
      mask: which leaves decay: tree of booleans, or function of params.

    Returns:
      A finished optimizer.

    Raises:
      ValueError: as `scale_by_fadam`.

    Example:
      >>> import optax_ext as ox
      >>> tx = ox.fadam(1e-3, weight_decay=0.1)
    """
    return finish(
        scale_by_fadam(b1, b2, eps, eps2, clip, rho, weight_decay, mask),
        learning_rate=learning_rate,
        owner="fadam",
    )

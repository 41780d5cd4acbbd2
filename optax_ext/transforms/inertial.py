"""INNAprop: inertial Newton dynamics with the scaling of RMSprop.

A second-order differential equation, with a damping alpha of the velocity and beta of
the Hessian, is solved in first-order form: an auxiliary variable psi carries the
inertia, so that no Hessian is needed. The gradient is scaled as in RMSprop.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam, check_rate
from optax_ext._core.leaves import at_step
from optax_ext.transforms._inner_decay import decaying_leafwise

_TITLE = "A second-order-like optimizer with adaptive gradient scaling for deep "


class InnapropState(NamedTuple):
    """State of `innaprop`."""

    count: jax.Array
    psi: optax.Params
    nu: optax.Updates


@catalogued(
    title=_TITLE + "learning",
    arxiv="2410.05871",
    kind="optimizer",
    needs=("params",),
    state="2 (auxiliary variable, second moment)",
    slots=2,
    variant="psi follows the decayed parameters, as in the official code.",
    compared="golden innaprop; bias-corrected RMSprop where alpha beta = 1",
    example=lambda: {"learning_rate": 0.01},
)
def innaprop(
    learning_rate: optax.ScalarOrSchedule,
    alpha: float = 0.1,
    beta: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Inertial Newton dynamics at the memory of AdamW.

    With x the decayed parameters, and psi starting at (1 - alpha beta) p_0:

    .. math::
      x = (1 - \eta \lambda) p_{t-1}, \qquad
      v_t = b_2 v_{t-1} + (1 - b_2) g_t^2, \qquad
      \psi_t = (1 - \eta / \beta) \psi_{t-1} + \eta (1 / \beta - \alpha) x

    .. math::
      p_t = x + \frac{\eta}{\beta - \eta} ((1 - \alpha \beta) x - \psi_t)
        - \frac{\eta \beta g_t}{\sqrt{v_t / (1 - b_2^t)} + \epsilon}

    With alpha beta = 1 it is RMSprop at the rate eta beta. The learning rate is part of
    the dynamics, so this is no link: put nothing that scales behind it.

    Args:
      learning_rate: number or schedule; it must never be equal to `beta`.
      alpha: damping of the velocity. (alpha, beta) = (2, 2) is the authors' other
        recommended pair.
      beta: damping by the Hessian, above 0.
      b2: decay rate of the second moment, in [0, 1).
      eps: added to the root of the second moment.
      weight_decay: decoupled decay, multiplied by the learning rate.
      mask: which leaves decay: tree of booleans, or function of params.

    Returns:
      A finished optimizer.

    Raises:
      ValueError: for hyper-parameters outside their range; for a learning rate equal to
        `beta`; if `update` is called without params.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> tx = ox.innaprop(0.1, weight_decay=0.0)
      >>> x = jnp.array([1.0, 2.0])
      >>> print(tx.update(jnp.array([3.0, -4.0]), tx.init(x), x)[0].round(3))
      [-0.09  0.09]
    """
    check_hyperparam("innaprop", low=0.0, learning_rate=learning_rate, alpha=alpha)
    check_hyperparam("innaprop", low=0.0, open_low=True, beta=beta)
    check_rate("innaprop", b2=b2)
    check_hyperparam("innaprop", low=0.0, eps=eps)
    check_hyperparam("innaprop", weight_decay=weight_decay)
    if isinstance(learning_rate, int | float) and learning_rate == beta:
        raise ValueError(
            f"innaprop: learning_rate must not be equal to beta, got {learning_rate} "
            "for both: the rule divides by their difference"
        )

    def init(p):
        return (1 - alpha * beta) * p, jnp.zeros_like(p)

    def update(g, slots, p, t, decay):
        psi, v = slots
        lr = at_step(learning_rate, t)
        x = p - lr * decay * p
        v = optax.tree.update_moment_per_elem_norm(g, v, b2, 2)
        psi = (1 - lr / beta) * psi + lr * (1 / beta - alpha) * x
        # A difference of nearly equal terms: keep it in one bracket.
        inertia = lr / (beta - lr) * ((1 - alpha * beta) * x - psi)
        v_hat = optax.tree.bias_correction(v, b2, t)
        descent = lr * beta * (g / (jnp.sqrt(v_hat) + eps))
        return inertia - descent - lr * decay * p, (psi, v)

    return decaying_leafwise(
        InnapropState, init, update, weight_decay=weight_decay, mask=mask
    )

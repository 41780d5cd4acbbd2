"""Rules on Adam's two moments: what a paper does with them, in one link each.

All keep the average m of gradients and the average v of their squares, and differ in
how a direction is made of the two. Adam divides m by the root of v. diffGrad slows that
down where the gradient has stopped changing, Adam-atan2 replaces the division by an
arctangent, which needs no eps, and AdamNC takes the plain mean of squares for v.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam, check_rate
from optax_ext._core.leaves import leafwise, map_leaves
from optax_ext._core.optimizers import adam_direction, finish
from optax_ext._core.views import full_precision

_DIFFGRAD = "diffGrad: An Optimization Method for Convolutional Neural Networks"
_ATAN2 = "Scaling Exponents Across Parameterizations and Optimizers"


class MomentsState(NamedTuple):
    """State of `scale_by_adam_atan2` and `scale_by_adamnc`."""

    count: jax.Array
    mu: optax.Updates
    nu: optax.Updates


class DiffGradState(NamedTuple):
    """State of `scale_by_diffgrad`."""

    count: jax.Array
    mu: optax.Updates
    nu: optax.Updates
    previous: optax.Updates


@catalogued(
    title=_DIFFGRAD,
    arxiv="1909.11015",
    kind="link",
    state="3 (moments, previous gradient)",
    slots=3,
    variant="diffGrad_v2: the authors' first file aliases the stored gradient, which "
    "halves every step from the second on, and made the journal's results.",
    compared="golden diffgrad",
)
def scale_by_diffgrad(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, eps_root: float = 0.0
) -> optax.GradientTransformationExtraArgs:
    r"""Adam, slowed where the gradient has stopped changing.

    .. math::
      \xi_t = \sigma(|g_{t-1} - g_t|), \qquad
      u_t = \xi_t \frac{\hat m_t}{\sqrt{\hat v_t + \epsilon_0} + \epsilon}

    with :math:`g_0 = 0`, Adam's bias-corrected moments, and the logistic function
    :math:`\sigma`, so that :math:`\xi` lies in [1/2, 1).

    Args:
      b1: decay rate of the first moment, in [0, 1) (paper).
      b2: decay rate of the second moment, in [0, 1) (paper).
      eps: added to the root of the second moment (paper).
      eps_root: added under the root.

    Returns:
      A link that emits the un-negated direction.

    Raises:
      ValueError: for hyper-parameters outside their range.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> tx, g = ox.scale_by_diffgrad(), jnp.array([0.7])
      >>> u, state = tx.update(g, tx.init(g))
      >>> print(f"{u[0]:.3f}")
      0.668
    """
    adam: Any = adam_direction("scale_by_diffgrad", b1, b2, eps, eps_root, None)

    def rule(u, slots, g):
        (previous,) = slots
        xi = jax.nn.sigmoid(jnp.abs(previous - g))
        return xi * u, (g,)

    def init(params):
        return DiffGradState(*adam.init(params), previous=optax.tree.zeros_like(params))

    def update(updates, state, params=None, **extra):
        del params, extra
        *moments, previous = state
        direction, moments = adam.update(updates, optax.ScaleByAdamState(*moments))
        out, (previous,) = map_leaves(rule, direction, (previous,), (updates,))
        return out, DiffGradState(*moments, previous=previous)

    return full_precision(optax.GradientTransformationExtraArgs(init, update))


@catalogued(
    title=_DIFFGRAD,
    arxiv="1909.11015",
    kind="optimizer",
    needs=("params",),
    state="3 (moments, previous gradient)",
    slots=3,
    variant="decay decoupled; the authors' code adds it to the gradient.",
    compared="golden diffgrad",
    example=lambda: {"learning_rate": 0.01},
)
def diffgrad(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    weight_decay: float = 0.0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""DiffGrad with decoupled decay.

    .. math:: x_t = x_{t-1} - \eta_t (u_t + \lambda x_{t-1})

    with u from `scale_by_diffgrad`.

    Args:
      learning_rate: number or schedule (paper: 1e-3).
      b1: decay rate of the first moment, in [0, 1).
      b2: decay rate of the second moment, in [0, 1).
      eps: added to the root of the second moment.
      eps_root: added under the root.
      weight_decay: decoupled decay, multiplied by the learning rate.
      mask: which leaves decay, as in `optax.add_decayed_weights`.

    Returns:
      A finished optimizer.

    Raises:
      ValueError: for hyper-parameters outside their range.

    Example:
      >>> import optax_ext as ox
      >>> tx = ox.diffgrad(1e-3)
    """
    return finish(
        scale_by_diffgrad(b1, b2, eps, eps_root),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        mask=mask,
        owner="diffgrad",
    )


@catalogued(
    title=_ATAN2,
    arxiv="2407.05872",
    kind="link",
    state="2 (moments)",
    slots=2,
    variant="bias correction inside the arctangent, as in the paper; one CUDA package "
    "corrects the first moment outside.",
    compared="golden adam_atan2",
)
def scale_by_adam_atan2(
    b1: float = 0.9,
    b2: float = 0.999,
    a: float = 1.0,
    b: float = 1.0,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam without eps: bounded, and invariant to the scale of the gradient.

    .. math:: u_t = a\, \text{arctan2}(\hat m_t,\; b \sqrt{\hat v_t})

    The direction is at most :math:`a \pi / 2`, and 0 where both moments are.

    Args:
      b1: decay rate of the first moment, in [0, 1).
      b2: decay rate of the second moment, in [0, 1).
      a: scale of the direction; 4/pi makes the first step 1.
      b: scale of the second moment, above 0.
      mu_dtype: dtype of the first moment; None keeps float32.

    Returns:
      A link that emits the un-negated direction.

    Raises:
      ValueError: for hyper-parameters outside their range.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> tx, g = ox.scale_by_adam_atan2(), jnp.array([1e-12, 0.0])
      >>> print(tx.update(g, tx.init(g))[0].round(3))
      [0.785 0.   ]
    """
    check_rate("scale_by_adam_atan2", b1=b1, b2=b2)
    check_hyperparam("scale_by_adam_atan2", low=0.0, open_low=True, a=a, b=b)

    def init(p):
        return jnp.zeros_like(p, dtype=mu_dtype), jnp.zeros_like(p)

    def update(g, slots, p, t):
        del p
        m, v = slots
        m = optax.tree.update_moment(g, m, b1, 1)
        v = optax.tree.update_moment_per_elem_norm(g, v, b2, 2)
        m_hat = optax.tree.bias_correction(m, b1, t)
        v_hat = optax.tree.bias_correction(v, b2, t)
        return a * jnp.arctan2(m_hat, b * jnp.sqrt(v_hat)), (m, v)

    return leafwise(MomentsState, init, update)


@catalogued(
    title=_ATAN2,
    arxiv="2407.05872",
    kind="optimizer",
    needs=("params",),
    state="2 (moments)",
    slots=2,
    variant="decay multiplied by the learning rate, not by a.",
    compared="golden adam_atan2",
    example=lambda: {"learning_rate": 0.01},
)
def adam_atan2(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    a: float = 1.0,
    b: float = 1.0,
    mu_dtype: Any = None,
    weight_decay: float = 0.0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam-atan2 with decoupled decay.

    .. math:: x_t = x_{t-1} - \eta_t (u_t + \lambda x_{t-1})

    with u from `scale_by_adam_atan2`.

    Args:
      learning_rate: number or schedule.
      b1: decay rate of the first moment, in [0, 1).
      b2: decay rate of the second moment, in [0, 1).
      a: scale of the direction.
      b: scale of the second moment, above 0.
      mu_dtype: dtype of the first moment; None keeps float32.
      weight_decay: decoupled decay, multiplied by the learning rate.
      mask: which leaves decay, as in `optax.add_decayed_weights`.

    Returns:
      A finished optimizer.

    Raises:
      ValueError: for hyper-parameters outside their range.

    Example:
      >>> import optax_ext as ox
      >>> tx = ox.adam_atan2(1e-3, a=1.27)
    """
    return finish(
        scale_by_adam_atan2(b1, b2, a, b, mu_dtype),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        mask=mask,
        owner="adam_atan2",
    )


@catalogued(
    title="On the Convergence of Adam and Beyond",
    arxiv="1904.09237",
    kind="link",
    state="2 (moments)",
    slots=2,
    variant="the paper's: no bias correction. For AMSGrad use optax.scale_by_amsgrad.",
    compared="golden adamnc (closed-form mean of squares)",
)
def scale_by_adamnc(
    b1: float = 0.9, eps: float = 1e-8, eps_root: float = 0.0, b1_decay: float = 1.0
) -> optax.GradientTransformationExtraArgs:
    r"""Adam whose second moment is the plain mean of all squared gradients.

    .. math::
      \beta_t = b_1 \lambda^{t-1}, \quad
      m_t = \beta_t m_{t-1} + (1 - \beta_t) g_t, \quad
      v_t = (1 - 1/t)\, v_{t-1} + g_t^2 / t, \quad
      u_t = \frac{m_t}{\sqrt{v_t + \epsilon_0} + \epsilon}

    The paper's rate falls as :math:`\eta / \sqrt t`: give a schedule.

    Args:
      b1: decay rate of the first moment, in [0, 1); Adam's default.
      eps: added to the root of the second moment; ours, the paper has none.
      eps_root: added under the root.
      b1_decay: lambda, in (0, 1]; below 1 the momentum dies out (the paper's theory).

    Returns:
      A link that emits the un-negated direction.

    Raises:
      ValueError: for hyper-parameters outside their range.

    Example:
      >>> import optax, optax_ext as ox
      >>> rate = lambda count: 0.1 / (count + 1) ** 0.5
      >>> tx = optax.chain(ox.scale_by_adamnc(), optax.scale_by_learning_rate(rate))
    """
    owner = "scale_by_adamnc"
    check_rate(owner, b1=b1)
    check_hyperparam(owner, low=0.0, eps=eps, eps_root=eps_root)
    check_hyperparam(owner, low=0.0, high=1.0, open_low=True, b1_decay=b1_decay)

    def init(p):
        return jnp.zeros_like(p), jnp.zeros_like(p)

    def update(g, slots, p, t):
        del p
        m, v = slots
        b1_t = b1 * b1_decay ** (t - 1)
        m = b1_t * m + (1 - b1_t) * g
        # Not v + (g^2 - v) / t: where g^2 overflows, that is inf - inf.
        v = (1 - 1 / t) * v + g**2 / t
        return m / (jnp.sqrt(v + eps_root) + eps), (m, v)

    return leafwise(MomentsState, init, update)

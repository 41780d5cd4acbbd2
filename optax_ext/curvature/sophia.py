"""Second-order clipping: divide by averaged curvature, never step beyond the sign.

A diagonal of the Hessian is noisy, and its sign is no help where it is negative. Sophia
averages it, divides the momentum by it, and clips: where curvature is large the step is
Newton-like and small; where it is small, negative or wrong, the clip makes it a sign
step. `precondition_by_hessian_diag` is the division alone, for chains of your own.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam, check_rate
from optax_ext._core.leaves import init_leaves, map_leaves
from optax_ext._core.optimizers import finish
from optax_ext.curvature.estimators import (
    SOPHIA_TITLE,
    ema_hessian_diag,
    gauss_newton_bartlett_diag,
    hutchinson_diag,
)


@catalogued(
    title=SOPHIA_TITLE,
    arxiv="2305.14342",
    kind="link",
    needs=("params", "logits_fn"),
    state="1 (average), and the estimator's",
    slots=1,
    variant="max(gamma h, eps), not gamma h + eps; curvature refreshed before use.",
    compared="goldens sophia, sophia_g, as a chain with optax.ema and optax.clip",
    example=lambda: {"estimator": gauss_newton_bartlett_diag()},
)
def precondition_by_hessian_diag(
    estimator: optax.GradientTransformation,
    b2: float = 0.99,
    gamma: float = 1.0,
    eps: float = 1e-12,
    update_interval: int = 10,
) -> optax.GradientTransformationExtraArgs:
    r"""Divide by an averaged diagonal of the Hessian.

    .. math:: \text{out} = u / \max(\gamma h, \epsilon)

    with h from ``ema_hessian_diag(estimator, b2, update_interval)``. Where curvature is
    zero or negative the result is u / eps: put `optax.clip` behind it.

    Args:
      estimator: estimates diag(H) when it is asked, every `update_interval` steps.
      b2: decay rate of the average, in [0, 1) (Sophia).
      gamma: scale of h; the smaller, the more entries a following clip catches.
      eps: floor of the divisor, above 0.
      update_interval: steps between refreshes.

    Returns:
      A link that needs what `estimator` needs.

    Raises:
      ValueError: for hyper-parameters outside their range.

    Example:
      >>> import optax, optax_ext as ox
      >>> tx = optax.chain(
      ...     ox.scale_by_lion_k(),
      ...     ox.precondition_by_hessian_diag(ox.hutchinson_diag(), gamma=0.05),
      ...     optax.clip(1.0))
    """
    owner = "precondition_by_hessian_diag"
    check_hyperparam(owner, low=0.0, gamma=gamma)
    check_hyperparam(owner, low=0.0, open_low=True, eps=eps)
    curvature = ema_hessian_diag(estimator, b2, update_interval)

    def rule(u, slots, h):
        return u / jnp.maximum(gamma * h, eps), slots

    def update(updates, state, params=None, **extra):
        hessian, state = curvature.update(updates, state, params, **extra)
        return map_leaves(rule, updates, (), (hessian,))[0], state

    return optax.GradientTransformationExtraArgs(curvature.init, update)


class SophiaState(NamedTuple):
    """State of `scale_by_sophia`; `win_rate` has one scalar a leaf."""

    mu: optax.Updates
    win_rate: optax.Updates
    curvature: optax.OptState  # an EmaHessianState


@catalogued(
    title=SOPHIA_TITLE,
    arxiv="2305.14342",
    kind="link",
    needs=("params", "value_fn"),
    state="2 (momentum, curvature)",
    slots=2,
    variant="the paper: no bias correction, curvature refreshed before use; the "
    "released loop refreshes after the step, optax.contrib.sophia corrects the bias.",
    compared="goldens sophia, sophia_g",
)
def scale_by_sophia(
    b1: float = 0.96,
    b2: float = 0.99,
    eps: float = 1e-12,
    gamma: float = 0.01,
    clip_threshold: float | None = 1.0,
    update_interval: int = 10,
    estimator: optax.GradientTransformation | None = None,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum over a diagonal Hessian, clipped entry by entry.

    .. math::
      m_t = b_1 m_{t-1} + (1 - b_1) g_t, \qquad
      u_t = \text{clip}(m_t / \max(\gamma h_t, \epsilon), -c, c)

    with h from `ema_hessian_diag`. Where h <= 0 the entry is c sign(m). `gamma` sets
    how many entries escape the clip; `sophia_win_rate` says how many did (0.1 to 0.5
    is healthy).

    Args:
      b1: decay rate of the momentum, in [0, 1) (paper).
      b2: decay rate of the curvature, in [0, 1) (paper).
      eps: floor of the divisor, above 0 (paper).
      gamma: scale of the curvature; the paper has 0.01 with Hutchinson, 0.05 with
        Gauss-Newton-Bartlett.
      clip_threshold: c, above 0; None does not clip.
      update_interval: steps between curvature estimates (paper: 10).
      estimator: None is ``hutchinson_diag(probe="gaussian")``, the paper's Sophia-H;
        ``gauss_newton_bartlett_diag()`` makes Sophia-G.
      mu_dtype: dtype of the momentum; None keeps float32.

    Returns:
      A link that emits the un-negated direction and needs what `estimator` needs.

    Raises:
      ValueError: for hyper-parameters outside their range.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> tx = ox.scale_by_sophia(b1=0.0, b2=0.0, gamma=1.0, clip_threshold=None)
      >>> f = lambda x: jnp.sum(jnp.array([1.0, 4.0]) * x**2) / 2
      >>> x = jnp.array([3.0, 5.0])
      >>> newton, _ = tx.update(
      ...     jnp.array([3.0, 20.0]), tx.init(x), x, hessian_diag=None, value_fn=f)
      >>> newton.shape
      (2,)
    """
    owner = "scale_by_sophia"
    check_rate(owner, b1=b1)
    check_hyperparam(owner, low=0.0, gamma=gamma)
    check_hyperparam(
        owner, low=0.0, open_low=True, eps=eps, clip_threshold=clip_threshold
    )
    if estimator is None:
        estimator = hutchinson_diag(probe="gaussian")
    curvature = ema_hessian_diag(estimator, b2, update_interval)

    def init_leaf(p):
        return jnp.zeros_like(p, dtype=mu_dtype), jnp.zeros([], p.real.dtype)

    def init(params):
        mu, win_rate = init_leaves(init_leaf, params, 2)
        return SophiaState(mu, win_rate, curvature.init(params))

    def rule(g, slots, h):
        m = b1 * slots[0] + (1 - b1) * g
        u = m / jnp.maximum(gamma * h, eps)
        win_rate = jnp.mean(jnp.abs(u) < 1, dtype=u.dtype)
        if clip_threshold is not None:
            u = jnp.clip(u, -clip_threshold, clip_threshold)
        return u, (m, win_rate)

    def update(updates, state, params=None, **extra):
        hessian, curved = curvature.update(updates, state.curvature, params, **extra)
        out, (mu, win_rate) = map_leaves(
            rule, updates, (state.mu, state.win_rate), (hessian,)
        )
        return out, SophiaState(mu, win_rate, curved)

    return optax.GradientTransformationExtraArgs(init, update)


def sophia_win_rate(state: optax.OptState) -> jax.Array:
    """Fraction of entries that Sophia's clip left alone at the last step.

    Entries whose momentum is zero count as left alone.

    Args:
      state: any optimizer state that holds one `SophiaState`.

    Returns:
      A scalar in [0, 1]; 0.1 to 0.5 is healthy. Raise `gamma` where it is lower.

    Raises:
      ValueError: if the state holds no `SophiaState`, or several.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> print(ox.sophia_win_rate(ox.sophia(1e-3).init(jnp.zeros(3))))
      0.0
    """
    states = [
        s
        for s in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, SophiaState))
        if isinstance(s, SophiaState)
    ]
    if len(states) != 1:
        raise ValueError(
            f"sophia_win_rate: expected one SophiaState, found {len(states)}"
        )
    rates = jax.tree.leaves(states[0].win_rate)
    sizes = [m.size for m in jax.tree.leaves(states[0].mu)]
    # The mean: a rate is a scalar a leaf, or a vector for a stack made by `bucketed`.
    wins = sum(jnp.mean(r) * size for r, size in zip(rates, sizes, strict=True))
    return jnp.asarray(wins / max(sum(sizes), 1))


@catalogued(
    title=SOPHIA_TITLE,
    arxiv="2305.14342",
    kind="optimizer",
    needs=("params", "value_fn"),
    state="2 (momentum, curvature)",
    slots=2,
    variant="the paper; decay multiplied by the learning rate.",
    compared="goldens sophia (pytorch_optimizer), sophia_g (official class)",
    example=lambda: {"learning_rate": 0.01},
)
def sophia(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.96,
    b2: float = 0.99,
    eps: float = 1e-12,
    weight_decay: float = 0.2,
    mask: Any = None,
    gamma: float = 0.01,
    clip_threshold: float | None = 1.0,
    update_interval: int = 10,
    estimator: optax.GradientTransformation | None = None,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Sophia: clipped momentum over a diagonal Hessian, with decoupled decay.

    .. math:: x_t = x_{t-1} - \eta_t (u_t + \lambda x_{t-1})

    with u from `scale_by_sophia`.

    Args:
      learning_rate: number or schedule; somewhat below AdamW's.
      b1: decay rate of the momentum, in [0, 1).
      b2: decay rate of the curvature, in [0, 1).
      eps: floor of the divisor, above 0.
      weight_decay: decoupled decay, multiplied by the learning rate (paper).
      mask: which leaves decay, as in `optax.add_decayed_weights`.
      gamma: scale of the curvature: 0.01 with Hutchinson, 0.05 with
        Gauss-Newton-Bartlett.
      clip_threshold: c, above 0; None does not clip.
      update_interval: steps between curvature estimates.
      estimator: as in `scale_by_sophia`.
      mu_dtype: dtype of the momentum; None keeps float32.

    Returns:
      A finished optimizer that needs what `estimator` needs.

    Raises:
      ValueError: for hyper-parameters outside their range.

    Example:
      >>> import optax_ext as ox
      >>> tx = ox.sophia(3e-4, gamma=0.05, estimator=ox.gauss_newton_bartlett_diag())
    """
    return finish(
        scale_by_sophia(
            b1, b2, eps, gamma, clip_threshold, update_interval, estimator, mu_dtype
        ),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        mask=mask,
        owner="sophia",
    )

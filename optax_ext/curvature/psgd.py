r"""PSGD: a preconditioner over all parameters, fitted while it is used.

The criterion is :math:`h^T P h + v^T P^{-1} v` for pairs of a probe v and a response h,
which is least where P turns responses into probes. With Hessian-vector products h = H v
that is :math:`P = |H|^{-1}`, a Newton method without damping, for curvature of any
sign; with h = the gradient and unrelated v it whitens gradients, as Adam and Shampoo
do. :math:`P = Q^T Q`, and Q moves by small multiplicative steps in a group of
invertible matrices, so that nothing is ever inverted that could become singular. Two
groups are here: an X of a diagonal and an anti-diagonal, and a diagonal plus low rank.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import (
    check_choice,
    check_hyperparam,
    check_interval,
    check_rate,
)
from optax_ext._core.extra_args import require
from optax_ext._core.flat import FlatView
from optax_ext._core.keys import key_state
from optax_ext._core.leaves import init_leaves, map_leaves, next_count
from optax_ext.curvature._lie_groups import Group, lra, xmat

_TITLE = "Curvature-Informed SGD via General Purpose Lie-Group Preconditioners"


class PsgdState(NamedTuple):
    """State of `scale_by_psgd_xmat` and `scale_by_psgd_lra`."""

    count: jax.Array
    mu: optax.Updates
    preconditioner: Any
    key: jax.Array


def _mean_power(x: jax.Array, power: int) -> jax.Array:
    """The mean of abs(x)^power, to the 1 / power, without overflow; 1 for x = 0."""
    largest = jnp.max(jnp.abs(x))
    unit = x / jnp.where(largest > 0, largest, 1)
    mean = jnp.mean(unit**power) ** (1 / power)
    return jnp.where(largest > 0, largest * mean, 1)


def _psgd(
    owner: str,
    group: Group,
    b1: float,
    precond_lr: float,
    update_interval: int,
    init_scale: float | None,
    damping: float,
    mu_dtype: Any,
    key: jax.Array | None,
) -> optax.GradientTransformationExtraArgs:
    """Momentum, and a preconditioner fitted every `update_interval` steps."""
    check_rate(owner, b1=b1)
    check_hyperparam(owner, low=0.0, precond_lr=precond_lr, damping=damping)
    check_hyperparam(owner, low=0.0, open_low=True, init_scale=init_scale)
    check_interval(owner, update_interval=update_interval)
    data, impl = key_state(key)

    def init(params):
        view = FlatView(params, owner)
        start, keep = jax.random.split(jax.random.wrap_key_data(data, impl=impl))
        q = group.start(view.size, view.dtype, start)
        (mu,) = init_leaves(lambda p: (jnp.zeros_like(p, mu_dtype),), params, 1)
        if init_scale is not None:
            q = group.scale(q, jnp.asarray(init_scale, view.dtype))
        return PsgdState(jnp.zeros([], jnp.int32), mu, q, jax.random.key_data(keep))

    def fitted(q, g, hvp, vector, count, keys):
        """Q after one more pair of probe and response."""
        n, dtype = g.size, g.dtype
        v = jax.random.normal(keys[0], (n,), dtype) if vector is None else vector
        if hvp is None:
            h, scale = g + damping * jnp.mean(jnp.abs(g)) * v, 1 / _mean_power(g, 4)
        else:
            h, scale = hvp, _mean_power(v, 2) / _mean_power(hvp, 4)
        if init_scale is None:
            q = group.scale(q, jnp.where(count == 0, jnp.sqrt(scale), 1))
        return group.fit(q, v, h, precond_lr, count // update_interval, keys[1])

    def momentum(g, slots):
        return g, (b1 * slots[0] + (1 - b1) * g,)

    def update(updates, state, params=None, **extra):
        del params
        view, count = FlatView(updates, owner), next_count(state.count)
        if not view.size:
            return updates, state._replace(count=count)
        _, (mu,) = map_leaves(momentum, updates, (state.mu,), owner=owner)
        *keys, keep = jax.random.split(
            jax.random.wrap_key_data(state.key, impl=impl), 3
        )
        g, vector, hvp = view.to(updates), extra.get("vector"), extra.get("hvp")
        if hvp is not None:
            vector = require(owner, extra, "vector")
        hvp = None if hvp is None else view.to(hvp)
        vector = None if vector is None else view.to(vector)
        # Without a response there is nothing to learn, and Q would grow.
        is_due = jnp.any((g if hvp is None else hvp) != 0)
        q = jax.lax.cond(
            is_due & (state.count % update_interval == 0),
            lambda q: fitted(q, g, hvp, vector, state.count, keys),
            lambda q: q,
            state.preconditioner,
        )
        m_hat = view.to(mu) / (1 - b1 ** count.astype(view.dtype))
        out = view.back(group.apply(q, m_hat))
        return out, PsgdState(count, mu, q, jax.random.key_data(keep))

    return optax.GradientTransformationExtraArgs(init, update)


@catalogued(
    title=_TITLE,
    arxiv="2402.04553",
    kind="link",
    state="3 (momentum, diagonal, anti-diagonal)",
    slots=3,
    variant="psgd_torch of December 2024 (damping, scale from fourth powers) around a "
    "bias-corrected momentum; the Lipschitz-smoothed steps of 2025 are not in it.",
    compared="goldens psgd_xmat_newton, psgd_xmat_whitening",
)
def scale_by_psgd_xmat(
    b1: float = 0.9,
    precond_lr: float = 0.1,
    update_interval: int = 1,
    init_scale: float | None = None,
    damping: float = 2**-13,
    mu_dtype: Any = None,
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Precondition by an X: a diagonal and an anti-diagonal over all parameters.

    .. math:: P = Q^T Q, \qquad Q = \text{diag}(a) + \text{antidiag}(b)

    With F the reversal of a vector, a fit to a probe v and a response h is

    .. math::
      q = a h + b F h, \quad w = \frac{F a\, v - F b\, F v}{a F a - b F b}, \quad
      A = q^2 - w^2, \quad B = q F q - w F w,

    .. math::
      a \leftarrow a - \mu (A a + B F b), \quad b \leftarrow b - \mu (A b + B F a),
      \quad \mu = \frac{\text{precond\_lr}}{\max(q^2 + w^2)}

    and the output is P times the bias-corrected momentum. Which parameters the
    anti-diagonal pairs follows from the order of the tree. Extra arguments decide the
    type: with ``hvp`` and ``vector`` (v, and h = H v) it is a Newton method; without,
    it whitens the raw gradient g: :math:`h = g + \text{damping}\,\text{mean}|g|\, v`
    with v from ``vector`` or the key.

    Args:
      b1: decay rate of the momentum, in [0, 1) (psgd_jax).
      precond_lr: step size of the fit, at least 0 (psgd_jax).
      update_interval: steps between fits; a fit comes before its use.
      init_scale: Q at the start; None finds it from the first response (psgd_torch).
        If that is 0 at the first step, Q starts at 1.
      damping: noise on the gradient, relative to its mean size; whitening only
        (psgd_torch).
      mu_dtype: dtype of the momentum; None keeps float32.
      key: where the probes start; None is ``jax.random.key(0)``.

    Returns:
      A link that emits the un-negated direction.

    Raises:
      ValueError: for numbers outside their range; at trace time for ``hvp`` without
        ``vector``.

    Example:
      >>> import jax, jax.numpy as jnp, optax_ext as ox
      >>> tx = ox.scale_by_psgd_xmat(b1=0.0)
      >>> curvature, state = jnp.array([100.0, -4.0, 1.0]), tx.init(jnp.ones(3))
      >>> def step(state, key):
      ...     v = jax.random.normal(key, 3)
      ...     u, state = tx.update(curvature, state, vector=v, hvp=curvature * v)
      ...     return state, u
      >>> _, u = jax.lax.scan(step, state, jax.random.split(jax.random.key(0), 1000))
      >>> print(u[-100:].mean(0).round(1))
      [ 1. -1.  1.]
    """
    return _psgd(
        "scale_by_psgd_xmat",
        xmat(),
        b1,
        precond_lr,
        update_interval,
        init_scale,
        damping,
        mu_dtype,
        key,
    )


@catalogued(
    title=_TITLE,
    arxiv="2402.04553",
    kind="link",
    state="2 + 2 rank (momentum, diagonal, two factors)",
    slots=6,
    variant="psgd_torch of December 2024 (damping, scale from fourth powers) around a "
    "bias-corrected momentum; U and V are balanced at fixed intervals, not by chance.",
    compared="goldens psgd_lra_newton, psgd_lra_whitening",
    example=lambda: {"rank": 2},
)
def scale_by_psgd_lra(
    rank: int = 10,
    b1: float = 0.9,
    precond_lr: float = 0.1,
    update_interval: int = 1,
    init_scale: float | None = None,
    damping: float = 2**-13,
    uv_update: str = "random",
    balance_interval: int = 100,
    mu_dtype: Any = None,
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Precondition by a diagonal and a low-rank matrix over all parameters.

    .. math:: P = Q^T Q, \qquad Q = (I + U V^T)\, \text{diag}(d)

    With :math:`q = Q h, w = Q^{-T} v` a fit to a probe v and a response h is

    .. math::
      d \leftarrow d - \mu_d\, d\, (P h \odot h - v \odot P^{-1} v), \quad
      \mu_d = \text{precond\_lr} \min \frac{1}{\sqrt{(P h)^2 + v^2}
      \sqrt{h^2 + (P^{-1} v)^2}}

    and then, in turn, one of

    .. math::
      U \leftarrow U - \mu_U (q q^T - w w^T) V (I + V^T U), \quad
      V \leftarrow V - \mu_V (I + V U^T)(q q^T - w w^T) U

    with :math:`\mu_U = \text{precond\_lr} / (|q||V V^T q| + |w||V V^T w|)` and
    :math:`\mu_V` the same with U. Probes and responses are those of
    `scale_by_psgd_xmat`.

    Args:
      rank: columns of U and V, each as large as the parameters (psgd_jax: 10).
      b1: decay rate of the momentum, in [0, 1) (psgd_jax).
      precond_lr: step size of the fit, at least 0 (psgd_jax).
      update_interval: steps between fits; a fit comes before its use.
      init_scale: d at the start; None finds it from the first response (psgd_torch).
        If that is 0 at the first step, d starts at 1.
      damping: noise on the gradient, relative to its mean size; whitening only
        (psgd_torch).
      uv_update: "random" moves U or V by a fair coin, "alternate" U at even fits and V
        at odd ones.
      balance_interval: fits between U and V being made equally long.
      mu_dtype: dtype of the momentum; None keeps float32.
      key: where U, V, probes and coins start; None is ``jax.random.key(0)``.

    Returns:
      A link that emits the un-negated direction.

    Raises:
      ValueError: for an unknown `uv_update` or numbers outside their range; at trace
        time for ``hvp`` without ``vector``.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> state = ox.scale_by_psgd_lra(rank=2).init({"w": jnp.ones((3, 4))})
      >>> state.preconditioner.U.shape
      (12, 2)
    """
    owner = "scale_by_psgd_lra"
    check_interval(owner, rank=rank, balance_interval=balance_interval)
    check_choice(owner, "uv_update", uv_update, ("random", "alternate"))
    return _psgd(
        owner,
        lra(rank, uv_update, balance_interval),
        b1,
        precond_lr,
        update_interval,
        init_scale,
        damping,
        mu_dtype,
        key,
    )

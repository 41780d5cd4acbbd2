"""AdaHessian: Adam with the Hessian's diagonal in place of the squared gradient."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam, check_interval, check_rate
from optax_ext._core.leaves import init_leaves, map_leaves, next_count
from optax_ext._core.optimizers import finish
from optax_ext.curvature.estimators import hutchinson_diag

_TITLE = "ADAHESSIAN: An Adaptive Second Order Optimizer for Machine Learning"


class AdaHessianState(NamedTuple):
    """State of `scale_by_adahessian`; `hessian` is () where it is not cached."""

    count: jax.Array
    mu: optax.Updates
    nu: optax.Updates
    hessian: optax.Updates
    estimator: optax.OptState


@catalogued(
    title=_TITLE,
    arxiv="2006.00719",
    kind="link",
    needs=("params", "value_fn"),
    state="2 (moments), 3 with update_interval > 1",
    slots=2,
    variant="the authors' code: absolute value before the spatial mean, eps after the "
    "power; the paper averages the signed diagonal.",
    compared="golden adahessian",
)
def scale_by_adahessian(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-4,
    hessian_power: float = 1.0,
    spatial_average: bool | Callable[[Any, jax.Array], jax.Array] = True,
    update_interval: int = 1,
    estimator: optax.GradientTransformation | None = None,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with the Hessian's diagonal in place of the squared gradient.

    .. math::
      D_t = |\hat h_t| \text{ (averaged over space)}, \quad
      m_t = b_1 m_{t-1} + (1 - b_1) g_t, \quad
      s_t = b_2 s_{t-1} + (1 - b_2) D_t^2

    .. math::
      u_t = \frac{m_t / (1 - b_1^t)}{\sqrt{s_t / (1 - b_2^t)}^{\,k} + \epsilon}

    Args:
      b1: decay rate of the first moment, in [0, 1) (official code).
      b2: decay rate of the second moment, in [0, 1) (official code).
      eps: added after the power (official image code).
      hessian_power: k, in [0, 1] (official code: 1).
      spatial_average: True averages D of a leaf of rank above 2 over all but its last
        two axes (the window of a convolution kernel); False does not; a function
        (path, D) -> D averages as it likes, and must keep the shape.
      update_interval: steps between curvature estimates; above 1 the last D is kept
        and enters at every step, which costs a third tree of state.
      estimator: None is ``hutchinson_diag()``.
      mu_dtype: dtype of the first moment; None keeps float32.

    Returns:
      A link that emits the un-negated direction and needs what `estimator` needs.

    Raises:
      ValueError: for hyper-parameters outside their range.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> tx = ox.scale_by_adahessian(eps=0.0, estimator=ox.external_hessian_diag())
      >>> x, h = jnp.array([3.0, 5.0]), jnp.array([1.0, 4.0])
      >>> newton, _ = tx.update(h * x, tx.init(x), x, hessian_diag=h)
      >>> print(newton.round(4))
      [3. 5.]
    """
    owner = "scale_by_adahessian"
    check_rate(owner, b1=b1, b2=b2)
    check_hyperparam(owner, low=0.0, eps=eps)
    check_hyperparam(owner, low=0.0, high=1.0, hessian_power=hessian_power)
    check_interval(owner, update_interval=update_interval)
    estimator = optax.with_extra_args_support(
        hutchinson_diag() if estimator is None else estimator
    )
    cached = update_interval > 1

    def init_leaf(p):
        return jnp.zeros_like(p, dtype=mu_dtype), jnp.zeros_like(p), jnp.zeros_like(p)

    def init(params):
        mu, nu, hessian = init_leaves(init_leaf, params, 3)
        hessian = hessian if cached else ()
        count = jnp.zeros([], jnp.int32)
        return AdaHessianState(count, mu, nu, hessian, estimator.init(params))

    def curvature(updates, state, params, extra):
        def estimate():
            return estimator.update(updates, state.estimator, params, **extra)

        def refresh():
            new, inner = estimate()
            return map_leaves(replace, state.hessian, (), (new,))[0], inner

        def replace(old, slots, new):
            return jnp.broadcast_to(new, old.shape), slots

        if not cached:
            return estimate()
        return jax.lax.cond(
            state.count % update_interval == 0,
            refresh,
            lambda: (state.hessian, state.estimator),
        )

    def update(updates, state, params=None, **extra):
        hessian, inner = curvature(updates, state, params, extra)
        count = next_count(state.count)
        magnitude = jax.tree.map(jnp.abs, hessian)
        if not isinstance(spatial_average, bool):
            magnitude = jax.tree_util.tree_map_with_path(spatial_average, magnitude)

        def rule(g, slots, d):
            m, s = slots
            t = count.astype(g.dtype)
            if spatial_average is True and d.ndim > 2:
                d = jnp.mean(d, axis=tuple(range(d.ndim - 2)), keepdims=True)
            m = b1 * m + (1 - b1) * g
            s = b2 * s + (1 - b2) * jnp.broadcast_to(d, s.shape) ** 2
            m_hat, s_hat = m / (1 - b1**t), s / (1 - b2**t)
            return m_hat / (jnp.sqrt(s_hat) ** hessian_power + eps), (m, s)

        out, (mu, nu) = map_leaves(rule, updates, (state.mu, state.nu), (magnitude,))
        return out, AdaHessianState(count, mu, nu, hessian if cached else (), inner)

    return optax.GradientTransformationExtraArgs(init, update)


@catalogued(
    title=_TITLE,
    arxiv="2006.00719",
    kind="optimizer",
    needs=("params", "value_fn"),
    state="2 (moments), 3 with update_interval > 1",
    slots=2,
    variant="the authors' code; decay decoupled and multiplied by the learning rate.",
    compared="golden adahessian",
)
def adahessian(
    learning_rate: optax.ScalarOrSchedule = 0.15,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-4,
    weight_decay: float = 0.0,
    mask: Any = None,
    hessian_power: float = 1.0,
    spatial_average: bool | Callable[[Any, jax.Array], jax.Array] = True,
    update_interval: int = 1,
    estimator: optax.GradientTransformation | None = None,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdaHessian with decoupled decay.

    .. math:: x_t = x_{t-1} - \eta_t (u_t + \lambda x_{t-1})

    with u from `scale_by_adahessian`.

    Args:
      learning_rate: number or schedule (official code: 0.15).
      b1: decay rate of the first moment, in [0, 1).
      b2: decay rate of the second moment, in [0, 1).
      eps: added after the power.
      weight_decay: decoupled decay, multiplied by the learning rate.
      mask: which leaves decay, as in `optax.add_decayed_weights`.
      hessian_power: k, in [0, 1].
      spatial_average: as in `scale_by_adahessian`.
      update_interval: steps between curvature estimates.
      estimator: None is ``hutchinson_diag()``.
      mu_dtype: dtype of the first moment; None keeps float32.

    Returns:
      A finished optimizer that needs what `estimator` needs.

    Raises:
      ValueError: for hyper-parameters outside their range.

    Example:
      >>> import optax_ext as ox
      >>> tx = ox.adahessian(0.1, update_interval=5)
    """
    return finish(
        scale_by_adahessian(
            b1,
            b2,
            eps,
            hessian_power,
            spatial_average,
            update_interval,
            estimator,
            mu_dtype,
        ),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        mask=mask,
        owner="adahessian",
    )

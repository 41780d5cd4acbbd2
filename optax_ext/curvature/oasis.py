r"""OASIS: curvature sets the direction, and what it measures sets the length.

The gradient is divided by an averaged diagonal of the Hessian, as AdaHessian does it.
The learning rate is measured: half the ratio of how far the parameters moved to how
far the gradient turned, both in the norm of that diagonal.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import (
    check_hyperparam,
    check_interval,
    check_params,
    check_rate,
)
from optax_ext._core.extra_args import require
from optax_ext._core.geometry import tree_length
from optax_ext._core.leaves import init_leaves, map_leaves, next_count
from optax_ext._core.states import fill, scalar_dtype
from optax_ext._core.views import full_precision
from optax_ext.curvature.estimators import hutchinson_diag


class OasisState(NamedTuple):
    """State of `oasis`; `previous_grads` is () where they are taken anew."""

    count: jax.Array
    hessian: optax.Updates
    previous_params: optax.Updates
    previous_grads: optax.Updates
    eta: jax.Array
    theta: jax.Array
    estimator: optax.OptState


@catalogued(
    title="Doubly Adaptive Scaled Algorithm for Machine Learning Using Second-Order "
    "Information",
    arxiv="2109.05198",
    kind="optimizer",
    needs=("params", "value_fn"),
    state="3 (curvature, previous parameters and gradients), 2 with same_batch",
    slots=3,
    variant="signed average of curvature, its absolute value floored after it; steps "
    "are final.",
    compared="golden oasis",
    terminal=True,
)
def oasis(
    b2: float = 0.99,
    alpha: float = 1e-2,
    eta0: float = 1e-3,
    estimator: optax.GradientTransformation | None = None,
    d0_samples: int = 10,
    same_batch: bool = False,
    weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""OASIS: a scaled gradient whose learning rate needs no tuning.

    .. math:: D_k = b_2 D_{k-1} + (1 - b_2)\, \hat h_k, \qquad
      \hat D_k = \max(|D_k|, \alpha)

    .. math:: \eta_k = \min\left( \sqrt{1 + \theta_{k-1}}\, \eta_{k-1},\;
      \frac12 \frac{|x_k - x_{k-1}|_{\hat D_k}}{|g_k - g_{k-1}|_{\hat D_k^{-1}}}
      \right), \qquad \theta_k = \eta_k / \eta_{k-1}

    .. math:: x_{k+1} = x_k - \eta_k g_k / \hat D_k

    :math:`D_0` is the mean of `d0_samples` estimates, :math:`\theta_0 = \infty`. Where
    nothing moved or turned, the first term alone counts, and the rate stays while
    :math:`\theta` is infinite.

    Args:
      b2: decay rate of the curvature, in [0, 1) (paper: 0.99 to 0.999).
      alpha: floor of the curvature, above 0 (paper: 1e-3 to 1e-1).
      eta0: rate of the first step, above 0.
      estimator: estimates diag(H); None is ``hutchinson_diag()``.
      d0_samples: calls of the estimator in the first step; one without a state, such as
        `external_hessian_diag`, is not random and called once.
      same_batch: take the previous gradient anew, on the present batch (the paper's
        form for batches): one more gradient, and one tree of state less.
      weight_decay: coupled decay: g + weight_decay x stands for g everywhere.

    Returns:
      A finished optimizer without a learning rate, last in a chain. It needs params,
      what `estimator` needs, and ``value_fn`` with `same_batch`.

    Raises:
      ValueError: for hyper-parameters outside their range; at trace time without
        params or what the estimator needs.

    Example:
      >>> import jax, jax.numpy as jnp, optax_ext as ox
      >>> f = lambda x: jnp.sum(jnp.array([1.0, 100.0]) * x**2) / 2
      >>> tx, x = ox.oasis(), jnp.ones(2)
      >>> state = tx.init(x)
      >>> for _ in range(20):
      ...     step, state = tx.update(jax.grad(f)(x), state, x, value_fn=f)
      ...     x = x + step
      >>> bool(jnp.abs(x).max() < 1e-5)
      True
    """
    owner = "oasis"
    check_rate(owner, b2=b2)
    check_hyperparam(owner, low=0.0, open_low=True, alpha=alpha, eta0=eta0)
    check_hyperparam(owner, low=0.0, weight_decay=weight_decay)
    check_interval(owner, d0_samples=d0_samples)
    estimator = optax.with_extra_args_support(
        hutchinson_diag() if estimator is None else estimator
    )

    def init(params):
        def zeros(p):
            return jnp.zeros_like(p), jnp.zeros_like(p), jnp.zeros_like(p)

        hessian, before, grads = init_leaves(zeros, params, 3)
        dtype = scalar_dtype(params)
        return OasisState(
            jnp.zeros([], jnp.int32),
            hessian,
            before,
            () if same_batch else grads,
            jnp.asarray(eta0, dtype),
            jnp.full((), jnp.inf, dtype),
            estimator.init(params),
        )

    def decayed(grads, params):
        def rule(g, slots, p):
            return g + weight_decay * p, slots

        return map_leaves(rule, grads, (), (params,), owner=owner)[0]

    def estimate(updates, state, params, extra):
        """The mean of several calls in the first step, one call later."""

        def call(inner):
            return estimator.update(updates, inner, params, **extra)

        if not jax.tree.leaves(state.estimator):
            return call(state.estimator)
        calls = jnp.where(state.count == 0, d0_samples, 1)

        def add(_, carry):
            new, inner = call(carry[1])
            return jax.tree.map(jnp.add, carry[0], new), inner

        shapes, _ = jax.eval_shape(call, state.estimator)
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total, inner = jax.lax.fori_loop(0, calls, add, (zero, state.estimator))
        return jax.tree.map(lambda h: h / calls.astype(h.dtype), total), inner

    def previous_gradient(updates, state, params, extra):
        if not same_batch:
            return state.previous_grads
        gradient = jax.grad(require(owner, extra, "value_fn"))
        before = fill_holes(updates, state.previous_params, params)
        return jax.lax.cond(
            state.count == 0,
            lambda: optax.tree.zeros_like(before),
            lambda: decayed(gradient(before), before),
        )

    def measured(g, params, old_params, old_g, d):
        """Half of movement over turn; infinite where one of them is 0."""

        def moved(_, slots, x, old, d):
            return jnp.sqrt(floored(d)) * (x - old), slots

        def turned(g, slots, old, d):
            return (g - old) / jnp.sqrt(floored(d)), slots

        others = (params, old_params, d)
        movement = tree_length(map_leaves(moved, g, (), others, owner=owner)[0])
        turn = tree_length(map_leaves(turned, g, (), (old_g, d), owner=owner)[0])
        known = (movement > 0) & (turn > 0)
        local = 0.5 * movement / jnp.where(known, turn, 1)
        return jnp.where(known & (local > 0), local, jnp.inf)

    def floored(d):
        return jnp.maximum(jnp.abs(d), alpha)

    def update(updates, state, params=None, **extra):
        check_params(owner, params)
        first = state.count == 0
        g = decayed(updates, params)
        new, inner = estimate(updates, state, params, extra)

        def average(_, slots, h):
            decay = jnp.where(first, 0.0, b2).astype(h.dtype)
            return h, (decay * slots[0] + (1 - decay) * h,)

        _, (d,) = map_leaves(average, g, (state.hessian,), (new,), owner=owner)
        old_g = previous_gradient(updates, state, params, extra)
        local = measured(g, params, state.previous_params, old_g, d)
        eta = jnp.minimum(jnp.sqrt(1 + state.theta) * state.eta, local)
        eta = jnp.where(first | jnp.isinf(eta), state.eta, eta)
        waits = first | (jnp.isinf(state.theta) & jnp.isinf(local))
        theta = jnp.where(waits, jnp.inf, eta / state.eta)

        def step(g, slots, x, d):
            return -eta.astype(g.dtype) * g / floored(d), (x, g)[: len(slots)]

        kept = (state.previous_params, *(() if same_batch else (state.previous_grads,)))
        out, kept = map_leaves(step, g, kept, (params, d), owner=owner)
        grads = () if same_batch else kept[1]
        count = next_count(state.count)
        return out, OasisState(count, d, kept[0], grads, eta, theta, inner)

    def fill_holes(updates, tree, params):
        kept, _ = map_leaves(lambda _, s, x: (x, s), updates, (), (tree,), owner=owner)
        return fill(kept, params)

    return full_precision(optax.GradientTransformationExtraArgs(init, update))

r"""Newton's method whose damping is found by search.

The step :math:`-(B + \lambda I)^{-1} g` with :math:`\lambda = |g| / \gamma` is Newton's
where the gradient is small and a gradient step of length :math:`\gamma` where B is 0:
:math:`\gamma` is how far the model B is trusted. It doubles after each success and
halves after each failure.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.scipy.linalg import cho_factor, cho_solve
from jax.scipy.sparse.linalg import cg

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import (
    check_choice,
    check_hyperparam,
    check_interval,
    check_params,
)
from optax_ext._core.extra_args import require
from optax_ext._core.flat import FlatView
from optax_ext._core.geometry import length
from optax_ext._core.states import scalar_dtype
from optax_ext.curvature.products import hvp


class GradientRegularizedNewtonState(NamedTuple):
    """State of `gradient_regularized_newton`: the radius of trust."""

    gamma: jax.Array


@catalogued(
    title="Gradient-Normalized Smoothness for Optimization with Approximate Hessians",
    arxiv="2506.13710",
    kind="optimizer",
    needs=("params", "value", "value_fn"),
    state="0 (1 scalar)",
    slots=0,
    variant="the authors' code, in the Euclidean metric; steps are final.",
    compared="goldens gns_full, gns_diag, gns_none",
    terminal=True,
)
def gradient_regularized_newton(
    gamma0: float = 1.0,
    gamma_min: float = 1e-9,
    eps: float = 1e-8,
    max_search: int = 40,
    hessian: str | Callable[[Any], Any] = "full",
    solver: str = "cholesky",
    cg_iters: int = 50,
) -> optax.GradientTransformationExtraArgs:
    r"""Newton's method with damping by the norm of the gradient.

    Repeat, at most `max_search` times,

    .. math:: \lambda = \frac{|g|}{\gamma + \epsilon}, \qquad
      d = -(B + \lambda I)^{-1} g

    until :math:`f(x) - f(x + d) \ge |\nabla f(x + d)|^2 / (8 \lambda)`, halving
    :math:`\gamma` after each failure; then
    :math:`\gamma \gets \max(2 \gamma, \gamma_\text{min})`. The step is d, the last one
    if none was accepted, and 0 if that one is not finite or g is 0.

    Args:
      gamma0: first :math:`\gamma`, above 0 (official code).
      gamma_min: least :math:`\gamma` after a success (official code).
      eps: added to :math:`\gamma`, above 0 (official code).
      max_search: most trials a step (official code); each costs a solve, a value and a
        gradient, and there are about two a step.
      hessian: B: "full", the Hessian of ``value_fn``; "diag", the extra argument
        ``hessian_diag``, floored at 0; "none", 0: a normalised gradient step. Or a
        function of params that returns a positive semi-definite matrix in the order
        of `jax.flatten_util.ravel_pytree`, or, for `solver` "cg", a function v -> B v
        of trees like params (see `gnvp`).
      solver: "cholesky" forms "full" matrices; "cg" uses products only.
      cg_iters: most iterations of conjugate gradients a solve.

    Returns:
      A finished optimizer without a learning rate, last in a chain. It needs params,
      ``value`` and ``value_fn``, and ``hessian_diag`` where `hessian` says so.

    Raises:
      ValueError: for hyper-parameters outside their range, an unknown `hessian` or
        `solver`; at trace time for a missing argument.

    Example:
      >>> import jax, jax.numpy as jnp, optax_ext as ox
      >>> f = lambda x: jnp.sum(jnp.cosh(x))
      >>> tx, x = ox.gradient_regularized_newton(), jnp.array([2.0, -1.0])
      >>> state = tx.init(x)
      >>> for _ in range(8):
      ...     value, grad = jax.value_and_grad(f)(x)
      ...     step, state = tx.update(grad, state, x, value=value, value_fn=f)
      ...     x = x + step
      >>> bool(jnp.abs(x).max() < 1e-3)
      True
    """
    owner = "gradient_regularized_newton"
    check_hyperparam(owner, low=0.0, open_low=True, gamma0=gamma0, eps=eps)
    check_hyperparam(owner, low=0.0, gamma_min=gamma_min)
    check_interval(owner, max_search=max_search, cg_iters=cg_iters)
    if not callable(hessian):
        check_choice(owner, "hessian", hessian, ("full", "diag", "none"))
    check_choice(owner, "solver", solver, ("cholesky", "cg"))

    def init(params):
        return GradientRegularizedNewtonState(jnp.asarray(gamma0, scalar_dtype(params)))

    def damped_solve(view, f, p, g, params, extra):
        """The function lambda -> (B + lambda I)^{-1} g; B is formed once."""
        if hessian == "none":
            return lambda lam: g / lam
        if hessian == "diag":
            b = jnp.maximum(view.to(require(owner, extra, "hessian_diag")), 0)
            return lambda lam: g / (b + lam)
        if solver == "cholesky":
            b = hessian(params) if callable(hessian) else jax.hessian(f)(p)
            eye = jnp.eye(g.size, dtype=g.dtype)
            b = b.astype(g.dtype)
            return lambda lam: cho_solve(cho_factor(b + lam * eye), g)
        of_tree = hessian(params) if callable(hessian) else None
        still, of_vector = optax.tree.zeros_like(params), hvp(f)

        def product(v):
            if of_tree is None:
                return of_vector(p, v)
            return view.to(of_tree(view.back(v, still)))

        return lambda lam: cg(lambda v: product(v) + lam * v, g, maxiter=cg_iters)[0]

    def update(updates, state, params=None, **extra):
        check_params(owner, params)
        value = require(owner, extra, "value")
        view = FlatView(updates, owner)
        value_of = view.function(require(owner, extra, "value_fn"), params)
        if view.size == 0:
            return updates, state
        g, p = view.to(updates), view.to(params)

        def f(x):
            return value_of(x).astype(x.dtype)

        f0, norm = jnp.asarray(value).astype(g.dtype), length(g)
        solve = damped_solve(view, f, p, g, params, extra)

        def trial(carry):
            count, gamma, _, _ = carry
            lam = norm / (gamma + eps)
            d = -solve(lam)
            f1, g1 = jax.value_and_grad(f)(p + d)
            finite = jnp.isfinite(f1) & jnp.all(jnp.isfinite(d))
            # Not squared: the norm of a gradient may be 1e30.
            enough = f0 - f1 >= length(g1) / (8 * lam) * length(g1)
            accepted = finite & enough
            gamma = jnp.where(accepted, jnp.maximum(2 * gamma, gamma_min), gamma / 2)
            return count + 1, gamma, jnp.where(finite, d, 0), accepted

        def searching(carry):
            count, _, _, accepted = carry
            return (count < max_search) & ~accepted

        gamma = state.gamma.astype(g.dtype)
        start = (jnp.zeros([], jnp.int32), gamma, jnp.zeros_like(g), norm == 0)
        _, gamma, d, _ = jax.lax.while_loop(searching, trial, start)
        gamma = gamma.astype(state.gamma.dtype)
        return view.back(d), GradientRegularizedNewtonState(gamma)

    return optax.GradientTransformationExtraArgs(init, update)

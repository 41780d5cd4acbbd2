"""Refresh learning: forget a little of the present batch before learning it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam, check_interval, check_params
from optax_ext._core.extra_args import require
from optax_ext._core.geometry import length
from optax_ext._core.keys import key_state
from optax_ext._core.leaves import init_leaves, map_leaves


class RefreshState(NamedTuple):
    """State of `refresh`; `key` is raw key data."""

    key: jax.Array
    inner_state: optax.OptState


@catalogued(
    title="A Unified and General Framework for Continual Learning",
    arxiv="2403.13249",
    kind="wrapper",
    needs=("params", "grad_fn"),
    state="that of inner",
    variant="the paper's Langevin step; normalize=True is the step of the released "
    "code, with another law of the noise.",
    compared="golden refresh (noise off); variance of the noise by sampling",
    example=lambda: {
        "inner": optax.sgd(0.1),
        "gamma": 1e-5,
        "noise_scale": 1e-3,
        "normalize": True,
    },
    terminal=True,
)
def refresh(
    inner: optax.GradientTransformation,
    gamma: float,
    num_unlearn: int = 1,
    damping: float = 1.0,
    noise_scale: float = 1.0,
    normalize: bool = False,
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Unlearn by noisy ascent, then learn from where that led.

    From q = x, `num_unlearn` times, with F a diagonal Fisher information and xi
    standard normal:

    .. math::
      P = \frac{1}{\text{damping} + F}, \qquad
      q \leftarrow q + \gamma P\, \nabla f(q) + \text{noise\_scale} \sqrt{2 \gamma P}\,
      \xi

    Then u is the update of `inner` with the gradient at q, and q + u is the next x.
    With `normalize`, per leaf:

    .. math::
      a = \nabla f(q)\, \frac{\|q\|}{\|\nabla f(q)\| + 10^{-20}}, \qquad
      q \leftarrow q + \gamma P (a + \text{noise\_scale}\, \xi)

    The DER++ code of the authors has normalize=True, gamma=1e-5, noise_scale=1e-3 and
    P = 1 / (1 + 1e-3 F): pass 1e-3 times the Fisher information as ``hessian_diag``.

    Args:
      inner: a whole optimizer. It sees q as its parameters and the gradient there also
        as ``grad``; other extra arguments stay those at x.
      gamma: size of the unlearning step, 0 or more; 0 is `inner` alone.
      num_unlearn: unlearning steps; each costs a gradient, whose program is repeated.
      damping: above 0 (released code: 1).
      noise_scale: 1 is the paper's Langevin dynamics, 0 turns the noise off.
      normalize: whether to take the released code's step.
      key: where the noise starts; None is ``jax.random.key(0)``.

    Returns:
      A link that needs params and the extra argument ``grad_fn``; ``hessian_diag`` is
      F where given, else F = 0. Negative entries of it count as 0.

    Raises:
      ValueError: for hyper-parameters outside their range; at trace time without params
        or ``grad_fn``.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_ext as ox
      >>> grad_fn = jax.grad(lambda x: jnp.sum(x**2) / 2)
      >>> tx = ox.refresh(optax.sgd(0.5), gamma=0.5, noise_scale=0.0)
      >>> x = jnp.array([1.0, 2.0])
      >>> updates, _ = tx.update(grad_fn(x), tx.init(x), x, grad_fn=grad_fn)
      >>> print(optax.apply_updates(x, updates))
      [0.75 1.5 ]
    """
    check_hyperparam("refresh", low=0.0, gamma=gamma, noise_scale=noise_scale)
    check_hyperparam("refresh", low=0.0, open_low=True, damping=damping)
    check_interval("refresh", num_unlearn=num_unlearn)
    inner = optax.with_extra_args_support(inner)
    data, impl = key_state(key)

    def init(params):
        return RefreshState(jnp.array(data), inner.init(params))

    def unlearn(a, slots, p, fisher, xi):
        (moved,) = slots  # q - x, so that small steps are not lost in x
        fisher = jnp.zeros_like(p) if fisher is None else jnp.maximum(fisher, 0)
        step = gamma / (damping + fisher)
        if normalize:
            a = a / (length(a) + 1e-20) * length(p + moved)
            return a, (moved + step * (a + noise_scale * xi),)
        return a, (moved + step * a + noise_scale * jnp.sqrt(2 * step) * xi,)

    def shift(p, slots, moved):
        return p + moved, slots

    def add(u, slots, moved):
        return u + moved, slots

    def zeros(p):
        return (jnp.zeros_like(p),)

    def update(updates, state, params=None, **extra):
        check_params("refresh", params)
        grad_fn = require("refresh", extra, "grad_fn")
        fisher = extra.get("hessian_diag")
        key = jax.random.wrap_key_data(state.key, impl=impl)
        keep, *uses = jax.random.split(key, 1 + num_unlearn)
        (moved,) = init_leaves(zeros, params, 1)
        q, a = params, updates
        for use in uses:
            xi = optax.tree.random_like(use, moved, jax.random.normal)
            _, (moved,) = map_leaves(unlearn, a, (moved,), (params, fisher, xi))
            q, _ = map_leaves(shift, params, (), (moved,))
            a = grad_fn(q)
        out, inner_state = inner.update(a, state.inner_state, q, **{**extra, "grad": a})
        out, _ = map_leaves(add, out, (), (moved,))
        return out, RefreshState(jax.random.key_data(keep), inner_state)

    return optax.GradientTransformationExtraArgs(init, update)

"""Momentum carried along by the Hessian.

The gradient changes by H (x_t - x_{t-1}) over a step. Added to the momentum, the change
brings it to where the parameters are now, so that it lags behind no more than the last
gradient does. `optax_ext.implicit_gradient_transport` has the same aim without a
Hessian, by taking gradients elsewhere.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam, check_params
from optax_ext._core.extra_args import require
from optax_ext._core.keys import key_state
from optax_ext._core.leaves import at_step, init_leaves, map_leaves, next_count
from optax_ext._core.points import (
    on_trainable,
    plus,
    trainable,
    unit,
)
from optax_ext._core.states import scalar_dtype
from optax_ext._core.views import full_precision
from optax_ext.curvature.products import hvp


class HessianAidedState(NamedTuple):
    """State of `scale_by_hessian_aided_momentum`; `previous` are parameters."""

    count: jax.Array
    mu: optax.Updates
    previous: optax.Params
    key: jax.Array


def _eta_of_code(t: Any) -> Any:
    return 2 / (t + 2)


@catalogued(
    title="Stochastic Policy Gradient Methods: Improved Sample Complexity for "
    "Fisher-non-degenerate Policies",
    arxiv="2302.01734",
    kind="link",
    needs=("params", "value_fn"),
    state="2 (momentum, last parameters)",
    slots=2,
    variant="(N-)HARPG: the Hessian at a random point of the last step, on the present "
    "batch.",
    compared="golden harpg; exact on quadratics",
)
def scale_by_hessian_aided_momentum(
    eta: optax.ScalarOrSchedule = _eta_of_code,
    normalize: bool = True,
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum corrected by a Hessian-vector product along the last step.

    :math:`d_0 = g_0`, and then with :math:`q \sim U(0, 1)`:

    .. math::
      v_t &= \nabla^2 L(q x_t + (1 - q) x_{t-1})\, (x_t - x_{t-1}) \\
      d_t &= (1 - \eta_t)(d_{t-1} + v_t) + \eta_t\, g_t \\
      \text{out} &= d_t / \|d_t\| \quad\text{or}\quad d_t

    The mean of v over q is the change of the gradient, so that :math:`d_t` has no bias.
    One Hessian-vector product a step, about two gradients; none at the first.

    Args:
      eta: weight of the new gradient, in [0, 1]; a number or a schedule of the step,
        counted from 0. By default 2 / (t + 2), that of the experiments.
      normalize: whether to emit the direction with norm 1 over all leaves (0 where d is
        0). The experiments take learning rates of :math:`\gamma_0 \cdot 2 / (t + 2)`
        with it and :math:`\gamma_0 \cdot (2 / (t + 2))^{1/2}` without.
      key: where q is drawn from; None is ``jax.random.key(0)``.

    Returns:
      A link that needs params and ``value_fn``, or instead of that the product v as
      ``hvp``, a tree like params: policy gradients add :math:`(v^\top \nabla \log \pi)
      \nabla J` to it there.

    Raises:
      ValueError: for an `eta` outside [0, 1]; at trace time without params, or without
        both ``value_fn`` and ``hvp``.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_ext as ox
      >>> f = lambda x: jnp.sum(x**2) / 2
      >>> tx = ox.scale_by_hessian_aided_momentum(eta=0.1, normalize=False)
      >>> x = jnp.array([1.0, -2.0])
      >>> _, state = tx.update(x, tx.init(x), x, value_fn=f)
      >>> d, _ = tx.update(x / 2, state, x / 2, value_fn=f)
      >>> print(d)  # the gradient at x / 2: nothing lags behind
      [ 0.5 -1. ]
    """
    owner = "scale_by_hessian_aided_momentum"
    check_hyperparam(owner, low=0.0, high=1.0, eta=eta)
    data, impl = key_state(key)

    def start(p):
        return jnp.zeros_like(p), p

    def init(params):
        mu, previous = init_leaves(start, params, 2)
        return HessianAidedState(
            jnp.zeros([], jnp.int32), mu, previous, jnp.array(data)
        )

    def update(updates, state, params=None, **extra):
        check_params(owner, params)
        use, keep = jax.random.split(jax.random.wrap_key_data(state.key, impl=impl))
        count, first = next_count(state.count), state.count == 0

        def product():
            f = on_trainable(require(owner, extra, "value_fn"), params, owner)
            last = trainable(updates, state.previous, owner)
            step = plus(trainable(updates, params, owner), -1.0, last)
            q = jax.random.uniform(use, (), scalar_dtype(updates))
            return hvp(f)(plus(last, q, step), step)

        def transport(g, slots, v, p):
            t = count.astype(g.real.dtype)
            weight = jnp.where(first, 1, at_step(eta, t))
            d = (1 - weight) * (slots[0] + jnp.where(first, 0, v)) + weight * g
            return d, (d, p)

        v = extra.get("hvp")
        if v is None:
            zeros = jax.tree.map(jnp.zeros_like, updates)
            v = jax.lax.cond(first, lambda: zeros, product)
        slots = state.mu, state.previous
        d, new = map_leaves(transport, updates, slots, (v, params), owner=owner)
        out = unit(d) if normalize else d
        return out, HessianAidedState(count, new[0], new[1], jax.random.key_data(keep))

    return full_precision(optax.GradientTransformationExtraArgs(init, update))

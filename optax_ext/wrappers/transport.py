r"""Implicit gradient transport: momentum that does not lag behind.

An average of past gradients is a gradient of past points. Transport takes each new
gradient a little ahead of the iterate, as far as the average lags behind it; on a
quadratic the two cancel, and the average is an average of noise alone: the smoothing of
a long momentum without its bias. The parameters that train are the points ahead;
`igt_eval_params` returns the iterates. `optax_ext.scale_by_hessian_aided_momentum`
removes the same bias with a product with the Hessian.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam, check_params
from optax_ext._core.leaves import at_step, init_leaves, map_leaves, next_count
from optax_ext._core.optimizers import finish
from optax_ext._core.points import unit
from optax_ext._core.states import fill, find_state
from optax_ext._core.views import full_precision

IGT_PAPER: dict[str, Any] = {
    "title": "Stochastic Policy Gradient Methods: Improved Sample Complexity for "
    "Fisher-non-degenerate Policies",
    "arxiv": "2302.01734",
}


# A number or a schedule. The rule needs the schedule's next value too, so that
# `inject_hyperparams` must leave it alone: it does, for it is not said to be a float.
Eta = Any


class TransportState(NamedTuple):
    """State of `implicit_gradient_transport`: `base` is the iterate, in float32."""

    count: jax.Array
    base: optax.Params
    mu: optax.Updates
    inner_state: optax.OptState


def _eta_of_code(t: Any) -> Any:
    return (2 / (t + 2)) ** 0.8


@catalogued(
    **IGT_PAPER,
    kind="wrapper",
    needs=("params",),
    state="2 (iterate and momentum), and that of inner",
    variant="extrapolation with the coming eta, as the paper; the released loop takes "
    "the past one, which is the same for a constant.",
    compared="goldens normalized_igt, normalized_igt_schedule; exact on quadratics",
    example=lambda: {"inner": optax.sgd(0.1), "eta": 0.5},
    terminal=True,
)
def implicit_gradient_transport(
    inner: optax.GradientTransformation, eta: Eta
) -> optax.GradientTransformationExtraArgs:
    r"""Average gradients that are taken ahead of the iterate.

    The parameters are the points :math:`x_t`, the state holds the iterates
    :math:`\theta_t`, with :math:`x_0 = \theta_0` and :math:`d_0 = g_0`:

    .. math::
      d_t &= (1 - \eta_t)\, d_{t-1} + \eta_t\, g(x_t) \\
      \theta_{t+1} &= \theta_t + \text{inner}(d_t, \theta_t) \\
      x_{t+1} &= \theta_{t+1} + \tfrac{1 - \eta_{t+1}}{\eta_{t+1}}
        (\theta_{t+1} - \theta_t)

    On a quadratic without noise :math:`d_t` is the gradient at :math:`\theta_t`,
    whatever eta. Evaluate and save `igt_eval_params`. Only this wrapper may move the
    parameters: put clipping and decay inside.

    Args:
      inner: a finished optimizer, without momentum of its own; sees the iterates as its
        parameters.
      eta: weight of the new gradient, in (0, 1]; a number or a schedule of the step,
        counted from 0. 1 is `inner` alone.

    Returns:
      A link for the end of a chain with two trees of state beside that of `inner`; it
      needs params.

    Raises:
      ValueError: for an `eta` outside (0, 1]; at trace time without params.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_ext as ox
      >>> f = lambda x: jnp.sum(x**2) / 2
      >>> tx = ox.implicit_gradient_transport(optax.sgd(0.5), eta=0.5)
      >>> x = jnp.array([1.0, -2.0])
      >>> state = tx.init(x)
      >>> for _ in range(2):
      ...     updates, state = tx.update(jax.grad(f)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> print(ox.igt_eval_params(state))  # as without transport
      [ 0.25 -0.5 ]
    """
    owner = "implicit_gradient_transport"
    check_hyperparam(owner, low=0.0, high=1.0, open_low=True, eta=eta)
    inner = optax.with_extra_args_support(inner)

    def start(p):
        return p, jnp.zeros_like(p)

    def init(params):
        base, mu = init_leaves(start, params, 2)
        return TransportState(jnp.zeros([], jnp.int32), base, mu, inner.init(params))

    def update(updates, state, params=None, **extra):
        check_params(owner, params)
        count = next_count(state.count)

        def average(g, slots):
            t = count.astype(g.real.dtype)
            weight = jnp.where(t == 1, 1, at_step(eta, t))
            d = (1 - weight) * slots[0] + weight * g
            return d, (d,)

        def extrapolate(u, slots, x):
            weight = at_step(eta, count.astype(u.real.dtype) + 1)
            base = slots[0] + u
            return base + (1 - weight) / weight * u - x, (base,)

        d, (mu,) = map_leaves(average, updates, (state.mu,), owner=owner)
        u, inner_state = inner.update(d, state.inner_state, state.base, **extra)
        out, (base,) = map_leaves(extrapolate, u, (state.base,), (params,), owner=owner)
        return out, TransportState(count, base, mu, inner_state)

    return full_precision(optax.GradientTransformationExtraArgs(init, update))


def _normalized() -> optax.GradientTransformation:
    return optax.stateless(lambda updates, params: unit(updates))


@catalogued(
    **IGT_PAPER,
    kind="optimizer",
    needs=("params",),
    state="2 (iterate and momentum)",
    slots=2,
    variant="N-PG-IGT of the paper, with its experiments' schedule of eta.",
    compared="goldens normalized_igt, normalized_igt_schedule",
    example=lambda: {"learning_rate": 0.01},
)
def normalized_igt(
    learning_rate: optax.ScalarOrSchedule,
    eta: Eta = _eta_of_code,
    weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Normalised steps along a transported momentum.

    `implicit_gradient_transport` around

    .. math:: \theta_{t+1} = \theta_t - \gamma_t \left(\frac{d_t}{\|d_t\|} +
      \lambda \theta_t\right)

    with the norm over all leaves, and no step where d is 0. Made for gradients of one
    sample, such as those of REINFORCE.

    Args:
      learning_rate: gamma, the length of a step: a number or a schedule. The paper's
        experiments take :math:`\gamma_0 \cdot 2 / (t + 2)`, t from 0.
      eta: weight of the new gradient, in (0, 1]; by default
        :math:`(2 / (t + 2))^{4/5}`, that of the experiments.
      weight_decay: decoupled decay of the iterates, multiplied by the learning rate.

    Returns:
      A finished optimizer. Evaluate `igt_eval_params`, not the parameters.

    Raises:
      ValueError: for an `eta` outside (0, 1]; at trace time without params.

    Example:
      >>> import optax_ext as ox
      >>> tx = ox.normalized_igt(lambda t: 0.1 * 2 / (t + 2))
    """
    descend = finish(
        _normalized(),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        owner="normalized_igt",
    )
    return implicit_gradient_transport(descend, eta)


def igt_eval_params(state: optax.OptState, params: Any = None) -> Any:
    r"""The iterates of `implicit_gradient_transport`, at which to evaluate and save.

    Args:
      state: any optimizer state that holds one `TransportState`.
      params: the parameters that train; gives the dtypes of the result and the leaves
        that a mask hides. None returns float32, with holes for hidden leaves.

    Returns:
      A tree like params.

    Raises:
      ValueError: if there is no `TransportState`, or more than one.

    Example:
      >>> import jax.numpy as jnp, optax, optax_ext as ox
      >>> tx = ox.implicit_gradient_transport(optax.sgd(0.5), eta=0.25)
      >>> x = jnp.ones(1)
      >>> updates, state = tx.update(x, tx.init(x), x)
      >>> print(optax.apply_updates(x, updates), ox.igt_eval_params(state))
      [-1.] [0.5]
    """
    base = find_state("igt_eval_params", state, TransportState).base
    return base if params is None else fill(base, params, owner="igt_eval_params")

"""Many steps of a model for one gradient of its loss.

Where the loss is dear (a simulator, a remote reward) and the model is cheap, one
gradient in the outputs is worth more than one step. `target_surrogate` builds a
quadratic model of the loss in the outputs, `optax_ext.losses.target_surrogate_loss`,
and takes several steps of an optimizer on it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam, check_interval, check_params
from optax_ext._core.extra_args import require
from optax_ext._core.leaves import at_step, init_leaves, map_leaves, next_count
from optax_ext._core.trees import flatten_like, is_hole
from optax_ext.losses.solvers import target_surrogate_loss


class TargetSurrogateState(NamedTuple):
    """State of `target_surrogate` where eta is a schedule."""

    count: jax.Array


@catalogued(
    title="Target-based Surrogates for Stochastic Optimization",
    arxiv="2302.02607",
    kind="wrapper",
    needs=("params", "logits_fn", "logits_grad"),
    state="none: that of inner starts anew at every step",
    variant="a fixed number of inner steps; the official code has a line search.",
    compared="golden target_surrogate; inner itself for one inner step",
    example=lambda: {"inner": optax.sgd(0.1), "inner_steps": 2},
    terminal=True,
)
def target_surrogate(
    inner: optax.GradientTransformation,
    inner_steps: int = 10,
    eta: optax.ScalarOrSchedule = 1.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Take several steps on a model of the loss, from one gradient in the outputs.

    With outputs z at the parameters x, and d the gradient of the loss there, `inner`
    starts anew and takes `inner_steps` steps to lower

    .. math::
      \sum_i \langle d_i, f_i(q) - z_i \rangle + \frac{|f_i(q) - z_i|^2}{2 \eta}

    in q from x; the update is q - x. The first of these steps is a step on the loss
    itself, so that ``inner_steps=1`` is `inner` without memory.

    Args:
      inner: a finished optimizer, with its learning rate.
      inner_steps: steps on each model, 10 as in the paper.
      eta: step size in the space of outputs, or a schedule of it: 1 / L for a loss that
        is L-smooth in the outputs, see `losses.target_surrogate_loss`; with noise the
        paper lowers it like 1 / sqrt(t).

    Returns:
      A finished optimizer: no learning rate behind it. It needs params and the extra
      arguments ``logits_fn`` (params -> outputs on this batch) and ``logits_grad`` (the
      gradient of the loss in them, of their shape). Of the updates it takes the holes
      and the dtypes only; they may be None. To `inner` the extra arguments ``value``,
      ``value_fn``, ``grad`` and ``grad_fn`` are those of the model of the loss.

    Raises:
      ValueError: for hyper-parameters outside their range; at trace time without params
        or one of the extra arguments, or where their shapes differ.

    Example:
      >>> import jax.numpy as jnp, optax, optax_ext as ox
      >>> tx = ox.target_surrogate(optax.sgd(0.5), inner_steps=2, eta=1.0)
      >>> x = jnp.array([2.0])
      >>> updates, _ = tx.update(
      ...     None, tx.init(x), x, logits_fn=lambda x: x, logits_grad=jnp.array([1.0]))
      >>> print(updates)  # on its way to -eta * 1
      [-0.75]
    """
    owner = "target_surrogate"
    check_interval(owner, inner_steps=inner_steps)
    check_hyperparam(owner, low=0.0, open_low=True, eta=eta)
    inner = optax.with_extra_args_support(inner)

    def init(params):
        del params
        if callable(eta):
            return TargetSurrogateState(jnp.zeros([], jnp.int32))
        return optax.EmptyState()

    def zeros(x):
        return (jnp.zeros_like(x),)

    def shift(x, slots, moved):
        return x + moved, slots

    def add(u, slots):
        (moved,) = slots  # q - x, so that small steps are not lost in x
        return u, (moved + u,)

    def emit(u, slots, moved):
        del u
        return moved, slots

    def update(updates, state, params=None, **extra):
        check_params(owner, params)
        logits_fn = require(owner, extra, "logits_fn")
        d = require(owner, extra, "logits_grad")
        updates = params if updates is None else updates
        leaves, (given,), treedef = flatten_like(updates, params, owner=owner)
        pairs = zip(leaves, given, strict=True)
        x = treedef.unflatten([u if is_hole(u) else p for u, p in pairs])
        z = jax.lax.stop_gradient(logits_fn(x))
        if jnp.shape(d) != z.shape:
            raise ValueError(
                f"{owner}: logits_grad has shape {jnp.shape(d)}, logits_fn returns "
                f"{z.shape}"
            )
        width: Any = eta
        if callable(eta):
            state = TargetSurrogateState(next_count(state.count))
            width = at_step(eta, state.count.astype(float))

        def model(q):
            return jnp.sum(target_surrogate_loss(logits_fn(q), z, d, eta=width))

        seen = {k: v for k, v in extra.items() if k != "obj_fn"}
        seen |= {"value_fn": model, "grad_fn": jax.grad(model)}

        def step(_, carry):
            moved, inner_state = carry
            q, _ = map_leaves(shift, x, (), (moved,), owner=owner)
            value, grad = jax.value_and_grad(model)(q)
            known = {**seen, "value": value, "grad": grad}
            u, inner_state = inner.update(grad, inner_state, q, **known)
            _, (moved,) = map_leaves(add, u, (moved,), owner=owner)
            return moved, inner_state

        start = init_leaves(zeros, x, 1)[0], inner.init(x)
        moved, _ = jax.lax.fori_loop(0, inner_steps, step, start)
        return map_leaves(emit, updates, (), (moved,), owner=owner)[0], state

    return optax.GradientTransformationExtraArgs(init, update)

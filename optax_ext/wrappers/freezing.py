"""Freezing: matrices that have settled stop for good."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_choice, check_hyperparam, check_interval
from optax_ext._core.leaves import init_leaves, map_leaves, next_count
from optax_ext._core.states import fill, find_state
from optax_ext._core.trees import flatten_like, is_hole, treated


class FreezeConvergedState(NamedTuple):
    """State of `freeze_converged`; leaves that are not monitored have no entry.

    `memory` holds the gradient at the last check ("grad_change"), or the sum of updates
    since then ("update" with update_interval > 1), else ().
    """

    count: jax.Array
    frozen: Any
    memory: optax.Updates
    inner_state: optax.OptState


@catalogued(
    title="GradES: Significantly Faster Training in Transformers with Gradient-Based "
    "Early Stopping",
    arxiv="2509.01842",
    kind="wrapper",
    state="1 (last gradient) for 'grad_change', else 0; 1 boolean a leaf",
    variant="'grad_change' is the current paper, 'grad' its first version, 'update' "
    "the released code without its made-up first measurement of 0.",
    compared="goldens freeze_converged_grad, _grad_change, _update",
    example=lambda: {"inner": optax.trace(0.9), "total_steps": 1000},
)
def freeze_converged(
    inner: optax.GradientTransformation,
    total_steps: int,
    tau: float = 1e-4,
    grace_fraction: float = 0.3,
    measure: str = "grad_change",
    norm: str = "l1",
    update_interval: int = 1,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Stop each weight matrix for good once its gradient has settled.

    At steps t = k, 2k, ... (k the interval), from step int(grace * total_steps) on, a
    monitored leaf freezes where

    .. math::
      N(g_t) < \tau \text{ ("grad")}, \qquad
      N(g_t - g_{t-k}) < \tau \text{ ("grad\_change")}, \qquad
      N(u_{t-k+1} + \dots + u_t) < \tau \text{ ("update")}

    with g the incoming gradient, u the update of `inner`, and N the sum ("l1") or the
    mean ("mean_abs") of absolute values. From then on it emits exact zeros: decay and
    momentum stop too, though `inner` goes on. "update" still takes the step that it
    has measured. The first check of "grad_change" has nothing to compare with.

    Under jit a zero update saves no backward pass. To save it, read the flags on the
    host now and then and compile anew with `optax.selective_transform` or
    `optax.partition`.

    Args:
      inner: a whole optimizer, so that "update" measures what the weights do.
      total_steps: length of the training.
      tau: threshold; 1e-4 is the released configuration's. Tune it: an l1 norm grows
        with the leaf, and the authors use 0.02 to 2.4 for language models.
      grace_fraction: share of `total_steps` in which nothing freezes, in [0, 1]
        (released configuration).
      measure: "grad_change" (the paper), "grad" or "update" (the released code).
      norm: "l1" (released code) or "mean_abs", which does not depend on the size.
      update_interval: steps between checks (released configuration: 1).
      mask: which leaves to monitor: tree of booleans or function of params; None for
        the leaves of rank 2 and more. The others never freeze.

    Returns:
      A link; `frozen_fraction` reads how far it got.

    Raises:
      ValueError: for arguments outside their range.

    Example:
      >>> import jax.numpy as jnp, optax, optax_ext as ox
      >>> tx = ox.freeze_converged(
      ...     optax.sgd(1.0), total_steps=4, tau=0.5, grace_fraction=0.0)
      >>> x = jnp.zeros((1, 2))
      >>> state = tx.init(x)
      >>> for scale in (1.0, 3.0, 3.1, 9.0):
      ...     updates, state = tx.update(jnp.full((1, 2), scale), state, x)
      ...     print(updates, ox.frozen_fraction(state))
      [[-1. -1.]] 0.0
      [[-3. -3.]] 0.0
      [[0. 0.]] 1.0
      [[0. 0.]] 1.0
    """
    owner = "freeze_converged"
    check_interval(owner, total_steps=total_steps, update_interval=update_interval)
    check_hyperparam(owner, low=0.0, tau=tau)
    check_hyperparam(owner, low=0.0, high=1.0, grace_fraction=grace_fraction)
    check_choice(owner, "measure", measure, ("grad_change", "grad", "update"))
    check_choice(owner, "norm", norm, ("l1", "mean_abs"))
    inner = optax.with_extra_args_support(inner)
    total = jnp.sum if norm == "l1" else jnp.mean
    accumulates = measure == "update" and update_interval > 1
    remembers = measure == "grad_change" or accumulates
    first: Any = grace_fraction * total_steps
    # In Python where it can be: 0.29 * 100 is below 29, but not in float32.
    first = first.astype(jnp.int32) if isinstance(first, jax.Array) else int(first)

    def init_leaf(p):
        return jnp.zeros((), bool), *([jnp.zeros_like(p)] if remembers else [])

    def init(params):
        def only(keep, leaf):  # a leaf of size 0 would never freeze
            keep = keep and any(x.size for x in jax.tree.leaves(leaf))
            return leaf if keep else optax.MaskedNode()

        monitored = jax.tree.map(only, treated(mask, params), params)
        frozen, *memory = init_leaves(init_leaf, monitored, 1 + remembers)
        return FreezeConvergedState(
            jnp.zeros([], jnp.int32), frozen, (*memory,), inner.init(params)
        )

    def update(updates, state, params=None, **extra):
        out, inner_state = inner.update(updates, state.inner_state, params, **extra)
        t = next_count(state.count)
        checked = t % update_interval == 0
        may_freeze = checked & (t >= first)
        if measure == "grad_change":
            may_freeze &= t > update_interval

        def measured(u, g, memory):
            if measure == "grad":
                return g, ()
            if measure == "grad_change":
                return g - memory[0], (jnp.where(checked, g, memory[0]),)
            if not memory:
                return u, ()
            change = memory[0] + u
            return change, (jnp.where(checked, 0, change),)

        def rule(u, slots, g):
            before, *memory = slots
            x, memory = measured(u, g, memory)
            after = before | (may_freeze & (total(jnp.abs(x)) < tau))
            stopped = before if measure == "update" else after
            return jnp.where(stopped, 0, u), (after, *memory)

        seen = _monitored(out, state.frozen)
        slots = (state.frozen, *state.memory)
        kept, (frozen, *memory) = map_leaves(rule, seen, slots, (updates,))
        state = FreezeConvergedState(t, frozen, (*memory,), inner_state)
        return fill(kept, out, owner=owner), state

    return optax.GradientTransformationExtraArgs(init, update)


def _monitored(updates: Any, frozen: Any) -> Any:
    """The updates, with holes where `frozen` has them."""
    leaves, (flags,), treedef = flatten_like(updates, frozen, owner="freeze_converged")
    return treedef.unflatten(
        [flag if is_hole(flag) else x for x, flag in zip(leaves, flags, strict=True)]
    )


def frozen_fraction(state: optax.OptState) -> jax.Array:
    """How many of the monitored leaves `freeze_converged` has frozen.

    For your own early stop: at 1 only the leaves outside the mask still move.

    Args:
      state: any optimizer state that holds one `FreezeConvergedState`.

    Returns:
      A scalar in [0, 1]; 0 where nothing is monitored.

    Raises:
      ValueError: if there is no `FreezeConvergedState`, or more than one.

    Example:
      >>> import jax.numpy as jnp, optax, optax_ext as ox
      >>> tx = ox.freeze_converged(optax.sgd(0.1), total_steps=100)
      >>> print(ox.frozen_fraction(tx.init({"kernel": jnp.ones((2, 2))})))
      0.0
    """
    found = find_state("frozen_fraction", state, FreezeConvergedState)
    flags = jax.tree.leaves(found.frozen)
    frozen = sum((jnp.sum(x, dtype=jnp.float32) for x in flags), jnp.float32(0))
    return frozen / max(sum(x.size for x in flags), 1)

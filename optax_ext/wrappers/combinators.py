"""Links side by side: two of which one steers and one sizes, or several merged.

`optax.chain` puts links behind each other. Here they stand beside each other: all see
the same gradients and extra arguments, each keeps its own state.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from optax_ext._core.checks import check_choice, check_hyperparam
from optax_ext._core.geometry import length
from optax_ext._core.leaves import map_leaves


class GraftState(NamedTuple):
    """States of the two links of `graft`."""

    direction: optax.OptState
    magnitude: optax.OptState


def graft(
    direction: optax.GradientTransformation,
    magnitude: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    r"""Go where one optimizer goes, as far as another does, leaf by leaf.

    With :math:`d` and :math:`m` the updates of the two links for one leaf:

    .. math:: \text{out} = \frac{\lVert m \rVert}{\lVert d \rVert}\, d

    0 where d is 0. It carries a tuned learning rate over to a new optimizer: the size
    of each step is that of `magnitude`, whose learning rate belongs inside it if it is
    to count; a learning rate inside `direction` cancels. Decay that is to be neither
    turned nor resized goes behind.

    Args:
      direction: link or optimizer that gives the direction of each leaf.
      magnitude: link or optimizer that gives its Euclidean norm.

    Returns:
      A link with the states of both. Updates have the sign of `direction`.

    Example:
      >>> import jax.numpy as jnp, optax, optax_ext as ox
      >>> tx = ox.graft(optax.scale_by_sign(), magnitude=optax.sgd(0.1))
      >>> g = jnp.array([3.0, -4.0, 0.0])
      >>> out = tx.update(g, tx.init(g))[0]
      >>> print(out)
      [ 0.35355338 -0.35355338  0.        ]

    References:
      Disentangling Adaptive Gradient Methods from Learning Rates, arXiv:2002.11803
      (there over the whole tree, too)
    """
    steering = optax.with_extra_args_support(direction)
    sizing = optax.with_extra_args_support(magnitude)

    def rule(d, slots, m):
        norm = length(d)
        return d / jnp.where(norm > 0, norm, 1) * length(m), slots

    def init(params):
        return GraftState(steering.init(params), sizing.init(params))

    def update(updates, state, params=None, **extra):
        d, steered = steering.update(updates, state.direction, params, **extra)
        m, sized = sizing.update(updates, state.magnitude, params, **extra)
        out = map_leaves(rule, d, (), (m,), owner="graft")[0]
        return out, GraftState(steered, sized)

    return optax.GradientTransformationExtraArgs(init, update)


class BranchState(NamedTuple):
    """State of `branch`: those of the links, by name."""

    inner_states: dict[str, optax.OptState]


def branch(
    links: Mapping[str, optax.GradientTransformation],
    merge: str | Mapping[str, float] | Callable[[dict[str, Any]], Any] = "sum",
) -> optax.GradientTransformationExtraArgs:
    r"""Run links on the same gradients and merge what they emit.

    .. math:: \text{out} = \sum_i w_i\, u_i

    Args:
      links: the links by name, at least one.
      merge: "sum" (all w are 1), "mean" (all w are 1/n), weights by name, or a function
        of the updates by name that returns the merged updates.

    Returns:
      A link. ``state.inner_states`` holds the states by name.

    Raises:
      ValueError: without links, for an unknown `merge`, or weights whose names are not
        those of the links.

    Example:
      >>> import jax.numpy as jnp, optax, optax_ext as ox
      >>> tx = ox.branch(
      ...     {"fast": optax.trace(0.5), "slow": optax.trace(0.99)},
      ...     merge={"fast": 1.0, "slow": 0.1})
      >>> g = jnp.array([1.0, -2.0])
      >>> print(tx.update(g, tx.init(g))[0])
      [ 1.1 -2.2]
    """
    if not links:
        raise ValueError("branch: links is empty, it needs at least one link")
    sides = {name: optax.with_extra_args_support(tx) for name, tx in links.items()}
    if isinstance(merge, Mapping):
        if set(merge) != set(sides):
            raise ValueError(
                f"branch: merge has weights for {sorted(merge)}, the links are "
                f"{sorted(sides)}; give one weight a link"
            )
        for name, weight in merge.items():
            check_hyperparam(f"branch {name}", weight=weight)
        weights = [merge[name] for name in sides]
    elif not callable(merge):
        check_choice("branch", "merge", merge, ("sum", "mean"))
        weights = [1 if merge == "sum" else 1 / len(sides)] * len(sides)

    def rule(first, slots, *others):
        terms = zip(weights, (first, *others), strict=True)
        return sum(w * u for w, u in terms), slots

    def init(params):
        return BranchState({name: tx.init(params) for name, tx in sides.items()})

    def update(updates, state, params=None, **extra):
        out, states = {}, {}
        for name, tx in sides.items():
            out[name], states[name] = tx.update(
                updates, state.inner_states[name], params, **extra
            )
        if callable(merge):
            return merge(out), BranchState(states)
        first, *others = out.values()
        merged = map_leaves(rule, first, (), tuple(others), owner="branch")[0]
        return merged, BranchState(states)

    return optax.GradientTransformationExtraArgs(init, update)

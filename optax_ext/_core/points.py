"""Derivatives at other points than the present parameters.

A method that asks for a gradient elsewhere holds updates, in which frozen leaves are
holes, and params, in which they may be arrays of any dtype. What it moves are the
leaves that train: `trainable` picks them, `on_trainable` makes the caller's function
one of them alone. Trees of one structure follow, and arithmetic on them is a `tree.map`
or the `plus` and `unit` below.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_ext._core.geometry import tree_length
from optax_ext._core.leaves import map_leaves
from optax_ext._core.states import fill


def trainable(updates: Any, params: Any, owner: str) -> Any:
    """The leaves of `params` that have an update, in the update's dtype.

    Raises:
      ValueError: if trees or shapes do not fit, naming the leaf.
    """

    def take(update, slots, param):
        del update
        return param, slots

    return map_leaves(take, updates, (), (params,), owner=owner)[0]


def on_trainable(
    fn: Callable[[Any], Any], params: Any, owner: str
) -> Callable[[Any], Any]:
    """`fn` of params as a function of what `trainable` picks; the rest stays."""
    return lambda leaves: fn(fill(leaves, params, owner=owner))


def plus(tree: Any, scale: Any, direction: Any) -> Any:
    """The sum tree + scale * direction."""

    def add(x, d):
        return x + jnp.asarray(scale, x.dtype) * d

    return jax.tree.map(add, tree, direction)


def unit(tree: Any) -> Any:
    """The tree over its Euclidean norm; a tree of zeros stays."""
    norm = tree_length(tree)
    norm = jnp.where(norm > 0, norm, 1)
    return jax.tree.map(lambda x: x / norm.astype(x.real.dtype), tree)

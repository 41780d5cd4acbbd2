"""Leaves: which there are in a tree, in what dtype, and how an error names one."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class Bucket(NamedTuple):
    """A stack of leaves of equal shape and dtype, made by `bucketed`."""

    stack: Any


def computing_dtype(*leaves: Any) -> np.dtype:
    """The dtype in which a rule sees leaves: the widest of them, float32 at least.

    Raises:
      TypeError: if the first leaf is not an array of a floating or complex type.
    """
    if not hasattr(leaves[0], "dtype"):
        raise TypeError(f"a leaf must be an array, got {type(leaves[0]).__name__}")
    if not jnp.issubdtype(leaves[0].dtype, jnp.inexact):
        raise TypeError(
            f"a leaf of dtype {leaves[0].dtype} cannot be trained: hide it from the "
            "optimizer with optax.masked, or make it a float"
        )
    wide = [np.dtype(np.float32)]
    for leaf in leaves:
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and jnp.finfo(leaf.dtype).bits >= 32:
            wide.append(np.dtype(leaf.dtype))
    return functools.reduce(np.promote_types, wide)


def is_hole(leaf: Any) -> bool:
    """Whether a leaf is None or masked away."""
    return leaf is None or isinstance(leaf, optax.MaskedNode)


def is_unit(leaf: Any) -> bool:
    """Whether a node is one leaf to a rule: a hole or a bucket."""
    return is_hole(leaf) or isinstance(leaf, Bucket)


def treated(mask: Any, params: Any) -> Any:
    """Which leaves a method treats, as a tree of Python booleans.

    Args:
      mask: tree of booleans (a prefix of `params` will do), a function of params that
        returns one, or None for the leaves of rank 2 and more.
      params: tree that decides which leaves there are.
    """
    if mask is None:

        def is_matrix(leaf):
            rank = leaf.stack.ndim - 1 if isinstance(leaf, Bucket) else leaf.ndim
            return rank >= 2

        return jax.tree.map(
            lambda x: False if is_hole(x) else is_matrix(x), params, is_leaf=is_unit
        )
    mask = mask(params) if callable(mask) else mask
    return jax.tree.map(
        lambda keep, tree: jax.tree.map(lambda _: keep, tree, is_leaf=is_unit),
        mask,
        params,
    )


def flatten_like(updates: Any, *trees: Any, owner: str = "update") -> Any:
    """Leaves of `updates`, of each tree at the same places, and the tree definition.

    Holes and buckets count as leaves. A tree that is None gives None at every place.

    Raises:
      ValueError: naming the first place where a tree differs from `updates`.
    """
    leaves, treedef = jax.tree.flatten(updates, is_leaf=is_unit)
    others = []
    for tree in trees:
        if tree is None:
            others.append([None] * len(leaves))
            continue
        try:
            others.append(treedef.flatten_up_to(tree))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{owner}: {_difference(updates, tree)}") from error
    return leaves, others, treedef


def _difference(updates: Any, tree: Any) -> str:
    def paths(t):
        found = jax.tree_util.tree_leaves_with_path(t, is_leaf=is_unit)
        return [jax.tree_util.keystr(path) for path, _ in found]

    ours, theirs = paths(updates), paths(tree)
    for names, place in (
        ([n for n in ours if n not in theirs], "in the gradients but not in the"),
        ([n for n in theirs if n not in ours], "missing from the gradients but in the"),
    ):
        if names:
            return (
                f"leaf {names[0]} is {place} state, params or extra tree it meets; "
                "init and update must see trees of one structure"
            )
    return (
        f"the gradients are a {type(updates).__name__} tree, the state, params or "
        f"extra tree they meet is a {type(tree).__name__} with the same leaf paths"
    )


def owner_of(function: Callable[..., Any]) -> str:
    """Name of the public method inside which `function` is defined."""
    return function.__qualname__.partition(".")[0]


@contextlib.contextmanager
def naming(owner: str, path: Callable[[], Any]) -> Iterator[None]:
    """Put method and leaf path before the message of a TypeError or ValueError."""
    try:
        yield
    except (TypeError, ValueError) as error:
        where = f"{owner}: leaf {jax.tree_util.keystr(path())}"
        if type(error) in (TypeError, ValueError):
            raise type(error)(f"{where}: {error}") from error
        error.add_note(where)  # jax's own errors cannot be made anew
        raise


def leaf_path(tree: Any, i: int) -> Any:
    """Path of the i-th leaf."""
    return jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_unit)[i][0]

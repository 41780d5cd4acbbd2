"""Leaves of a tree by their path, for methods that know layers by name."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.tree_util import GetAttrKey

from optax_ext._core.trees import Bucket, is_hole, is_unit

Path = str | Sequence[Any]
"""Keys of a leaf, as a tuple or joined by "/"."""


def path_name(path: Path) -> str:
    """The path joined by "/"."""
    return path if isinstance(path, str) else "/".join(map(str, path))


def _name(path: tuple[Any, ...]) -> str:
    # The value of an nnx variable is not a level of its own in nnx's paths.
    path = path[:-1] if path and path[-1] == GetAttrKey("value") else path
    return jax.tree_util.keystr(path, simple=True, separator="/")


class LeavesByPath:
    """The leaves of a tree by path; `owner` is named in messages."""

    def __init__(self, tree: Any, owner: str):
        found, self._treedef = jax.tree.flatten_with_path(tree, is_leaf=is_unit)
        self._leaves = {_name(path): leaf for path, leaf in found}
        self._owner = owner

    def get(self, path: Path | None) -> Any:
        """The leaf at a path; None for a hole, or where the path is None.

        Raises:
          ValueError: if there is no leaf, or one of `bucketed`, which has no path.
        """
        if path is None:
            return None
        leaves = self._leaves
        if any(isinstance(leaf, Bucket) for leaf in leaves.values()):
            raise ValueError(
                f"{self._owner} tells layers apart by their paths, which bucketed "
                "takes away: leave it outside of bucketed"
            )
        name = path_name(path)
        # A mask may hide a whole branch.
        for at, leaf in leaves.items():
            if is_hole(leaf) and f"{name}/".startswith(f"{at}/"):
                return None
        if name not in leaves:
            raise ValueError(
                f"{self._owner}: no leaf has the path {name!r}; there are "
                f"{sorted(leaves)}"
            )
        return leaves[name]

    def has(self, path: Path) -> bool:
        """Whether there is a leaf at a path."""
        return path_name(path) in self._leaves

    def put(self, path: Path | None, value: jax.Array) -> None:
        """Replace a leaf, in its own shape and dtype."""
        name = path_name(path or ())
        old = self._leaves[name]
        self._leaves[name] = value.reshape(old.shape).astype(old.dtype)

    def tree(self) -> Any:
        """The tree with its new leaves."""
        return self._treedef.unflatten(self._leaves.values())

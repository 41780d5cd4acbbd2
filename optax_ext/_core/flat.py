"""A whole tree as one vector, for methods that mix all parameters.

Krylov methods, dense Hessians and ring buffers of gradients see n numbers in jax's tree
order (dict keys sorted), each leaf in C order. `FlatView` goes there and back: holes
are skipped and kept, stacks of `bucketed` stay as they are stacked, the vector has the
computing dtype of the whole tree and every leaf gets its own dtype back.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_ext._core.trees import computing_dtype, flatten_like, is_hole


@dataclasses.dataclass(frozen=True)
class FlatView:
    """The leaves of `like`, arrays or `jax.ShapeDtypeStruct`s, as one vector [n].

    Attributes:
      like: tree that decides which leaves there are; updates, as a rule.
      owner: name of the method, for messages.
    """

    like: Any
    owner: str

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the vector: float32, or wider where a leaf is."""
        leaves = jax.tree.leaves(self.like)
        each = [np.zeros((), computing_dtype(leaf)) for leaf in leaves]
        return computing_dtype(*each) if each else np.dtype(np.float32)

    @property
    def size(self) -> int:
        """How many numbers there are."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.like))

    def to(self, tree: Any) -> jax.Array:
        """The leaves of `tree` at the places of `like`, [n].

        Raises:
          ValueError: if `tree` does not fit `like`.
        """
        leaves, (found,), _ = flatten_like(self.like, tree, owner=self.owner)
        parts = [jnp.zeros(0, self.dtype)]
        for leaf, x in zip(leaves, found, strict=True):
            if is_hole(leaf):
                continue
            (want,), got = jax.tree.leaves(leaf), jax.tree.leaves(x)
            if [want.shape] != [part.shape for part in got]:
                raise ValueError(
                    f"{self.owner}: a leaf of shape {want.shape} met one of shapes "
                    f"{[part.shape for part in got]} in another tree"
                )
            parts.append(jnp.ravel(got[0]).astype(self.dtype))
        return jnp.concatenate(parts)

    def back(self, vector: jax.Array, like: Any = None) -> Any:
        """The tree of a vector.

        Args:
          vector: [n].
          like: tree with the dtypes and the leaves at the holes of the view, such as
            params; None is that of the view, which keeps the holes.
        """
        like = self.like if like is None else like
        leaves, (others,), treedef = flatten_like(self.like, like, owner=self.owner)
        out, start = [], 0
        for leaf, other in zip(leaves, others, strict=True):
            if is_hole(leaf):
                out.append(other)
                continue
            (x,), stacked = jax.tree.flatten(other)
            part = vector[start : start + math.prod(x.shape)]
            out.append(stacked.unflatten([part.reshape(x.shape).astype(x.dtype)]))
            start += part.size
        return treedef.unflatten(out)

    def function(self, fn: Callable[[Any], Any], params: Any) -> Callable[..., Any]:
        """`fn` of params as a function of the vector.

        Leaves of `params` at the holes of the view stay what they are.
        """
        return lambda vector: fn(self.back(vector, params))

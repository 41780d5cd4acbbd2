"""Buckets: leaves of equal shape and dtype become one batched operation.

A tree of 800 equal matrices costs a link 800 small programs to trace, compile and run.
`bucketed` stacks them, so that there is one. Rules of this package see the stack as
what it is (a `Bucket`) and are mapped over it; links that act entry by entry
(optax.scale_by_adam, optax.clip) or on the whole tree (optax.clip_by_global_norm) give
the same numbers on a stack as without.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.trees import Bucket, flatten_like, is_hole
from optax_ext._core.views import viewed

# Taking leaf k out of a stack is a kernel of its own for each k, which XLA compiles
# once for all stacks of one shape. On CPU 800 matrices in one stack took 20 s to
# compile, nearly all for these kernels, and 2 s in stacks of 32 (64: 3 s).
_STACK = 32


class _Buckets:
    """The view of a tree as a dict of stacks, keyed by dtype, shape and number."""

    def __init__(self, params: Any):
        self._like = params
        self._leaves, _, self._treedef = flatten_like(params)
        self._places: dict[str, list[int]] = {}
        seen: dict[str, int] = {}
        for i, leaf in enumerate(self._leaves):
            if isinstance(leaf, Bucket):  # a stack of its own: blocks, or layers
                key = f"{leaf.stack.dtype}{list(leaf.stack.shape)}[{i}]"
                self._places[key] = [i]
            elif not is_hole(leaf):
                kind = f"{leaf.dtype}{list(leaf.shape)}"
                seen[kind] = seen.get(kind, -1) + 1
                key = f"{kind}#{seen[kind] // _STACK}"
                self._places.setdefault(key, []).append(i)

    def to(self, tree: Any) -> dict[str, Bucket]:
        leaves = flatten_like(self._like, tree, owner="bucketed")[1][0]
        if any(is_hole(leaves[i]) for places in self._places.values() for i in places):
            raise ValueError(
                "bucketed: some gradients are None where their parameters are arrays; "
                "freeze leaves with optax.partition or optax.masked around bucketed"
            )
        return {
            key: Bucket(_stack([leaves[i] for i in places]))
            for key, places in self._places.items()
        }

    def back(self, tree: dict[str, Bucket]) -> Any:
        leaves = list(self._leaves)
        for key, places in self._places.items():
            for row, i in enumerate(places):
                is_stack = isinstance(self._leaves[i], Bucket)
                leaves[i] = tree[key] if is_stack else tree[key].stack[row]
        return self._treedef.unflatten(leaves)


def _stack(leaves: list[Any]) -> Any:
    first = leaves[0]
    if isinstance(first, Bucket):
        return first.stack
    if isinstance(first, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(leaves), *first.shape), first.dtype)
    shapes = [leaf.shape for leaf in leaves]
    if len(set(shapes)) > 1:
        raise ValueError(
            f"bucketed: leaves of one stack meet arrays of shapes {shapes} in an extra "
            "argument; pad bases with zero columns to one shape"
        )
    return jnp.stack(leaves)


def bucketed(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Run `inner` on stacks of leaves of equal shape and dtype, up to 32 in a stack.

    The numbers are those of `inner`. The rule is traced and compiled once a stack, not
    once a leaf; at run time the stacks are copied once in and once out. It pays for
    many small leaves and for matrix rules, not for a few large leaves. Call `init` for
    parameters on a mesh with explicit axes inside ``jax.set_mesh(mesh)``.

    Args:
      inner: a link of this package, or one that acts entry by entry or on the whole
        tree. A link from elsewhere that treats a leaf as one thing (a norm per leaf,
        optax.contrib.muon) would take a stack for a leaf of higher rank: do not wrap
        those, nor anything that tells leaves apart by their path.

    Returns:
      A link whose state is that of `inner` on a dict of stacks.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> tx = ox.bucketed(ox.scale_by_lion_k())
      >>> params = {f"layer{i}": jnp.ones((2, 3)) for i in range(4)}
      >>> tx.init(params).mu["float32[2, 3]#0"].stack.shape
      (4, 2, 3)
    """
    return viewed(inner, _Buckets)

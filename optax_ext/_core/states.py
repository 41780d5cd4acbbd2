"""What links and wrappers share about states: finding one, filling one."""

from typing import Any

import jax
import numpy as np

from optax_ext._core.trees import computing_dtype, flatten_like, is_hole


def find_state(owner: str, state: Any, state_type: type) -> Any:
    """The one state of a type inside the state of any chain.

    Args:
      owner: name of the function that looks, for messages.
      state: an optimizer state, or a larger tree that holds one (a TrainState).
      state_type: the NamedTuple to look for.

    Raises:
      ValueError: if there is none, or more than one.
    """

    def inside(node):
        def found(x):
            return isinstance(x, state_type) and x is not node

        here = [x for x in jax.tree.leaves(node, is_leaf=found) if found(x)]
        return here + [y for x in here for y in inside(x)]

    states = inside((state,))
    if len(states) != 1:
        raise ValueError(
            f"{owner} needs a state that holds one {state_type.__name__}, got "
            f"{len(states)} in a {type(state).__name__}"
        )
    return states[0]


def fill(tree: Any, present: Any, *, owner: str = "update") -> Any:
    """`tree` in the dtypes of `present`, with its holes taken from there."""
    leaves, (others,), treedef = flatten_like(tree, present, owner=owner)

    def pick(x, y):
        if is_hole(x) or is_hole(y):
            return y
        return jax.tree.map(lambda a, b: a.astype(b.dtype), x, y)

    return treedef.unflatten(map(pick, leaves, others))


def scalar_dtype(params: Any) -> np.dtype:
    """Dtype of a scalar of state: float32, float64 if there is a float64 leaf."""
    leaves = jax.tree.leaves(params)
    dtype = computing_dtype(*leaves) if leaves else np.dtype(np.float32)
    return np.finfo(dtype).dtype  # of a complex type: that of its parts

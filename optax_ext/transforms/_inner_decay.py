"""Rules that decay inside, where a link in front or behind would compute another thing.

`optax.masked` around such a link would mask all of it. Here a mask turns off the decay
alone: the rule is told the rate for its leaf.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

from optax_ext._core.checks import check_params
from optax_ext._core.leaves import leafwise, map_leaves, next_count
from optax_ext._core.trees import owner_of, treated


def decaying_leafwise(
    state_type: Any,
    init: Callable[[jax.Array], tuple[Any, ...]],
    update: Callable[..., tuple[jax.Array, tuple[Any, ...]]],
    *,
    weight_decay: Any,
    mask: Any,
    needs_params: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """`leafwise` for a rule that is told its rate of decay.

    Args:
      state_type: NamedTuple of the state, `count` first.
      init: leaf in the computing dtype -> tuple of slots.
      update: `(grad, slots, param, t, decay) -> (direction, slots)`.
      weight_decay: what `decay` is for the leaves that decay; it is 0.0 for the others.
      mask: which leaves decay: tree of booleans, function of params, None for all.
      needs_params: whether to raise where `update` is called without parameters.

    Returns:
      A link that ignores extra arguments.
    """
    owner = owner_of(update)

    def update_fn(updates, state, params=None, **extra):
        del extra
        if needs_params:
            check_params(owner, params)
        count = next_count(state.count)
        like = updates if params is None else params
        decays = treated(True if mask is None else mask, like)

        def rule(grad, slots, param, decays):
            t = count.astype(grad.real.dtype)
            return update(grad, slots, param, t, weight_decay if decays else 0.0)

        out, slots = map_leaves(
            rule, updates, tuple(state[1:]), (params, decays), owner=owner
        )
        return out, state_type(count, *slots)

    init_fn = leafwise(state_type, init, update).init
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)

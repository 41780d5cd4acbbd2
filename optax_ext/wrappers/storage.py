"""Optimizer state in 16 or 8 bits.

The state of an optimizer is most of what training keeps in memory beside activations,
and few of its bits matter. `stored` keeps the state of any link narrow between steps
and widens it for the step, so that no link needs a dtype argument of its own.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.checks import check_choice, check_interval
from optax_ext._core.keys import key_state
from optax_ext._core.quantization import (
    Blockwise,
    random_bits,
    round_to_bfloat16,
    to_blockwise,
    unpacked,
)
from optax_ext._core.trees import Bucket
from optax_ext._core.views import full_precision


class StoredState(NamedTuple):
    """State of `stored`.

    Attributes:
      key: raw key data of the random rounding, or None.
      inner_state: that of the inner link, with bfloat16 or `Blockwise` leaves.
    """

    key: Any
    inner_state: optax.OptState


def stored(
    inner: optax.GradientTransformation,
    dtype: Any = "bfloat16",
    rounding: str = "stochastic",
    *,
    key: jax.Array | None = None,
    block_size: int = 256,
    min_size: int = 4096,
) -> optax.GradientTransformationExtraArgs:
    r"""Keep the state of `inner` in bfloat16 or in block-wise 8 bits.

    .. math:: \text{update} = \text{round} \circ \text{inner.update} \circ \text{widen}

    The step itself is computed in float32 (`full_precision`). Narrow are the float32
    leaves of the state that have the path and shape of a parameter of at least
    `min_size` entries: moments, accumulated gradients, buffers; in chains, in wrappers,
    behind masks, and in the stacks of `bucketed`. Counts, factors, matrices of other
    shapes and float64 stay what they are.

    ========== ===== =============================================================
    dtype      bytes an entry
    ========== ===== =============================================================
    float32    4     as `inner` has it
    bfloat16   2     8 bits of precision
    uint8      1.016 a level of 255 (with negative entries in the block: of 127 and a
                     sign), laid out as fourth powers, times the largest magnitude of
                     the block. Gaps are 1.6 % (3.1 %) of a number at the top
    ========== ===== =============================================================

    Rounding to the nearest forgets increments below half a gap. A second moment with
    b2 = 0.999 moves by at most 1/1000 a step and gaps of bfloat16 are 1/256 to 1/128:
    after 3000 gradients of 1 it is 0.25, and not 0.95. Stochastic rounding is right in
    the mean, and off by 1.5 % in an entry. Its random bits are a hash of an entry's
    place, seeded anew at each step, which fuses with the step; the cost is measured by
    ``python -m benchmarks.foundation``.

    8 bits also are right in the mean, and off by 4 % in an entry of that second moment
    (largest error 20 %) where gradients in a block differ by a factor of 200. To the
    nearest they are as good for gradients whose sizes stay in proportion, and stay
    behind for good where only some of a block shrink.

    Args:
      inner: any link, wrapper or finished optimizer that keeps float32 itself: leave
        out its ``mu_dtype``.
      dtype: "bfloat16" or "uint8".
      rounding: "stochastic" or "nearest".
      key: where the random bits start; None is ``jax.random.key(0)``. Give two in one
        optimizer different keys.
      block_size: most entries that share a scale in 8 bits (8-bit Adam's 256). Blocks
        run along the last axis; sharding that axis finer than a block costs
        communication.
      min_size: smallest parameter whose state becomes narrow (8-bit Adam's 4096):
        biases and scales weigh nothing and matter much.

    Returns:
      A link with a `StoredState`. `unpack_stored_state` reads it.

    Raises:
      ValueError: for an unknown dtype or rounding, sizes below 1, and at `init` for an
        inner link whose own state has bfloat16 leaves.

    Example:
      >>> import jax.numpy as jnp, optax, optax_ext as ox
      >>> tx = ox.stored(optax.adamw(1e-3), "bfloat16")
      >>> state = tx.init({"w": jnp.ones((64, 64))})
      >>> optax.tree.get(state, "nu")["w"].dtype
      dtype(bfloat16)
    """
    dtype = getattr(dtype, "dtype", dtype)
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    check_choice("stored", "dtype", name, ("bfloat16", "uint8"))
    check_choice("stored", "rounding", rounding, ("stochastic", "nearest"))
    check_interval("stored", block_size=block_size, min_size=min_size)
    inner = full_precision(inner)
    data = impl = None
    if rounding == "stochastic":
        data, impl = key_state(key)

    def pack(x: jax.Array, bits: jax.Array | None) -> Any:
        if name == "uint8":
            return to_blockwise(x, bits, block_size)
        return round_to_bfloat16(x, bits)

    def init(params):
        is_moment = _moments_of(params, min_size)

        def narrowed(path, leaf):
            if getattr(leaf, "dtype", None) == jnp.bfloat16:
                raise ValueError(
                    f"stored: the inner state is bfloat16 at "
                    f"{jax.tree_util.keystr(path)} already: leave out mu_dtype"
                )
            if not is_moment(path, leaf):
                return leaf
            if isinstance(leaf, jax.ShapeDtypeStruct):
                return jax.eval_shape(lambda x: pack(x, None), leaf)
            return pack(leaf, None)

        state = jax.tree_util.tree_map_with_path(narrowed, inner.init(params))
        return StoredState(None if data is None else jnp.array(data), state)

    def update(updates, state, params=None, **extra):
        old, treedef = jax.tree.flatten(state.inner_state, is_leaf=_is_blockwise)
        wide = treedef.unflatten([unpacked(leaf) for leaf in old])
        updates, wide = inner.update(updates, wide, params, **extra)
        keep, use = state.key, None
        if keep is not None:
            keys = jax.random.split(jax.random.wrap_key_data(keep, impl=impl))
            keep, use = jax.random.key_data(keys[0]), keys[1]
        new = treedef.flatten_up_to(wide)
        for i, leaf in enumerate(old):
            if _is_blockwise(leaf) or leaf.dtype == jnp.bfloat16:
                bits = None
                if use is not None:
                    bits = random_bits(jax.random.fold_in(use, i), new[i].shape)
                new[i] = pack(new[i], bits)
        return updates, StoredState(keep, treedef.unflatten(new))

    return optax.GradientTransformationExtraArgs(init, update)


def unpack_stored_state(state: Any) -> Any:
    """The state that the links inside `stored` work on, in float32.

    Args:
      state: any optimizer state.

    Returns:
      The state with each `StoredState` replaced by the widened state of its inner link.
      A wider copy, for reading: `update` takes the state itself.

    Example:
      >>> import jax.numpy as jnp, optax, optax_ext as ox
      >>> state = ox.stored(optax.adam(1e-3), "uint8").init({"w": jnp.ones((64, 64))})
      >>> optax.tree.get(ox.unpack_stored_state(state), "nu")["w"].dtype
      dtype('float32')
    """

    def read(node):
        if not isinstance(node, StoredState):
            return node
        wide = jax.tree.map(unpacked, node.inner_state, is_leaf=_is_blockwise)
        return unpack_stored_state(wide)

    return jax.tree.map(read, state, is_leaf=lambda x: isinstance(x, StoredState))


def _is_blockwise(leaf: Any) -> bool:
    return isinstance(leaf, Blockwise)


def _moments_of(params: Any, min_size: int) -> Any:
    """A test (path, leaf of the state) -> whether it is a parameter's, and large."""
    shapes = {
        path: leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    lengths = {len(path) for path in shapes}
    stack = jax.tree_util.GetAttrKey(Bucket._fields[0])

    def is_moment(path, leaf):
        if getattr(leaf, "dtype", None) != jnp.float32 or leaf.size < min_size:
            return False
        if path and path[-1] == stack and leaf.shape[1:] in shapes.values():
            return True  # made by `bucketed` inside
        return any(
            shapes.get(path[len(path) - n :]) == leaf.shape
            for n in lengths
            if n <= len(path)
        )

    return is_moment

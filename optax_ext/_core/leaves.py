"""The leaf driver: a method is a rule for one array, the rest happens here.

`map_leaves` applies a rule to every leaf of an update tree; `leafwise` makes a whole
`GradientTransformation` of a rule and its initialiser. Between them they own trees,
dtypes, the step count, stacked leaves and errors, once for all methods:

* *Trees.* Any pytree of arrays. None and `optax.MaskedNode` leaves of the updates are
  holes: they pass through, and so do the leaves at their place in every other tree
  (optax masks updates, params and state, but not trees in extra arguments). Leaves of
  size 0 pass through too.
* *Dtypes.* A rule sees float32 (float64 for float64 leaves), whatever the leaf's dtype.
  The direction goes back in the update's dtype, slots in the dtype they were stored in,
  which `init` decides: it sees the leaf in the computing dtype, so `jnp.zeros_like(p)`
  is a float32 moment for a bfloat16 parameter.
* *Stacks.* A leaf inside a `Bucket` is a stack of equal leaves; the rule is mapped over
  it, so that a norm or a matrix product in a rule stays one of a single leaf.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.checks import check_params
from optax_ext._core.trees import (
    Bucket,
    computing_dtype,
    flatten_like,
    is_hole,
    is_unit,
    leaf_path,
    naming,
    owner_of,
)

Rule = Callable[..., tuple[Any, tuple[Any, ...]]]
"""One step of one leaf: (update, slots, *others) -> (direction, slots)."""


def next_count(count: jax.Array) -> jax.Array:
    """The count after one more step; it stops at the largest int32."""
    return jnp.asarray(optax.safe_increment(count))


def at_step(value: Any, t: jax.Array) -> Any:
    """A hyper-parameter at step t = 1, 2, ...: schedules are called with t - 1.

    optax's schedules divide integers by floats, hence the standard promotion, and
    under x64 an int32 count would make float32 values of it, hence the widest integer.
    """
    if not callable(value):
        return value
    with jax.numpy_dtype_promotion("standard"):
        return jnp.asarray(value((t - 1).astype(int)), t.dtype)


def map_leaves(
    rule: Rule,
    updates: Any,
    slots: tuple[Any, ...] = (),
    others: tuple[Any, ...] = (),
    *,
    owner: str | None = None,
) -> tuple[Any, tuple[Any, ...]]:
    """Apply a rule leaf by leaf, in float32 or wider.

    Args:
      rule: `(update, slots, *others) -> (direction, slots)` for one array.
      updates: tree of arrays; decides which leaves there are.
      slots: trees of state, like `updates` with any array at a leaf.
      others: further trees like `updates` (params, gradients, curvature), or None.
        A rule sees leaves that are no arrays (the booleans of a mask) as they are.
      owner: name of the method, for messages; None takes that of the rule.

    Returns:
      The tree of directions in the dtypes of `updates`, and the trees of new slots in
      the dtypes of `slots`.

    Raises:
      ValueError: if trees or shapes do not fit, naming the leaf.
    """
    owner = owner or owner_of(rule)
    leaves, rest, treedef = flatten_like(updates, *slots, *others, owner=owner)
    outs, new = [], [[] for _ in slots]
    for i, leaf in enumerate(leaves):
        at = [column[i] for column in rest]
        old, other = tuple(at[: len(slots)]), at[len(slots) :]
        with naming(owner, lambda i=i: leaf_path(updates, i)):
            out, kept = _apply(rule, leaf, old, other)
        outs.append(out)
        for column, slot in zip(new, kept, strict=True):
            column.append(slot)
    return treedef.unflatten(outs), tuple(treedef.unflatten(c) for c in new)


def _apply(rule: Rule, leaf: Any, slots: tuple[Any, ...], others: list[Any]) -> Any:
    """The rule on one leaf, one bucket, or nothing on a hole."""
    if isinstance(leaf, Bucket):
        stacks = [o.stack for o in others if isinstance(o, Bucket)]

        def of_row(u, s, rows):
            rows = iter(rows)
            each = [next(rows) if isinstance(o, Bucket) else o for o in others]
            return _apply(rule, u, s, each)

        out, kept = jax.vmap(of_row)(leaf.stack, tuple(s.stack for s in slots), stacks)
        return Bucket(out), tuple(map(Bucket, kept))
    if is_hole(leaf):
        return leaf, slots
    arrays = [x for x in jax.tree.leaves(others) if hasattr(x, "dtype")]
    dtype = computing_dtype(leaf, *arrays)
    if leaf.size == 0:
        return leaf, slots
    wide = jax.tree.map(lambda x: _cast(x, dtype), (slots, others))
    try:
        out, kept = rule(leaf.astype(dtype), wide[0], *wide[1])
    except (TypeError, ValueError) as error:
        if type(error) not in (TypeError, ValueError):
            raise
        shapes = [x.shape for x in jax.tree.leaves((slots, arrays))]
        raise ValueError(
            f"a gradient of shape {leaf.shape} met state and parameters of shapes "
            f"{shapes}: {error}"
        ) from error
    if out.shape != leaf.shape or [jnp.shape(x) for x in jax.tree.leaves(kept)] != [
        x.shape for x in jax.tree.leaves(slots)
    ]:
        raise ValueError(
            f"a gradient of shape {leaf.shape} does not fit its parameter or state; "
            "was the state made by init from these parameters?"
        )
    return out.astype(leaf.dtype), jax.tree.map(
        lambda x, old: _cast(x, old.dtype), kept, slots
    )


def _cast(x: Any, dtype: Any) -> Any:
    is_float = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)
    return x.astype(dtype) if is_float else x


def init_leaves(init: Callable[[Any], tuple[Any, ...]], params: Any, n: int) -> Any:
    """Trees of the `n` slots that `init` makes of each leaf.

    Works on arrays and on `jax.ShapeDtypeStruct`s, and never lets a slot share its
    buffer with a parameter, so that both can be donated.
    """

    def of_leaf(leaf):
        if is_hole(leaf):
            return (leaf,) * n
        if isinstance(jax.tree.leaves(leaf)[0], jax.ShapeDtypeStruct):
            return jax.eval_shape(of_leaf, leaf)
        if isinstance(leaf, Bucket):
            return tuple(map(Bucket, jax.vmap(of_leaf)(leaf.stack)))
        dtype = computing_dtype(leaf)
        seen = leaf.astype(dtype)
        buffers, slots = [leaf, seen], []
        for slot in init(seen):
            slots.append(jnp.array(slot) if any(slot is b for b in buffers) else slot)
            buffers.append(slots[-1])
        return tuple(slots)

    leaves, treedef = jax.tree.flatten(params, is_leaf=is_unit)
    per_leaf = []
    for i, leaf in enumerate(leaves):
        with naming(owner_of(init), lambda i=i: leaf_path(params, i)):
            per_leaf.append(of_leaf(leaf))
    return [treedef.unflatten([slots[i] for slots in per_leaf]) for i in range(n)]


def leafwise(
    state_type: Any,
    init: Callable[[jax.Array], tuple[Any, ...]],
    update: Callable[..., tuple[jax.Array, tuple[Any, ...]]],
    *,
    needs_params: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Make a link of the rule for one leaf.

    `state_type` is a NamedTuple: `count` first if the rule wants the step, then one
    field a slot. `optax.scale_by_adam` would be written so, and that is all of it:

    >>> import jax.numpy as jnp, optax
    >>> from typing import NamedTuple
    >>> class AdamState(NamedTuple):
    ...     count: jax.Array
    ...     mu: optax.Updates
    ...     nu: optax.Updates
    >>> def scale_by_adam(b1=0.9, b2=0.999, eps=1e-8):
    ...     def init(p):
    ...         return jnp.zeros_like(p), jnp.zeros_like(p)
    ...     def update(g, slots, p, t):
    ...         m, v = slots
    ...         m = b1 * m + (1 - b1) * g
    ...         v = b2 * v + (1 - b2) * g**2
    ...         m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
    ...         return m_hat / (jnp.sqrt(v_hat) + eps), (m, v)
    ...     return leafwise(AdamState, init, update)
    >>> tx = scale_by_adam()
    >>> params = {"w": jnp.ones((2,), jnp.bfloat16)}
    >>> tx.init(params).nu["w"].dtype
    dtype('float32')

    Args:
      state_type: NamedTuple of the state.
      init: leaf in the computing dtype -> tuple of slots, in the order of the fields.
      update: `(grad, slots, param, t) -> (direction, slots)`, everything in the
        computing dtype, t = 1, 2, ... a scalar of it (None without a count); `param`
        is None where `update` was called without parameters.
      needs_params: whether to raise where `update` is called without parameters.

    Returns:
      A `GradientTransformationExtraArgs` that ignores extra arguments.
    """
    owner = owner_of(update)
    counted = state_type._fields[:1] == ("count",)
    n = len(state_type._fields) - counted

    def init_fn(params):
        count = (jnp.zeros([], jnp.int32),) if counted else ()
        return state_type(*count, *init_leaves(init, params, n))

    def update_fn(updates, state, params=None, **extra):
        del extra
        if needs_params:
            check_params(owner, params)
        count = next_count(state.count) if counted else None

        def rule(grad, slots, param):
            if param is not None and param.shape != grad.shape:
                raise ValueError(
                    f"the gradient has shape {grad.shape}, the parameter {param.shape}"
                )
            t = None if count is None else count.astype(grad.real.dtype)
            return update(grad, slots, param, t)

        out, slots = map_leaves(
            rule, updates, tuple(state[counted:]), (params,), owner=owner
        )
        return out, state_type(*([] if count is None else [count]), *slots)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)

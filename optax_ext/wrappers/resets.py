"""Resets: stale optimizer state is cleared, unbalanced factors are balanced anew."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_interval, check_params
from optax_ext._core.leaves import next_count
from optax_ext._core.trees import computing_dtype, flatten_like, is_hole, is_unit

_TITLE = "Scalable Parameter and Memory Efficient Pretraining for LLM: Recent "
_TITLE += "Algorithmic Advances and Benchmarking"


class ResetState(NamedTuple):
    """State of `reset_state_every`."""

    count: jax.Array
    inner_state: optax.OptState


@catalogued(
    title=_TITLE,
    arxiv="2505.22922",
    kind="wrapper",
    needs=("params",),
    state="that of inner",
    variant="the whole state by default, as the released code restarts its optimizer; "
    "its SPAM clears both moments and keeps the step: which=('mu', 'nu').",
    compared="goldens reset_state_every_full, reset_state_every_mu",
    example=lambda: {"inner": optax.trace(0.9)},
)
def reset_state_every(
    inner: optax.GradientTransformation,
    period: int = 200,
    which: tuple[str, ...] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Start the state of `inner` afresh, all of it or some fields, now and then.

    .. math::
      s_t \leftarrow \text{init}(x_t) \text{ if } t > 0 \text{ and } t \bmod
      \text{period} = 0, \qquad t = 0, 1, \dots

    before the update of step t, so the first `period` steps are those of `inner`.

    With ``which=None`` schedules and random keys inside `inner` start anew too: put a
    schedule outside, or name fields. With Adam, ``which=("mu",)`` makes the step after
    a reset about 1 - b1 of a normal one. ``("mu", "nu")`` keeps the count, so nothing
    corrects the bias: that step is (1 - b1) / sqrt(1 - b2) = 3.2 times the learning
    rate.

    Args:
      inner: any link or optimizer.
      period: steps between resets (200: the paper's best, as quoted).
      which: names of fields, such as ``("mu", "nu")``; they are reset in every part of
        the state that has them. None resets everything.

    Returns:
      A link that needs params at ``update``.

    Raises:
      ValueError: for `period` below 1; for `which` that is no tuple of names; at init
        for a field that the state does not have, naming those that it has.

    Example:
      >>> import jax.numpy as jnp, optax, optax_ext as ox
      >>> tx = ox.reset_state_every(optax.trace(0.5), period=2)
      >>> x = jnp.zeros(1)
      >>> state = tx.init(x)
      >>> for _ in range(4):
      ...     updates, state = tx.update(jnp.ones(1), state, x)
      ...     print(updates)
      [1.]
      [1.5]
      [1.]
      [1.5]
    """
    owner = "reset_state_every"
    check_interval(owner, period=period)
    if which is not None and not (
        isinstance(which, tuple) and which and all(isinstance(x, str) for x in which)
    ):
        raise ValueError(
            f"{owner}: which must be None or a tuple of field names such as ('mu',), "
            f"got {which!r}"
        )
    inner = optax.with_extra_args_support(inner)

    def init(params):
        state = inner.init(params)
        fields = _fields(state)
        unknown = [name for name in which or () if name not in fields]
        if unknown:
            raise ValueError(
                f"{owner}: the state of inner has no field {unknown[0]!r}; it has "
                f"{', '.join(sorted(fields)) or 'none'}"
            )
        return ResetState(jnp.zeros([], jnp.int32), state)

    def update(updates, state, params: Any = None, **extra):
        check_params(owner, params)
        due = (state.count > 0) & (state.count % period == 0)

        def fresh(path, old, new):
            names = {getattr(key, "name", None) for key in path}
            reset = which is None or not names.isdisjoint(which)
            return jnp.where(due, new, old) if reset else old

        inner_state = jax.tree_util.tree_map_with_path(
            fresh, state.inner_state, inner.init(params)
        )
        out, inner_state = inner.update(updates, inner_state, params, **extra)
        return out, ResetState(next_count(state.count), inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _fields(state: Any) -> set[str]:
    """Names of the fields of all NamedTuples and dataclasses in a state."""
    own = {*getattr(state, "_fields", ()), *getattr(state, "__dataclass_fields__", ())}
    children = jax.tree.leaves(state, is_leaf=lambda x: x is not state)
    return own.union(*(_fields(x) for x in children if x is not state))


@catalogued(
    title=_TITLE,
    arxiv="2505.22922",
    kind="helper",
    needs=("left", "right"),
    variant="full rank; signs fixed; pairs of deficient rank are left alone (the "
    "released code truncates, never signs, and would lose a zero factor for good).",
    compared="golden refactorize_every; the product and the balance of the factors",
    example=lambda: {
        "left": jnp.array([[2.0, 0.0], [0.0, 1.0]]),
        "right": jnp.array([[1.0, 1.0], [1.0, -1.0]]),
    },
)
def refactorize(left: jax.Array, right: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""Balance the factors of a product without changing it.

    .. math::
      L R = U S V^T, \qquad L' = U \sqrt S, \qquad R' = \sqrt S\, V^T

    so that L'^T L' = R' R'^T = S, in descending order. The largest entry of each column
    of U is positive. Costs two thin QRs and one r x r SVD.

    Args:
      left: L [m, r]; with flax kernels, the first of ``x @ A @ B``.
      right: R [r, n].

    Returns:
      L' and R', in the dtypes of L and R, computed in float32 or wider. Both as they
      were where the smallest singular value is 1e-6 of the largest or less: a direction
      that is zero in both factors has no gradient and would never come back.

    Raises:
      ValueError: for arrays that are no matrices or do not multiply.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> left, right = ox.refactorize(jnp.array([[8.0]]), jnp.array([[0.5]]))
      >>> print(left, right)
      [[2.]] [[2.]]
    """
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        raise ValueError(
            "refactorize: left [m, r] and right [r, n] must be matrices that multiply, "
            f"got shapes {left.shape} and {right.shape}"
        )
    if left.shape[1] > min(left.shape[0], right.shape[1]) or 0 in left.shape:
        return left, right  # the rank of the product is below r
    dtype = computing_dtype(left, right)
    q_left, r_left = jnp.linalg.qr(left.astype(dtype))
    q_right, r_right = jnp.linalg.qr(right.astype(dtype).T)
    u, s, vt = jnp.linalg.svd(r_left @ r_right.T)
    u, vt = q_left @ u, vt @ q_right.T
    largest = jnp.argmax(jnp.abs(u), axis=0, keepdims=True)
    sign = jnp.sign(jnp.take_along_axis(u, largest, axis=0))
    root = jnp.sqrt(s)[None, :]
    full_rank = s[-1] > 1e-6 * s[0]  # not so for NaN either
    new_left = jnp.where(full_rank, u * sign * root, left.astype(dtype))
    new_right = jnp.where(full_rank, (sign * root).T * vt, right.astype(dtype))
    return new_left.astype(left.dtype), new_right.astype(right.dtype)


class RefactorizeState(NamedTuple):
    """State of `refactorize_every`."""

    count: jax.Array
    inner_state: optax.OptState


@catalogued(
    title=_TITLE,
    arxiv="2505.22922",
    kind="wrapper",
    needs=("params",),
    state="that of inner",
    variant="with a reset of the inner state, whose moments live in the old factors.",
    compared="golden refactorize_every",
    example=lambda: {"inner": optax.trace(0.9)},
)
def refactorize_every(
    inner: optax.GradientTransformation,
    period: int = 200,
    pairs: Sequence[tuple[str, str]] = (),
    reset_inner: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Balance pairs of factors with `refactorize` after every `period` steps.

    .. math::
      (L, R) \leftarrow \text{refactorize}(L + u_L, R + u_R) \text{ after steps period},
      2\,\text{period}, \dots

    The emitted update takes the factors there, so this comes last: wrap a whole
    optimizer. Products change only by rounding; in bfloat16 that is 0.4% an entry.

    Args:
      inner: a whole optimizer.
      period: steps between refactorizations (200: the paper's best, as quoted).
      pairs: paths of the factors, ``((left, right), ...)``. A path is what
        `jax.tree_util.keystr` prints, ``"['block']['a']"``, or its keys joined by
        slashes, ``"block/a"``; a name alone is a path in a flat tree.
      reset_inner: whether the state of `inner` starts afresh, for all leaves, before
        the next step (`reset_state_every`).

    Returns:
      A link that needs params. Not for the inside of `bucketed`, which hides paths.

    Raises:
      ValueError: for pairs that are no pairs; at init for a path that names no leaf,
        with the paths that do; for factors that do not multiply.

    Example:
      >>> import jax.numpy as jnp, optax, optax_ext as ox
      >>> tx = ox.refactorize_every(optax.sgd(0.1), period=1, pairs=[("a", "b")])
      >>> x = {"a": jnp.array([[8.0]]), "b": jnp.array([[0.5]])}
      >>> zeros = optax.tree.zeros_like(x)
      >>> updates, _ = tx.update(zeros, tx.init(x), x)
      >>> print(optax.apply_updates(x, updates)["a"])
      [[2.]]
    """
    owner = "refactorize_every"
    check_interval(owner, period=period)
    pairs = tuple(pairs)
    for pair in pairs:
        if isinstance(pair, str) or [type(x) for x in pair] != [str, str]:
            raise ValueError(
                f"{owner}: pairs must hold pairs of paths such as (('left', 'right'),),"
                f" got {pair!r}"
            )
    if reset_inner:
        inner = reset_state_every(inner, period)
    inner = optax.with_extra_args_support(inner)

    def init(params):
        _places(params, pairs)
        return RefactorizeState(jnp.zeros([], jnp.int32), inner.init(params))

    def update(updates, state, params=None, **extra):
        check_params(owner, params)
        out, inner_state = inner.update(updates, state.inner_state, params, **extra)
        count = next_count(state.count)
        leaves, (old,), treedef = flatten_like(out, params, owner=owner)
        for i, j in _places(out, pairs):
            leaves[i], leaves[j] = jax.lax.cond(
                count % period == 0,
                _to_balance,
                lambda *given: given[:2],
                *(leaves[i], leaves[j], old[i], old[j]),
            )
        return treedef.unflatten(leaves), RefactorizeState(count, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _to_balance(u: Any, v: Any, left: Any, right: Any) -> tuple[Any, Any]:
    """Updates that lead from left and right to the factors of their next product."""
    dtype = computing_dtype(u, v, left, right)
    du, dv = u.astype(dtype), v.astype(dtype)
    a, b = left.astype(dtype) + du, right.astype(dtype) + dv
    new_a, new_b = refactorize(a, b)
    # Differences last: where the pair is left alone, exactly u and v.
    return (du + (new_a - a)).astype(u.dtype), (dv + (new_b - b)).astype(v.dtype)


def _places(params: Any, pairs: Sequence[tuple[str, str]]) -> list[tuple[int, int]]:
    """Numbers of the leaves that pairs of paths name."""
    number, paths = {}, []
    found = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_unit)
    for i, (path, leaf) in enumerate(found):
        if not is_hole(leaf):
            paths.append(jax.tree_util.keystr(path))
            number[jax.tree_util.keystr(path, simple=True, separator="/")] = i
            number[paths[-1]] = i
    for name in [name for pair in pairs for name in pair]:
        if name not in number:
            raise ValueError(
                f"refactorize_every: no leaf {name!r} to be seen; the paths are "
                f"{', '.join(paths) or 'none'}"
            )
    return [(number[left], number[right]) for left, right in pairs]

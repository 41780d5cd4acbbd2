"""Scalars recorded in the optimizer state, at any place of a chain.

What an optimizer does to a gradient is seen best from inside: before the clipping,
behind the preconditioner. `record` stands there and writes a few scalars into its
state, whose structure is the same before the first step and after the last, so that it
runs in `jax.lax.scan`, in checkpoints and under donation.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.checks import (
    check_choice,
    check_hyperparam,
    check_params,
    check_rate,
)
from optax_ext._core.geometry import tree_length
from optax_ext._core.leaves import next_count


class RecordState(NamedTuple):
    """State of `record`.

    Attributes:
      count: steps so far.
      scalars: float32 scalars by name, 0 before the first step.
      inner_state: state of the inner link.
    """

    count: jax.Array
    scalars: dict[str, jax.Array]
    inner_state: optax.OptState


def record(
    inner: optax.GradientTransformation | None = None,
    scalars: Sequence[str] = ("grad_norm", "update_norm"),
    *,
    name: str = "",
    max_norm: float | None = None,
    max_delta: float | None = None,
    decay: float = 0.99,
    functions: Mapping[str, Callable[..., Any]] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Record scalars about what goes into a link and what comes out.

    With g what enters, u what leaves, x the parameters, all norms over the whole tree:

    ========================= ======================================================
    ``grad_norm``             :math:`\lVert g \rVert`
    ``update_norm``           :math:`\lVert u \rVert`
    ``param_norm``            :math:`\lVert x \rVert`
    ``update_to_param_ratio`` :math:`\lVert u \rVert / \lVert x \rVert`, 0 where x is 0
    ``clip_fraction``         of the last steps, how many had
                              :math:`\lVert g \rVert > \text{max\_norm}`: a running mean
                              with weight max(1 - decay, 1/t) for step t. Recorded where
                              `max_norm` is given.
    ``clipped_entries``       of the entries of g at this step, how many have
                              :math:`|g_i| > \text{max\_delta}`. Recorded where
                              `max_delta` is given.
    ========================= ======================================================

    Args:
      inner: link to look at; None records what passes at this place of the chain, and
        g is u. Put it before a clipping link, with that link's `max_norm` or
        `max_delta`, or around it.
      scalars: which of the first four to record.
      name: prefix, "name/grad_norm", which tells several records apart.
      max_norm: limit of `optax.clip_by_global_norm`.
      max_delta: limit of `optax.clip`.
      decay: of the running mean in ``clip_fraction``, in [0, 1).
      functions: more scalars by name: functions called with the keywords ``grads``,
        ``updates``, ``params`` and all extra arguments of ``update``; write
        ``lambda updates, **_: ...``.

    Returns:
      A link that emits what `inner` emits. `recorded` reads its state.

    Raises:
      ValueError: for unknown scalars, names twice, limits below 0; at trace time for a
        function that returns no scalar, and without params where they are recorded.

    Example:
      >>> import jax.numpy as jnp, optax, optax_ext as ox
      >>> tx = optax.chain(
      ...     ox.record(name="raw", max_norm=1.0, scalars=["grad_norm"]),
      ...     ox.record(optax.clip_by_global_norm(1.0), ["update_norm"], name="clip"))
      >>> _, state = tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))
      >>> for key, value in ox.recorded(state).items():
      ...     print(key, value)
      clip/update_norm 1.0
      raw/clip_fraction 1.0
      raw/grad_norm 5.0
    """
    for scalar in scalars:
        check_choice("record", "scalars", scalar, _SCALARS)
    check_hyperparam("record", low=0.0, max_norm=max_norm, max_delta=max_delta)
    check_rate("record", decay=decay)
    measures: list[tuple[str, Callable[..., Any]]] = [
        *((scalar, _SCALARS[scalar]) for scalar in scalars),
        *(functions or {}).items(),
    ]
    if max_norm is not None:
        measures += [
            ("clip_fraction", lambda grads, **_: tree_length(grads) > max_norm)
        ]
    if max_delta is not None:
        measures += [("clipped_entries", lambda grads, **_: _beyond(grads, max_delta))]
    keys = [f"{name}/{key}" if name else key for key, _ in measures]
    if len(set(keys)) < len(keys):
        raise ValueError(f"record: a name occurs twice among {keys}")
    link = optax.with_extra_args_support(optax.identity() if inner is None else inner)

    def init(params):
        zeros = {key: jnp.zeros([], jnp.float32) for key in keys}
        return RecordState(jnp.zeros([], jnp.int32), zeros, link.init(params))

    def update(updates, state, params=None, **extra):
        out, inner_state = link.update(updates, state.inner_state, params, **extra)
        seen = {**extra, "grads": updates, "updates": out, "params": params}
        count = next_count(state.count)
        weight = jnp.maximum(1 - decay, 1 / count.astype(jnp.float32))
        written = {}
        for key, (measured, measure) in zip(keys, measures, strict=True):
            value = _scalar(key, measure(**seen))
            if measured == "clip_fraction" and max_norm is not None:
                value = state.scalars[key] + weight * (value - state.scalars[key])
            written[key] = value
        return out, RecordState(count, written, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def recorded(state: Any) -> dict[str, jax.Array]:
    """The scalars of all `record` links in an optimizer state.

    Args:
      state: any optimizer state.

    Returns:
      Scalars by name, in the order of names; empty where nothing was recorded.

    Raises:
      ValueError: if two records share a name.

    Example:
      >>> import jax.numpy as jnp, optax, optax_ext as ox
      >>> tx = optax.chain(ox.record(scalars=["grad_norm"]), optax.adam(1e-3))
      >>> ox.recorded(tx.init(jnp.zeros(2)))
      {'grad_norm': Array(0., dtype=float32)}
    """
    found: dict[str, jax.Array] = {}

    def visit(node):
        if isinstance(node, RecordState):
            twice = sorted(found.keys() & node.scalars.keys())
            if twice:
                raise ValueError(
                    f"recorded: two records share {', '.join(twice)}; "
                    "tell them apart with name="
                )
            found.update(node.scalars)
            collect(node.inner_state)

    def collect(tree):
        jax.tree.map(visit, tree, is_leaf=lambda x: isinstance(x, RecordState))

    collect(state)
    return dict(sorted(found.items()))


def _ratio(updates: Any, params: Any, **_: Any) -> jax.Array:
    check_params("record of update_to_param_ratio", params)
    norm = tree_length(params)
    ratio = tree_length(updates) / jnp.where(norm > 0, norm, jnp.ones_like(norm))
    return jnp.where(norm > 0, ratio, jnp.zeros_like(ratio))


def _param_norm(params: Any, **_: Any) -> jax.Array:
    check_params("record of param_norm", params)
    return tree_length(params)


def _beyond(tree: Any, limit: Any) -> jax.Array:
    """Fraction of the entries of a tree whose magnitude is above a limit."""
    leaves = jax.tree.leaves(tree)
    size = sum(x.size for x in leaves)
    above = [jnp.sum(jnp.abs(x).astype(jnp.float32) > limit) for x in leaves]
    return sum(above, jnp.zeros([], int)).astype(jnp.float32) / max(size, 1)


def _scalar(key: str, value: Any) -> jax.Array:
    array = jnp.asarray(value)
    if array.shape:
        raise ValueError(
            f"record: the function {key!r} must return a scalar, got {array.shape}"
        )
    return array.astype(jnp.float32)


_SCALARS: dict[str, Callable[..., Any]] = {
    "grad_norm": lambda grads, **_: tree_length(grads),
    "update_norm": lambda updates, **_: tree_length(updates),
    "param_norm": _param_norm,
    "update_to_param_ratio": _ratio,
}

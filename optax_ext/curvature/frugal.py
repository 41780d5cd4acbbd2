r"""FRUGAL: Adam on a rotating part of each gradient, signs on the rest.

A gradient G is split into a part that lies in a small subspace and the rest. The part
goes through Adam, whose moments are as small as the subspace; the rest, which has no
state, is replaced by its sign. Known methods are corners of it: density 1 is Adam,
density 0 signSGD, a rest of 0 with the leading singular vectors GaLore.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_choice, check_hyperparam, check_interval
from optax_ext._core.keys import key_state
from optax_ext._core.leaves import init_leaves, map_leaves, next_count
from optax_ext._core.matrices import as_matrix
from optax_ext._core.optimizers import adam_direction, finish
from optax_ext._core.trees import Bucket, flatten_like, is_hole, is_unit, treated
from optax_ext.curvature._subspace import adam_step, small_side_first

_TITLE = (
    "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable "
    "Training"
)
_COORDINATES = ("in_features", "out_features", "randk")
_PROJECTIONS = ("svd", "random_projection")
_SELECTIONS = (*_COORDINATES, *_PROJECTIONS, "blockwise")
_ORDERS = ("random", "ascending", "descending")
_STATE_FREE = {"sign": jnp.sign, "sgd": lambda x: x, "none": jnp.zeros_like}


def _split_axis_first(selection: str, x: jax.Array, part: Any) -> tuple[Any, Any]:
    """The matrix of a leaf whose axis 0 is split, and the way back to the leaf."""
    if part is None:
        return x, lambda y: y
    if selection == "randk":
        return x.reshape(-1, 1), lambda y: y.reshape(x.shape)
    if selection in _PROJECTIONS:
        return small_side_first(x)
    if selection == "out_features":
        return as_matrix(x).T, lambda y: y.T.reshape(x.shape)
    return as_matrix(x), lambda y: y.reshape(x.shape)


def _low_slots(selection: str, p: jax.Array, density: float) -> tuple[Any, ...]:
    """Count, moments and part of a leaf that is split."""
    if p.ndim == 0:
        raise ValueError("a scalar cannot be split: leave it out of project_mask")
    x, _ = _split_axis_first(selection, p, ())
    rounded = round if selection in _PROJECTIONS else math.floor
    k = max(rounded(x.shape[0] * density), 1)
    part = jnp.arange(k, dtype=jnp.int32)
    if selection in _PROJECTIONS:
        part = jnp.eye(x.shape[0], k, dtype=p.dtype)
    shape = k, x.shape[1]
    return (
        jnp.zeros([], jnp.int32),
        jnp.zeros(shape, p.dtype),
        jnp.zeros(shape, p.dtype),
        part,
    )


def _chosen(size: int, k: int, turn: jax.Array, order: str, key: Any) -> jax.Array:
    """The k of `size` indices that have their turn, sorted."""
    if order == "random":
        return jnp.sort(jax.random.permutation(key, size)[:k].astype(jnp.int32))
    # turn * k modulo size repeats: the remainder of turn keeps the product small.
    start = turn % (size // math.gcd(size, k)) * k
    window = (start + jnp.arange(k, dtype=jnp.int32)) % size
    return jnp.sort(size - 1 - window if order == "descending" else window)


def _new_part(
    selection: str, order: str, turn: jax.Array, part: Any, g: jax.Array, key: Any
) -> Any:
    """Indices, or orthonormal columns: leading singular vectors of g, or random."""
    if part is None:
        return None
    x, _ = _split_axis_first(selection, g, part)
    if selection in _COORDINATES:
        return _chosen(x.shape[0], part.size, turn, order, key)
    if selection == "random_projection":
        return jnp.linalg.qr(jax.random.normal(key, part.shape, x.dtype))[0]
    largest = jnp.max(jnp.abs(x))
    x = x / jnp.where(largest > 0, largest, 1)
    return jnp.linalg.svd(x, full_matrices=False)[0][:, : part.shape[1]]


def _down(part: Any, x: jax.Array) -> jax.Array:
    if part is None:
        return x
    return x[part] if part.ndim == 1 else part.T @ x


def _up(part: Any, low: jax.Array, x: jax.Array) -> jax.Array:
    if part is None:
        return low
    return jnp.zeros_like(x).at[part].set(low) if part.ndim == 1 else part @ low


def _only(mask: Any, wanted: bool, tree: Any) -> Any:
    """The tree with None where the mask says something else."""
    return jax.tree.map(
        lambda keep, x: x if bool(keep) is wanted else None, mask, tree, is_leaf=is_unit
    )


def _merge(tree: Any, other: Any) -> Any:
    """The tree with what it lacks taken from another one."""
    return jax.tree.map(
        lambda x, y: y if x is None else x, tree, other, is_leaf=is_unit
    )


def _numbers(updates: Any, mask: Any) -> tuple[Any, int]:
    """A number for each leaf that is split, in tree order, and how many there are."""
    leaves, (keep,), treedef = flatten_like(updates, mask)
    numbers, n = [], 0
    for leaf, is_split in zip(leaves, keep, strict=True):
        if is_hole(leaf) or not is_split:
            numbers.append(None)
        elif isinstance(leaf, Bucket):
            rows = len(leaf.stack)
            numbers.append(Bucket(jnp.arange(n, n + rows, dtype=jnp.int32)))
            n += rows
        else:
            numbers.append(jnp.asarray(n, jnp.int32))
            n += 1
    return treedef.unflatten(numbers), n


class FrugalState(NamedTuple):
    """State of `scale_by_frugal`.

    `steps` counts what went into the moments of each leaf. `part` is what Adam sees of
    a leaf: indices or an orthonormal basis, None where it sees all of it.
    """

    count: jax.Array
    key: jax.Array
    steps: optax.Updates
    mu: optax.Updates
    nu: optax.Updates
    part: optax.Updates


@catalogued(
    title=_TITLE,
    arxiv="2411.07837",
    kind="link",
    state="2 * density; 2 with 'blockwise', and for leaves that are not split",
    slots=0.5,
    variant="the official code; input features by default, while its scripts take "
    "whole blocks, whose moments cannot be freed inside jit.",
    compared="goldens frugal_blockwise, frugal_in_features, frugal_svd",
)
def scale_by_frugal(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    density: Any = 0.25,
    update_interval: int = 200,
    selection: str = "in_features",
    order: str = "random",
    state_free: str = "sign",
    state_free_scale: float = 1.0,
    reset_state: bool = True,
    project_mask: Any = None,
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam on a rotating part of each gradient, a stateless rule on the rest.

    With P the projection on the chosen part of the matrix G [in, out]:

    .. math::
      u_t = \text{Adam}(P G_t) + s\, \varphi(G_t - P G_t)

    ==================== ==================================== ==========================
    selection            part                                 size of each moment
    ==================== ==================================== ==========================
    "in_features"        rows of G: some inputs               density of the leaf
    "out_features"       columns of G: some outputs           density of the leaf
    "randk"              single entries                       density of the leaf
    "svd"                span of leading singular vectors     density of the leaf
    "random_projection"  a random subspace                    density of the leaf
    "blockwise"          all of some leaves, none of others   the leaf
    ==================== ==================================== ==========================

    The two projections split the smaller side, and store its basis besides. Every
    selection has at least one row, entry or vector a leaf, but for "blockwise".

    Args:
      b1: decay rate of the first moment, in [0, 1) (official).
      b2: decay rate of the second moment, in [0, 1) (official).
      eps: added to the root of the second moment (official).
      density: share of rows, columns, entries, directions or leaves that Adam sees, in
        [0, 1]; a Python number, for it decides shapes (official: 0.25).
      update_interval: steps between choices of a new part (official: 200).
      selection: a row of the table.
      order: "random" draws a part from the key; "ascending" and "descending" walk
        through the indices or leaves in turn. The projections do not use it.
      state_free: rule for the rest: "sign" (official), "sgd" (identity) or "none" (0).
      state_free_scale: s, relative to Adam's part (official: 1; 0.1 for fine-tuning).
      reset_state: whether moments and Adam's count start anew with every new part. If
        not, slot j of the old part becomes slot j of the new one, and the moments of
        leaves that "blockwise" leaves out wait.
      project_mask: tree of booleans, or a function of a tree that makes one: which
        leaves are split. The others get Adam. None splits those of rank 2 or more;
        official scripts leave embeddings and the head out too.
      key: where random parts start; None is ``jax.random.key(0)``.

    Returns:
      A link that emits the un-negated direction.

    Raises:
      ValueError: for hyper-parameters outside their range, unknown choices, or leaves
        of rank 0 to be split.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> tx = ox.scale_by_frugal(density=0.5, order="ascending")
      >>> g = jnp.array([[0.1, -0.1], [0.0, 7.0]])
      >>> updates, state = tx.update(g, tx.init(g))
      >>> print(updates.round(3), state.mu.shape)
      [[ 1. -1.]
       [ 0.  1.]] (1, 2)
    """
    owner = "scale_by_frugal"
    adam = adam_direction(owner, b1, b2, eps, 0.0, None)
    if not isinstance(density, int | float):
        raise ValueError(
            f"{owner}: density must be a Python number, got {type(density).__name__}; "
            "it decides shapes and cannot be traced"
        )
    check_hyperparam(owner, low=0.0, high=1.0, density=density)
    check_hyperparam(owner, state_free_scale=state_free_scale)
    check_interval(owner, update_interval=update_interval)
    check_choice(owner, "selection", selection, _SELECTIONS)
    check_choice(owner, "order", order, _ORDERS)
    check_choice(owner, "state_free", state_free, _STATE_FREE)
    data, impl = key_state(key)
    in_blocks, rule = selection == "blockwise", _STATE_FREE[state_free]

    def init_split(p):
        whole = jnp.zeros([], jnp.int32), jnp.zeros_like(p), jnp.zeros_like(p), None
        return whole if in_blocks else _low_slots(selection, p, density)

    def init_whole(p):
        return jnp.zeros([], jnp.int32), jnp.zeros_like(p), jnp.zeros_like(p), None

    def init(params):
        mask = treated(project_mask, params)
        split = init_leaves(init_split, _only(mask, True, params), 4)
        whole = init_leaves(init_whole, _only(mask, False, params), 4)
        steps, mu, nu, part = map(_merge, split, whole)
        count = jnp.zeros([], jnp.int32)
        return FrugalState(count, jnp.array(data), steps, mu, nu, part)

    def update(updates, state, params=None, **extra):
        del params, extra
        mask = treated(project_mask, updates)
        numbers, n = _numbers(updates, mask)
        turn, anew = state.count // update_interval, state.count % update_interval == 0
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key, impl=impl), turn)
        active = jnp.zeros(n, bool)
        if in_blocks and n:
            now = _chosen(n, round(n * density), turn, order, key)
            active = active.at[now].set(True)

        def choose(g, slots, number):
            own = None if number is None else jax.random.fold_in(key, number)
            return g, (_new_part(selection, order, turn, slots[0], g, own),)

        def choose_all():
            return map_leaves(choose, updates, (state.part,), (numbers,), owner=owner)

        def step(g, slots, part, number, is_split):
            if is_split and reset_state:
                slots = jax.tree.map(lambda x: jnp.where(anew, 0, x), slots)
            x, back = _split_axis_first(selection, g, part)
            seen = _down(part, x)
            steps, *moments = slots
            u, *moments = adam_step(adam, seen, moments[0], moments[1], steps)
            new = steps + 1, *moments
            seen, u = _up(part, seen, x), _up(part, u, x)
            if is_split and in_blocks:
                on = active[number]
                new = jax.tree.map(lambda x, old: jnp.where(on, x, old), new, slots)
                seen, u = jnp.where(on, seen, 0), jnp.where(on, u, 0)
            return back(u + state_free_scale * rule(x - seen)), new

        part = state.part
        if not in_blocks:
            part = jax.lax.cond(anew, lambda: choose_all()[1][0], lambda: part)
        slots, others = (state.steps, state.mu, state.nu), (part, numbers, mask)
        out, slots = map_leaves(step, updates, slots, others, owner=owner)
        (steps, mu, nu), count = slots, next_count(state.count)
        return out, FrugalState(count, state.key, steps, mu, nu, part)

    return optax.GradientTransformationExtraArgs(init, update)


@catalogued(
    title=_TITLE,
    arxiv="2411.07837",
    kind="optimizer",
    needs=("params",),
    state="2 * density; 2 with 'blockwise', and for leaves that are not split",
    slots=0.5,
    variant="decay multiplied by the learning rate; input features by default.",
    compared="goldens frugal_blockwise, frugal_in_features, frugal_svd",
    example=lambda: {"learning_rate": 0.01},
)
def frugal(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float = 0.0,
    mask: Any = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    density: Any = 0.25,
    update_interval: int = 200,
    selection: str = "in_features",
    order: str = "random",
    state_free: str = "sign",
    state_free_scale: float = 1.0,
    reset_state: bool = True,
    project_mask: Any = None,
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam on a rotating part of each gradient and signs on the rest, with decay.

    .. math:: x_t = x_{t-1} - \eta_t (u_t + \lambda x_{t-1})

    with u of `scale_by_frugal`. Both parts take the same learning rate.

    Args:
      learning_rate: number or schedule.
      weight_decay: decoupled decay, multiplied by the learning rate (official: 0).
      mask: which leaves decay, as in `optax.add_decayed_weights`.
      b1: decay rate of the first moment, in [0, 1).
      b2: decay rate of the second moment, in [0, 1).
      eps: added to the root of the second moment.
      density: share that Adam sees, as in `scale_by_frugal`.
      update_interval: steps between choices of a new part.
      selection: what a part is, as in `scale_by_frugal`.
      order: "random", "ascending" or "descending".
      state_free: rule for the rest: "sign", "sgd" or "none".
      state_free_scale: size of the rest relative to Adam's part.
      reset_state: whether moments start anew with every new part.
      project_mask: which leaves are split; None is those of rank 2 or more.
      key: where random parts start; None is ``jax.random.key(0)``.

    Returns:
      A finished optimizer.

    Raises:
      ValueError: for hyper-parameters outside their range, or unknown choices.

    Example:
      >>> import jax, jax.numpy as jnp, optax_ext as ox
      >>> tx = ox.frugal(1e-3, density=0.25)
      >>> state = jax.eval_shape(tx.init, jnp.zeros((64, 64)))
      >>> sum(x.size for x in jax.tree.leaves(state) if x.dtype == "float32") / 64**2
      0.5
    """
    return finish(
        scale_by_frugal(
            b1,
            b2,
            eps,
            density,
            update_interval,
            selection,
            order,
            state_free,
            state_free_scale,
            reset_state,
            project_mask,
            key,
        ),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        mask=mask,
        owner="frugal",
    )

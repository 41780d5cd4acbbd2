r"""Sketched gradients: send s numbers instead of d.

A random matrix R [s, d] with :math:`E[R^\top R] = I` makes a sketch :math:`R g` of a
gradient that is small to send, adds up over workers, and gives back an unbiased
:math:`R^\top R g`. Nobody stores R: workers draw the same one from key and step. A
`SketchOperator` is R as two functions.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_choice, check_hyperparam, check_interval
from optax_ext._core.flat import FlatView
from optax_ext._core.keys import key_state
from optax_ext._core.leaves import next_count

_PAPER: dict[str, Any] = {
    "title": "Sketching for First Order Method: Efficient Algorithm for Low-Bandwidth "
    "Channel and Vulnerability",
    "arxiv": "2210.08371",
}
_BLOCK = 32  # rows of a Gaussian matrix that exist at one time


class SketchOperator(NamedTuple):
    """A matrix R: ``sketch`` is v -> R v, ``restore`` is y -> R' y, shape (s, d)."""

    sketch: Callable[[jax.Array], jax.Array]
    restore: Callable[[jax.Array], jax.Array]
    shape: tuple[int, int]


@catalogued(
    **_PAPER,
    kind="helper",
    needs=("bucket", "sign"),
    variant="one bucket and one sign a coordinate.",
    compared="golden sketch_countsketch",
    example=lambda: {
        "bucket": jnp.array([0, 1, 0]),
        "sign": jnp.array([1.0, 1.0, -1.0]),
        "sketch_dim": 2,
    },
)
def countsketch_operator(
    bucket: jax.Array, sign: jax.Array, sketch_dim: int
) -> SketchOperator:
    """Add coordinates, with signs, into buckets: R[bucket[j], j] = sign[j].

    Args:
      bucket: integers in [0, sketch_dim), [d].
      sign: +1 or -1, [d].
      sketch_dim: s, the number of buckets.

    Returns:
      An operator for `sketch_gradients`; it costs d additions.

    Raises:
      ValueError: for a `bucket` that is no vector of integers, or a `sign` of another
        shape.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> r = ox.countsketch_operator(
      ...     jnp.array([0, 1, 0]), jnp.array([1.0, 1.0, -1.0]), sketch_dim=2)
      >>> y = r.sketch(jnp.array([5.0, 2.0, 1.0]))
      >>> print(y, r.restore(y))
      [4. 2.] [ 4.  2. -4.]
    """
    check_interval("countsketch_operator", sketch_dim=sketch_dim)
    bucket, sign = jnp.asarray(bucket), jnp.asarray(sign)
    is_index = bucket.ndim == 1 and jnp.issubdtype(bucket.dtype, jnp.integer)
    if not is_index or sign.shape != bucket.shape:
        raise ValueError(
            "countsketch_operator: bucket and sign must be vectors of one length, "
            f"bucket of integers, got {bucket.dtype} {bucket.shape} and {sign.shape}"
        )
    return SketchOperator(
        lambda v: jax.ops.segment_sum(sign.astype(v.dtype) * v, bucket, sketch_dim),
        lambda y: sign.astype(y.dtype) * y[bucket],
        (sketch_dim, bucket.size),
    )


@catalogued(
    **_PAPER,
    kind="helper",
    needs=("matrix",),
    variant="a matrix that is given.",
    compared="closed form: R' R g",
    example=lambda: {"matrix": jnp.eye(2, 3)},
)
def gaussian_operator(matrix: jax.Array) -> SketchOperator:
    """A given matrix as an operator; its entries are N(0, 1/s) in the paper.

    Args:
      matrix: R, [s, d].

    Returns:
      An operator for `sketch_gradients`.

    Raises:
      ValueError: if `matrix` has not rank 2.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> r = ox.gaussian_operator(jnp.array([[1.0, 2.0]]))
      >>> print(r.sketch(jnp.array([3.0, 1.0])), r.restore(jnp.array([5.0])))
      [5.] [ 5. 10.]
    """
    matrix = jnp.asarray(matrix)
    if matrix.ndim != 2:
        raise ValueError(
            f"gaussian_operator: matrix must be [s, d], got shape {matrix.shape}"
        )
    return SketchOperator(
        lambda v: matrix.astype(v.dtype) @ v,
        lambda y: matrix.astype(y.dtype).T @ y,
        (matrix.shape[0], matrix.shape[1]),
    )


def _countsketch(key: jax.Array, s: int, d: int) -> SketchOperator:
    where, which = jax.random.split(key)
    bucket = jax.random.randint(where, (d,), 0, s)
    sign = jax.random.rademacher(which, (d,), jnp.int8)
    return countsketch_operator(bucket, sign, s)


def _gaussian(key: jax.Array, s: int, d: int) -> SketchOperator:
    """Rows are drawn again where they are used: the matrix is never there."""

    def row(i, dtype):
        entries = jax.random.normal(jax.random.fold_in(key, i), (d,), dtype)
        return entries / math.sqrt(s)

    def sketch(v):
        return jax.lax.map(
            lambda i: jnp.vdot(row(i, v.dtype), v), jnp.arange(s), batch_size=_BLOCK
        )

    def restore(y):
        def add(i, total):
            return total + y[i] * row(i, y.dtype)

        return jax.lax.fori_loop(0, s, add, jnp.zeros((d,), y.dtype))

    return SketchOperator(sketch, restore, (s, d))


def _hadamard(x: jax.Array) -> jax.Array:
    """The orthonormal Hadamard matrix times x, whose length is a power of 2."""
    size, width = x.size, 1
    while width < size:
        pairs = x.reshape(-1, 2, width)
        x = jnp.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1)
        width *= 2
    return x.reshape(size) / math.sqrt(size)


def _srht(key: jax.Array, s: int, d: int) -> SketchOperator:
    """Signs, a Hadamard matrix, and some of its rows."""
    padded = 1 << (d - 1).bit_length()
    s = min(s, padded)
    where, which = jax.random.split(key)
    rows = jax.random.choice(where, padded, (s,), replace=False)
    sign = jax.random.rademacher(which, (d,), jnp.int8)
    scale = math.sqrt(padded / s)

    def sketch(v):
        return (
            scale * _hadamard(jnp.pad(sign.astype(v.dtype) * v, (0, padded - d)))[rows]
        )

    def restore(y):
        spread = jnp.zeros((padded,), y.dtype).at[rows].set(y)
        return scale * sign.astype(y.dtype) * _hadamard(spread)[:d]

    return SketchOperator(sketch, restore, (s, d))


_KINDS = {"countsketch": _countsketch, "gaussian": _gaussian, "srht": _srht}


class SketchState(NamedTuple):
    """State of `sketch_gradients`: the key does not change, the count does."""

    count: jax.Array
    key: jax.Array


@catalogued(
    **_PAPER,
    kind="link",
    slots=0,
    variant="one vector of all leaves, a new matrix each step, or one that is given.",
    compared="golden sketch_countsketch; mean and variance in closed form",
    example=lambda: {"sketch_dim": 32},
)
def sketch_gradients(
    sketch_dim: int | None = None,
    kind: str = "countsketch",
    noise_std: float = 0.0,
    operator: SketchOperator | None = None,
    key: jax.Array | None = None,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replace the gradient by what a random sketch of it keeps.

    With g all leaves as one vector of d numbers and a new R [s, d] at each step:

    .. math:: \text{out} = R^\top (R g + \sigma \xi), \qquad \xi \sim N(0, I_s)

    Without bias, but with much variance: for a Gaussian R, :math:`E \|\text{out}\|^2 =
    (1 + (d + 1) / s) \|g\|^2`, for a CountSketch :math:`1 + (d - 1) / s`. The learning
    rate must shrink by about s / d. Memory is a few vectors of d numbers in one place:
    gradients that are sharded are gathered.

    Args:
      sketch_dim: s, numbers sent a step.
      kind: how R is drawn: "countsketch" (one +-1 a column; d operations), "gaussian"
        (N(0, 1/s); d s operations, R is never stored) or "srht" (rows of a Hadamard
        matrix with random signs; d log d).
      noise_std: sigma, Gaussian noise on the sketch, for differential privacy of
        clipped gradients.
      operator: a fixed R in place of `sketch_dim` and `kind`: `countsketch_operator`,
        `gaussian_operator`, or a `SketchOperator` of your own.
      key: where R and noise are drawn from, with the step; None is
        ``jax.random.key(0)``. All workers must have the same.
      axis_name: a mapped axis (`jax.shard_map`, `jax.pmap`) over which to average the
        sketches before R' is applied; then only s numbers are sent. The noise of each
        worker is its own.

    Returns:
      A link.

    Raises:
      ValueError: unless exactly one of `sketch_dim` and `operator` is given, for an
        unknown kind or negative noise; at trace time for an operator of another size.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> r = ox.gaussian_operator(jnp.array([[1.0, 0.0], [0.0, 0.0]]))
      >>> tx, g = ox.sketch_gradients(operator=r), jnp.array([3.0, 4.0])
      >>> print(tx.update(g, tx.init(g))[0])
      [3. 0.]
    """
    owner = "sketch_gradients"
    check_choice(owner, "kind", kind, _KINDS)
    check_hyperparam(owner, low=0.0, noise_std=noise_std)
    if (sketch_dim is None) == (operator is None):
        raise ValueError(
            f"{owner}: give either sketch_dim (a new operator each step) or operator"
        )
    if sketch_dim is not None:
        check_interval(owner, sketch_dim=sketch_dim)
    data, impl = key_state(key)

    def init(params):
        del params
        return SketchState(jnp.zeros([], jnp.int32), jnp.array(data))

    def operator_of(key, size):
        if sketch_dim is not None:
            return _KINDS[kind](key, sketch_dim, size)
        assert operator is not None
        if operator.shape[1] != size:
            raise ValueError(
                f"{owner}: the operator takes {operator.shape[1]} numbers, the "
                f"gradients have {size}"
            )
        return operator

    def update(updates, state, params=None, **extra):
        del params, extra
        view, after = FlatView(updates, owner), next_count(state.count)
        if not view.size:
            return updates, SketchState(after, state.key)
        now = jax.random.wrap_key_data(state.key, impl=impl)
        draw, noise = jax.random.split(jax.random.fold_in(now, state.count))
        r = operator_of(draw, view.size)
        if axis_name is not None:
            noise = jax.random.fold_in(noise, jax.lax.axis_index(axis_name))
        y = r.sketch(view.to(updates))
        y += jnp.asarray(noise_std, y.dtype) * jax.random.normal(
            noise, y.shape, y.dtype
        )
        if axis_name is not None:
            y = jax.lax.pmean(y, axis_name)
        return view.back(r.restore(y)), SketchState(after, state.key)

    return optax.GradientTransformationExtraArgs(init, update)

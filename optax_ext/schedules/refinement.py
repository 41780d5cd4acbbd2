"""A schedule from the gradient norms of an earlier run of the same training.

`record_grad_norms` keeps the norms of the first run, `grad_norms` reads them from its
last state, and `refined_schedule` makes the learning rates of the next run of them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import ArrayLike

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_choice, check_hyperparam, check_interval
from optax_ext._core.geometry import tree_length
from optax_ext._core.leaves import next_count
from optax_ext._core.trees import computing_dtype

_TITLE = "When, Why and How Much? Adaptive Learning Rate Scheduling by Refinement"
_ARXIV = "2310.07831"


class GradNormsState(NamedTuple):
    """State of `record_grad_norms`."""

    count: jax.Array
    norms: jax.Array


@catalogued(
    title=_TITLE,
    arxiv=_ARXIV,
    kind="schedule",
    variant="the closed form after a median filter, as the authors' script.",
    compared="goldens refined_schedule_sgd, refined_schedule_adam",
    example=lambda: {"grad_norms": [3.0, 2.5, 2.0, 1.2, 1.0, 1.1, 0.9, 0.9]},
)
def refined_schedule(
    grad_norms: ArrayLike,
    peak_value: float = 1.0,
    kind: str = "adam",
    smooth: float = 0.1,
) -> optax.Schedule:
    r"""The schedule that a run's own gradient norms ask for.

    With :math:`\bar G_t` the median of the norms in a window of about ``smooth * n``
    steps around t:

    .. math::
      w_t = \bar G_t^{-2} \text{ ("sgd", l2 norms) or } \bar G_t^{-1} \text{ ("adam",
      l1 norms)}, \qquad s_t = w_t \sum_{q > t} w_q, \qquad
      \eta_t = \text{peak} \cdot s_t / \max_q s_q

    Constant norms give linear decay, and the last value is 0. Without norms take
    `optax.linear_schedule`, the paper's advice.

    Args:
      grad_norms: norms of the run's gradients [n], n of 2 or more. Norms that are 0 or
        not finite are replaced by the straight line between their neighbours. For a run
        of another length, resample the norms first
        (``np.interp(np.linspace(0, 1, m), np.linspace(0, 1, n), norms)``).
      peak_value: largest value of the schedule.
      kind: "adam" for methods that normalise the gradient, "sgd" for those that do not.
      smooth: share of the steps in the window of the median, in [0, 1] (paper); 0
        takes the norms as they are.

    Returns:
      A schedule, computed once; after step n - 1 it is 0.

    Raises:
      ValueError: for an unknown `kind`, values outside their range, or fewer than two
        norms that are finite and above 0.

    Example:
      >>> import optax_ext as ox
      >>> rate = ox.refined_schedule([1.0] * 11)
      >>> print(f"{rate(0):.1f} {rate(5):.1f} {rate(10):.1f}")
      1.0 0.5 0.0
    """
    check_choice("refined_schedule", "kind", kind, ("adam", "sgd"))
    check_hyperparam("refined_schedule", low=0.0, high=1.0, smooth=smooth)
    check_hyperparam("refined_schedule", low=0.0, peak_value=peak_value)
    norms = _smoothed(_filled(np.asarray(grad_norms, np.float64)), smooth)
    # Only ratios matter, so divide first: tiny norms cannot overflow.
    w = (norms / norms.min()) ** (-2 if kind == "sgd" else -1)
    s = w * np.append(np.cumsum(w[:0:-1])[::-1], 0.0)
    table = s / s.max()

    def schedule(count):
        step = jnp.clip(jnp.asarray(count), 0, len(table) - 1).astype(int)
        return peak_value * jnp.asarray(table, float)[step]

    return schedule


def _filled(norms: np.ndarray) -> np.ndarray:
    """The norms, with a straight line through those that are 0 or not finite."""
    if norms.ndim != 1:
        raise ValueError(
            f"refined_schedule: grad_norms must have shape [n], got {norms.shape}"
        )
    good = np.flatnonzero(np.isfinite(norms) & (norms > 0))
    if len(good) < 2:
        raise ValueError(
            "refined_schedule: grad_norms must hold two or more norms that are finite "
            f"and above 0, got {len(good)} among {len(norms)}"
        )
    return np.interp(np.arange(len(norms)), good, norms[good])


def _smoothed(norms: np.ndarray, smooth: float) -> np.ndarray:
    """Medians of windows; the left end is repeated, the right end reflected."""
    half = int(smooth * len(norms)) // 2
    width = 2 * half + 1
    padded = np.pad(np.pad(norms, (0, 2 * width), "reflect"), (half, 0), "edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, width)
    return np.median(windows[: len(norms)], axis=-1)


@catalogued(
    title=_TITLE,
    arxiv=_ARXIV,
    kind="link",
    state="none (num_steps floats in all)",
    slots=0,
    variant="norm of the whole tree.",
    compared="closed form",
    example=lambda: {"num_steps": 4},
)
def record_grad_norms(
    num_steps: int, ord: int = 2
) -> optax.GradientTransformationExtraArgs:
    r"""Keep the norm of every step's gradient; the gradient passes unchanged.

    .. math:: \text{norms}[t] = \lVert g_t \rVert_{\text{ord}}, \qquad
      t = 0, 1, \dots, \text{num\_steps} - 1

    Put it first in the chain, where it sees the raw gradient. It never changes shape,
    so it runs inside `jax.lax.scan`.

    Args:
      num_steps: how many norms to keep; later ones are dropped.
      ord: 1, which `refined_schedule` needs for kind="adam", or 2, for kind="sgd".

    Returns:
      A link that emits its updates unchanged; read its state with `grad_norms`.

    Raises:
      ValueError: for another `ord` or `num_steps` below 1.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> tx, g = ox.record_grad_norms(3, ord=1), jnp.array([3.0, -4.0])
      >>> updates, state = tx.update(g, tx.init(g))
      >>> print(updates, ox.grad_norms(state))
      [ 3. -4.] [7. 0. 0.]
    """
    check_interval("record_grad_norms", num_steps=num_steps)
    if ord not in (1, 2):
        raise ValueError(f"record_grad_norms: ord must be 1 or 2, got {ord!r}")

    def init(params):
        wide = computing_dtype(*(jax.tree.leaves(params) or [jnp.zeros([])]))
        dtype = jnp.finfo(wide).dtype  # real also of complex leaves
        return GradNormsState(jnp.zeros([], jnp.int32), jnp.zeros(num_steps, dtype))

    def update(updates, state, params=None, **extra):
        del params, extra
        sizes = jax.tree.map(jnp.abs, updates)
        norm = _total(sizes) if ord == 1 else tree_length(sizes)
        norms = state.norms.at[state.count].set(
            norm.astype(state.norms.dtype), mode="drop"
        )
        return updates, GradNormsState(next_count(state.count), norms)

    return optax.GradientTransformationExtraArgs(init, update)


def _total(tree: Any) -> jax.Array:
    """Sum of all entries of a tree, in float32 or wider."""
    leaves = jax.tree.leaves(tree) or [jnp.zeros([])]
    wide = computing_dtype(*leaves)
    return jnp.sum(jnp.stack([jnp.sum(leaf.astype(wide)) for leaf in leaves]))


@catalogued(
    title=_TITLE,
    arxiv=_ARXIV,
    kind="helper",
    variant="the buffer as it is; steps not yet taken are 0.",
    compared="closed form",
    example=lambda: {"state": record_grad_norms(4).init({})},
)
def grad_norms(state: optax.OptState) -> jax.Array:
    r"""The norms that `record_grad_norms` kept, from the state of any chain.

    .. math:: \text{norms}[t] = \lVert g_t \rVert_{\text{ord}}, \text{ and } 0
      \text{ for steps not yet taken}

    Args:
      state: an optimizer state with one `GradNormsState` in it, however deep.

    Returns:
      The norms [num_steps], in float32 (float64 for float64 parameters).

    Raises:
      ValueError: if there is none, or more than one.

    Example:
      >>> import jax.numpy as jnp, optax, optax_ext as ox
      >>> tx = optax.chain(ox.record_grad_norms(2), optax.adam(1e-3))
      >>> params = {"w": jnp.ones(4)}
      >>> _, state = tx.update(params, tx.init(params))
      >>> print(ox.grad_norms(state))
      [2. 0.]
    """

    def is_record(node):
        return isinstance(node, GradNormsState)

    found = [x for x in jax.tree.leaves(state, is_leaf=is_record) if is_record(x)]
    if len(found) != 1:
        raise ValueError(
            f"grad_norms: the state holds {len(found)} GradNormsState, not one: chain "
            "record_grad_norms once, or pass the part of the state that is meant"
        )
    return found[0].norms

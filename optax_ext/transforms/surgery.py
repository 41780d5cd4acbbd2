r"""Gradient surgery: keep one gradient out of the way of another.

Two losses share parameters, or two tasks follow each other. Adding their gradients lets
the second undo the first. Surgery removes from one gradient what lies along the other:

* `bloop` has both gradients at once, and removes from the auxiliary one what lies along
  a moving average of the main one;
* `project_out_subspace` has only a memory of the first task: for each layer a basis of
  the inputs that it saw (`update_gradient_memory`). A gradient without components in
  that space leaves the outputs on those inputs as they were.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_choice, check_hyperparam
from optax_ext._core.extra_args import require
from optax_ext._core.geometry import inner_product, tree_length
from optax_ext._core.leaves import init_leaves, map_leaves, next_count
from optax_ext._core.trees import computing_dtype, is_hole, is_unit


class BloopState(NamedTuple):
    """State of `bloop`."""

    count: jax.Array
    mu: optax.Updates


@catalogued(
    title="Careful with that Scalpel: Improving Gradient Surgery with an EMA",
    arxiv="2402.02998",
    kind="link",
    needs=("aux_grads",),
    state="1 (average of the main gradient)",
    slots=1,
    variant="average updated before the projection; 'zeros' as the official README; "
    "the function says 'grad', and the training scripts pass it the parameters.",
    compared="golden bloop",
)
def bloop(
    aux_weight: float = 0.1,
    ema_rate: float = 0.01,
    eps: float = 1e-7,
    init: str = "zeros",
    max_ratio: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Add an auxiliary gradient without its part along the main gradient's average.

    With g the main and a the auxiliary gradient, inner products over the whole tree:

    .. math::
      m_t = m_{t-1} + \rho (g_t - m_{t-1}), \qquad
      r = \frac{\langle m_t, a_t \rangle}{\langle m_t, m_t \rangle + \epsilon}, \qquad
      \text{out} = g_t + \lambda (a_t - r\, m_t)

    The auxiliary loss then moves the parameters along the valley of the main one only.
    Put it first in the chain, weight decay behind it.

    Args:
      aux_weight: lambda, the weight of the auxiliary gradient (official default).
      ema_rate: rho, the weight of the new gradient in the average, in [0, 1] (released
        experiments; the official function's default is 0.1). 1 projects on the present
        gradient, which in noise is close to plainly adding the two.
      eps: added to the squared length of the average (official default).
      init: average before the first step: "zeros", or "grad" for the first gradient.
        It matters through `eps` only, and in how the first gradients are weighted.
      max_ratio: upper bound of r; ``1 / aux_weight`` gives the Dynamic Barrier method
        of the same repository. None has no bound.

    Returns:
      A link that needs the extra argument ``aux_grads``, a tree like the updates.

    Raises:
      ValueError: for arguments outside their range; in `update` without ``aux_grads``.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> tx, x = ox.bloop(aux_weight=0.5), jnp.zeros(2)
      >>> g, a = jnp.array([1.0, 0.0]), jnp.array([-4.0, 2.0])
      >>> print(tx.update(g, tx.init(x), aux_grads=a)[0].round(2))
      [1. 1.]
    """
    check_hyperparam("bloop", aux_weight=aux_weight)
    check_hyperparam("bloop", low=0.0, high=1.0, ema_rate=ema_rate)
    check_hyperparam("bloop", low=0.0, eps=eps, max_ratio=max_ratio)
    check_choice("bloop", "init", init, ("zeros", "grad"))

    def init_fn(params):
        (mu,) = init_leaves(lambda p: (jnp.zeros_like(p),), params, 1)
        return BloopState(jnp.zeros([], jnp.int32), mu)

    def update(updates, state, params=None, **extra):
        del params
        aux_grads = require("bloop", extra, "aux_grads")

        def average(g, slots):
            (m,) = slots
            if init == "grad":
                m = jnp.where(state.count == 0, g, m)
            return g, (m + ema_rate * (g - m),)

        def add(g, slots, u, a):
            return g + aux_weight * (a - along.astype(g.real.dtype) * u), slots

        (mu,) = map_leaves(average, updates, (state.mu,), owner="bloop")[1]
        # r m = along * unit, in which no square of m overflows or underflows.
        unit, norm = _unit(updates, mu)
        shrink = 1 / (1 + (eps**0.5 / norm) ** 2)
        along = shrink * inner_product(unit, aux_grads, "bloop")
        if max_ratio is not None:
            along = jnp.minimum(along, max_ratio * norm)
        out, _ = map_leaves(add, updates, (), (unit, aux_grads), owner="bloop")
        return out, BloopState(next_count(state.count), mu)

    return optax.GradientTransformationExtraArgs(init_fn, update)


def _unit(updates: Any, mu: Any) -> tuple[Any, jax.Array]:
    """`mu` over its length, where `updates` has no hole, and that length or 1."""
    seen = jax.tree.map(
        lambda g, m: g if is_hole(g) else m, updates, mu, is_leaf=is_unit
    )
    norm = tree_length(seen)
    norm = jnp.where(norm > 0, norm, 1)
    return jax.tree.map(lambda m: m / norm.astype(m.real.dtype), seen), norm


@catalogued(
    title="Maintaining Adversarial Robustness in Continuous Learning",
    arxiv="2402.11196",
    kind="link",
    needs=("bases",),
    slots=0,
    variant="the projection of Gradient Projection Memory (arXiv:2103.09762), which "
    "the paper applies with more columns: those that keep old input gradients.",
    compared="golden project_out_subspace",
)
def project_out_subspace(
    zero_unlisted: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Remove from each gradient what lies in the span of a given basis.

    With M the basis of a leaf, [fan_in, r] with orthonormal columns, and G the gradient
    as a matrix [fan_in, out]:

    .. math:: \text{out} = G - M (M^\top G)

    A layer so updated maps inputs in the span of M to what it mapped them to before.
    That holds for plain SGD behind it. Momentum from before the task, Adam and weight
    decay leave the complement: place a second copy after the optimizer.

    Args:
      zero_unlisted: whether leaves without a basis emit zero (Gradient Projection
        Memory does so with biases from the second task on), or pass unchanged.

    Returns:
      A link without state that needs the extra argument ``bases``: a tree like params,
      each entry None or M; None alone where no leaf has one. Rows of M are in the order
      of ``leaf.reshape(fan_in, -1)``, for a convolution kernel (height, width, in).
      Zero columns do nothing, so padding with them keeps shapes static from task to
      task. Inside `bucketed`, leaves of one shape need bases of one shape.

    Raises:
      ValueError: in `update` without ``bases``, or for a basis whose rows do not divide
        the leaf.

    Example:
      >>> import jax, jax.numpy as jnp, optax_ext as ox
      >>> tx, g = ox.project_out_subspace(), jnp.ones((2, 3))
      >>> basis = jnp.array([[1.0], [0.0]])
      >>> print(tx.update(g, tx.init(g), bases=basis)[0])
      [[0. 0. 0.]
       [1. 1. 1.]]
    """
    owner = "project_out_subspace"

    def rule(g, slots, basis):
        if basis is None or basis.shape[0] == 0:
            return (jnp.zeros_like(g) if zero_unlisted else g), slots
        matrix = g.reshape(basis.shape[0], -1)
        inside = jnp.matmul(basis.T, matrix, precision="highest")
        outside = matrix - jnp.matmul(basis, inside, precision="highest")
        return outside.reshape(g.shape), slots

    def update(updates, state, params=None, **extra):
        del params
        # None is a tree without any basis, and not an argument left out.
        bases = extra["bases"] if "bases" in extra else require(owner, extra, "bases")
        return map_leaves(rule, updates, (), (bases,), owner=owner)[0], state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update
    )


@catalogued(
    title="Gradient Projection Memory for Continual Learning",
    arxiv="2103.09762",
    kind="helper",
    needs=("activations",),
    variant="the fewest columns that reach the threshold, as the paper's Eq. 5; the "
    "official code takes one fewer for the first task.",
    compared="golden update_gradient_memory",
    example=lambda: {"bases": None, "activations": {"kernel": np.eye(3, 4)}},
)
def update_gradient_memory(
    bases: Any, activations: Any, threshold: float = 0.95
) -> Any:
    r"""Extend the bases of `project_out_subspace` by what a task's inputs span.

    With R the inputs of a layer and M its old basis, :math:`H = R - M M^\top R` is what
    M misses. With singular values S of H, the leading left singular vectors of H are
    appended to M, as few as give

    .. math:: |R|^2 - |H|^2 + \textstyle\sum_i S_i^2 \ge \text{threshold}\, |R|^2

    and none where M reaches that alone. It runs on the host, in float64, after a task.

    Args:
      bases: tree like `activations` of old bases, or None before the first task. An
        entry that is None has no columns yet.
      activations: tree with a matrix R [fan_in, samples] for each layer, rows in the
        order of ``kernel.reshape(fan_in, -1)``. Where it is None, the old entry stays:
        give it the structure of the parameters, and so will be the bases.
      threshold: share of the squared length of R to keep, in (0, 1]. Gradient
        Projection Memory uses 0.95 to 0.99, raised a little from task to task.

    Returns:
      Tree of bases [fan_in, r], in the dtype of `activations`, float32 at least.

    Raises:
      ValueError: for a `threshold` outside (0, 1], or activations that are no matrix
        or have not the rows of their basis.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> seen = jnp.array([[2.0, 4.0], [0.0, 0.0]])
      >>> print(abs(ox.update_gradient_memory(None, seen)))
      [[1.]
       [0.]]
    """
    check_hyperparam(
        "update_gradient_memory", low=0.0, open_low=True, high=1.0, threshold=threshold
    )
    layers, treedef = jax.tree.flatten(activations, is_leaf=lambda x: x is None)
    old = [None] * len(layers) if bases is None else treedef.flatten_up_to(bases)
    return treedef.unflatten(
        [
            basis if inputs is None else _extended(basis, inputs, threshold)
            for basis, inputs in zip(old, layers, strict=True)
        ]
    )


def _extended(basis: Any, activations: Any, threshold: float) -> jax.Array:
    """The basis of one layer with the columns that its new inputs ask for."""
    inputs = np.asarray(activations, np.float64)
    if inputs.ndim != 2 or (basis is not None and len(basis) != len(inputs)):
        raise ValueError(
            "update_gradient_memory: activations must be matrices [fan_in, samples] "
            f"with the rows of their basis, got shape {inputs.shape}"
            + (f" and a basis of shape {basis.shape}" if basis is not None else "")
        )
    fan_in = len(inputs)
    old = np.zeros((fan_in, 0)) if basis is None else np.asarray(basis, np.float64)
    missed = inputs - old @ (old.T @ inputs)
    vectors, values, _ = np.linalg.svd(missed, full_matrices=False)
    known = np.sum(inputs**2) - np.sum(missed**2)
    reached = known + np.concatenate([[0.0], np.cumsum(values**2)])
    added = np.sum(reached < threshold * np.sum(inputs**2))
    columns = np.concatenate([old, vectors[:, :added]], axis=1)[:, :fan_in]
    return jnp.asarray(columns, computing_dtype(activations))

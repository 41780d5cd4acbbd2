r"""Learning rates for another batch size, and from the curvature.

Noise of variance :math:`\sigma^2 / B` in the entries of a Hessian of P parameters lifts
its largest eigenvalue from :math:`\lambda_1` to the edge of a spiked random matrix.
Where noise dominates, the edge falls as :math:`B^{-1/2}`, and the learning rate that
goes with it grows as the root of the batch; where the curvature dominates, neither
changes.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_choice, check_hyperparam, check_interval

_RANDOM_MATRIX = (
    "Learning Rates as a Function of Batch Size: A Random Matrix Theory Approach to "
    "Neural Network Training"
)


@catalogued(
    title="Train longer, generalize better: closing the generalization gap in large "
    "batch training of neural networks",
    arxiv="1705.08741",
    kind="schedule",
    variant="the rate only; ghost batch norm is a layer.",
    compared="golden sqrt_batch_scaled",
    example=lambda: {
        "schedule": optax.cosine_decay_schedule(0.1, 100),
        "batch_size": 512,
        "base_batch_size": 128,
    },
)
def sqrt_batch_scaled(
    schedule: optax.ScalarOrSchedule, batch_size: float, base_batch_size: float
) -> optax.ScalarOrSchedule:
    r"""The learning rate of one batch size, for another.

    .. math:: \eta'_t = \sqrt{B / B_0}\; \eta_t

    The paper also keeps the number of *updates* (a schedule in update steps does), and
    its code clips the global norm of the gradient at 5.

    Args:
      schedule: learning rate for `base_batch_size`, a number or a schedule.
      batch_size: B, examples in a batch.
      base_batch_size: B_0, examples in a batch of the run that `schedule` is from.

    Returns:
      A number for a number, a schedule for a schedule.

    Raises:
      ValueError: for batch sizes that are not above 0.

    Example:
      >>> import optax_ext as ox
      >>> ox.sqrt_batch_scaled(0.1, batch_size=512, base_batch_size=128)
      0.2
    """
    owner = "sqrt_batch_scaled"
    check_hyperparam(owner, low=0.0, open_low=True, batch_size=batch_size)
    check_hyperparam(owner, low=0.0, open_low=True, base_batch_size=base_batch_size)
    check_hyperparam(owner, schedule=schedule)
    scale = math.sqrt(batch_size / base_batch_size)
    if not callable(schedule):
        return scale * schedule

    def scaled(count):
        # The widest integer, and standard promotion: see at_step in _core.leaves.
        with jax.numpy_dtype_promotion("standard"):
            return scale * jnp.asarray(schedule(jnp.asarray(count).astype(int)), float)

    return scaled


@catalogued(
    title=_RANDOM_MATRIX,
    arxiv="2006.09092",
    kind="helper",
    variant="linear for SGD, sqrt for adaptive methods, rmt by the edge.",
    compared="golden scale_lr_by_batch",
    example=lambda: {"base_lr": 0.1, "base_batch": 128, "batch": 512},
)
def scale_lr_by_batch(
    base_lr: float,
    base_batch: float,
    batch: float,
    rule: str = "linear",
    lam1: float | None = None,
    noise_var: float | None = None,
    n_params: int | None = None,
    dataset_size: int | None = None,
) -> float:
    r"""The learning rate for another batch size.

    .. math::
      \eta = \eta_0 \cdot \begin{cases}
        B / B_0 & \text{"linear": SGD} \\
        \sqrt{B / B_0} & \text{"sqrt": adaptive methods} \\
        \text{edge}(B_0) / \text{edge}(B) & \text{"rmt"}
      \end{cases}

    with the edge of `batch_hessian_edge`. "rmt" is the "sqrt" rule where noise
    dominates, and keeps the rate where curvature does.

    Args:
      base_lr: learning rate that is right for `base_batch`.
      base_batch: B_0, examples in a batch.
      batch: B, examples in a batch.
      rule: "linear", "sqrt" or "rmt".
      lam1: for "rmt": largest eigenvalue of the Hessian of the whole data.
      noise_var: for "rmt": variance of an entry of one example's Hessian.
      n_params: for "rmt": number of parameters.
      dataset_size: for "rmt": number of examples; None for infinitely many.

    Returns:
      The learning rate.

    Raises:
      ValueError: for an unknown rule, what "rmt" lacks, or values outside their range.

    Example:
      >>> import optax_ext as ox
      >>> ox.scale_lr_by_batch(0.1, 128, 512, rule="sqrt")
      0.2
    """
    owner = "scale_lr_by_batch"
    check_choice(owner, "rule", rule, ("linear", "sqrt", "rmt"))
    check_hyperparam(owner, low=0.0, base_lr=base_lr)
    check_hyperparam(owner, low=0.0, open_low=True, base_batch=base_batch, batch=batch)
    if rule == "linear":
        return base_lr * batch / base_batch
    if rule == "sqrt":
        return base_lr * math.sqrt(batch / base_batch)
    if lam1 is None or noise_var is None or n_params is None:
        raise ValueError(f"{owner}: rule='rmt' needs lam1, noise_var and n_params")
    model = (lam1, noise_var, n_params, dataset_size)
    edge = batch_hessian_edge(batch, *model)
    if edge == 0:
        raise ValueError(
            f"{owner}: without curvature (lam1 = 0) and noise at batch = {batch} there "
            "is no largest stable learning rate"
        )
    return base_lr * batch_hessian_edge(base_batch, *model) / edge


@catalogued(
    title=_RANDOM_MATRIX,
    arxiv="2006.09092",
    kind="helper",
    variant="one spike, noise of a Gaussian orthogonal ensemble.",
    compared="golden scale_lr_by_batch; Monte Carlo",
    example=lambda: {"batch": 50, "lam1": 5.0, "noise_var": 1.0, "n_params": 400},
)
def batch_hessian_edge(
    batch: float,
    lam1: float,
    noise_var: float,
    n_params: int,
    dataset_size: int | None = None,
) -> float:
    r"""Largest eigenvalue of a batch's Hessian, expected from that of all the data.

    .. math::
      \frac1b = \frac1B - \frac1N, \qquad e = \sqrt{P \sigma^2 / b}, \qquad
      \text{edge} = \begin{cases} \lambda_1 + e^2 / \lambda_1 & \lambda_1 > e \\
        2 e & \text{else} \end{cases}

    Args:
      batch: B, examples in a batch.
      lam1: largest eigenvalue of the Hessian of the whole data, 0 or more.
      noise_var: variance of an entry of one example's Hessian.
      n_params: P, number of parameters.
      dataset_size: N, number of examples, `batch` or more; None for infinitely many.

    Returns:
      The edge, in the units of `lam1`.

    Raises:
      ValueError: for values outside their range.

    Example:
      >>> import optax_ext as ox
      >>> ox.batch_hessian_edge(batch=4, lam1=8.0, noise_var=4.0, n_params=16)
      10.0
    """
    owner = "batch_hessian_edge"
    check_hyperparam(owner, low=0.0, open_low=True, batch=batch)
    check_hyperparam(owner, low=0.0, lam1=lam1, noise_var=noise_var, n_params=n_params)
    check_hyperparam(owner, low=float(batch), dataset_size=dataset_size)
    whole = 0.0 if dataset_size is None else 1 / dataset_size
    e = math.sqrt(n_params * noise_var * (1 / batch - whole))
    return lam1 + e**2 / lam1 if lam1 > e else 2 * e


@catalogued(
    title=_RANDOM_MATRIX,
    arxiv="2006.09092",
    kind="helper",
    variant="heavy-ball optimum for the extreme Ritz values; that choice is ours.",
    compared="closed form",
    example=lambda: {
        "hvp_fn": lambda v: v,
        "params": jnp.ones(2),
        "key": jax.random.key(0),
    },
)
def lanczos_lr_and_momentum(
    hvp_fn: Callable[[Any], Any],
    params: Any,
    key: jax.Array,
    num_iters: int = 10,
    damping: float = 0.0,
) -> tuple[float, float]:
    r"""Learning rate and momentum from the ends of the Hessian's spectrum.

    Lanczos from a random direction, fully reorthogonalised; with L the largest Ritz
    value and :math:`\mu` the smallest above the noise floor:

    .. math::
      \eta = \frac{4}{(\sqrt L + \sqrt\mu)^2}, \qquad
      m = \left( \frac{\sqrt L - \sqrt\mu}{\sqrt L + \sqrt\mu} \right)^2

    It runs step by step in Python, not inside `jax.jit`; jit `hvp_fn`.

    Args:
      hvp_fn: v -> H v, both trees like params:
        ``lambda v: jax.jvp(jax.grad(loss), (params,), (v,))[1]``.
      params: tree that says what v looks like.
      key: for the random start.
      num_iters: products to take; never more than there are parameters.
      damping: curvature below which directions do not count. Whatever it is, Ritz
        values below 1e-12 L do not (in float32: 10 roundings of L).

    Returns:
      Learning rate and momentum, as floats.

    Raises:
      ValueError: if no curvature above `damping` was met.

    Example:
      >>> import jax, jax.numpy as jnp, optax_ext as ox
      >>> h = jnp.array([10.0, 0.1])
      >>> lr, m = ox.lanczos_lr_and_momentum(
      ...     lambda v: h * v, jnp.zeros(2), jax.random.key(0))
      >>> print(f"{lr:.4f} {m:.4f}")
      0.3306 0.6694
    """
    owner = "lanczos_lr_and_momentum"
    check_interval(owner, num_iters=num_iters)
    check_hyperparam(owner, low=0.0, damping=damping)
    flat, unravel = ravel_pytree(params)
    rounding = float(jnp.finfo(flat.dtype).eps)

    def product(q):
        return np.asarray(
            ravel_pytree(hvp_fn(unravel(jnp.asarray(q, flat.dtype))))[0], np.float64
        )

    start = np.asarray(jax.random.normal(key, flat.shape), np.float64)
    ritz = _ritz_values(product, start, min(num_iters, flat.size), rounding)
    largest = ritz.max(initial=0.0)
    kept = ritz[ritz > max(damping, max(1e-12, 10 * rounding) * largest)]
    if not len(kept):
        raise ValueError(
            f"{owner}: no curvature above damping = {damping} among {ritz.tolist()}"
        )
    low, high = math.sqrt(kept.min()), math.sqrt(largest)
    return 4 / (high + low) ** 2, ((high - low) / (high + low)) ** 2


def _ritz_values(
    product: Callable[[np.ndarray], np.ndarray],
    start: np.ndarray,
    num_iters: int,
    rounding: float,
) -> np.ndarray:
    """Eigenvalues of the tridiagonal matrix of Lanczos, ended where nothing is left."""
    basis, diagonal, off = np.empty((0, start.size)), [], []
    q, size = start / np.linalg.norm(start), 0.0
    for _ in range(num_iters):
        basis = np.vstack([basis, q])
        r = product(q)
        size = max(size, float(np.linalg.norm(r)))
        diagonal.append(q @ r)
        for _ in range(2):  # once is not enough where much cancels
            r = r - basis.T @ (basis @ r)
        off.append(np.linalg.norm(r))
        if off[-1] <= 10 * rounding * size:
            break
        q = r / off[-1]
    links = off[: len(diagonal) - 1]
    return np.linalg.eigvalsh(
        np.diag(diagonal) + np.diag(links, 1) + np.diag(links, -1)
    )

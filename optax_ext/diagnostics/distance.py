"""How far the weights have come from where they started."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from optax_ext._core.catalogue import catalogued


class LogFit(NamedTuple):
    """Result of `weight_distance_log_fit`."""

    slope: float
    intercept: float
    r_squared: float


@catalogued(
    title="Train longer, generalize better: closing the generalization gap in large "
    "batch training of neural networks",
    arxiv="1705.08741",
    kind="diagnostic",
    variant="least squares on the natural logarithm of the step.",
    compared="closed form",
    example=lambda: {"steps": [1, 10, 100], "distances": [0.1, 0.5, 0.9]},
)
def weight_distance_log_fit(steps: ArrayLike, distances: ArrayLike) -> LogFit:
    r"""Fit the distance from the initial weights to the logarithm of the step.

    .. math:: \lVert w_t - w_0 \rVert \approx a \ln t + b

    The paper's random walk on a random potential: the fit is good in the first phase of
    training, and the slopes of two batch sizes agree where their learning rates fit.

    Args:
      steps: steps t [n], counted from 1.
      distances: distances at these steps [n].

    Returns:
      Slope a, intercept b, and the share :math:`R^2` of the variance that is explained
      (1 where the distances do not vary).

    Raises:
      ValueError: for arrays of different or no length, steps below 1, or fewer than two
        different steps.

    Example:
      >>> import optax_ext as ox
      >>> fit = ox.weight_distance_log_fit([1, 10, 100], [1.0, 2.0, 3.0])
      >>> print(f"{fit.slope:.4f} {fit.intercept:.4f} {fit.r_squared:.4f}")
      0.4343 1.0000 1.0000
    """
    t, y = np.asarray(steps, np.float64), np.asarray(distances, np.float64)
    if t.ndim != 1 or t.shape != y.shape:
        raise ValueError(
            "weight_distance_log_fit: steps and distances must have one shape [n], got "
            f"{t.shape} and {y.shape}"
        )
    if len(np.unique(t)) < 2 or t.min() < 1:
        raise ValueError(
            "weight_distance_log_fit: steps must hold two or more different steps, "
            f"counted from 1, got {t.tolist()}"
        )
    x = np.log(t) - np.log(t).mean()
    slope = x @ (y - y.mean()) / (x @ x)
    residual, spread = y - y.mean() - slope * x, y - y.mean()
    total = spread @ spread
    r_squared = 1 - residual @ residual / total if total > 0 else 1.0
    intercept = y.mean() - slope * np.log(t).mean()
    return LogFit(float(slope), float(intercept), float(r_squared))

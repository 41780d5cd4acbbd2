"""Power laws through the losses of models of several sizes."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from optax_ext._core.catalogue import catalogued


class ScalingLaw(NamedTuple):
    """Result of `fit_scaling_law`: loss = a * size**b + c."""

    a: float
    b: float
    c: float


@catalogued(
    title="Research without Re-search: Maximal Update Parametrization Yields Accurate "
    "Loss Prediction across Scales",
    arxiv="2304.06875",
    kind="diagnostic",
    variant="the exponent is scanned and the rest solved, so no start is needed.",
    compared="golden fit_scaling_law (SciPy)",
    example=lambda: {"sizes": [1, 2, 4, 8], "losses": [4.0, 3.5, 3.25, 3.125]},
)
def fit_scaling_law(sizes: ArrayLike, losses: ArrayLike) -> ScalingLaw:
    r"""Fit a power law with a floor to losses at several model sizes.

    .. math:: \min_{a, b, c} \sum_i (a N_i^b + c - L_i)^2, \qquad 10^{-3} \le |b| \le 8

    For given b, the best a and c are those of a straight line; b is found by a scan and
    a golden-section search.

    Args:
      sizes: N [n], numbers of parameters in any unit, above 0.
      losses: L [n].

    Returns:
      a (per unit of the sizes to the power b), b and c.

    Raises:
      ValueError: for arrays of different shapes, sizes that are not above 0, values
        that are not finite, or fewer than three different sizes.

    Example:
      >>> import optax_ext as ox
      >>> law = ox.fit_scaling_law([1, 2, 4, 8], [4.0, 3.5, 3.25, 3.125])
      >>> print(f"{law.a:.4f} {law.b:.4f} {law.c:.4f}")
      1.0000 -1.0000 3.0000
    """
    x, y = np.asarray(sizes, np.float64), np.asarray(losses, np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(
            "fit_scaling_law: sizes and losses must have one shape [n], got "
            f"{x.shape} and {y.shape}"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all() and (x > 0).all()):
        raise ValueError(
            "fit_scaling_law: sizes must be above 0, and all values finite"
        )
    if len(np.unique(x)) < 3:
        raise ValueError(
            "fit_scaling_law: three coefficients need three or more different sizes"
        )
    middle = np.exp(np.log(x).mean())

    def line(b):
        """Best a (in units of the middle size) and c for b, and what they leave."""
        powers = (x / middle) ** b
        u, v = powers - powers.mean(), y - y.mean()
        a = u @ v / (u @ u)
        return a, y.mean() - a * powers.mean(), np.sum((v - a * u) ** 2)

    found = [_least(lambda size, sign=sign: line(sign * size)[2]) for sign in (-1, 1)]
    b = -found[0] if line(-found[0])[2] <= line(found[1])[2] else found[1]
    a, c, _ = line(b)
    return ScalingLaw(float(a * middle**-b), float(b), float(c))


def _least(f: Callable[[float], float]) -> float:
    """Where in [1e-3, 8] a function is least: a scan, then a golden-section search."""
    grid = np.geomspace(1e-3, 8.0, 200)
    best = int(np.argmin([f(x) for x in grid]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    ratio = (np.sqrt(5) - 1) / 2
    for _ in range(80):
        inner = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, inner[1]) if f(inner[0]) < f(inner[1]) else (inner[0], high)
    return float((low + high) / 2)

"""The ends of the Hessian's spectrum: how sharp a minimum is, and whether it is one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_interval
from optax_ext._core.flat import FlatView
from optax_ext._core.lanczos import lanczos
from optax_ext.curvature.products import hvp


class ExtremeEigenvalues(NamedTuple):
    """Result of `hessian_extreme_eigenvalues`."""

    smallest: jax.Array
    largest: jax.Array


@catalogued(
    title="Escaping Saddle Points for Effective Generalization on Class-Imbalanced "
    "Data",
    arxiv="2212.13827",
    kind="diagnostic",
    needs=("value_fn", "params"),
    variant="Lanczos from a Gaussian vector, orthogonalised twice.",
    compared="dense eigenvalues",
    example=lambda: {"value_fn": lambda x: jnp.sum(x**4), "params": jnp.arange(3.0)},
)
def hessian_extreme_eigenvalues(
    value_fn: Callable[[Any], jax.Array],
    params: Any,
    num_iters: int = 20,
    key: jax.Array | None = None,
) -> ExtremeEigenvalues:
    r"""The smallest and the largest eigenvalue of the Hessian, by Lanczos.

    The largest, the *sharpness*, is what sharpness-aware training lowers, and gradient
    descent is stable for learning rates below 2 over it. A smallest one clearly below
    0 says that the point is no minimum.

    Both are eigenvalues of the Hessian on a Krylov space, and so never beyond the true
    ones; ends of the spectrum that stand apart are found first.

    Args:
      value_fn: params -> scalar, on one batch or on one class of it.
      params: where the Hessian is taken.
      num_iters: size of the Krylov space, and number of Hessian-vector products; no
        more than there are parameters are made.
      key: key of the first vector; None is ``jax.random.key(0)``.

    Returns:
      The two eigenvalues, in float32 or wider.

    Raises:
      ValueError: for `num_iters` below 1.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> found = ox.hessian_extreme_eigenvalues(
      ...     lambda x: jnp.sum(jnp.array([-1.0, 2.0, 5.0]) * x**2) / 2, jnp.ones(3))
      >>> print(f"{found.smallest:.2f} {found.largest:.2f}")
      -1.00 5.00
    """
    check_interval("hessian_extreme_eigenvalues", num_iters=num_iters)
    view = FlatView(params, "hessian_extreme_eigenvalues")
    key = jax.random.key(0) if key is None else key
    start = jax.random.normal(key, (view.size,), view.dtype)
    product = hvp(view.function(value_fn, params))
    point = view.to(params)
    rank = min(num_iters, view.size)
    _, matrix = lanczos(lambda v: product(point, v), start, rank)
    values = jnp.linalg.eigvalsh(matrix)
    return ExtremeEigenvalues(values[0], values[-1])

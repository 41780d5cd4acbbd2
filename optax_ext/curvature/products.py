r"""Products of a curvature matrix and a vector, built once from the caller's functions.

No link forms a matrix where a product will do. Three closures, ``(params, vector) ->
tree like params``:

* `hvp` of ``value_fn``: the Hessian, about two gradients, either sign.
* `gnvp` of ``logits_fn`` and a convex loss: the Gauss-Newton matrix, never negative.
* `finite_difference_hvp` of ``grad_fn``: the Hessian where the gradient is all there
  is, two gradients.

`hvp_probe` draws the vector too. The estimators of this package are written with them.
Under `jax.jit` on sharded arrays the products are those of the whole batch.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.checks import check_choice, check_hyperparam
from optax_ext._core.geometry import tree_length
from optax_ext._core.trees import computing_dtype

Product = Callable[[Any, Any], Any]
"""(params, vector) -> matrix times vector, all three trees of one structure."""

PROBES = {"rademacher": jax.random.rademacher, "gaussian": jax.random.normal}
"""Distributions with mean 0 and covariance 1."""


def hvp(value_fn: Callable[[Any], jax.Array]) -> Product:
    r"""Hessian-vector products of a function of params.

    .. math:: (x, v) \mapsto \nabla^2 f(x)\, v = \partial_v \nabla f(x)

    Forward over reverse: about two gradients, and no matrix.

    Args:
      value_fn: params -> scalar.

    Returns:
      ``(params, vector) -> tree like params``; vector has the dtypes of params.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> product = ox.hvp(lambda x: x[0] ** 2 * x[1])
      >>> print(product(jnp.array([2.0, 3.0]), jnp.array([1.0, 0.0])))
      [6. 4.]
    """
    gradient = jax.grad(value_fn)
    return lambda params, vector: jax.jvp(gradient, (params,), (vector,))[1]


def gnvp(logits_fn: Callable[[Any], Any], loss: Callable[[Any], jax.Array]) -> Product:
    r"""Products with the generalised Gauss-Newton matrix of a loss of logits.

    .. math:: (x, v) \mapsto J^\top H_L J v, \qquad
      J = \partial\, \text{logits} / \partial x, \quad H_L = \nabla^2 L(\text{logits})

    Positive semi-definite where the loss is convex in the logits; the Fisher matrix
    where it is a cross-entropy. One forward pass, one tangent, one backward pass.

    Args:
      logits_fn: params -> logits of the batch, an array or a tree.
      loss: logits -> scalar, with its mean over the batch.

    Returns:
      ``(params, vector) -> tree like params``; vector has the dtypes of params.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> product = ox.gnvp(lambda x: x**2, lambda z: jnp.sum(z**2) / 2)
      >>> print(product(jnp.array([1.0, 2.0]), jnp.ones(2)))
      [ 4. 16.]
    """

    def product(params, vector):
        logits, push = jax.linearize(logits_fn, params)
        pull = jax.linear_transpose(push, params)
        return pull(hvp(loss)(logits, push(vector)))[0]

    return product


def finite_difference_hvp(
    grad_fn: Callable[[Any], Any], step: float | None = None
) -> Product:
    r"""Hessian-vector products from central differences of a gradient.

    .. math:: (x, v) \mapsto
      \frac{\nabla f(x + h v) - \nabla f(x - h v)}{2 h}, \qquad
      h = \delta\, \frac{1 + |x|}{|v|}

    The error is :math:`h^2 / 6` times a fourth derivative, and the rounding of the
    gradient over h.

    Args:
      grad_fn: params -> tree like params, such as ``jax.grad(value_fn)``.
      step: :math:`\delta`, above 0; None is the cube root of the rounding unit of the
        coarsest leaf, 0.005 in float32.

    Returns:
      ``(params, vector) -> tree like params``; 0 for a vector of 0.

    Raises:
      ValueError: for a step that is not positive.

    Example:
      >>> import jax, jax.numpy as jnp, optax_ext as ox
      >>> product = ox.finite_difference_hvp(jax.grad(lambda x: jnp.sum(x**3)))
      >>> print(product(jnp.array([1.0, 2.0]), jnp.ones(2)).round(2))
      [ 6. 12.]
    """
    check_hyperparam("finite_difference_hvp", low=0.0, open_low=True, step=step)

    def product(params, vector):
        units = [float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(params)]
        delta = max(units, default=0.0) ** (1 / 3) if step is None else step
        norm = tree_length(vector)
        h = delta * (1 + tree_length(params)) / jnp.where(norm > 0, norm, 1)

        def gradient_at(shift):
            def move(p, v):
                wide = computing_dtype(p, v)
                moved = p.astype(wide) + shift.astype(wide) * v.astype(wide)
                return moved.astype(p.dtype)

            return grad_fn(jax.tree.map(move, params, vector))

        def quotient(above, below):
            wide = computing_dtype(above)
            slope = (above.astype(wide) - below.astype(wide)) / (2 * h.astype(wide))
            return slope.astype(above.dtype)

        return jax.tree.map(quotient, gradient_at(h), gradient_at(-h))

    return product


def hvp_probe(
    value_fn: Callable[[Any], jax.Array],
    params: Any,
    key: jax.Array,
    probe: str = "gaussian",
) -> tuple[Any, Any]:
    r"""The Hessian along one random vector, for links that take ``hvp`` and ``vector``.

    .. math:: (H z, z), \qquad E[z z^\top] = I

    Args:
      value_fn: params -> scalar.
      params: where the Hessian is taken.
      key: a new key at every step.
      probe: "gaussian" (N(0, 1)) or "rademacher" (+-1).

    Returns:
      The product and the vector, trees like params in its dtypes.

    Raises:
      ValueError: for an unknown probe.

    Example:
      >>> import jax, jax.numpy as jnp, optax_ext as ox
      >>> f = lambda x: jnp.sum(jnp.array([1.0, 4.0]) * x**2) / 2
      >>> product, z = ox.hvp_probe(f, jnp.ones(2), jax.random.key(0))
      >>> print(product / z)
      [1. 4.]
    """
    check_choice("hvp_probe", "probe", probe, tuple(PROBES))
    vector = optax.tree.random_like(key, params, PROBES[probe])
    return hvp(value_fn)(params, vector), vector

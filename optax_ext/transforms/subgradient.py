"""Subgradient steps of a length that falls geometrically, for sharp losses."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam
from optax_ext._core.geometry import tree_length
from optax_ext._core.leaves import map_leaves, next_count


class GeometricSubgradientState(NamedTuple):
    """State of `scale_by_geometric_subgradient`."""

    count: jax.Array


@catalogued(
    title="Global Convergence of Sub-gradient Method for Robust Matrix Recovery: Small "
    "Initialization, Noisy Measurements, and Over-parameterization",
    arxiv="2202.08788",
    kind="link",
    slots=0,
    variant="normalised by the gradient of the parameters; the paper's norm is that of "
    "the subgradient in the product U U', which comes as subgradient_norm.",
    compared="golden geometric_subgradient; closed form of the step length",
)
def scale_by_geometric_subgradient(
    decay: float = 0.99, normalize: bool = True
) -> optax.GradientTransformationExtraArgs:
    r"""Steps of the length decay^t in the direction of the gradient.

    .. math:: \text{out} = q^t \frac{g}{|g|}, \qquad t = 0, 1, \dots

    with the norm over the whole tree. The subgradient of a loss with a kink, such as
    :math:`|x|`, does not shrink near the minimum, so that the steps must; a path of
    them is at most :math:`\eta_0 / (1 - q)` long. A zero gradient gives 0, and counts.

    Args:
      decay: q in (0, 1]; it depends on the problem.
      normalize: whether to divide by the norm; False is decay alone.

    Returns:
      A link whose ``update`` takes the scalar ``subgradient_norm``, if given, for the
      norm.

    Raises:
      ValueError: for `decay` outside (0, 1].

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> tx = ox.scale_by_geometric_subgradient(decay=0.5)
      >>> state, g = tx.init(jnp.zeros(2)), jnp.array([3.0, 4.0])
      >>> for _ in range(2):
      ...     u, state = tx.update(g, state)
      >>> print(u)
      [0.3 0.4]
    """
    owner = "scale_by_geometric_subgradient"
    check_hyperparam(owner, low=0.0, high=1.0, open_low=True, decay=decay)

    def init(params):
        del params
        return GeometricSubgradientState(jnp.zeros([], jnp.int32))

    def update(updates, state, params=None, **extra):
        del params
        given: Any = extra.get("subgradient_norm")
        norm = tree_length(updates) if given is None else jnp.asarray(given)

        def rule(g, slots):
            step = decay ** state.count.astype(g.dtype)
            if not normalize:
                return step * g, slots
            n = norm.astype(g.dtype)
            return jnp.where(n == 0, 0, step * (g / jnp.where(n == 0, 1, n))), slots

        updates, _ = map_leaves(rule, updates, owner=owner)
        return updates, GeometricSubgradientState(next_count(state.count))

    return optax.GradientTransformationExtraArgs(init, update)

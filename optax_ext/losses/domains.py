"""Losses over several domains at once."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam
from optax_ext._core.trees import computing_dtype


@catalogued(
    title="Gradient Matching for Domain Generalization",
    arxiv="2104.09937",
    kind="helper",
    needs=("per_domain_losses_fn",),
    variant="exact, with second derivatives; `optax_ext.fish` approximates it.",
    compared="closed form on quadratics; the expansion of fish",
    example=lambda: {
        "per_domain_losses_fn": lambda x: jnp.stack([jnp.sum(x**2), jnp.sum(x)]),
        "gamma": 0.1,
    },
)
def idgm_loss(
    per_domain_losses_fn: Callable[..., jax.Array], gamma: float
) -> Callable[..., jax.Array]:
    r"""Reward gradients of the domains that point the same way.

    With S domains, losses L_i and their gradients G_i with respect to all parameters:

    .. math::
      L = \frac1S \sum_i L_i - \gamma\, \frac{2}{S(S-1)} \sum_{i<j} \langle G_i, G_j
      \rangle

    Its gradient costs S Hessian-vector products. One domain alone has no pairs.

    Args:
      per_domain_losses_fn: ``(params, *args) -> losses`` [domains].
      gamma: weight of the inner products; above 0 to align gradients.

    Returns:
      A function of the same arguments that returns a scalar, in float32 or wider.

    Raises:
      TypeError: for a `gamma` that is no number.
      AssertionError: at the call, if the losses are no vector.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> def losses(x):
      ...     return jnp.stack([jnp.sum(x**2), 3 * jnp.sum(x)])
      >>> print(ox.losses.idgm_loss(losses, gamma=0.5)(jnp.array([1.0, 2.0])))
      -2.0
    """
    check_hyperparam("idgm_loss", gamma=gamma)

    def loss_fn(params: Any, *args: Any, **kwargs: Any) -> jax.Array:
        def losses_of(params):
            losses = per_domain_losses_fn(params, *args, **kwargs)
            chex.assert_rank(
                losses, 1, custom_message="per_domain_losses_fn must return a vector"
            )
            return losses.astype(computing_dtype(losses))

        losses, pullback = jax.vjp(losses_of, params)
        n = losses.size
        (grads,) = jax.vmap(pullback)(jnp.eye(n, dtype=losses.dtype))
        gram = jnp.zeros((n, n), losses.dtype)
        for leaf in jax.tree.leaves(grads):
            rows = leaf.reshape(n, -1).astype(computing_dtype(losses, leaf))
            products = jnp.matmul(rows, rows.T, precision="highest")
            gram += products.astype(losses.dtype)
        agreement = jnp.sum(jnp.triu(gram, 1)) / max(n * (n - 1) / 2, 1)
        return jnp.mean(losses) - gamma * agreement

    return loss_fn

"""A penalty for leaving earlier parameters: continual learning without replay.

| you want | reach for |
|---|---|
| a term of the loss | `anchor_penalty` |
| its gradient, inside or outside of the preconditioning | `add_anchor_decay` |
| weights that say which parameters matter (EWC) | `diagonal_fisher` |
"""

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam
from optax_ext._core.trees import computing_dtype, flatten_like, is_hole


@catalogued(
    title="A Closer Look at Rehearsal-Free Continual Learning",
    arxiv="2203.17269",
    kind="loss",
    needs=("params", "anchor"),
    variant="L2, or EWC with a diagonal Fisher information, with the factor 1/2",
    compared="gradient of golden add_anchor_decay; joint optimum of two quadratics",
    example=lambda: {
        "params": jnp.array([1.0, -2.0, 0.5]),
        "anchor": jnp.array([0.5, -2.0, 0.0]),
        "strength": 0.1,
    },
)
def anchor_penalty(
    params: chex.ArrayTree,
    anchor: chex.ArrayTree,
    strength: chex.Numeric,
    *,
    fisher: chex.ArrayTree | None = None,
) -> jax.Array:
    r"""Weighted squared distance of parameters from earlier ones.

    .. math:: \frac{\lambda}{2} \sum_j F_j (x_j - a_j)^2

    Args:
      params: x, a tree of arrays. Leaves that are None or masked do not count.
      anchor: a, a tree like it. Detached.
      strength: lambda; it has no default in the paper.
      fisher: F, a tree like it, by default ones; see `diagonal_fisher`. Detached.

    Returns:
      The penalty, a scalar of float32 or wider.

    Raises:
      ValueError: for trees that differ.
      TypeError: for leaves that are no floats.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> x, a = {"w": jnp.array([1.0, 3.0])}, {"w": jnp.array([0.0, 1.0])}
      >>> print(ox.losses.anchor_penalty(x, a, 2.0))
      5.0
    """
    check_hyperparam("anchor_penalty", strength=strength)
    leaves, rest, _ = flatten_like(params, anchor, fisher, owner="anchor_penalty")
    parts = []
    for x, a, f in zip(leaves, *rest, strict=True):
        if is_hole(x):
            continue
        arrays = [x, a] if f is None else [x, a, f]
        chex.assert_equal_shape(arrays, custom_message="params, anchor, fisher")
        dtype = computing_dtype(*arrays)
        x, *given = (y.astype(dtype) for y in arrays)
        a, *f = jax.lax.stop_gradient(given)
        square = (x - a) ** 2
        parts.append(jnp.sum(f[0] * square if f else square))
    if not parts:
        return jnp.zeros((), jnp.float32)
    wide = computing_dtype(*parts)
    return (
        jnp.asarray(strength, wide)
        / 2
        * jnp.sum(jnp.stack([part.astype(wide) for part in parts]))
    )

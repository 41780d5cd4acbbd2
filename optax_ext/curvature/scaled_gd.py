r"""Scaled gradient descent: low-rank factors without their condition number.

The loss of a product L R^T is as badly conditioned in L as R is. Multiplying the
gradient of each factor by the inverse Gram matrix of the other takes this away, and a
damping keeps it so where the rank is larger than that of the solution.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_choice, check_hyperparam, check_params
from optax_ext._core.leaves import map_leaves
from optax_ext._core.trees import Bucket, is_hole, is_unit


def _damped_inverse(gram: jax.Array, damping: jax.Array) -> jax.Array:
    """(gram + damping I)^-1; the pseudo-inverse where the damping is 0.

    By eigenvalues, as the damping may be traced and rounding may make them negative.
    """
    values, vectors = jnp.linalg.eigh(gram)
    rounding = values.size * jnp.finfo(gram.dtype).eps * values[-1]
    total = jnp.maximum(values, 0) + damping
    is_kept = total > jnp.where(damping > 0, jnp.zeros_like(rounding), rounding)
    inverse = jnp.where(is_kept, 1 / jnp.where(is_kept, total, 1), 0)
    return (vectors * inverse[None]) @ vectors.T


@catalogued(
    title="The Power of Preconditioning in Overparameterized Low-Rank Matrix Sensing",
    arxiv="2302.01186",
    kind="link",
    needs=("params",),
    slots=0,
    variant="both factors move at once; the pair form is that of the undamped official "
    "MATLAB code, with the damping of the paper.",
    compared="goldens scaled_gd_symmetric, scaled_gd_pair",
)
def scale_by_scaled_gd(
    damping: float = 1e-3,
    factor_pairs: tuple[tuple[str, str], ...] | None = None,
    right_layout: str = "nr",
) -> optax.GradientTransformationExtraArgs:
    r"""Divide gradients of low-rank factors by a damped Gram matrix.

    .. math::
      G (X^T X + \lambda I)^{-1}, \qquad \text{in pairs} \quad
      G_L (R^T R + \lambda I)^{-1}, \quad G_R (L^T L + \lambda I)^{-1}

    with Gram matrices of the parameters before the step. Where R is stored as [r, b],
    as the LoRA factor next to the output, this is
    :math:`G_L (R R^T + \lambda I)^{-1}` and :math:`(L^T L + \lambda I)^{-1} G_R`.

    Args:
      damping: lambda, at least 0; 0 takes the pseudo-inverse. The theory sets a small
        multiple of the smallest singular value of the solution; 1e-3 is a placeholder.
      factor_pairs: paths of the two factors of each product, keys joined by "/":
        ``(("layer/lora_a", "layer/lora_b"),)``. None: every matrix X [n, r] by itself,
        for products X X^T. Other leaves pass through.
      right_layout: "nr": the right factor is [b, r], the product L R^T. "rn": it is
        [r, b], the product L R. The left factor is [a, r].

    Returns:
      A link that needs params.

    Raises:
      ValueError: for a negative damping, an unknown layout, a pair that the parameters
        do not have, or factors whose ranks differ.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> x = jnp.array([[2.0], [1.0]])
      >>> tx = ox.scale_by_scaled_gd(damping=0.0)
      >>> print(tx.update(5 * x, tx.init(x), x)[0].ravel())
      [2. 1.]
    """
    owner = "scale_by_scaled_gd"
    check_hyperparam(owner, low=0.0, damping=damping)
    check_choice(owner, "right_layout", right_layout, ("nr", "rn"))

    def scaled(g, slots, factor, is_before):
        if factor is None:
            return g, slots
        inverse = _damped_inverse(factor.T @ factor, jnp.asarray(damping, factor.dtype))
        return (inverse @ g if is_before else g @ inverse), slots

    def update(updates, state, params=None, **extra):
        del extra
        check_params(owner, params)
        if factor_pairs is None:
            others = jax.tree.map(_matrix, params, is_leaf=is_unit), _everywhere(params)
        else:
            others = _other_factors(owner, factor_pairs, right_layout, params)
        return map_leaves(scaled, updates, (), others)[0], state

    def init(params):
        del params
        return optax.EmptyState()

    return optax.GradientTransformationExtraArgs(init, update)


def _matrix(leaf: Any) -> Any:
    """The leaf if it is a matrix, or a stack of them."""
    if is_hole(leaf):
        return None
    rank = leaf.stack.ndim - 1 if isinstance(leaf, Bucket) else leaf.ndim
    return leaf if rank == 2 else None


def _everywhere(params: Any) -> Any:
    return jax.tree.map(lambda _: False, params, is_leaf=is_unit)


def _other_factors(
    owner: str, pairs: tuple[tuple[str, str], ...], right_layout: str, params: Any
) -> tuple[Any, Any]:
    """At each factor the other one as [n, r], and whether it multiplies from before."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_unit)
    at = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
    }
    others: dict[str, tuple[Any, bool]] = {}
    for left, right in pairs:
        for name in (left, right):
            if getattr(at.get(name), "ndim", None) != 2:
                raise ValueError(
                    f"{owner}: factor_pairs names {name!r}, which is no matrix of the "
                    f"parameters; their paths are {', '.join(map(repr, at))}"
                )
        transposed = at[right].T if right_layout == "rn" else at[right]
        if transposed.shape[1] != at[left].shape[1]:
            raise ValueError(
                f"{owner}: {left!r} of shape {at[left].shape} and {right!r} of shape "
                f"{at[right].shape} have no common rank with right_layout="
                f"{right_layout!r}"
            )
        others[left] = transposed, False
        others[right] = at[left], right_layout == "rn"
    each = [others.get(name, (None, False)) for name in at]
    return tuple(treedef.unflatten(column) for column in zip(*each, strict=True))

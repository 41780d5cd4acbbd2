"""The Fisher information of each parameter, from gradients of single examples."""

from typing import Any

import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.trees import computing_dtype, is_hole


@catalogued(
    title="A Closer Look at Rehearsal-Free Continual Learning",
    arxiv="2203.17269",
    kind="helper",
    needs=("per_example_grads",),
    variant="mean of squares, without mammoth's factor of predicted probabilities",
    compared="closed form of a Gaussian",
    example=lambda: {"per_example_grads": jnp.array([[1.0, 0.0], [3.0, 2.0]])},
)
def diagonal_fisher(per_example_grads: Any, axis: int = 0) -> Any:
    r"""Diagonal of the Fisher information: mean square of per-example gradients.

    .. math:: F = \frac{1}{n} \sum_i g_i^2, \qquad
      g_i = \nabla \log p(y_i \mid x_i)

    Labels drawn from the model give the Fisher information; true labels, as in
    class-incremental learning, the empirical one. Gradients of the loss will do, for
    signs do not matter; those of a mean over the batch will not.

    Args:
      per_example_grads: tree of gradients with an axis of examples, for example
        ``jax.vmap(jax.grad(loss_fn), (None, 0))(params, examples)``.
      axis: the axis of examples.

    Returns:
      A tree like the parameters, in float32 or wider.

    Raises:
      TypeError: for leaves that are no floats.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> print(ox.diagonal_fisher({"w": jnp.array([[1.0, 0.0], [3.0, 2.0]])})["w"])
      [5. 2.]
    """

    def of_leaf(g: Any) -> Any:
        if is_hole(g):
            return g
        return jnp.mean(jnp.square(g.astype(computing_dtype(g))), axis)

    return jax.tree.map(of_leaf, per_example_grads, is_leaf=is_hole)

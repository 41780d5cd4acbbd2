"""The Fisher information of each parameter, from gradients of single examples."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.extra_args import require
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


@catalogued(
    title="Limitations of the Empirical Fisher Approximation for Natural Gradient "
    "Descent",
    arxiv="1905.12558",
    kind="estimator",
    needs=("per_example_grads",),
    slots=0,
    variant="true labels; mean of squares over the batch.",
    compared="closed form of logistic regression",
)
def empirical_fisher_diag() -> optax.GradientTransformationExtraArgs:
    r"""Take the empirical Fisher's diagonal for that of the Hessian.

    .. math:: \hat h = \frac1B \sum_{i=1}^B g_i^2

    Never negative. It agrees with the Gauss-Newton diagonal in expectation where the
    model has learned the distribution of the labels, and shrinks with the residuals
    where it fits them exactly; `gauss_newton_bartlett_diag` does not.

    Returns:
      An estimator without state that needs ``per_example_grads``, a tree like params
      with a leading axis of examples.

    Raises:
      ValueError: at trace time without ``per_example_grads``.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> estimator, x = ox.empirical_fisher_diag(), jnp.zeros(2)
      >>> each = jnp.array([[1.0, 0.0], [3.0, 2.0]])
      >>> h, _ = estimator.update(None, estimator.init(x), x, per_example_grads=each)
      >>> print(h)
      [5. 2.]
    """

    def update(updates, state, params=None, **extra):
        del updates, params
        each = require("empirical_fisher_diag", extra, "per_example_grads")
        return diagonal_fisher(each), state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update
    )

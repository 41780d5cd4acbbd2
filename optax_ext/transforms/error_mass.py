"""Steps that grow as the errors vanish."""

import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam
from optax_ext._core.extra_args import require
from optax_ext._core.leaves import map_leaves


@catalogued(
    title="From Logistic Regression to the Perceptron Algorithm: Exploring Gradient "
    "Descent with Large Step Sizes",
    arxiv="2412.08424",
    kind="link",
    needs=("error_mass",),
    slots=0,
    variant="the paper's normalised gradient descent; eps is ours.",
    compared="golden inverse_error_mass; Table 1 of the paper",
)
def scale_by_inverse_error_mass(
    eps: float = 1e-12,
) -> optax.GradientTransformationExtraArgs:
    r"""Divide by the mean probability that the model gives to wrong classes.

    .. math:: \text{out} = \frac{g}{\max(\tfrac1n \sum_i (1 - p_i),\ \epsilon)}

    with p_i the probability of the right class of example i. The gradient of the
    logistic loss fades with that mean, so gradient descent slows down as it succeeds;
    divided by it, steps keep a length of up to lr times the largest norm of an input.
    It is not invariant to micro-batches: accumulate gradients and error masses first.
    `optax_ext.losses.normalized_sigmoid_binary_cross_entropy` and
    `optax_ext.losses.normalized_softmax_cross_entropy_with_integer_labels` put the same
    factor into the loss.

    Args:
      eps: smallest mass to divide by, positive; ours.

    Returns:
      A link without state that needs the extra argument ``error_mass``, a scalar in
      [0, 1]. Compute 1 - p without cancellation, as ``jax.nn.sigmoid(-margin)`` or
      ``-jnp.expm1(-loss)``.

    Raises:
      ValueError: for `eps` that is not positive; in `update` without ``error_mass``, or
        with one that is not a scalar.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> tx = ox.scale_by_inverse_error_mass()
      >>> g = jnp.array([0.1, -0.2])
      >>> print(tx.update(g, tx.init(g), error_mass=jnp.mean(jnp.array([0.3, 0.1])))[0])
      [ 0.5 -1. ]
    """
    owner = "scale_by_inverse_error_mass"
    check_hyperparam(owner, low=0.0, open_low=True, eps=eps)

    def update(updates, state, params=None, **extra):
        del params
        mass = require(owner, extra, "error_mass")
        if jnp.shape(mass):
            raise ValueError(
                f"{owner}: error_mass must be a scalar, the mean over the batch; got "
                f"shape {jnp.shape(mass)}"
            )

        def rule(g, slots):
            return g / jnp.maximum(jnp.asarray(mass, g.real.dtype), eps), slots

        return map_leaves(rule, updates, owner=owner)[0], state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update
    )

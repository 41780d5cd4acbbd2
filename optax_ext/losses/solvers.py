"""Losses for what stands in front of an iterative solver, or takes many small steps.

| you train | loss | it stands for |
|---|---|---|
| what starts or steers a solver | `iteration_count_surrogate` | its iterations |
| a cheap model under a dear loss | `target_surrogate_loss` | the loss, nearby |

The first counts; a count has no gradient, so it borrows one. The second is a quadratic
model of a loss in the outputs of a network: one gradient of the loss, many steps of
the network. `optax_ext.target_surrogate` is the wrapper that takes those steps.
"""

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam
from optax_ext.losses._numerics import working_floats


@catalogued(
    title="Principled Acceleration of Iterative Numerical Methods Using Machine "
    "Learning",
    arxiv="2206.08594",
    kind="loss",
    needs=("residuals",),
    variant="the authors' indicator with a straight-through gradient, or their masked "
    "sigmoid",
    compared="golden iteration_count_surrogate; hand-computed values",
    example=lambda: {
        "residuals": jnp.array([[1.0, 0.3, 0.1], [0.5, 0.02, 0.001], [2.0, 1.0, 0.5]]),
        "tol": 0.05,
    },
)
def iteration_count_surrogate(
    residuals: chex.Array,
    tol: chex.Numeric,
    *,
    slope: chex.Numeric = 1.0,
    log: bool = False,
    straight_through: bool = True,
) -> jax.Array:
    r"""The number of iterations that a solver needs, with a gradient.

    With residuals r_k before step k and the tolerance :math:`\epsilon`,

    .. math::
      \ell = \sum_k 1[r_k > \epsilon], \qquad
      \nabla \ell := \nabla \sum_k 1[r_k > \epsilon]\,
        \sigma(a (r_k - \epsilon)).

    The authors minimise its mean, and add the final residual of runs that hit the
    limit.

    Args:
      residuals: r of an unrolled solver, [..., K], that of the initial guess first. A
        NaN makes the loss NaN.
      tol: the tolerance, above 0.
      slope: a > 0. 1 as in the authors' code.
      log: whether to take logarithms of residuals and tolerance in the sigmoid.
      straight_through: False returns the sum of sigmoids itself.

    Returns:
      Counts, [...]. Residuals that have converged get no gradient.

    Raises:
      AssertionError: if `residuals` are not floats, or a scalar.
      ValueError: for a hyper-parameter that is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> residuals = 2 * 0.5 ** jnp.arange(10.0)
      >>> print(ox.losses.iteration_count_surrogate(residuals, tol=1e-2))
      8.0
    """
    owner = "iteration_count_surrogate"
    check_hyperparam(owner, low=0.0, open_low=True, tol=tol, slope=slope)
    (r,) = working_floats(residuals=residuals)
    chex.assert_axis_dimension_gteq(r, -1, 0, custom_message="residuals")
    tol, slope = (jnp.asarray(x, r.dtype) for x in (tol, slope))

    on = ~(r <= tol)  # a NaN has not converged
    r = jnp.where(on, r, tol)
    excess = jnp.log(r) - jnp.log(tol) if log else r - tol
    soft = jnp.sum(jnp.where(on, jax.nn.sigmoid(slope * excess), 0), -1)
    if not straight_through:
        return soft
    count = jnp.sum(on.astype(r.dtype), -1)
    return count + (soft - jax.lax.stop_gradient(soft))


@catalogued(
    title="Target-based Surrogates for Stochastic Optimization",
    arxiv="2302.02607",
    kind="loss",
    needs=("outputs", "anchor_outputs", "output_grads"),
    variant="the paper's surrogate; the official code minimises a multiple of it",
    compared="golden target_surrogate_loss; upper bound of a logistic loss",
    example=lambda: {
        "outputs": jnp.array([[1.0, 0.2], [-0.3, 1.0], [0.5, -1.0]]),
        "anchor_outputs": jnp.array([[0.9, 0.1], [0.3, 1.0], [1.0, -1.5]]),
        "output_grads": jnp.array([[0.1, -0.1], [0.2, -0.2], [-0.3, 0.3]]),
    },
)
def target_surrogate_loss(
    outputs: chex.Array,
    anchor_outputs: chex.Array,
    output_grads: chex.Array,
    *,
    eta: chex.Numeric = 1.0,
) -> jax.Array:
    r"""A quadratic model of a loss, in the outputs of a network.

    With outputs z and the gradient d of the loss at the anchor,

    .. math:: \ell_i = \langle d_i, f_i - z_i \rangle + \frac{|f_i - z_i|^2}{2 \eta}.

    For eta = 1 / L it bounds the change of an L-smooth loss from above; d and L are
    those of the total loss, in the outputs. Where that is a mean over n examples, L is
    at most 1 / (2n) for the softmax cross-entropy and 1 / (4n) for the logistic loss.

    Args:
      outputs: f, outputs of the network as it learns, [N, ...].
      anchor_outputs: z, its outputs at the anchor, of the same shape. Detached.
      output_grads: d, the gradient of the total loss in the outputs, there. Detached.
      eta: step size in the space of outputs, above 0. 1 / L as in the paper.

    Returns:
      Losses of examples, [N]: sum them, do not average.

    Raises:
      AssertionError: for shapes that differ, or arguments that are not floats.
      ValueError: for an eta that is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> z, d = jnp.array([[0.0, 0.0]]), jnp.array([[1.0, -1.0]])
      >>> best = z - 0.5 * d
      >>> print(ox.losses.target_surrogate_loss(best, z, d, eta=0.5))
      [-0.5]
    """
    owner = "target_surrogate_loss"
    check_hyperparam(owner, low=0.0, open_low=True, eta=eta)
    f, z, d = working_floats(
        outputs=outputs, anchor_outputs=anchor_outputs, output_grads=output_grads
    )
    chex.assert_axis_dimension_gteq(f, 0, 0, custom_message="outputs")
    message = "outputs, anchor_outputs, output_grads"
    chex.assert_equal_shape([f, z, d], custom_message=message)

    z, d = jax.lax.stop_gradient((z, d))
    moved = f - z
    terms = d * moved + moved**2 / (2 * jnp.asarray(eta, f.dtype))
    return jnp.sum(terms, axis=tuple(range(1, f.ndim)))

r"""Auto-encoders whose residual is a score.

A reconstruction r that is trained to undo small noise, or to contract where the data do
not vary, points uphill: :math:`(r(x) - x) / \sigma^2 \to \nabla \log p(x)` as sigma
goes to 0. `denoising_reconstruction_loss` draws the noise,
`contractive_reconstruction_loss` takes its expectation to second order with a Jacobian
(no noise in the gradient, more work), and they agree up to o(sigma^2).
`score_from_reconstruction` reads the score off.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam
from optax_ext.losses._batches import check_batch, sum_of_squares
from optax_ext.losses._numerics import working_floats

_AUTO = "What Regularized Auto-Encoders Learn from the Data Generating Distribution"

ReconFn = Callable[[jax.Array], jax.Array]


def _three_points() -> jax.Array:
    return jnp.array([[1.0, -0.5], [0.2, 0.4], [-1.0, 0.3]])


def _reconstructed(recon_fn: ReconFn, x: jax.Array) -> jax.Array:
    """Reconstructions of a batch by a function of one example."""
    recon = jax.vmap(recon_fn)(x)
    chex.assert_equal_shape([recon, x], custom_message="recon_fn's result, x")
    return recon


@catalogued(
    title=_AUTO,
    arxiv="1211.4246",
    kind="loss",
    needs=("x", "probes"),
    variant="exact or with probes",
    compared="golden `contractive_reconstruction_loss`",
    example=lambda: {"recon_fn": jnp.tanh, "x": _three_points(), "sigma": 0.3},
)
def contractive_reconstruction_loss(
    recon_fn: ReconFn,
    x: chex.Array,
    sigma: chex.Numeric,
    *,
    probes: chex.Array | None = None,
) -> jax.Array:
    r"""Reconstruction error plus the squared size of the Jacobian.

    .. math::
      \ell = |r(x) - x|^2 + \sigma^2 \left\| \frac{\partial r}{\partial x} \right\|_F^2

    With K probes v the Frobenius norm is :math:`\mathrm{mean}_k |J v_k|^2`, which is
    right in expectation for entries of mean 0 and variance 1. Costs one forward-mode
    column for each element of an example, or K.

    Args:
      recon_fn: r, ONE example -> one of the same shape.
      x: examples, [batch, ...].
      sigma: standard deviation of the noise that it stands for, positive.
      probes: v, [K, batch, ...], standard normal or signs; None is exact.

    Returns:
      Losses [batch], sums over the axes of an example.

    Raises:
      AssertionError: for shapes that do not fit, or arrays that are not floats.
      ValueError: if `sigma` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> x = jnp.array([[1.0, 1.0], [0.0, 2.0]])
      >>> print(ox.losses.contractive_reconstruction_loss(
      ...     lambda x: 0.5 * x, x, sigma=1.0))
      [1.  1.5]
    """
    _check_sigma("contractive_reconstruction_loss", sigma)
    if probes is None:
        (x,) = working_floats(x=x)
    else:
        x, probes = working_floats(x=x, probes=probes)
        message = "probes must be [K, batch, ...] with the axes of x"
        chex.assert_equal_shape_suffix([probes, x], x.ndim, custom_message=message)
        chex.assert_rank(probes, x.ndim + 1, custom_message=message)
    check_batch("x", x)

    def squares_of_columns(example: jax.Array, directions: jax.Array) -> jax.Array:
        _, jvp = jax.linearize(recon_fn, example)
        return sum_of_squares(jax.vmap(jvp)(directions))

    if probes is None:
        units = jnp.eye(x[0].size, dtype=x.dtype).reshape(-1, *x.shape[1:])
        columns = jax.vmap(squares_of_columns, (0, None))(x, units)
        contraction = jnp.sum(columns, -1)
    else:
        columns = jax.vmap(squares_of_columns, (0, 1))(x, probes)
        contraction = jnp.mean(columns, -1)
    sigma = jnp.asarray(sigma, x.dtype)
    return sum_of_squares(_reconstructed(recon_fn, x) - x) + sigma**2 * contraction


@catalogued(
    title=_AUTO,
    arxiv="1211.4246",
    kind="loss",
    needs=("x", "noise"),
    variant="Gaussian corruption",
    compared="golden `contractive_reconstruction_loss`",
    example=lambda: {
        "recon_fn": jnp.tanh,
        "x": _three_points(),
        "noise": jnp.array([[0.3, 0.8], [-1.2, 0.1], [0.5, -0.6]]),
        "sigma": 0.3,
    },
)
def denoising_reconstruction_loss(
    recon_fn: ReconFn, x: chex.Array, noise: chex.Array, sigma: chex.Numeric
) -> jax.Array:
    r"""Error of a reconstruction from a noisy example.

    .. math:: \ell = |r(x + \sigma \epsilon) - x|^2

    Args:
      recon_fn: r, ONE example -> one of the same shape.
      x: examples, [batch, ...].
      noise: epsilon, standard normal, of the same shape.
      sigma: standard deviation of the noise, positive.

    Returns:
      Losses [batch], sums over the axes of an example.

    Raises:
      AssertionError: for shapes that do not fit, or arrays that are not floats.
      ValueError: if `sigma` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> x, noise = jnp.zeros((2, 2)), jnp.array([[1.0, 1.0], [0.0, 2.0]])
      >>> print(ox.losses.denoising_reconstruction_loss(
      ...     lambda x: 0.5 * x, x, noise, sigma=1.0))
      [0.5 1. ]
    """
    _check_sigma("denoising_reconstruction_loss", sigma)
    x, noise = working_floats(x=x, noise=noise)
    check_batch("x", x)
    chex.assert_equal_shape([x, noise], custom_message="x, noise")
    noisy = x + jnp.asarray(sigma, x.dtype) * noise
    return sum_of_squares(_reconstructed(recon_fn, noisy) - x)


@catalogued(
    title=_AUTO,
    arxiv="1211.4246",
    kind="helper",
    needs=("x",),
    variant="as in the paper",
    compared="golden `contractive_reconstruction_loss`; closed form for Gaussian data",
    example=lambda: {"recon_fn": jnp.tanh, "x": _three_points(), "sigma": 0.3},
)
def score_from_reconstruction(
    recon_fn: ReconFn, x: chex.Array, sigma: chex.Numeric
) -> jax.Array:
    r"""Score of the data that a trained reconstruction implies.

    .. math:: \nabla \log p(x) \approx (r(x) - x) / \sigma^2

    Args:
      recon_fn: r, ONE example -> one of the same shape, trained with this `sigma`.
      x: examples, [batch, ...].
      sigma: standard deviation of the noise that r was trained with, positive.

    Returns:
      Scores of the shape of `x`.

    Raises:
      AssertionError: for shapes that do not fit, or arrays that are not floats.
      ValueError: if `sigma` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> print(ox.losses.score_from_reconstruction(
      ...     lambda x: 0.75 * x, jnp.array([[1.0], [-2.0]]), sigma=0.5))
      [[-1.]
       [ 2.]]
    """
    _check_sigma("score_from_reconstruction", sigma)
    (x,) = working_floats(x=x)
    check_batch("x", x)
    return (_reconstructed(recon_fn, x) - x) / jnp.asarray(sigma, x.dtype) ** 2


def _check_sigma(owner: str, sigma: chex.Numeric) -> None:
    check_hyperparam(owner, low=0.0, open_low=True, sigma=sigma)

r"""NoProp: blocks of a classifier that learn on their own to denoise a label.

Block t gets the input and a noised label embedding
:math:`z_{t-1} = \sqrt{\bar\alpha_{t-1}} u + \sqrt{1 - \bar\alpha_{t-1}} \epsilon` and
estimates u. Since every z is drawn from the label, no gradient goes from block to
block. The objective is a likelihood bound,

.. math::
  \mathrm{mean}(\texttt{noprop\_loss}) + \mathrm{mean}(\texttt{noprop\_prior\_kl})
  + \text{cross-entropy of a read-out of } z_T.

To predict, start from noise and let each block step with `noprop_posterior_coeffs`.
"""

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam
from optax_ext.losses._numerics import working_floats

_NOPROP = (
    "NoProp: Training Neural Networks without Full Back-propagation or "
    "Full Forward-propagation"
)


def _targets() -> jax.Array:
    return jnp.array([[1.0, 0.0], [0.0, 1.0], [0.5, -0.5]])


def _check_levels(alpha_bar: jax.Array) -> None:
    message = "alpha_bar must be a vector of T + 1 entries"
    chex.assert_rank(alpha_bar, 1, custom_message=message)
    chex.assert_axis_dimension_gt(alpha_bar, 0, 1, custom_message=message)


@catalogued(
    title=_NOPROP,
    arxiv="2503.24322",
    kind="loss",
    needs=("predictions", "targets", "alpha_bar"),
    variant="discrete time, with the factor T that belongs to a mean over blocks",
    compared="golden `noprop_loss`; the weights are those of the KL terms",
    example=lambda: {
        "predictions": jnp.stack([0.5 * _targets(), 0.9 * _targets()]),
        "targets": _targets(),
        "alpha_bar": jnp.array([0.1, 0.5, 0.9]),
    },
)
def noprop_loss(
    predictions: chex.Array,
    targets: chex.Array,
    alpha_bar: chex.Array,
    *,
    eta: chex.Numeric = 0.1,
) -> jax.Array:
    r"""Denoising loss of every block, weighted as in the likelihood bound.

    With :math:`\mathrm{snr} = \bar\alpha / (1 - \bar\alpha)`, for t = 1..T

    .. math::
      \ell_t = \frac{T \eta}{2} (\mathrm{snr}_t - \mathrm{snr}_{t-1})\,
      |\hat u_t - u|^2.

    The mean over blocks is the expectation over a uniform t: take the mean, not the
    sum.

    Args:
      predictions: what block t makes of z_{t-1}, [T, batch, D].
      targets: u, the label embeddings, [batch, D]. Gradients flow: they may be learnt.
      alpha_bar: T + 1 increasing entries in (0, 1), from noise to clean.
      eta: scale of these terms against the others; 0.1 in the paper.

    Returns:
      Losses [T, batch].

    Raises:
      AssertionError: for shapes that do not fit, or arguments that are not floats.
      ValueError: for a negative `eta`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> predictions, targets = jnp.zeros((2, 1, 2)), jnp.array([[1.0, 0.0]])
      >>> alpha_bar = jnp.array([0.2, 0.5, 0.8])  # snr 1/4, 1, 4
      >>> print(ox.losses.noprop_loss(predictions, targets, alpha_bar)[:, 0].round(3))
      [0.075 0.3  ]
    """
    check_hyperparam("noprop_loss", low=0.0, eta=eta)
    predictions, targets, alpha_bar = working_floats(
        predictions=predictions, targets=targets, alpha_bar=alpha_bar
    )
    chex.assert_rank(predictions, 3, custom_message="predictions: [T, batch, D]")
    message = "targets must be [batch, D] as in the predictions"
    chex.assert_equal_shape([predictions[0], targets], custom_message=message)
    _check_levels(alpha_bar)
    steps = len(predictions)
    message = "alpha_bar must have one entry more than there are blocks"
    chex.assert_axis_dimension(alpha_bar, 0, steps + 1, custom_message=message)

    snr = alpha_bar / (1 - alpha_bar)
    weight = steps * jnp.asarray(eta, snr.dtype) / 2 * jnp.diff(snr)
    return weight[:, None] * jnp.sum((predictions - targets[None]) ** 2, -1)


@catalogued(
    title=_NOPROP,
    arxiv="2503.24322",
    kind="loss",
    needs=("targets", "alpha_bar_0"),
    variant="closed form of the KL of two Gaussians",
    compared="golden `noprop_loss`",
    example=lambda: {"targets": _targets(), "alpha_bar_0": jnp.float32(0.1)},
)
def noprop_prior_kl(targets: chex.Array, alpha_bar_0: chex.Numeric) -> jax.Array:
    r"""KL divergence of the noisiest label embedding from a standard normal.

    .. math::
      KL = \tfrac{1}{2} \left(\bar\alpha_0 |u|^2 - D \bar\alpha_0
      - D \log(1 - \bar\alpha_0)\right)

    Args:
      targets: u, the label embeddings, [batch, D]. Gradients flow.
      alpha_bar_0: the first entry of alpha_bar, a scalar in [0, 1).

    Returns:
      Divergences [batch], in nats.

    Raises:
      AssertionError: for shapes that do not fit, or arguments that are not floats.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> kl = ox.losses.noprop_prior_kl(jnp.array([[1.0, 1.0], [0.0, 0.0]]), 0.5)
      >>> print([f"{each:.4f}" for each in kl])
      ['0.6931', '0.1931']
    """
    targets, alpha_bar_0 = working_floats(targets=targets, alpha_bar_0=alpha_bar_0)
    chex.assert_rank(targets, 2, custom_message="targets: [batch, D]")
    chex.assert_rank(alpha_bar_0, 0, custom_message="alpha_bar_0 must be a scalar")
    of_variance = targets.shape[-1] * (alpha_bar_0 + jnp.log1p(-alpha_bar_0))
    return (alpha_bar_0 * jnp.sum(targets**2, -1) - of_variance) / 2


@catalogued(
    title=_NOPROP,
    arxiv="2503.24322",
    kind="helper",
    needs=("alpha_bar",),
    variant="of the posterior q(z_t | z_{t-1}, u)",
    compared="golden `noprop_loss`; a^2 / c = snr_t - snr_{t-1}",
    example=lambda: {"alpha_bar": jnp.array([0.1, 0.5, 0.9])},
)
def noprop_posterior_coeffs(
    alpha_bar: chex.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""Coefficients of the step from block to block.

    .. math:: z_t = a_t\, \hat u_t + b_t\, z_{t-1} + \sqrt{c_t}\, \epsilon

    With :math:`\alpha = \bar\alpha_{t-1} / \bar\alpha_t`, for t = 1..T

    .. math::
      a = \frac{\sqrt{\bar\alpha_t} (1 - \alpha)}{1 - \bar\alpha_{t-1}}, \quad
      b = \frac{\sqrt{\alpha} (1 - \bar\alpha_t)}{1 - \bar\alpha_{t-1}}, \quad
      c = \frac{(1 - \bar\alpha_t)(1 - \alpha)}{1 - \bar\alpha_{t-1}}.

    Args:
      alpha_bar: T + 1 increasing entries in (0, 1), from noise to clean.

    Returns:
      a, b and c, each [T].

    Raises:
      AssertionError: if `alpha_bar` is not a vector of at least 2 floats.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> a, b, c = ox.losses.noprop_posterior_coeffs(jnp.array([0.25, 0.5, 0.75]))
      >>> print([f"{d:.3f}" for d in a**2 / c])  # differences of the snr 1/3, 1, 3
      ['0.667', '2.000']
    """
    (alpha_bar,) = working_floats(alpha_bar=alpha_bar)
    _check_levels(alpha_bar)
    before, after = alpha_bar[:-1], alpha_bar[1:]
    alpha = before / after
    a = jnp.sqrt(after) * (1 - alpha) / (1 - before)
    b = jnp.sqrt(alpha) * (1 - after) / (1 - before)
    c = (1 - after) * (1 - alpha) / (1 - before)
    return a, b, c

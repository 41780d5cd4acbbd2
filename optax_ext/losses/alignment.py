r"""Aligning the features of a generative model with those of a frozen encoder.

`representation_alignment_loss` is REPA's cosine between projected features of the
network and those of the encoder, token by token. With `spatial_norm` it is iREPA:
`spatial_normalize` first takes out most of what all tokens of an image share, since it
is the spatial structure of the encoder's features that helps generation.
"""

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam
from optax_ext.losses._numerics import norm_of, working_floats

_IREPA = (
    "What matters for Representation Alignment: Global Information or Spatial "
    "Structure?"
)


@catalogued(
    title=_IREPA,
    arxiv="2512.10794",
    kind="helper",
    needs=("tokens",),
    variant="as in the official code, with gamma of its training script",
    compared="golden `representation_alignment_loss`",
    example=lambda: {"tokens": jnp.array([[[1.0, 0.0], [2.0, 1.0], [4.0, -1.0]]])},
)
def spatial_normalize(
    tokens: chex.Array, *, gamma: chex.Numeric = 0.6, eps: chex.Numeric = 1e-6
) -> jax.Array:
    r"""Takes out most of what the tokens of an example share.

    .. math:: y_t = (x_t - \gamma\, \mathrm{mean}_t x) / (\mathrm{std}_t x + \epsilon)

    with the sample standard deviation (N - 1), feature by feature.

    Args:
      tokens: x, [..., T, D] with T of 2 or more.
      gamma: how much of the mean goes; 1 is all of it. 0.6 in the training script for
        latent diffusion, 0.8 in that for pixels.
      eps: added to the standard deviation; 1e-6 in the official code.

    Returns:
      y, of the shape of `tokens`.

    Raises:
      AssertionError: for fewer than 2 tokens, or tokens that are not floats.
      ValueError: if `eps` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> tokens = jnp.array([[1.0], [3.0], [5.0]])
      >>> print(ox.losses.spatial_normalize(tokens, gamma=1.0)[:, 0].round(3))
      [-1.  0.  1.]
    """
    owner = "spatial_normalize"
    check_hyperparam(owner, gamma=gamma)
    check_hyperparam(owner, low=0.0, open_low=True, eps=eps)
    (tokens,) = working_floats(tokens=tokens)
    chex.assert_rank(tokens, set(range(2, 33)), custom_message="tokens: [..., T, D]")
    message = "tokens: a standard deviation over tokens needs at least 2"
    chex.assert_axis_dimension_gt(tokens, -2, 1, custom_message=message)

    gamma, eps = (jnp.asarray(h, tokens.dtype) for h in (gamma, eps))
    mean = jnp.mean(tokens, -2, keepdims=True)
    std = norm_of(tokens - mean, -2, keepdims=True) / (tokens.shape[-2] - 1) ** 0.5
    return (tokens - gamma * mean) / (std + eps)


def _direction(x: jax.Array) -> jax.Array:
    """Rows of length 1, shorter where the norm is below 1e-12."""
    norm = norm_of(x, keepdims=True)
    # A row of zeros is divided by 1, so that its gradient is no 1e12.
    return x / jnp.where(norm > 0, jnp.maximum(norm, 1e-12), 1)


@catalogued(
    title=_IREPA,
    arxiv="2512.10794",
    kind="loss",
    needs=("student", "teacher"),
    variant="as in the official code; the projector belongs to the model",
    compared="golden `representation_alignment_loss`",
    example=lambda: {
        "student": jnp.array([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [-1.0, 0.5]]]),
        "teacher": jnp.array([[[1.0, 2.0], [3.0, 1.0]], [[0.0, 1.0], [2.0, 0.5]]]),
    },
)
def representation_alignment_loss(
    student: chex.Array,
    teacher: chex.Array,
    *,
    spatial_norm: bool = True,
    gamma: chex.Numeric = 0.6,
    eps: chex.Numeric = 1e-6,
) -> jax.Array:
    r"""Minus the mean cosine between a network's tokens and those of an encoder.

    .. math:: \ell = -\mathrm{mean}_t \cos(s_t, y_t), \qquad
      y = \mathrm{spatial\_normalize}(\text{teacher})

    Add it to the diffusion loss, with a coefficient of 1 for latent diffusion with
    spatial normalisation and 0.5 for pixels or without it.

    Args:
      student: s, the network's features after the projector, [..., T, D]. The paper's
        projector is a 3x3 convolution on the grid of tokens.
      teacher: the encoder's features, of the same shape. Detached.
      spatial_norm: False aligns with the features as they are, which is REPA.
      gamma: of `spatial_normalize`.
      eps: of `spatial_normalize`.

    Returns:
      Losses [...], one an example, in [-1, 1]. A token of zeros counts as cosine 0.

    Raises:
      AssertionError: for shapes that do not fit, fewer than 2 tokens to normalise, or
        arguments that are not floats.
      ValueError: if `eps` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> teacher = jnp.array([[[1.0, 0.0], [0.0, 3.0]]])
      >>> student = jnp.array([[[2.0, 0.0], [1.0, 0.0]]])
      >>> print(ox.losses.representation_alignment_loss(
      ...     student, teacher, spatial_norm=False))
      [-0.5]
    """
    student, teacher = working_floats(student=student, teacher=teacher)
    chex.assert_rank(student, set(range(2, 33)), custom_message="student: [..., T, D]")
    chex.assert_equal_shape([student, teacher], custom_message="student, teacher")
    teacher = jax.lax.stop_gradient(teacher)
    if spatial_norm:
        teacher = spatial_normalize(teacher, gamma=gamma, eps=eps)
    cosine = jnp.sum(_direction(student) * _direction(teacher), -1)
    return -jnp.mean(cosine, -1)

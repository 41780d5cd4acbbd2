r"""Wasserstein GANs: a critic that is held to slopes of about 1.

The critic maximises the difference of its mean scores on real and generated examples,
which is the Wasserstein distance if its slope is at most 1 everywhere.
`gradient_penalty` pulls the slope at given points to 1, `wgan_gp_loss` is the critic's
whole loss, with points drawn between real and generated examples. The generator
minimises ``-critic_fn(fake).mean()``.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam
from optax_ext.losses._batches import check_batch, example_axes, over_example
from optax_ext.losses._numerics import norm_of, working_floats

_WGAN_GP = "Improved Training of Wasserstein GANs"

CriticFn = Callable[[jax.Array], jax.Array]


def _critic(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.sin(x), -1)


@catalogued(
    title=_WGAN_GP,
    arxiv="1704.00028",
    kind="loss",
    needs=("x",),
    variant="two-sided as in the paper, one-sided on request",
    compared="golden `wgan_gp_loss`; linear critics in closed form",
    example=lambda: {
        "fn": _critic,
        "x": jnp.array([[1.0, -0.5], [0.2, 0.4], [-1.0, 0.3]]),
    },
)
def gradient_penalty(
    fn: CriticFn,
    x: chex.Array,
    *,
    target: chex.Numeric = 1.0,
    one_sided: bool = False,
) -> jax.Array:
    r"""Squared distance of a function's slope from a target.

    .. math::
      \ell = (|\nabla_x f(x)| - c)^2 \quad\text{or, one-sided,}\quad
      \max(|\nabla_x f(x)| - c, 0)^2

    Where the gradient is 0 the penalty is c^2 (0 if one-sided) and its gradient 0.

    Args:
      fn: f, a batch -> scores [batch]. It must not mix examples: no batch
        normalisation.
      x: the points, [batch, ...].
      target: c, 0 or more; 1 in the paper.
      one_sided: True leaves slopes below the target alone.

    Returns:
      Penalties [batch].

    Raises:
      AssertionError: if `fn` does not return one score an example, or `x` are not
        floats.
      ValueError: for a negative `target`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> w = jnp.array([3.0, 4.0])
      >>> print(ox.losses.gradient_penalty(lambda x: x @ w, jnp.ones((2, 2))))
      [16. 16.]
    """
    check_hyperparam("gradient_penalty", low=0.0, target=target)
    (x,) = working_floats(x=x)
    check_batch("x", x)

    def total(x: jax.Array) -> jax.Array:
        scores = fn(x)
        _check_scores("fn", scores, x)
        return jnp.sum(scores)

    slope = norm_of(jax.grad(total)(x), example_axes(x))
    excess = slope - jnp.asarray(target, slope.dtype)
    return (jnp.maximum(excess, 0) if one_sided else excess) ** 2


def _check_scores(name: str, scores: jax.Array, x: jax.Array) -> None:
    message = f"{name} must return one score an example"
    chex.assert_shape(scores, (len(x),), custom_message=message)


@catalogued(
    title=_WGAN_GP,
    arxiv="1704.00028",
    kind="loss",
    needs=("real", "fake", "key"),
    variant="two-sided as in the paper, one-sided on request",
    compared="golden `wgan_gp_loss`; the optimal slope between two points",
    example=lambda: {
        "critic_fn": _critic,
        "real": jnp.array([[1.0, -0.5], [0.2, 0.4], [-1.0, 0.3]]),
        "fake": jnp.array([[0.0, 0.5], [0.3, -0.4], [1.0, 0.0]]),
        "interpolation": jnp.array([0.1, 0.5, 0.8]),
    },
)
def wgan_gp_loss(
    critic_fn: CriticFn,
    real: chex.Array,
    fake: chex.Array,
    key: chex.PRNGKey | None = None,
    *,
    interpolation: chex.Array | None = None,
    penalty_weight: chex.Numeric = 10.0,
    one_sided: bool = False,
) -> jax.Array:
    r"""Loss of the critic of a Wasserstein GAN with gradient penalty.

    .. math::
      \ell = \mathrm{mean}\, D(\text{fake}) - \mathrm{mean}\, D(\text{real})
      + \lambda\, \mathrm{mean}\, (|\nabla D(\hat x)| - 1)^2, \qquad
      \hat x = u\, \text{real} + (1 - u)\, \text{fake}

    with one :math:`u \sim U[0, 1)` an example. The paper takes five steps of the critic
    for one of the generator, both with ``optax.adam(1e-4, b1=0.0, b2=0.9)``.

    Args:
      critic_fn: D, a batch -> scores [batch]; must not mix examples. Called in float32
        (float64 if an argument is).
      real: examples of the data, [batch, ...].
      fake: generated ones, of the same shape. For a step of the critic they are
        constants.
      key: draws u. Either this or `interpolation`.
      interpolation: u, [batch].
      penalty_weight: lambda, 0 or more; 10 in the paper, 0.1 in its toy examples.
      one_sided: True leaves slopes below 1 alone.

    Returns:
      The loss, a scalar.

    Raises:
      AssertionError: for shapes that do not fit, or arrays that are not floats.
      ValueError: for both or none of `key` and `interpolation`, or a negative
        `penalty_weight`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import optax_ext as ox
      >>> real, fake = jnp.full((4, 1), 3.0), jnp.zeros((4, 1))
      >>> def loss(slope):
      ...     return ox.losses.wgan_gp_loss(
      ...         lambda x: slope * x[:, 0], real, fake, jax.random.key(0))
      >>> print(f"{jax.grad(loss)(1.0):.1f}, {jax.grad(loss)(1.3):.1f}")  # 0 at 1.15
      -3.0, 3.0
    """
    owner = "wgan_gp_loss"
    check_hyperparam(owner, low=0.0, penalty_weight=penalty_weight)
    if (key is None) == (interpolation is None):
        given = "neither" if key is None else "both"
        raise ValueError(f"{owner} takes either key or interpolation, got {given}")
    real, fake = working_floats(real=real, fake=fake)
    check_batch("real", real)
    chex.assert_equal_shape([real, fake], custom_message="real, fake")
    if interpolation is None:
        assert key is not None
        interpolation = jax.random.uniform(key, real.shape[:1], real.dtype)
    u = jnp.asarray(interpolation, real.dtype)
    message = "interpolation must be one number an example"
    chex.assert_shape(u, real.shape[:1], custom_message=message)

    u = over_example(u, real)
    scores_real, scores_fake = critic_fn(real), critic_fn(fake)
    _check_scores("critic_fn", scores_real, real)
    between = u * real + (1 - u) * fake
    penalty = jnp.mean(gradient_penalty(critic_fn, between, one_sided=one_sided))
    weight = jnp.asarray(penalty_weight, penalty.dtype)
    return jnp.mean(scores_fake) - jnp.mean(scores_real) + weight * penalty

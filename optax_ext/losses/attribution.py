"""Penalties on what a model looks at, through expected gradients.

Expected gradients say how much each input contributed to an output. They cost one
gradient a reference and can be trained through: add a penalty on them to the loss.

| function | rewards | penalty |
|---|---|---|
| `attribution_gini` | few inputs that matter | minus it |
| `attribution_total_variation` | smooth maps over an image | itself |
| `attribution_graph_penalty` | related inputs alike, by a graph | itself |
"""

import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_interval
from optax_ext.losses._numerics import working_floats
from optax_ext.losses.calibration import magnitude

_PAPER: dict[str, Any] = {
    "title": "Improving performance of deep learning models with axiomatic attribution "
    "priors and expected gradients",
    "arxiv": "1906.10670",
}


def _score(x: jax.Array) -> jax.Array:
    return jnp.sum(x**2, axis=-1)


def _example() -> dict[str, Any]:
    return {"fn": _score, "x": jnp.array([[1.0, 2.0], [0.0, -1.0], [0.5, 0.2]])}


@catalogued(
    **_PAPER,
    kind="helper",
    needs=("fn", "x", "references", "interpolation"),
    variant="one reference a draw, as in the official code",
    compared="golden `expected_gradients`; closed form of a linear function",
    example=lambda: {
        **_example(),
        "references": jnp.zeros((3, 1, 2)),
        "interpolation": jnp.array([[0.2], [0.9], [0.5]]),
    },
)
def expected_gradients(
    fn: Callable[[jax.Array], jax.Array],
    x: chex.Array,
    references: chex.Array,
    interpolation: chex.Array,
) -> jax.Array:
    r"""Contribution of each input, against references, at given points between.

    .. math::
      \phi = \frac1k \sum_{j=1}^k (x - r_j) \odot \nabla f(a_j x + (1 - a_j) r_j)

    In expectation over a and r, the contributions sum to f(x) less the mean of f(r).

    Args:
      fn: f, from a batch like `x` to one number an example, [batch]: pick the label's
        logit inside. It is called once for each of the k points.
      x: inputs, [batch, ...].
      references: r, [batch, k, ...]; k = 1 is enough for training, 100 or 200 for
        reading the result.
      interpolation: a, [batch, k], uniform in [0, 1].

    Returns:
      Contributions of the shape of `x`. All of it can be differentiated, also with
      respect to what `fn` closes over.

    Raises:
      AssertionError: for shapes that do not fit, arguments that are not floats, or a
        `fn` that does not return [batch].

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> def fn(x):
      ...     return x @ jnp.array([2.0, -1.0])
      >>> x, references = jnp.array([[1.0, 3.0]]), jnp.zeros((1, 1, 2))
      >>> print(ox.losses.expected_gradients(fn, x, references, jnp.array([[0.3]])))
      [[ 2. -3.]]
    """
    x, references, interpolation = working_floats(
        x=x, references=references, interpolation=interpolation
    )
    chex.assert_rank(
        interpolation, 2, custom_message="interpolation must be [batch, k]"
    )
    chex.assert_axis_dimension_gt(
        interpolation, 1, 0, custom_message="interpolation: k must be 1 or more"
    )
    chex.assert_shape(
        references,
        (*interpolation.shape, *x.shape[1:]),
        custom_message="references must be [batch, k, ...] like interpolation and x",
    )

    def total(points):
        out = fn(points)
        chex.assert_shape(
            out, x.shape[:1], custom_message="fn must return one number an example"
        )
        return jnp.sum(out)

    def contribution(reference, a):
        a = a.reshape(a.shape + (1,) * (x.ndim - 1))
        return (x - reference) * jax.grad(total)(a * x + (1 - a) * reference)

    return jnp.mean(jax.vmap(contribution, 1, 0)(references, interpolation), axis=0)


@catalogued(
    **_PAPER,
    kind="helper",
    needs=("fn", "x", "references", "key"),
    variant="references without replacement over the batch, as the official sampler",
    compared="`expected_gradients` with the same draws; completeness in expectation",
    example=lambda: {
        **_example(),
        "references": jnp.zeros((4, 2)),
        "key": jax.random.key(0),
    },
)
def sample_expected_gradients(
    fn: Callable[[jax.Array], jax.Array],
    x: chex.Array,
    references: chex.Array,
    key: chex.PRNGKey,
    *,
    k: int = 1,
) -> jax.Array:
    """`expected_gradients` with references and points drawn at random.

    Args:
      fn: from a batch like `x` to one number an example, [batch].
      x: inputs, [batch, ...].
      references: the background set, [size, ...], of batch * k examples at least: no
        two draws of a batch share one.
      key: random key.
      k: draws an example. 1 is the paper's for training.

    Returns:
      Contributions of the shape of `x`.

    Raises:
      AssertionError: for shapes that do not fit, arguments that are not floats, or too
        few references.
      ValueError: for `k` that is no positive integer.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import optax_ext as ox
      >>> def fn(x):
      ...     return x @ jnp.array([2.0, -1.0])
      >>> x, background = jnp.array([[1.0, 3.0]]), jnp.zeros((5, 2))
      >>> key = jax.random.key(0)
      >>> print(ox.losses.sample_expected_gradients(fn, x, background, key, k=3))
      [[ 2. -3.]]
    """
    check_interval("sample_expected_gradients", k=k)
    x, references = working_floats(x=x, references=references)
    chex.assert_equal_shape_suffix(
        [x, references], x.ndim - 1, custom_message="references must be [size, ...]"
    )
    size, draws = references.shape[0], (x.shape[0], k)
    chex.assert_axis_dimension_gteq(
        references,
        0,
        math.prod(draws),
        custom_message="references: fewer than batch * k; draw your own and call "
        "expected_gradients",
    )
    of_reference, of_point = jax.random.split(key)
    index = jax.random.choice(of_reference, size, draws, replace=False)
    interpolation = jax.random.uniform(of_point, draws, x.dtype)
    return expected_gradients(fn, x, references[index], interpolation)


def _importance(attributions: jax.Array) -> jax.Array:
    """Mean over the batch of the absolute contributions, as a vector."""
    return jnp.mean(magnitude(attributions), axis=0).ravel()


@catalogued(
    **_PAPER,
    kind="loss",
    needs=("attributions",),
    variant="the Gini coefficient itself, as in the official code, with its factor 1/2",
    compared="golden `expected_gradients`; closed forms",
    example=lambda: {"attributions": jnp.array([[1.0, -2.0], [0.0, 3.0], [0.5, 0.2]])},
)
def attribution_gini(attributions: chex.Array) -> jax.Array:
    r"""How unequally the inputs matter: subtract it from a loss to make them few.

    With m the mean over the batch of the absolute contributions of the n inputs:

    .. math:: G = \frac{\sum_{ij} |m_i - m_j|}{2 n \sum_i m_i}

    Args:
      attributions: contributions, [batch, ...].

    Returns:
      A scalar from 0 (all alike) to 1 - 1/n (one input alone), a statistic of the whole
      batch; 0 if nothing contributes.

    Raises:
      AssertionError: if `attributions` are not floats with a batch axis.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> print(ox.losses.attribution_gini(jnp.array([[0.0, 0.0, -3.0, 0.0]])))
      0.75
    """
    (attributions,) = working_floats(attributions=attributions)
    chex.assert_axis_dimension_gt(
        attributions, 0, 0, custom_message="attributions must be [batch, ...]"
    )
    m = jnp.sort(_importance(attributions))
    n, total = m.size, jnp.sum(m)
    # In order, the i-th of n is the larger one of i - 1 pairs, the smaller of n - i.
    ranks = (2 * jnp.arange(n, dtype=m.dtype) + 1 - n) / n
    unequal = jnp.sum(ranks * (m - m[:1]))
    return jnp.where(total > 0, unequal / jnp.where(total > 0, total, 1), 0)


@catalogued(
    **_PAPER,
    kind="loss",
    needs=("attributions",),
    variant="anisotropic, sum over pixels and channels, as tf.image.total_variation",
    compared="golden `attribution_total_variation`",
    example=lambda: {
        "attributions": jnp.array([[[[1.0], [3.0]], [[0.0], [2.5]]]] * 3),
    },
)
def attribution_total_variation(attributions: chex.Array) -> jax.Array:
    """Roughness of attribution maps: absolute differences of neighbouring pixels.

    Args:
      attributions: signed contributions, [batch, height, width, channels].

    Returns:
      Sums of the absolute differences along height and width, [batch].

    Raises:
      AssertionError: if `attributions` are not floats of rank 4.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> image = jnp.array([[1.0, 3.0], [1.0, 0.0]])
      >>> print(ox.losses.attribution_total_variation(image[None, :, :, None]))
      [6.]
    """
    (phi,) = working_floats(attributions=attributions)
    chex.assert_rank(
        phi, 4, custom_message="attributions must be [batch, height, width, channels]"
    )
    along = (jnp.sum(magnitude(jnp.diff(phi, axis=i)), axis=(1, 2, 3)) for i in (1, 2))
    return sum(along, start=jnp.zeros(phi.shape[:1], phi.dtype))


@catalogued(
    **_PAPER,
    kind="loss",
    needs=("attributions", "laplacian"),
    variant="on the mean absolute contributions of a batch, as in the official code",
    compared="golden `expected_gradients`; the sum over edges",
    example=lambda: {
        "attributions": jnp.array([[1.0, -2.0], [0.0, 3.0], [0.5, 0.2]]),
        "laplacian": jnp.array([[1.0, -1.0], [-1.0, 1.0]]),
    },
)
def attribution_graph_penalty(
    attributions: chex.Array, laplacian: chex.Array
) -> jax.Array:
    r"""Differences in importance between inputs that a graph connects.

    With m the mean over the batch of the absolute contributions of the n inputs:

    .. math:: m^\top L m = \sum_{i < j} A_{ij} (m_i - m_j)^2

    Args:
      attributions: contributions, [batch, ...].
      laplacian: L = D - A, not normalised, [n, n].

    Returns:
      A scalar, a statistic of the whole batch.

    Raises:
      AssertionError: for shapes that do not fit, or arguments that are not floats.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> laplacian = jnp.array([[1.0, -1.0], [-1.0, 1.0]])
      >>> attributions = jnp.array([[3.0, -1.0]])
      >>> print(ox.losses.attribution_graph_penalty(attributions, laplacian))
      4.0
    """
    phi, laplacian = working_floats(attributions=attributions, laplacian=laplacian)
    chex.assert_axis_dimension_gt(
        phi, 0, 0, custom_message="attributions must be [batch, ...]"
    )
    m = _importance(phi)
    chex.assert_shape(
        laplacian, (m.size, m.size), custom_message="laplacian must be [n, n]"
    )
    moved = jnp.matmul(laplacian, m, precision="highest")
    return jnp.vdot(m, moved, precision="highest")

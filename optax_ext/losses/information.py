"""Kernel measures of dependence, for regression without distributional assumptions.

| function | 0 where | use it as |
|---|---|---|
| `cs_conditional_divergence` | the prediction is y | regression loss |
| `cs_qmi` | x and the code t are independent | compression penalty |
| `cs_ib_loss` | - | the two together: an information bottleneck |

All are scalars of one batch, with N^2 memory and in natural logarithms. Standardise
inputs and targets: a kernel of width 1 then sees neighbours.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam
from optax_ext.losses._numerics import working_floats

_PAPER: dict[str, Any] = {
    "title": "Cauchy-Schwarz Divergence Information Bottleneck for Regression",
    "arxiv": "2404.17951",
    "compared": "golden `cs_ib_loss`",
}


def _samples(**arguments: chex.Array) -> list[jax.Array]:
    """The arguments as [N, d] in one dtype; vectors are N samples in one dimension."""
    arrays = dict(zip(arguments, working_floats(**arguments), strict=True))
    for name, x in arrays.items():
        chex.assert_rank(x, {1, 2}, custom_message=f"{name} must be [N, d] or [N]")
    columns = [x[:, None] if x.ndim == 1 else x for x in arrays.values()]
    chex.assert_equal_shape_prefix(
        columns, 1, custom_message=f"{', '.join(arguments)} must have one length"
    )
    chex.assert_axis_dimension_gt(
        columns[0], 0, 0, custom_message=f"{', '.join(arguments)} need a sample"
    )
    return columns


def _log_gram(a: jax.Array, b: jax.Array, sigma: chex.Numeric) -> jax.Array:
    """Log of the Gaussian kernel between all rows; exactly 0 between equal ones."""
    squares = jnp.sum((a[:, None] - b[None]) ** 2, axis=-1)
    return -squares / (2 * jnp.asarray(sigma, a.dtype) ** 2)


@catalogued(
    **_PAPER,
    kind="loss",
    needs=("x", "y", "y_pred"),
    variant="divides by the square of the kernel's row sums, as a ratio of density "
    "estimates does; the released code divides by the sum of squares, in bits",
    example=lambda: {
        "x": jnp.array([[0.0], [1.0], [3.0]]),
        "y": jnp.array([[0.0], [0.5], [1.0]]),
        "y_pred": jnp.array([[0.2], [0.4], [0.1]]),
    },
)
def cs_conditional_divergence(
    x: chex.Array,
    y: chex.Array,
    y_pred: chex.Array,
    *,
    sigma_x: chex.Numeric = 1.0,
    sigma_y: chex.Numeric = 1.0,
) -> jax.Array:
    r"""Cauchy-Schwarz divergence between p(y | x) and the prediction given x.

    With Gaussian kernels K of x, and :math:`L^{ab}` between targets or predictions:

    .. math::
      D = \log S(L^{yy}) + \log S(L^{\hat y \hat y}) - 2 \log S(L^{\hat y y}),
      \qquad
      S(L) = \sum_j \frac{\sum_i K_{ji} L_{ji}}{(\sum_i K_{ji})^2}

    It is an estimate and no distance: K, divided by its row sums, is not symmetric, so
    that the gradient at y_pred = y is small but not 0, and values a little below 0
    exist near by.

    Args:
      x: inputs, [N, d] or [N].
      y: targets, [N, d] or [N].
      y_pred: predictions, like y.
      sigma_x: width of the kernel of x, above 0; 1 for standardised inputs.
      sigma_y: width of the kernel of targets and predictions, above 0.

    Returns:
      A scalar, a statistic of the whole batch; 0 where the prediction is y.

    Raises:
      AssertionError: if the arguments are not floats [N, d] or [N] of one length, or
        y and y_pred differ in shape.
      ValueError: for a width that is not above 0.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> x, y = jnp.array([0.0, 1.0, 3.0]), jnp.array([0.0, 0.5, 1.0])
      >>> print(ox.losses.cs_conditional_divergence(x, y, y))
      0.0
      >>> print(ox.losses.cs_conditional_divergence(x, y, y + 2).round(4))
      3.7526
    """
    owner = "cs_conditional_divergence"
    check_hyperparam(owner, low=0.0, open_low=True, sigma_x=sigma_x, sigma_y=sigma_y)
    x, y, y_pred = _samples(x=x, y=y, y_pred=y_pred)
    chex.assert_equal_shape([y, y_pred], custom_message="y, y_pred")

    k = _log_gram(x, x, sigma_x)
    rows = jax.nn.logsumexp(k, axis=1)

    def log_s(a, b):
        products = jax.nn.logsumexp(k + _log_gram(a, b, sigma_y), axis=1)
        return jax.nn.logsumexp(products - 2 * rows)

    return log_s(y, y) + log_s(y_pred, y_pred) - 2 * log_s(y_pred, y)


def _qmi(k: jax.Array, q: jax.Array) -> jax.Array:
    """Quadratic mutual information from the logs of two Gram matrices.

    Through covariances: it is exactly 0 where one matrix is constant, and a matrix near
    1 loses nothing. No mean underflows, as the diagonals are 1.
    """

    def centred(log_gram):
        less_one = jnp.expm1(log_gram)
        return less_one - jnp.mean(less_one), jnp.mean(jnp.exp(log_gram))

    (k, mean_k), (q, mean_q) = centred(k), centred(q)
    scale = mean_k * mean_q
    of_pairs = jnp.mean(k * q) / scale
    of_rows = jnp.mean(jnp.mean(k, axis=1) * jnp.mean(q, axis=1)) / scale
    return jnp.log1p(of_pairs) - 2 * jnp.log1p(of_rows)


def _root(x: jax.Array) -> jax.Array:
    """The square root, 0 with gradient 0 where x is not positive."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


@catalogued(
    **_PAPER,
    kind="loss",
    needs=("x", "t"),
    variant="natural logarithms; the released code has bits",
    example=lambda: {
        "x": jnp.array([[0.0], [1.0], [3.0]]),
        "t": jnp.array([[0.2], [0.4], [0.1]]),
    },
)
def cs_qmi(
    x: chex.Array,
    t: chex.Array,
    *,
    sigma_x: chex.Numeric = 1.0,
    sigma_t: chex.Numeric = 1.0,
    normalized: bool = False,
) -> jax.Array:
    r"""Cauchy-Schwarz quadratic mutual information between inputs and a code.

    With Gaussian kernels K of x and Q of t, and bars for means over one index:

    .. math::
      \log \mathrm{mean}\, K Q + \log(\mathrm{mean}\, K\; \mathrm{mean}\, Q)
      - 2 \log \mathrm{mean}_i\, \bar K_i \bar Q_i

    Args:
      x: inputs, [N, d] or [N].
      t: the code, [N, d'] or [N].
      sigma_x: width of the kernel of x, above 0; 1 for standardised inputs.
      sigma_t: width of the kernel of t, above 0.
      normalized: whether to divide by the root of QMI(x, x) QMI(t, t), which makes 1
        of QMI(x, x); 0 where one of them is constant.

    Returns:
      A scalar, a statistic of the whole batch; 0 for independent samples.

    Raises:
      AssertionError: if the arguments are not floats [N, d] or [N] of one length.
      ValueError: for a width that is not above 0.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> x = jnp.array([0.0, 1.0, 3.0])
      >>> print(ox.losses.cs_qmi(x, x, normalized=True))
      1.0
      >>> print(ox.losses.cs_qmi(x, jnp.ones(3), normalized=True))
      0.0
    """
    owner = "cs_qmi"
    check_hyperparam(owner, low=0.0, open_low=True, sigma_x=sigma_x, sigma_t=sigma_t)
    x, t = _samples(x=x, t=t)
    k, q = _log_gram(x, x, sigma_x), _log_gram(t, t, sigma_t)
    if not normalized:
        return _qmi(k, q)
    norm = _root(_qmi(k, k)) * _root(_qmi(q, q))
    return jnp.where(norm > 0, _qmi(k, q) / jnp.where(norm > 0, norm, 1), 0)


@catalogued(
    **_PAPER,
    kind="loss",
    needs=("x", "y", "y_pred", "t"),
    variant="normalised mutual information, which the released script trains with",
    example=lambda: {
        "x": jnp.array([[0.0], [1.0], [3.0]]),
        "y": jnp.array([[0.0], [0.5], [1.0]]),
        "y_pred": jnp.array([[0.2], [0.4], [0.1]]),
        "t": jnp.array([[0.2, 1.0], [0.4, 0.0], [0.1, 2.0]]),
    },
)
def cs_ib_loss(
    x: chex.Array,
    y: chex.Array,
    y_pred: chex.Array,
    t: chex.Array,
    *,
    beta: chex.Numeric = 1e-2,
    sigma_x: chex.Numeric = 1.0,
    sigma_y: chex.Numeric = 1.0,
    sigma_t: chex.Numeric = 1.0,
    normalized: bool = True,
) -> jax.Array:
    r"""Information bottleneck: predict y from a code that keeps little of x.

    .. math:: D(y, \hat y \mid x) + \beta\, \mathrm{QMI}(x, t)

    Args:
      x: inputs, [N, d] or [N].
      y: targets, [N, d] or [N].
      y_pred: predictions, like y.
      t: the code that they are made from, [N, d'] or [N].
      beta: price of what the code keeps, 0 or more. 1e-2 is the official default, the
        experiments have 1e-4 to 1.
      sigma_x: width of the kernel of x, above 0.
      sigma_y: width of the kernel of targets and predictions, above 0.
      sigma_t: width of the kernel of t, above 0.
      normalized: which form of `cs_qmi`.

    Returns:
      A scalar, a statistic of the whole batch.

    Raises:
      AssertionError: if the arguments are not floats [N, d] or [N] of one length, or
        y and y_pred differ in shape.
      ValueError: for hyper-parameters outside their range.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> x, y = jnp.array([0.0, 1.0, 3.0]), jnp.array([0.0, 0.5, 1.0])
      >>> print(ox.losses.cs_ib_loss(x, y, y, x, beta=0.5))
      0.5
    """
    check_hyperparam("cs_ib_loss", low=0.0, beta=beta)
    divergence = cs_conditional_divergence(
        x, y, y_pred, sigma_x=sigma_x, sigma_y=sigma_y
    )
    qmi = cs_qmi(x, t, sigma_x=sigma_x, sigma_t=sigma_t, normalized=normalized)
    divergence, qmi = working_floats(divergence=divergence, qmi=qmi)
    return divergence + jnp.asarray(beta, qmi.dtype) * qmi

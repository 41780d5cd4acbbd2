"""Training that stays stable at high learning rates, and how to measure it.

| function | what it is for |
|---|---|
| `z_loss` | keeps log Z of the output softmax near 0, where logits drift away |
| `cross_entropy_with_z_loss` | the same added to the cross-entropy |
| `lr_sensitivity` | one number for how much the final loss depends on the rate |

The paper trains with AdamW whose decay the peak learning rate does not scale:
`optax_ext.adamw_decoupled` with b2=0.95, eps=1e-8, weight_decay=1e-4 and its `schedule`
for warm-up and decay, behind ``optax.clip_by_global_norm(1.0)``.
`optax_ext.losses.with_z_loss` adds the z-loss to any loss function with logits.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_choice, check_hyperparam
from optax_ext.losses._numerics import working_floats

_PAPER: dict[str, Any] = {
    "title": "Small-scale proxies for large-scale Transformer training instabilities",
    "arxiv": "2309.14322",
}


@catalogued(
    **_PAPER,
    kind="loss",
    needs=("logits",),
    variant="as in PaLM and t5x: the square of log Z, a row",
    compared="golden `z_loss`",
    example=lambda: {"logits": jnp.array([[1.0, 2.0], [0.0, -3.0], [4.0, 4.0]])},
)
def z_loss(logits: chex.Array, *, coef: chex.Numeric = 1e-4) -> jax.Array:
    r"""Penalty that keeps a softmax normalised.

    .. math:: c\, (\log Z)^2, \qquad Z = \sum_k e^{z_k}

    Its gradient :math:`2 c \log Z\, \mathrm{softmax}(z)` moves all logits together,
    which the cross-entropy never does.

    Args:
      logits: z, [..., classes].
      coef: c, 0 or more. 1e-4 is the paper's and PaLM's.

    Returns:
      Penalties [...].

    Raises:
      AssertionError: if `logits` are not floats, or have no class axis.
      ValueError: for a negative `coef`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> logits = jnp.array([[0.0, -jnp.inf], [3.0, -jnp.inf]])
      >>> print(ox.losses.z_loss(logits, coef=1.0))
      [0. 9.]
    """
    check_hyperparam("z_loss", low=0.0, coef=coef)
    (logits,) = working_floats(logits=logits)
    chex.assert_axis_dimension_gt(logits, -1, 0, custom_message="logits need classes")
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return jnp.asarray(coef, logits.dtype) * log_z**2


@catalogued(
    **_PAPER,
    kind="loss",
    needs=("logits", "labels"),
    variant="integer labels; as in PaLM and t5x",
    compared="golden `z_loss`; t5x's loss and gradient",
    example=lambda: {
        "logits": jnp.array([[1.0, 2.0], [0.0, -3.0], [4.0, 4.0]]),
        "labels": jnp.array([1, 1, 0]),
    },
)
def cross_entropy_with_z_loss(
    logits: chex.Array, labels: chex.Array, *, coef: chex.Numeric = 1e-4
) -> jax.Array:
    r"""Cross-entropy plus `z_loss`.

    .. math:: \log Z - z_y + c\, (\log Z)^2

    Args:
      logits: z, [..., classes].
      labels: y, integers [...].
      coef: c, 0 or more. 1e-4 is the paper's and PaLM's.

    Returns:
      Losses [...].

    Raises:
      AssertionError: for shapes that do not fit, logits that are not floats, or labels
        that are not integers.
      ValueError: for a negative `coef`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> logits, labels = jnp.zeros((1, 2)), jnp.array([0])
      >>> print(ox.losses.cross_entropy_with_z_loss(logits, labels, coef=1.0).round(4))
      [1.1736]
    """
    penalty = z_loss(logits, coef=coef)
    return token_cross_entropy(logits, labels) + penalty


def token_cross_entropy(logits: chex.Array, labels: chex.Array) -> jax.Array:
    """Cross-entropy with integer labels, of the shape of the labels, never below 0."""
    (logits,) = working_floats(logits=logits)
    labels = jnp.asarray(labels)
    chex.assert_type(labels, int, custom_message="labels must be integers")
    chex.assert_shape(
        labels,
        logits.shape[:-1],
        custom_message="labels must be logits[..., 0]'s shape",
    )
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)


@catalogued(
    **_PAPER,
    kind="diagnostic",
    needs=("learning_rates", "final_losses", "init_loss"),
    variant="the mean over a log-uniform grid; rule='trapezoid' for other grids",
    compared="golden `lr_sensitivity`",
    example=lambda: {
        "learning_rates": jnp.array([1e-3, 1e-2, 1e-1]),
        "final_losses": jnp.array([3.0, 2.5, 12.0]),
        "init_loss": jnp.array(10.4),
    },
)
def lr_sensitivity(
    learning_rates: chex.Array,
    final_losses: chex.Array,
    init_loss: chex.Numeric,
    *,
    rule: str = "mean",
) -> jax.Array:
    r"""How much worse than at the best learning rate training ends on average.

    With final losses l, of which those that diverged count as :math:`l_0`:

    .. math::
      \mathrm{mean}_i\, \ell_i - \min_i \ell_i, \qquad \ell_i = \min(l_i, l_0)

    Args:
      learning_rates: the grid, positive, [runs]; evenly spaced in the logarithm for
        rule "mean".
      final_losses: l, [runs]; NaN counts as l_0.
      init_loss: l_0, the loss before training, a scalar.
      rule: "mean" over the runs; "trapezoid" integrates over the logarithm of the rate
        and divides by its range, for grids that are not even.

    Returns:
      A scalar, 0 where the rate does not matter.

    Raises:
      AssertionError: if `learning_rates` and `final_losses` are not vectors of one
        length, or fewer than two with the trapezoid rule.
      ValueError: for an unknown `rule`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> rates = jnp.array([1e-3, 1e-2, 1e-1])
      >>> final_losses = jnp.array([3.0, 2.5, jnp.nan])
      >>> print(ox.losses.lr_sensitivity(rates, final_losses, 6.5))
      1.5
    """
    check_choice("lr_sensitivity", "rule", rule, ("mean", "trapezoid"))
    rates, final, init = working_floats(
        learning_rates=learning_rates, final_losses=final_losses, init_loss=init_loss
    )
    chex.assert_rank(rates, 1, custom_message="learning_rates must be a vector")
    chex.assert_shape(
        final, rates.shape, custom_message="final_losses must be like learning_rates"
    )
    chex.assert_rank(init, 0, custom_message="init_loss must be a scalar")
    losses = jnp.minimum(jnp.where(jnp.isnan(final), init, final), init)
    if rule == "mean":
        return jnp.mean(losses) - jnp.min(losses)
    chex.assert_axis_dimension_gt(
        rates, 0, 1, custom_message="learning_rates: the trapezoid rule needs two"
    )
    order = jnp.argsort(rates)
    x, y = jnp.log(rates[order]), losses[order]
    return jnp.trapezoid(y, x) / (x[-1] - x[0]) - jnp.min(losses)

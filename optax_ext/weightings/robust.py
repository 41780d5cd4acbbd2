"""Weights for hard examples, with a normaliser that outlives the batch.

`optax_ext.losses.kl_dro_weights` divides by the mean of exp(l/T) over its own batch:
small batches know it badly, and the gradient is biased however long training goes on.
`compositional_kl_dro` divides by a moving average of it.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam
from optax_ext._core.pairs import Weighting
from optax_ext.losses._numerics import mask_of, working_floats
from optax_ext.losses.robust import check_temperature, log_mean_exp, tempered


@catalogued(
    title="Doubly Robust Instance-Reweighted Adversarial Training",
    arxiv="2308.00311",
    kind="weighting",
    needs=("losses",),
    state="one scalar in all",
    variant="the outer problem alone, with our own moving average of the normaliser",
    compared="golden `compositional_kl_dro`; `kl_dro_weights` for ema = 1",
    example=lambda: {"temperature": 1.0, "ema": 0.1},
)
def compositional_kl_dro(
    *, temperature: chex.Numeric = 1.0, ema: chex.Numeric = 0.1
) -> Weighting:
    r"""Weights of KL-regularised DRO with a running normaliser.

    With the mean over the batch, and :math:`u = \mathrm{mean}\, e^{l/T}` at first:

    .. math::
      u \leftarrow (1 - \epsilon)\, u + \epsilon\, \mathrm{mean}_j\, e^{l_j / T},
      \qquad w_i = e^{l_i / T} / u

    The update comes before the division, so that a weight is at most n / ema. The
    weights do not average to 1: a batch that is harder than most counts for more. The
    loss is ``mean(weights * losses)``.

    Args:
      temperature: T > 0. 1 is ours.
      ema: weight of the present batch in the average, in (0, 1]; 1 has no memory, and
        the weights are `optax_ext.losses.kl_dro_weights`. 0.1 is ours.

    Returns:
      A `Weighting`: ``init()`` makes the state, log u, a scalar of the default float
      type; ``update(losses, state, *, where=None)`` takes losses [batch] and returns
      weights [batch] without gradient, and the state. A batch of which nothing counts
      leaves it alone.

    Raises:
      ValueError: for hyper-parameters outside their range.
      AssertionError: at the update, if `losses` are no vector of floats.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> weighting = ox.compositional_kl_dro(ema=0.5)
      >>> weights, state = weighting.update(jnp.zeros(2), weighting.init())
      >>> losses = jnp.log(jnp.array([2.0, 4.0]))
      >>> weights, state = weighting.update(losses, state)  # u = (1 + 3) / 2
      >>> print(weights)
      [1. 2.]
    """
    check_temperature("compositional_kl_dro", temperature)
    check_hyperparam("compositional_kl_dro", low=0.0, high=1.0, open_low=True, ema=ema)

    def init() -> jax.Array:
        return jnp.full((), -jnp.inf, float)

    def update(
        losses: chex.Array, state: jax.Array, *, where: chex.Array | None = None
    ) -> tuple[jax.Array, Any]:
        losses = jax.lax.stop_gradient(working_floats(losses=losses)[0])
        x, largest, t = tempered(losses, temperature, where)
        rate, log_u = jnp.asarray(ema, losses.dtype), state.astype(losses.dtype)
        batch = largest / t + log_mean_exp(x, where)
        average = jnp.logaddexp(jnp.log1p(-rate) + log_u, jnp.log(rate) + batch)
        new = jnp.where(jnp.isneginf(log_u), batch, average)
        mask = mask_of(where, losses)
        new = jnp.where(jnp.any(mask > 0), new, log_u)
        weights = jnp.where(mask > 0, jnp.exp(x + (largest / t - new)), 0) * mask
        return weights, new.astype(state.dtype)

    return Weighting(init, update)

"""Weights from losses over a whole training: with a warm-up, or with a memory.

| weighting | remembers | when |
|---|---|---|
| `loss_based_reweighting` | how many steps there were | to skip what is easy |
| `adaptive_consistency_weighting` | two numbers an example | some labels do not fit |
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_choice, check_hyperparam, check_interval
from optax_ext._core.leaves import at_step, next_count
from optax_ext._core.pairs import Weighting
from optax_ext.losses._numerics import working_floats
from optax_ext.losses.robust import check_temperature
from optax_ext.losses.sample_weights import STRATEGIES, loss_based_weights


class LossBasedState(NamedTuple):
    """State of `loss_based_reweighting`: how many updates there were."""

    count: jax.Array


class ConsistencyState(NamedTuple):
    """State of `adaptive_consistency_weighting`: [num_examples, 2], rows of sum 1."""

    weights: jax.Array


@catalogued(
    title="Dynamic Loss-Based Sample Reweighting for Improved Large Language Model "
    "Pretraining",
    kind="weighting",
    needs=("losses",),
    state="one counter in all",
    variant="`loss_based_weights` behind a warm-up, without the trainer's token shares",
    compared="`loss_based_weights`, step by step",
    example=lambda: {"temperature": 0.4, "warmup_steps": 2},
)
def loss_based_reweighting(
    *,
    strategy: str = "linupper",
    delta: chex.Numeric = 1.0,
    temperature: chex.Numeric | optax.Schedule = 1.0,
    warmup_steps: int = 0,
) -> Weighting:
    """`optax_ext.losses.loss_based_weights` after some steps of equal weights.

    The weights sum to 1 and the loss is ``sum(weights * losses)``.

    Args:
      strategy: "linupper", "quadratic", "extremes" or "uniform".
      delta: above 0; 1 is the paper's.
      temperature: above 0, or a schedule, which is called with 0, 1, ... from the first
        update on. The paper's large models have 0.4.
      warmup_steps: how many updates give 1/n, 0 or more. The paper's configurations
        have 1000.

    Returns:
      A `Weighting`: ``init()`` makes the state, ``update(losses, state, *,
      where=None)`` takes losses [batch] and returns weights [batch] without gradient,
      and the state.

    Raises:
      ValueError: for hyper-parameters outside their range.
      AssertionError: at the update, if `losses` are no vector of floats.

    Example:
      >>> import jax.numpy as jnp, numpy as np, optax_ext as ox
      >>> weighting = ox.loss_based_reweighting(warmup_steps=1)
      >>> state, losses = weighting.init(), jnp.array([0.0, 4.0])
      >>> weights, state = weighting.update(losses, state)
      >>> print(weights)
      [0.5 0.5]
      >>> weights, state = weighting.update(losses, state)
      >>> print(np.asarray(weights).round(3))
      [0.269 0.731]
    """
    owner = "loss_based_reweighting"
    check_choice(owner, "strategy", strategy, STRATEGIES)
    check_hyperparam(owner, low=0.0, open_low=True, delta=delta)
    if not callable(temperature):
        check_temperature(owner, temperature)
    check_hyperparam(owner, low=0.0, warmup_steps=warmup_steps)

    def init() -> LossBasedState:
        return LossBasedState(jnp.zeros((), jnp.int32))

    def update(
        losses: chex.Array, state: LossBasedState, *, where: chex.Array | None = None
    ) -> tuple[jax.Array, LossBasedState]:
        (losses,) = working_floats(losses=losses)
        now = at_step(temperature, state.count.astype(losses.dtype) + 1)
        weights = loss_based_weights(
            losses, strategy=strategy, delta=delta, temperature=now, where=where
        )
        equal = loss_based_weights(losses, strategy="uniform", where=where)
        weights = jnp.where(state.count < warmup_steps, equal, weights)
        return weights, LossBasedState(next_count(state.count))

    return Weighting(init, update)


@catalogued(
    title="Adaptively Weighted Data Augmentation Consistency Regularization for Robust "
    "Optimization under Concept Shift",
    arxiv="2210.01891",
    kind="weighting",
    needs=("losses", "consistency_losses", "index"),
    state="two numbers an example",
    variant="the official update, in logarithms",
    compared="golden `adaptive_consistency_weighting`; the closed form of a history",
    example=lambda: {"num_examples": 4},
)
def adaptive_consistency_weighting(
    num_examples: int,
    *,
    learning_rate: chex.Numeric = 1.0,
    consistency_weight: chex.Numeric = 1.0,
) -> Weighting:
    r"""Learn for each example whether to trust its label or augmentation consistency.

    At each visit, with the loss l, the consistency loss rho and eta = learning_rate:

    .. math::
      b_0 \leftarrow b_0 e^{\eta l}, \qquad
      b_1 \leftarrow b_1 e^{\eta \lambda \rho}, \qquad b \leftarrow b / (b_0 + b_1)

    so that after any history
    :math:`b_0 = \sigma(\eta \sum (l - \lambda \rho))`. The loss of the step uses the
    new weights: ``mean(w[:, 0] * l + w[:, 1] * consistency_weight * rho)``.

    Args:
      num_examples: size of the training set.
      learning_rate: eta, 0 or more; 1 is the official default, the published UNet runs
        have 8.
      consistency_weight: lambda, 0 or more; 1 is the official default, the published
        UNet runs have 2.

    Returns:
      A `Weighting`: ``init()`` makes the state, a table with all weights 0.5;
      ``update(losses, state, *, consistency_losses, index)`` takes two losses an
      example, [batch], and the examples' integer indices [batch], and returns weights
      [batch, 2] without gradient, and the state. The indices of a batch must be
      distinct: of equal ones, any may be the one that is kept.

    Raises:
      ValueError: for hyper-parameters outside their range.
      AssertionError: at the update, for shapes or types that do not fit.

    Example:
      >>> import jax.numpy as jnp, numpy as np, optax_ext as ox
      >>> weighting = ox.adaptive_consistency_weighting(10)
      >>> losses, consistency = jnp.log(jnp.array([[3.0, 1.0], [1.0, 1.0]]))
      >>> weights, state = weighting.update(losses, weighting.init(),
      ...     consistency_losses=consistency, index=jnp.array([7, 2]))
      >>> print(np.asarray(weights).round(5))
      [[0.75 0.25]
       [0.5  0.5 ]]
    """
    owner = "adaptive_consistency_weighting"
    check_interval(owner, num_examples=num_examples)
    check_hyperparam(
        owner,
        low=0.0,
        learning_rate=learning_rate,
        consistency_weight=consistency_weight,
    )

    def init() -> ConsistencyState:
        return ConsistencyState(jnp.full((num_examples, 2), 0.5, float))

    def update(
        losses: chex.Array,
        state: ConsistencyState,
        *,
        consistency_losses: chex.Array,
        index: chex.Array,
    ) -> tuple[jax.Array, ConsistencyState]:
        losses, consistency = working_floats(
            losses=losses, consistency_losses=consistency_losses
        )
        index = jnp.asarray(index)
        chex.assert_rank(losses, 1, custom_message="losses must be a vector")
        chex.assert_type(index, int, custom_message="index must be integers")
        chex.assert_equal_shape(
            [losses, consistency, index],
            custom_message="losses, consistency_losses, index",
        )
        eta, lam = (
            jnp.asarray(x, losses.dtype) for x in (learning_rate, consistency_weight)
        )
        gains = eta * jnp.stack([losses, lam * consistency], axis=-1)
        old = state.weights[index].astype(losses.dtype)
        alive = jnp.any(old > 0, axis=-1, keepdims=True)
        rows = jax.nn.softmax(jnp.where(alive, jnp.log(old), 0) + gains)
        rows = jax.lax.stop_gradient(rows)
        table = state.weights.at[index].set(rows.astype(state.weights.dtype))
        return rows, ConsistencyState(table)

    return Weighting(init, update)

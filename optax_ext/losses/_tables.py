"""Losses that remember what the model said of every training example.

Their memory is one array, a table with a row of class probabilities an example. A loss
is then a rule for the rows of one batch; reading and writing them is the same for all.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.checks import check_interval
from optax_ext._core.pairs import StatefulLoss
from optax_ext.losses._labels import labelled

RowRule = Callable[..., tuple[jax.Array, jax.Array]]
"""``(rows, logits, labels, *more) -> (losses, new rows)``."""


def table_loss(
    owner: str, num_examples: int, num_classes: int, rule: RowRule
) -> StatefulLoss:
    """Keep a table [num_examples, num_classes], and apply a rule to rows of it.

    Rows are read and written by example id with one gather and one scatter, so that a
    table that is sharded over examples stays so. Neither the old rows nor the new ones
    carry gradients. An index of `num_examples` or more marks padding: what is read
    there is some row, and nothing is written.
    """
    check_interval(owner, num_examples=num_examples, num_classes=num_classes)

    def init() -> jax.Array:
        return jnp.zeros((num_examples, num_classes))

    def apply(
        state: jax.Array,
        logits: chex.Array,
        labels: chex.Array,
        index: chex.Array,
        *more: Any,
        **named: Any,
    ) -> tuple[jax.Array, jax.Array]:
        logits, labels = labelled(logits, labels)
        index = jnp.asarray(index)
        message = f"state must be the table of {owner}.init"
        chex.assert_shape(state, (num_examples, num_classes), custom_message=message)
        message = f"logits must have {num_classes} classes"
        chex.assert_axis_dimension(logits, -1, num_classes, custom_message=message)
        chex.assert_type(index, int, custom_message="index must be integers")
        message = "index must have one example id a row of logits"
        chex.assert_shape(index, labels.shape, custom_message=message)

        rows = state.at[index].get(mode="clip").astype(logits.dtype)
        rows = jax.lax.stop_gradient(rows)
        losses, new_rows = rule(rows, logits, labels, *more, **named)
        new_rows = jax.lax.stop_gradient(new_rows).astype(state.dtype)
        return losses, state.at[index].set(new_rows, mode="drop")

    return StatefulLoss(init, apply)

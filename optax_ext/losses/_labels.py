"""Checks of logits, labels and class counts that several modules share."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optax_ext.losses._numerics import working_floats


def labelled(logits: chex.Array, labels: chex.Array) -> tuple[jax.Array, jax.Array]:
    """Logits [..., classes] in the working dtype and labels [...], which fit them.

    Raises:
      AssertionError: if `logits` are no floats or `labels` no integers, or if `labels`
        have another shape than the rows of `logits`.
    """
    (logits,) = working_floats(logits=logits)
    labels = jnp.asarray(labels)
    message = "logits need an axis of classes"
    chex.assert_rank(logits, set(range(1, 33)), custom_message=message)
    chex.assert_type(labels, int, custom_message="labels must be integers")
    message = "labels must have one class a row of logits"
    chex.assert_shape(labels, logits.shape[:-1], custom_message=message)
    return logits, labels


def positive_counts(owner: str, class_counts: Any, dtype: Any) -> jax.Array:
    """How many training examples each class has, as floats [classes].

    Raises:
      AssertionError: if it is no vector.
      ValueError: for a class without examples, as far as the values are known.
    """
    counts = jnp.asarray(class_counts, dtype)
    chex.assert_rank(counts, 1, custom_message="class_counts must be a vector")
    if not isinstance(class_counts, Tracer):
        empty = np.flatnonzero(~(np.asarray(class_counts) > 0))
        if empty.size:
            raise ValueError(
                f"{owner}: class_counts must be positive, got none for the classes "
                f"{empty.tolist()}; leave classes without examples out"
            )
    return counts


def counts_like(owner: str, class_counts: Any, logits: jax.Array) -> jax.Array:
    """Positive counts in the dtype of the logits, one for each of their classes."""
    counts = positive_counts(owner, class_counts, logits.dtype)
    message = "class_counts must have one count a class of logits"
    chex.assert_shape(counts, logits.shape[-1:], custom_message=message)
    return counts


def over_rows(x: jax.Array, rows: jax.Array) -> jax.Array:
    """A vector over classes, broadcast to all rows of `rows`."""
    return jnp.broadcast_to(x, rows.shape)

"""What finished optimizers share: Adam's direction, decay, the learning rate."""

from typing import Any

import jax
import optax

from optax_ext._core.checks import check_hyperparam, check_params, check_rate
from optax_ext._core.views import full_precision


def adam_direction(
    owner: str, b1: float, b2: float, eps: float, eps_root: float, mu_dtype: Any
) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with checked hyper-parameters, to be run in float32.

    Args:
      owner: name of the method, for messages.
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: added to the root of the second moment.
      eps_root: added under the root.
      mu_dtype: dtype of the first moment; None keeps float32.
    """
    check_rate(owner, b1=b1, b2=b2)
    check_hyperparam(owner, low=0.0, eps=eps, eps_root=eps_root)
    return optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype)


def with_raw_gradient(
    inner: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Hand `inner` its incoming updates as the extra argument ``grad`` too."""

    def update(updates, state, params=None, **extra):
        return inner.update(updates, state, params, **{**extra, "grad": updates})

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _precise(schedule: Any) -> Any:
    """The schedule on the widest integer: an int32 makes float32 values under x64."""
    if not callable(schedule):
        return schedule

    def at(count: jax.Array) -> Any:
        return schedule(count.astype(int))

    return at


def finish(
    *links: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: Any = None,
    mask: Any = None,
    owner: str,
) -> optax.GradientTransformationExtraArgs:
    """Make a finished optimizer: links, then decay, then the learning rate.

    Args:
      *links: directions, un-negated.
      learning_rate: a number or a schedule.
      weight_decay: rate of decoupled decay, multiplied by the learning rate; None for
        an optimizer that has none.
      mask: which leaves decay, as in `optax.add_decayed_weights`.
      owner: name of the optimizer, for messages.

    Returns:
      The chain, in float32 from its first link to its last.
    """
    check_hyperparam(owner, low=0.0, learning_rate=learning_rate)
    check_hyperparam(owner, weight_decay=weight_decay)
    decay = []
    if weight_decay is not None:
        decay = [optax.add_decayed_weights(_precise(weight_decay), mask)]
    descend = optax.scale_by_learning_rate(_precise(learning_rate))
    tx = full_precision(optax.chain(*links, *decay, descend))

    def update(updates, state, params=None, **extra):
        if decay:
            check_params(owner, params)
        return tx.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update)

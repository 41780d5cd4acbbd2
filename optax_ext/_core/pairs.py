"""Pairs of functions: losses and weightings that remember something.

Both keep arrays only, so that their state goes through jit, scan, checkpoints and
sharding like any tree, and neither holds anything of the model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple


class StatefulLoss(NamedTuple):
    """A loss with a memory, usually a table with a row an example.

    Attributes:
      init: ``init() -> state``.
      apply: ``apply(state, *arguments) -> (losses, state)``. Differentiate the losses
        with the state as an auxiliary output (``has_aux=True``).
    """

    init: Callable[..., Any]
    apply: Callable[..., tuple[Any, Any]]


class Weighting(NamedTuple):
    """Weights for several losses (of examples, domains, tasks).

    Attributes:
      init: ``init(...) -> state``.
      update: ``update(losses, state, **extra) -> (weights, state)``; the weights carry
        no gradient.
    """

    init: Callable[..., Any]
    update: Callable[..., tuple[Any, Any]]

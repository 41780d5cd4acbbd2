"""optax_ext: published training methods that optax does not ship.

You hold gradients: links, wrappers and optimizers are here, and chain with optax's.
You hold predictions or log-probabilities: see `optax_ext.losses`.
``python -m optax_ext`` lists every method, its paper, and what it was compared with.
"""

from optax_ext import (
    curvature,
    diagnostics,
    losses,
    training,
    transforms,
    weightings,
    wrappers,
)
from optax_ext._core.catalogue import cite
from optax_ext._core.leaves import leafwise
from optax_ext._core.pairs import StatefulLoss
from optax_ext._core.trees import Bucket
from optax_ext.curvature import *  # noqa: F403
from optax_ext.diagnostics import *  # noqa: F403
from optax_ext.training import StepMetrics, make_train_step
from optax_ext.transforms import *  # noqa: F403
from optax_ext.weightings import *  # noqa: F403
from optax_ext.wrappers import *  # noqa: F403

__version__ = "0.1.0"

__all__ = [
    "Bucket",
    "StatefulLoss",
    "StepMetrics",
    "cite",
    "curvature",
    "diagnostics",
    "leafwise",
    "losses",
    "make_train_step",
    "training",
    "transforms",
    "weightings",
    "wrappers",
]
__all__ += curvature.__all__
__all__ += diagnostics.__all__
__all__ += transforms.__all__
__all__ += weightings.__all__
__all__ += wrappers.__all__

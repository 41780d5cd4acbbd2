"""Estimators of things that samplers and training loops ask for beside gradients."""

from optax_ext.estimators.guidance import (
    Guidance,
    GuidanceState,
    adaptive_projected_guidance,
)
from optax_ext.estimators.mixtures import (
    mixup,
    wise_ft,
)

__all__ = [
    "Guidance",
    "GuidanceState",
    "adaptive_projected_guidance",
    "mixup",
    "wise_ft",
]

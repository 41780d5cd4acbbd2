"""Estimators of things that samplers and training loops ask for beside gradients."""

from optax_ext.estimators.guidance import (
    Guidance,
    GuidanceState,
    adaptive_projected_guidance,
)

__all__ = ["Guidance", "GuidanceState", "adaptive_projected_guidance"]

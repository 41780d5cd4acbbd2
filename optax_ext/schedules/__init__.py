"""Schedules: functions of optax's 0-based step count, and rules for batch sizes."""

from optax_ext.schedules.batch_size import (
    batch_hessian_edge,
    lanczos_lr_and_momentum,
    scale_lr_by_batch,
    sqrt_batch_scaled,
)
from optax_ext.schedules.cycles import (
    infinite_schedule,
    one_cycle,
    rewarmed_cosine_schedule,
)
from optax_ext.schedules.refinement import (
    GradNormsState,
    grad_norms,
    record_grad_norms,
    refined_schedule,
)
from optax_ext.schedules.warmups import (
    ademamix_alpha_schedule,
    ademamix_b3_schedule,
    rectification_schedule,
    relative_step_schedule,
)

__all__ = [
    "GradNormsState",
    "ademamix_alpha_schedule",
    "ademamix_b3_schedule",
    "batch_hessian_edge",
    "grad_norms",
    "infinite_schedule",
    "lanczos_lr_and_momentum",
    "one_cycle",
    "record_grad_norms",
    "rectification_schedule",
    "refined_schedule",
    "relative_step_schedule",
    "rewarmed_cosine_schedule",
    "scale_lr_by_batch",
    "sqrt_batch_scaled",
]

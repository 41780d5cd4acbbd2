"""Losses on what a model puts out: log-probabilities, means, predictions.

Pure functions without a trainer. They return one value per element, sample or token and
leave the mean to you; `optax_ext.losses.policy` says which policy loss to reach for.
"""

from optax_ext.losses.confusion import (
    anyloss,
    soft_confusion_matrix,
)
from optax_ext.losses.distillation import (
    distillation_discriminator_loss,
    ensemble_distillation_loss,
    optimal_distillation_weight,
    progressive_self_distillation,
    self_distillation_loss,
)
from optax_ext.losses.domains import idgm_loss
from optax_ext.losses.flow_policy import flow_sde_step, gaussian_step_log_prob
from optax_ext.losses.grpo_guard import (
    denoising_step_weights,
    grpo_guard_loss,
    normalized_log_ratio,
)
from optax_ext.losses.imbalance import (
    deferred_reweighting,
    effective_number_weights,
    ldam_loss,
    vector_scaling_loss,
)
from optax_ext.losses.noisy_labels import (
    co_teaching_loss,
    co_teaching_weights,
    early_learning_regularization,
    forget_rate_schedule,
    nested_dropout,
    nested_dropout_probs,
)
from optax_ext.losses.policy import (
    clipped_surrogate_loss,
    group_relative_advantages,
    ppo_clip_loss,
)
from optax_ext.losses.proportions import (
    easy_llp_labels,
    easy_llp_loss,
)
from optax_ext.losses.semi_supervised import (
    shrinkmatch_loss,
)

__all__ = [
    "anyloss",
    "clipped_surrogate_loss",
    "co_teaching_loss",
    "co_teaching_weights",
    "deferred_reweighting",
    "denoising_step_weights",
    "distillation_discriminator_loss",
    "early_learning_regularization",
    "easy_llp_labels",
    "easy_llp_loss",
    "effective_number_weights",
    "ensemble_distillation_loss",
    "flow_sde_step",
    "forget_rate_schedule",
    "gaussian_step_log_prob",
    "group_relative_advantages",
    "grpo_guard_loss",
    "idgm_loss",
    "ldam_loss",
    "nested_dropout",
    "nested_dropout_probs",
    "normalized_log_ratio",
    "optimal_distillation_weight",
    "ppo_clip_loss",
    "progressive_self_distillation",
    "self_distillation_loss",
    "shrinkmatch_loss",
    "soft_confusion_matrix",
    "vector_scaling_loss",
]

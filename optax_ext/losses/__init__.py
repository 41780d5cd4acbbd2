"""Losses on what a model puts out: log-probabilities, means, predictions.

Pure functions without a trainer. They return one value per element, sample or token and
leave the mean to you; `optax_ext.losses.policy` says which policy loss to reach for.
"""

from optax_ext.losses.classification import (
    normalized_sigmoid_binary_cross_entropy,
    normalized_softmax_cross_entropy_with_integer_labels,
    stablemax_cross_entropy_with_integer_labels,
)
from optax_ext.losses.domains import (
    idgm_loss,
)
from optax_ext.losses.flow_policy import (
    flow_sde_step,
    gaussian_step_log_prob,
)
from optax_ext.losses.grpo_guard import (
    denoising_step_weights,
    grpo_guard_loss,
    normalized_log_ratio,
)
from optax_ext.losses.policy import (
    clipped_surrogate_loss,
    group_relative_advantages,
    ppo_clip_loss,
)

__all__ = [
    "clipped_surrogate_loss",
    "denoising_step_weights",
    "flow_sde_step",
    "gaussian_step_log_prob",
    "group_relative_advantages",
    "grpo_guard_loss",
    "idgm_loss",
    "normalized_log_ratio",
    "normalized_sigmoid_binary_cross_entropy",
    "normalized_softmax_cross_entropy_with_integer_labels",
    "ppo_clip_loss",
    "stablemax_cross_entropy_with_integer_labels",
]

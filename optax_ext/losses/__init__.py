"""Losses on what a model puts out: log-probabilities, means, predictions.

Pure functions without a trainer. They return one value per element, sample or token and
leave the mean to you; `optax_ext.losses.policy` says which policy loss to reach for.
"""

from optax_ext.losses.attribution import (
    attribution_gini,
    attribution_graph_penalty,
    attribution_total_variation,
    expected_gradients,
    sample_expected_gradients,
)
from optax_ext.losses.calibration import (
    RiskCoverage,
    area_under_risk_coverage,
    logit_norm_score,
    pit_calibration_loss,
    risk_coverage_curve,
)
from optax_ext.losses.domains import (
    hessian_alignment_loss,
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
from optax_ext.losses.information import (
    cs_conditional_divergence,
    cs_ib_loss,
    cs_qmi,
)
from optax_ext.losses.natural_gradient import (
    natural_gradient_loss,
)
from optax_ext.losses.perturbation import (
    awp_value_and_grad,
    rwp_value_and_grad,
    with_weight_perturbation,
)
from optax_ext.losses.policy import (
    clipped_surrogate_loss,
    group_relative_advantages,
    ppo_clip_loss,
)
from optax_ext.losses.robust import (
    kl_dro_loss,
    kl_dro_weights,
    loreun_weights,
    road_loss,
    road_weights,
)
from optax_ext.losses.sample_weights import (
    curriculum_weight,
    loss_based_weights,
    normalized_score,
    pairwise_easiness,
    pointwise_easiness,
    reciprocal_rank_score,
)
from optax_ext.losses.stability import (
    cross_entropy_with_z_loss,
    lr_sensitivity,
    z_loss,
)
from optax_ext.losses.token_weighting import (
    talr_cross_entropy,
    tldr_cross_entropy,
)
from optax_ext.losses.wrappers import (
    flooding,
    with_gradient_penalty,
    with_regularizer,
    with_z_loss,
)

__all__ = [
    "RiskCoverage",
    "area_under_risk_coverage",
    "attribution_gini",
    "attribution_graph_penalty",
    "attribution_total_variation",
    "awp_value_and_grad",
    "clipped_surrogate_loss",
    "cross_entropy_with_z_loss",
    "cs_conditional_divergence",
    "cs_ib_loss",
    "cs_qmi",
    "curriculum_weight",
    "denoising_step_weights",
    "expected_gradients",
    "flooding",
    "flow_sde_step",
    "gaussian_step_log_prob",
    "group_relative_advantages",
    "grpo_guard_loss",
    "hessian_alignment_loss",
    "idgm_loss",
    "kl_dro_loss",
    "kl_dro_weights",
    "logit_norm_score",
    "loreun_weights",
    "loss_based_weights",
    "lr_sensitivity",
    "natural_gradient_loss",
    "normalized_log_ratio",
    "normalized_score",
    "pairwise_easiness",
    "pit_calibration_loss",
    "pointwise_easiness",
    "ppo_clip_loss",
    "reciprocal_rank_score",
    "risk_coverage_curve",
    "road_loss",
    "road_weights",
    "rwp_value_and_grad",
    "sample_expected_gradients",
    "talr_cross_entropy",
    "tldr_cross_entropy",
    "with_gradient_penalty",
    "with_regularizer",
    "with_weight_perturbation",
    "with_z_loss",
    "z_loss",
]

"""Losses on what a model puts out: log-probabilities, means, predictions.

Pure functions without a trainer. They return one value per element, sample or token and
leave the mean to you. Each module says which of its losses to reach for:

| you train | modules |
|---|---|
| a policy on rewards | `policy`, `language_policy`, `grpo_guard`, `lens` |
| a language model on preferences | `preference`, `sparse_po`, with `tokens` |
| a classifier: rare classes, wrong labels | `imbalance`, `noisy_labels`, `confusion` |
| with teachers, or without labels | `distillation`, `semi_supervised`, `proportions` |
| for the worst case, with calibration | `robust`, `perturbation`, `calibration` |
| a diffusion model | `diffusion`, `consistency`, `distribution_matching` |
| embeddings and rankings | `contrastive`, `retrieval`, `ranking` |
| any loss with something around it | `wrappers` |
"""

from optax_ext.losses.alignment import (
    representation_alignment_loss,
    spatial_normalize,
)
from optax_ext.losses.anchors import (
    anchor_penalty,
)
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
from optax_ext.losses.classification import (
    normalized_sigmoid_binary_cross_entropy,
    normalized_softmax_cross_entropy_with_integer_labels,
    stablemax_cross_entropy_with_integer_labels,
)
from optax_ext.losses.confusion import (
    anyloss,
    soft_confusion_matrix,
)
from optax_ext.losses.consistency import (
    consistency_scalings,
    consistency_training_loss,
    pseudo_huber_loss,
)
from optax_ext.losses.consistency_levels import (
    ict_discretization_schedule,
    ict_weights,
    karras_sigmas,
    lognormal_timestep_probs,
)
from optax_ext.losses.contrastive import (
    macl_loss,
    macl_loss_from_similarities,
    multi_similarity_loss,
)
from optax_ext.losses.diffusion import (
    debiased_diffusion_weight,
    diffusion_weighting,
    p2_diffusion_weight,
    weighted_diffusion_loss,
)
from optax_ext.losses.distillation import (
    distillation_discriminator_loss,
    ensemble_distillation_loss,
    optimal_distillation_weight,
    progressive_self_distillation,
    self_distillation_loss,
)
from optax_ext.losses.distribution_matching import (
    f_distill_loss,
    f_divergence_weight,
    log_ratio_and_grad,
    tiw_dsm_loss,
)
from optax_ext.losses.domains import (
    hessian_alignment_loss,
    idgm_loss,
)
from optax_ext.losses.entanglement import (
    GradientEntanglement,
    gradient_entanglement,
    pairwise_normalized_gradient,
)
from optax_ext.losses.flow_policy import (
    flow_sde_step,
    gaussian_step_log_prob,
)
from optax_ext.losses.gan import (
    gradient_penalty,
    wgan_gp_loss,
)
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
from optax_ext.losses.information import (
    cs_conditional_divergence,
    cs_ib_loss,
    cs_qmi,
)
from optax_ext.losses.inverse import (
    proximal_matching_gamma_schedule,
    proximal_matching_loss,
    red_diff_loss,
)
from optax_ext.losses.language_policy import (
    grpo_loss,
    remax_advantages,
    remax_loss,
)
from optax_ext.losses.lens import (
    lens_advantages,
    lens_rewards,
)
from optax_ext.losses.natural_gradient import (
    natural_gradient_loss,
)
from optax_ext.losses.noisy_labels import (
    co_teaching_loss,
    co_teaching_weights,
    early_learning_regularization,
    forget_rate_schedule,
    nested_dropout,
    nested_dropout_probs,
)
from optax_ext.losses.noprop import (
    noprop_loss,
    noprop_posterior_coeffs,
    noprop_prior_kl,
)
from optax_ext.losses.offline_policy import (
    a_lol_loss,
)
from optax_ext.losses.orthogonality import (
    orthogonal_conv_penalty,
    orthogonal_dense_penalty,
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
from optax_ext.losses.preference import (
    dpo_loss,
    simpo_loss,
)
from optax_ext.losses.proportions import (
    easy_llp_labels,
    easy_llp_loss,
)
from optax_ext.losses.ranking import (
    neural_ndcg_loss,
    neural_sort,
    sinkhorn_normalize,
)
from optax_ext.losses.reconstruction import (
    contractive_reconstruction_loss,
    denoising_reconstruction_loss,
    score_from_reconstruction,
)
from optax_ext.losses.recurrent import (
    generalized_teacher_forcing_rollout,
    optimal_forcing,
    update_forcing,
    vanishing_gradient_regularizer,
)
from optax_ext.losses.retrieval import (
    focal_info_nce,
    mix_hard_negatives,
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
from optax_ext.losses.semi_supervised import (
    shrinkmatch_loss,
)
from optax_ext.losses.solvers import (
    iteration_count_surrogate,
    target_surrogate_loss,
)
from optax_ext.losses.sparse_po import (
    activation_token_mask,
    sparse_po_loss,
    sparse_token_mask,
)
from optax_ext.losses.stability import (
    cross_entropy_with_z_loss,
    lr_sensitivity,
    z_loss,
)
from optax_ext.losses.submodular import (
    reward_to_go,
    submodular_policy_loss,
)
from optax_ext.losses.token_weighting import (
    talr_cross_entropy,
    tldr_cross_entropy,
)
from optax_ext.losses.tokens import (
    sequence_log_probs,
    token_kl,
    token_log_probs,
)
from optax_ext.losses.wrappers import (
    flooding,
    with_gradient_penalty,
    with_regularizer,
    with_z_loss,
)

__all__ = [
    "GradientEntanglement",
    "RiskCoverage",
    "a_lol_loss",
    "activation_token_mask",
    "anchor_penalty",
    "anyloss",
    "area_under_risk_coverage",
    "attribution_gini",
    "attribution_graph_penalty",
    "attribution_total_variation",
    "awp_value_and_grad",
    "clipped_surrogate_loss",
    "co_teaching_loss",
    "co_teaching_weights",
    "consistency_scalings",
    "consistency_training_loss",
    "contractive_reconstruction_loss",
    "cross_entropy_with_z_loss",
    "cs_conditional_divergence",
    "cs_ib_loss",
    "cs_qmi",
    "curriculum_weight",
    "debiased_diffusion_weight",
    "deferred_reweighting",
    "denoising_reconstruction_loss",
    "denoising_step_weights",
    "diffusion_weighting",
    "distillation_discriminator_loss",
    "dpo_loss",
    "early_learning_regularization",
    "easy_llp_labels",
    "easy_llp_loss",
    "effective_number_weights",
    "ensemble_distillation_loss",
    "expected_gradients",
    "f_distill_loss",
    "f_divergence_weight",
    "flooding",
    "flow_sde_step",
    "focal_info_nce",
    "forget_rate_schedule",
    "gaussian_step_log_prob",
    "generalized_teacher_forcing_rollout",
    "gradient_entanglement",
    "gradient_penalty",
    "group_relative_advantages",
    "grpo_guard_loss",
    "grpo_loss",
    "hessian_alignment_loss",
    "ict_discretization_schedule",
    "ict_weights",
    "idgm_loss",
    "iteration_count_surrogate",
    "karras_sigmas",
    "kl_dro_loss",
    "kl_dro_weights",
    "ldam_loss",
    "lens_advantages",
    "lens_rewards",
    "log_ratio_and_grad",
    "logit_norm_score",
    "lognormal_timestep_probs",
    "loreun_weights",
    "loss_based_weights",
    "lr_sensitivity",
    "macl_loss",
    "macl_loss_from_similarities",
    "mix_hard_negatives",
    "multi_similarity_loss",
    "natural_gradient_loss",
    "nested_dropout",
    "nested_dropout_probs",
    "neural_ndcg_loss",
    "neural_sort",
    "noprop_loss",
    "noprop_posterior_coeffs",
    "noprop_prior_kl",
    "normalized_log_ratio",
    "normalized_score",
    "normalized_sigmoid_binary_cross_entropy",
    "normalized_softmax_cross_entropy_with_integer_labels",
    "optimal_distillation_weight",
    "optimal_forcing",
    "orthogonal_conv_penalty",
    "orthogonal_dense_penalty",
    "p2_diffusion_weight",
    "pairwise_easiness",
    "pairwise_normalized_gradient",
    "pit_calibration_loss",
    "pointwise_easiness",
    "ppo_clip_loss",
    "progressive_self_distillation",
    "proximal_matching_gamma_schedule",
    "proximal_matching_loss",
    "pseudo_huber_loss",
    "reciprocal_rank_score",
    "red_diff_loss",
    "remax_advantages",
    "remax_loss",
    "representation_alignment_loss",
    "reward_to_go",
    "risk_coverage_curve",
    "road_loss",
    "road_weights",
    "rwp_value_and_grad",
    "sample_expected_gradients",
    "score_from_reconstruction",
    "self_distillation_loss",
    "sequence_log_probs",
    "shrinkmatch_loss",
    "simpo_loss",
    "sinkhorn_normalize",
    "soft_confusion_matrix",
    "sparse_po_loss",
    "sparse_token_mask",
    "spatial_normalize",
    "stablemax_cross_entropy_with_integer_labels",
    "submodular_policy_loss",
    "talr_cross_entropy",
    "target_surrogate_loss",
    "tiw_dsm_loss",
    "tldr_cross_entropy",
    "token_kl",
    "token_log_probs",
    "update_forcing",
    "vanishing_gradient_regularizer",
    "vector_scaling_loss",
    "weighted_diffusion_loss",
    "wgan_gp_loss",
    "with_gradient_penalty",
    "with_regularizer",
    "with_weight_perturbation",
    "with_z_loss",
    "z_loss",
]

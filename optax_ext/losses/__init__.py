"""Losses on what a model puts out: log-probabilities, means, predictions.

Pure functions without a trainer. They return one value per element, sample or token and
leave the mean to you; `optax_ext.losses.policy` says which policy loss to reach for.
"""

from optax_ext.losses.anchors import (
    anchor_penalty,
)
from optax_ext.losses.contrastive import (
    macl_loss,
    macl_loss_from_similarities,
    multi_similarity_loss,
)
from optax_ext.losses.domains import idgm_loss
from optax_ext.losses.entanglement import (
    GradientEntanglement,
    gradient_entanglement,
    pairwise_normalized_gradient,
)
from optax_ext.losses.flow_policy import flow_sde_step, gaussian_step_log_prob
from optax_ext.losses.grpo_guard import (
    denoising_step_weights,
    grpo_guard_loss,
    normalized_log_ratio,
)
from optax_ext.losses.language_policy import grpo_loss, remax_advantages, remax_loss
from optax_ext.losses.lens import lens_advantages, lens_rewards
from optax_ext.losses.offline_policy import a_lol_loss
from optax_ext.losses.orthogonality import (
    orthogonal_conv_penalty,
    orthogonal_dense_penalty,
)
from optax_ext.losses.policy import (
    clipped_surrogate_loss,
    group_relative_advantages,
    ppo_clip_loss,
)
from optax_ext.losses.preference import dpo_loss, simpo_loss
from optax_ext.losses.ranking import (
    neural_ndcg_loss,
    neural_sort,
    sinkhorn_normalize,
)
from optax_ext.losses.recurrent import (
    generalized_teacher_forcing_rollout,
    optimal_forcing,
    update_forcing,
    vanishing_gradient_regularizer,
)
from optax_ext.losses.retrieval import focal_info_nce, mix_hard_negatives
from optax_ext.losses.solvers import (
    iteration_count_surrogate,
    target_surrogate_loss,
)
from optax_ext.losses.sparse_po import (
    activation_token_mask,
    sparse_po_loss,
    sparse_token_mask,
)
from optax_ext.losses.submodular import reward_to_go, submodular_policy_loss
from optax_ext.losses.tokens import sequence_log_probs, token_kl, token_log_probs

__all__ = [
    "GradientEntanglement",
    "a_lol_loss",
    "activation_token_mask",
    "anchor_penalty",
    "clipped_surrogate_loss",
    "denoising_step_weights",
    "dpo_loss",
    "flow_sde_step",
    "focal_info_nce",
    "gaussian_step_log_prob",
    "generalized_teacher_forcing_rollout",
    "gradient_entanglement",
    "group_relative_advantages",
    "grpo_guard_loss",
    "grpo_loss",
    "idgm_loss",
    "iteration_count_surrogate",
    "lens_advantages",
    "lens_rewards",
    "macl_loss",
    "macl_loss_from_similarities",
    "mix_hard_negatives",
    "multi_similarity_loss",
    "neural_ndcg_loss",
    "neural_sort",
    "normalized_log_ratio",
    "optimal_forcing",
    "orthogonal_conv_penalty",
    "orthogonal_dense_penalty",
    "pairwise_normalized_gradient",
    "ppo_clip_loss",
    "remax_advantages",
    "remax_loss",
    "reward_to_go",
    "sequence_log_probs",
    "simpo_loss",
    "sinkhorn_normalize",
    "sparse_po_loss",
    "sparse_token_mask",
    "submodular_policy_loss",
    "target_surrogate_loss",
    "token_kl",
    "token_log_probs",
    "update_forcing",
    "vanishing_gradient_regularizer",
]

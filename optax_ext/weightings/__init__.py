"""Weightings: how much each of several losses counts."""

from optax_ext._core.pairs import (
    Weighting,
)
from optax_ext.weightings._bins import (
    BinsState,
)
from optax_ext.weightings.constraints import (
    LagrangianRewardWeightsState,
    constrained_advantage,
    lagrangian_reward_weights,
)
from optax_ext.weightings.loss_based import (
    adaptive_consistency_weighting,
    loss_based_reweighting,
)
from optax_ext.weightings.noise_levels import (
    NoiseSchedule,
    adaptive_noise_schedule,
    f_distill_weighting,
)
from optax_ext.weightings.robust import (
    compositional_kl_dro,
)
from optax_ext.weightings.semi_supervised import (
    certain_ratio,
)

__all__ = [
    "BinsState",
    "LagrangianRewardWeightsState",
    "NoiseSchedule",
    "Weighting",
    "adaptive_consistency_weighting",
    "adaptive_noise_schedule",
    "certain_ratio",
    "compositional_kl_dro",
    "constrained_advantage",
    "f_distill_weighting",
    "lagrangian_reward_weights",
    "loss_based_reweighting",
]

"""Weightings: how much each of several losses counts."""

from optax_ext._core.pairs import Weighting
from optax_ext.weightings.constraints import (
    LagrangianRewardWeightsState,
    constrained_advantage,
    lagrangian_reward_weights,
)

__all__ = [
    "LagrangianRewardWeightsState",
    "Weighting",
    "constrained_advantage",
    "lagrangian_reward_weights",
]

"""Weightings: how much each of several losses counts."""

from optax_ext._core.pairs import Weighting
from optax_ext.weightings.loss_based import (
    adaptive_consistency_weighting,
    loss_based_reweighting,
)
from optax_ext.weightings.robust import compositional_kl_dro

__all__ = [
    "Weighting",
    "adaptive_consistency_weighting",
    "compositional_kl_dro",
    "loss_based_reweighting",
]

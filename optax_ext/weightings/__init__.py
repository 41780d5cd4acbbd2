"""Weightings: how much each of several losses counts."""

from optax_ext._core.pairs import Weighting
from optax_ext.weightings._bins import BinsState
from optax_ext.weightings.noise_levels import (
    NoiseSchedule,
    adaptive_noise_schedule,
    f_distill_weighting,
)

__all__ = [
    "BinsState",
    "NoiseSchedule",
    "Weighting",
    "adaptive_noise_schedule",
    "f_distill_weighting",
]

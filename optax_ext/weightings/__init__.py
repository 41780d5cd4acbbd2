"""Weightings: how much each of several losses counts."""

from optax_ext._core.pairs import Weighting
from optax_ext.weightings.semi_supervised import certain_ratio

__all__ = ["Weighting", "certain_ratio"]

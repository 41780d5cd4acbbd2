"""Weightings: how much each of several losses counts."""

from optax_ext._core.pairs import Weighting

__all__ = ["Weighting"]

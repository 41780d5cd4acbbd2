"""Wrappers: links that take another link first."""

from optax_ext._core.views import full_precision, inject_hyperparams
from optax_ext.wrappers.agreement import cautious, grams, grams_adamw, scale_by_grams
from optax_ext.wrappers.bucketing import bucketed
from optax_ext.wrappers.sphere import LawnState, lawn, normalize_and_project

__all__ = [
    "LawnState",
    "bucketed",
    "cautious",
    "full_precision",
    "grams",
    "grams_adamw",
    "inject_hyperparams",
    "lawn",
    "normalize_and_project",
    "scale_by_grams",
]

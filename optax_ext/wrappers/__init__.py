"""Wrappers: links that take another link first."""

from optax_ext._core.quantization import Blockwise
from optax_ext._core.views import full_precision, inject_hyperparams
from optax_ext.wrappers.agreement import cautious, grams, grams_adamw, scale_by_grams
from optax_ext.wrappers.bucketing import bucketed
from optax_ext.wrappers.combinators import BranchState, GraftState, branch, graft
from optax_ext.wrappers.spikes import SkipSpikesState, skip_spikes, spike_statistics
from optax_ext.wrappers.storage import StoredState, stored, unpack_stored_state

__all__ = [
    "Blockwise",
    "BranchState",
    "GraftState",
    "SkipSpikesState",
    "StoredState",
    "branch",
    "bucketed",
    "cautious",
    "full_precision",
    "graft",
    "grams",
    "grams_adamw",
    "inject_hyperparams",
    "scale_by_grams",
    "skip_spikes",
    "spike_statistics",
    "stored",
    "unpack_stored_state",
]

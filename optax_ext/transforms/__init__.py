"""Links that need gradients, and at most parameters."""

from optax_ext.transforms.decay import (
    CautiousDecayState,
    adamw_cwd,
    add_cautious_decayed_weights,
    lion_cwd,
)
from optax_ext.transforms.groups import decay_mask, label_by_path
from optax_ext.transforms.sign import LionKState, lion_k, lion_kernel, scale_by_lion_k

__all__ = [
    "CautiousDecayState",
    "LionKState",
    "adamw_cwd",
    "add_cautious_decayed_weights",
    "decay_mask",
    "label_by_path",
    "lion_cwd",
    "lion_k",
    "lion_kernel",
    "scale_by_lion_k",
]

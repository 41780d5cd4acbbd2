"""Links that need gradients, and at most parameters."""

from optax_ext.transforms.decay import (
    CautiousDecayState,
    adamw_cwd,
    add_cautious_decayed_weights,
    lion_cwd,
)
from optax_ext.transforms.learned import (
    MlpLoptState,
    init_mlp_lopt,
    scale_by_mlp_lopt,
)
from optax_ext.transforms.mup import mup_widths, scale_by_mup
from optax_ext.transforms.sign import LionKState, lion_k, lion_kernel, scale_by_lion_k

__all__ = [
    "CautiousDecayState",
    "LionKState",
    "MlpLoptState",
    "adamw_cwd",
    "add_cautious_decayed_weights",
    "init_mlp_lopt",
    "lion_cwd",
    "lion_k",
    "lion_kernel",
    "mup_widths",
    "scale_by_lion_k",
    "scale_by_mlp_lopt",
    "scale_by_mup",
]

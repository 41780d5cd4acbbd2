"""Links that need gradients, and at most parameters."""

from optax_ext.transforms.decay import (
    CautiousDecayState,
    adamw_cwd,
    add_cautious_decayed_weights,
    lion_cwd,
)
from optax_ext.transforms.radial import adamp, project_radial, sgdp
from optax_ext.transforms.sign import LionKState, lion_k, lion_kernel, scale_by_lion_k
from optax_ext.transforms.sphere import (
    InitNormState,
    effective_learning_rate,
    perp_grad,
    project_to_init_norm,
)
from optax_ext.transforms.subgradient import (
    GeometricSubgradientState,
    scale_by_geometric_subgradient,
)
from optax_ext.transforms.swats import SwatsState, swats
from optax_ext.transforms.variance_reduction import (
    MarsState,
    mars,
    scale_by_mars_correction,
)

__all__ = [
    "CautiousDecayState",
    "GeometricSubgradientState",
    "InitNormState",
    "LionKState",
    "MarsState",
    "SwatsState",
    "adamp",
    "adamw_cwd",
    "add_cautious_decayed_weights",
    "effective_learning_rate",
    "lion_cwd",
    "lion_k",
    "lion_kernel",
    "mars",
    "perp_grad",
    "project_radial",
    "project_to_init_norm",
    "scale_by_geometric_subgradient",
    "scale_by_lion_k",
    "scale_by_mars_correction",
    "sgdp",
    "swats",
]

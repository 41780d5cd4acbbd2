"""Links that need gradients, and at most parameters."""

from optax_ext.transforms.decay import (
    CautiousDecayState,
    adamw_cwd,
    add_cautious_decayed_weights,
    lion_cwd,
)
from optax_ext.transforms.error_mass import scale_by_inverse_error_mass
from optax_ext.transforms.greedy import greedy_block_update
from optax_ext.transforms.gsnr import (
    GsnrState,
    scale_by_gsnr,
    vr_adam,
    vr_lamb,
    vr_momentum,
    vr_sgd,
)
from optax_ext.transforms.per_example import (
    multiplicative_example_noise,
    normalized_dp_aggregate,
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
from optax_ext.transforms.surgery import (
    BloopState,
    bloop,
    project_out_subspace,
    update_gradient_memory,
)
from optax_ext.transforms.swats import SwatsState, swats
from optax_ext.transforms.variance_reduction import (
    MarsState,
    mars,
    scale_by_mars_correction,
)

__all__ = [
    "BloopState",
    "CautiousDecayState",
    "GeometricSubgradientState",
    "GsnrState",
    "InitNormState",
    "LionKState",
    "MarsState",
    "SwatsState",
    "adamp",
    "adamw_cwd",
    "add_cautious_decayed_weights",
    "bloop",
    "effective_learning_rate",
    "greedy_block_update",
    "lion_cwd",
    "lion_k",
    "lion_kernel",
    "mars",
    "multiplicative_example_noise",
    "normalized_dp_aggregate",
    "perp_grad",
    "project_out_subspace",
    "project_radial",
    "project_to_init_norm",
    "scale_by_geometric_subgradient",
    "scale_by_gsnr",
    "scale_by_inverse_error_mass",
    "scale_by_lion_k",
    "scale_by_mars_correction",
    "sgdp",
    "swats",
    "update_gradient_memory",
    "vr_adam",
    "vr_lamb",
    "vr_momentum",
    "vr_sgd",
]

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
from optax_ext.transforms.sign import LionKState, lion_k, lion_kernel, scale_by_lion_k
from optax_ext.transforms.surgery import (
    BloopState,
    bloop,
    project_out_subspace,
    update_gradient_memory,
)

__all__ = [
    "BloopState",
    "CautiousDecayState",
    "GsnrState",
    "LionKState",
    "adamw_cwd",
    "add_cautious_decayed_weights",
    "bloop",
    "greedy_block_update",
    "lion_cwd",
    "lion_k",
    "lion_kernel",
    "multiplicative_example_noise",
    "normalized_dp_aggregate",
    "project_out_subspace",
    "scale_by_gsnr",
    "scale_by_inverse_error_mass",
    "scale_by_lion_k",
    "update_gradient_memory",
    "vr_adam",
    "vr_lamb",
    "vr_momentum",
    "vr_sgd",
]

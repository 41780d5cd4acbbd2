"""Links that need gradients, and at most parameters."""

from optax_ext.transforms.averaging import (
    KalmanState,
    kalman_average_params,
    kalman_params,
)
from optax_ext.transforms.decay import (
    CautiousDecayState,
    adamw_cwd,
    add_cautious_decayed_weights,
    lion_cwd,
)
from optax_ext.transforms.sign import LionKState, lion_k, lion_kernel, scale_by_lion_k

__all__ = [
    "CautiousDecayState",
    "KalmanState",
    "LionKState",
    "adamw_cwd",
    "add_cautious_decayed_weights",
    "kalman_average_params",
    "kalman_params",
    "lion_cwd",
    "lion_k",
    "lion_kernel",
    "scale_by_lion_k",
]

"""Links that need gradients, and at most parameters."""

from optax_ext.transforms.decay import (
    CautiousDecayState,
    adamw_cwd,
    add_cautious_decayed_weights,
    lion_cwd,
)
from optax_ext.transforms.decoupled import (
    IndependentDecayState,
    adamw_decoupled,
    add_independent_weight_decay,
    normalized_weight_decay,
    sgdw,
)
from optax_ext.transforms.fisher import (
    FAdamState,
    fadam,
    scale_by_fadam,
)
from optax_ext.transforms.gravity import (
    GravityState,
    gravity,
    scale_by_gravity,
)
from optax_ext.transforms.inertial import (
    InnapropState,
    innaprop,
)
from optax_ext.transforms.moments import (
    DiffGradState,
    MomentsState,
    adam_atan2,
    diffgrad,
    scale_by_adam_atan2,
    scale_by_adamnc,
    scale_by_diffgrad,
)
from optax_ext.transforms.sign import (
    LionKState,
    lion_k,
    lion_kernel,
    scale_by_lion_k,
)
from optax_ext.transforms.widths import (
    scale_by_width_exponents,
)

__all__ = [
    "CautiousDecayState",
    "DiffGradState",
    "FAdamState",
    "GravityState",
    "IndependentDecayState",
    "InnapropState",
    "LionKState",
    "MomentsState",
    "adam_atan2",
    "adamw_cwd",
    "adamw_decoupled",
    "add_cautious_decayed_weights",
    "add_independent_weight_decay",
    "diffgrad",
    "fadam",
    "gravity",
    "innaprop",
    "lion_cwd",
    "lion_k",
    "lion_kernel",
    "normalized_weight_decay",
    "scale_by_adam_atan2",
    "scale_by_adamnc",
    "scale_by_diffgrad",
    "scale_by_fadam",
    "scale_by_gravity",
    "scale_by_lion_k",
    "scale_by_width_exponents",
    "sgdw",
]

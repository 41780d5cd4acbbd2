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
from optax_ext.transforms.decoupled import (
    IndependentDecayState,
    adamw_decoupled,
    add_independent_weight_decay,
    normalized_weight_decay,
    sgdw,
)
from optax_ext.transforms.error_mass import (
    scale_by_inverse_error_mass,
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
from optax_ext.transforms.greedy import (
    greedy_block_update,
)
from optax_ext.transforms.groups import (
    decay_mask,
    label_by_path,
)
from optax_ext.transforms.gsnr import (
    GsnrState,
    scale_by_gsnr,
    vr_adam,
    vr_lamb,
    vr_momentum,
    vr_sgd,
)
from optax_ext.transforms.inertial import (
    InnapropState,
    innaprop,
)
from optax_ext.transforms.learned import (
    MlpLoptState,
    init_mlp_lopt,
    scale_by_mlp_lopt,
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
from optax_ext.transforms.mup import (
    mup_widths,
    scale_by_mup,
)
from optax_ext.transforms.per_example import (
    multiplicative_example_noise,
    normalized_dp_aggregate,
)
from optax_ext.transforms.radial import (
    adamp,
    project_radial,
    sgdp,
)
from optax_ext.transforms.regularizers import (
    AnchorDecayState,
    add_anchor_decay,
    add_orthogonal_regularizer,
)
from optax_ext.transforms.sign import (
    LionKState,
    lion_k,
    lion_kernel,
    scale_by_lion_k,
)
from optax_ext.transforms.sketch import (
    SketchOperator,
    SketchState,
    countsketch_operator,
    gaussian_operator,
    sketch_gradients,
)
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
from optax_ext.transforms.swats import (
    SwatsState,
    swats,
)
from optax_ext.transforms.variance_reduction import (
    MarsState,
    mars,
    scale_by_mars_correction,
)
from optax_ext.transforms.widths import (
    scale_by_width_exponents,
)

__all__ = [
    "AnchorDecayState",
    "BloopState",
    "CautiousDecayState",
    "DiffGradState",
    "FAdamState",
    "GeometricSubgradientState",
    "GravityState",
    "GsnrState",
    "IndependentDecayState",
    "InitNormState",
    "InnapropState",
    "KalmanState",
    "LionKState",
    "MarsState",
    "MlpLoptState",
    "MomentsState",
    "SketchOperator",
    "SketchState",
    "SwatsState",
    "adam_atan2",
    "adamp",
    "adamw_cwd",
    "adamw_decoupled",
    "add_anchor_decay",
    "add_cautious_decayed_weights",
    "add_independent_weight_decay",
    "add_orthogonal_regularizer",
    "bloop",
    "countsketch_operator",
    "decay_mask",
    "diffgrad",
    "effective_learning_rate",
    "fadam",
    "gaussian_operator",
    "gravity",
    "greedy_block_update",
    "init_mlp_lopt",
    "innaprop",
    "kalman_average_params",
    "kalman_params",
    "label_by_path",
    "lion_cwd",
    "lion_k",
    "lion_kernel",
    "mars",
    "multiplicative_example_noise",
    "mup_widths",
    "normalized_dp_aggregate",
    "normalized_weight_decay",
    "perp_grad",
    "project_out_subspace",
    "project_radial",
    "project_to_init_norm",
    "scale_by_adam_atan2",
    "scale_by_adamnc",
    "scale_by_diffgrad",
    "scale_by_fadam",
    "scale_by_geometric_subgradient",
    "scale_by_gravity",
    "scale_by_gsnr",
    "scale_by_inverse_error_mass",
    "scale_by_lion_k",
    "scale_by_mars_correction",
    "scale_by_mlp_lopt",
    "scale_by_mup",
    "scale_by_width_exponents",
    "sgdp",
    "sgdw",
    "sketch_gradients",
    "swats",
    "update_gradient_memory",
    "vr_adam",
    "vr_lamb",
    "vr_momentum",
    "vr_sgd",
]

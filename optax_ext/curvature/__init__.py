"""Curvature: estimators, and the links that precondition with them."""

from optax_ext.curvature._lie_groups import (
    LraPreconditioner,
    XmatPreconditioner,
)
from optax_ext.curvature.adahessian import (
    AdaHessianState,
    adahessian,
    scale_by_adahessian,
)
from optax_ext.curvature.dct import (
    DCTAdamState,
    dct_adamw,
    dct_matrix,
    scale_by_dct_adam,
)
from optax_ext.curvature.empirical_fisher import (
    diagonal_fisher,
    empirical_fisher_diag,
)
from optax_ext.curvature.estimators import (
    EmaHessianState,
    KeyState,
    ema_hessian_diag,
    external_hessian_diag,
    gauss_newton_bartlett_diag,
    hutchinson_diag,
)
from optax_ext.curvature.frugal import (
    FrugalState,
    frugal,
    scale_by_frugal,
)
from optax_ext.curvature.gradient_penalty import (
    add_gradient_norm_penalty,
    gradient_regularized_value_and_grad,
)
from optax_ext.curvature.hessian_aided import (
    HessianAidedState,
    scale_by_hessian_aided_momentum,
)
from optax_ext.curvature.kron import (
    KronState,
    kron,
    kron_update_schedule,
    scale_by_kron,
)
from optax_ext.curvature.layer_inputs import (
    im2col_inputs,
    precondition_by_inputs,
)
from optax_ext.curvature.mfac import (
    MFACState,
    ihvp_empirical_fisher,
    mfac_prune_scores,
    scale_by_mfac,
)
from optax_ext.curvature.mkor import (
    MKORFactors,
    MKORState,
    scale_by_mkor,
)
from optax_ext.curvature.model_building import (
    SmbState,
    smb,
)
from optax_ext.curvature.newton import (
    GradientRegularizedNewtonState,
    gradient_regularized_newton,
)
from optax_ext.curvature.oasis import (
    OasisState,
    oasis,
)
from optax_ext.curvature.products import (
    finite_difference_hvp,
    gnvp,
    hvp,
    hvp_probe,
)
from optax_ext.curvature.psgd import (
    PsgdState,
    scale_by_psgd_lra,
    scale_by_psgd_xmat,
)
from optax_ext.curvature.saddle_free import (
    saddle_free_newton,
    scale_by_saddle_free_newton,
)
from optax_ext.curvature.scaled_gd import (
    scale_by_scaled_gd,
)
from optax_ext.curvature.sophia import (
    SophiaState,
    precondition_by_hessian_diag,
    scale_by_sophia,
    sophia,
    sophia_win_rate,
)
from optax_ext.curvature.trion import (
    TrionState,
    scale_by_trion,
)
from optax_ext.curvature.trust_region import (
    TrustRegionState,
    lmo,
    norm_trust_region,
    scale_by_trust_region,
)

__all__ = [
    "AdaHessianState",
    "DCTAdamState",
    "EmaHessianState",
    "FrugalState",
    "GradientRegularizedNewtonState",
    "HessianAidedState",
    "KeyState",
    "KronState",
    "LraPreconditioner",
    "MFACState",
    "MKORFactors",
    "MKORState",
    "OasisState",
    "PsgdState",
    "SmbState",
    "SophiaState",
    "TrionState",
    "TrustRegionState",
    "XmatPreconditioner",
    "adahessian",
    "add_gradient_norm_penalty",
    "dct_adamw",
    "dct_matrix",
    "diagonal_fisher",
    "ema_hessian_diag",
    "empirical_fisher_diag",
    "external_hessian_diag",
    "finite_difference_hvp",
    "frugal",
    "gauss_newton_bartlett_diag",
    "gnvp",
    "gradient_regularized_newton",
    "gradient_regularized_value_and_grad",
    "hutchinson_diag",
    "hvp",
    "hvp_probe",
    "ihvp_empirical_fisher",
    "im2col_inputs",
    "kron",
    "kron_update_schedule",
    "lmo",
    "mfac_prune_scores",
    "norm_trust_region",
    "oasis",
    "precondition_by_hessian_diag",
    "precondition_by_inputs",
    "saddle_free_newton",
    "scale_by_adahessian",
    "scale_by_dct_adam",
    "scale_by_frugal",
    "scale_by_hessian_aided_momentum",
    "scale_by_kron",
    "scale_by_mfac",
    "scale_by_mkor",
    "scale_by_psgd_lra",
    "scale_by_psgd_xmat",
    "scale_by_saddle_free_newton",
    "scale_by_scaled_gd",
    "scale_by_sophia",
    "scale_by_trion",
    "scale_by_trust_region",
    "smb",
    "sophia",
    "sophia_win_rate",
]

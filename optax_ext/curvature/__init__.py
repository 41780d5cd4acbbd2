"""Curvature: estimators, and the links that precondition with them."""

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

__all__ = [
    "AdaHessianState",
    "DCTAdamState",
    "EmaHessianState",
    "FrugalState",
    "KeyState",
    "MFACState",
    "MKORFactors",
    "MKORState",
    "SophiaState",
    "TrionState",
    "adahessian",
    "dct_adamw",
    "dct_matrix",
    "diagonal_fisher",
    "ema_hessian_diag",
    "external_hessian_diag",
    "frugal",
    "gauss_newton_bartlett_diag",
    "hutchinson_diag",
    "ihvp_empirical_fisher",
    "im2col_inputs",
    "mfac_prune_scores",
    "precondition_by_hessian_diag",
    "precondition_by_inputs",
    "scale_by_adahessian",
    "scale_by_dct_adam",
    "scale_by_frugal",
    "scale_by_mfac",
    "scale_by_mkor",
    "scale_by_sophia",
    "scale_by_trion",
    "sophia",
    "sophia_win_rate",
]

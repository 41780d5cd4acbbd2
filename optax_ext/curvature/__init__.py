"""Curvature: estimators, and the links that precondition with them."""

from optax_ext.curvature._lie_groups import LraPreconditioner, XmatPreconditioner
from optax_ext.curvature.adahessian import (
    AdaHessianState,
    adahessian,
    scale_by_adahessian,
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
from optax_ext.curvature.kron import (
    KronState,
    kron,
    kron_update_schedule,
    scale_by_kron,
)
from optax_ext.curvature.psgd import (
    PsgdState,
    scale_by_psgd_lra,
    scale_by_psgd_xmat,
)
from optax_ext.curvature.scaled_gd import scale_by_scaled_gd
from optax_ext.curvature.sophia import (
    SophiaState,
    precondition_by_hessian_diag,
    scale_by_sophia,
    sophia,
    sophia_win_rate,
)
from optax_ext.curvature.trust_region import (
    TrustRegionState,
    lmo,
    norm_trust_region,
    scale_by_trust_region,
)

__all__ = [
    "AdaHessianState",
    "EmaHessianState",
    "KeyState",
    "KronState",
    "LraPreconditioner",
    "PsgdState",
    "SophiaState",
    "TrustRegionState",
    "XmatPreconditioner",
    "adahessian",
    "diagonal_fisher",
    "ema_hessian_diag",
    "external_hessian_diag",
    "gauss_newton_bartlett_diag",
    "hutchinson_diag",
    "kron",
    "kron_update_schedule",
    "lmo",
    "norm_trust_region",
    "precondition_by_hessian_diag",
    "scale_by_adahessian",
    "scale_by_kron",
    "scale_by_psgd_lra",
    "scale_by_psgd_xmat",
    "scale_by_scaled_gd",
    "scale_by_sophia",
    "scale_by_trust_region",
    "sophia",
    "sophia_win_rate",
]

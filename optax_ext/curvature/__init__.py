"""Curvature: estimators, and the links that precondition with them."""

from optax_ext.curvature.adahessian import (
    AdaHessianState,
    adahessian,
    scale_by_adahessian,
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
from optax_ext.curvature.saddle_free import (
    saddle_free_newton,
    scale_by_saddle_free_newton,
)
from optax_ext.curvature.sophia import (
    SophiaState,
    precondition_by_hessian_diag,
    scale_by_sophia,
    sophia,
    sophia_win_rate,
)

__all__ = [
    "AdaHessianState",
    "EmaHessianState",
    "GradientRegularizedNewtonState",
    "KeyState",
    "OasisState",
    "SmbState",
    "SophiaState",
    "adahessian",
    "diagonal_fisher",
    "ema_hessian_diag",
    "empirical_fisher_diag",
    "external_hessian_diag",
    "finite_difference_hvp",
    "gauss_newton_bartlett_diag",
    "gnvp",
    "gradient_regularized_newton",
    "hutchinson_diag",
    "hvp",
    "hvp_probe",
    "oasis",
    "precondition_by_hessian_diag",
    "saddle_free_newton",
    "scale_by_adahessian",
    "scale_by_saddle_free_newton",
    "scale_by_sophia",
    "smb",
    "sophia",
    "sophia_win_rate",
]

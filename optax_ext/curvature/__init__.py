"""Curvature: estimators, and the links that precondition with them."""

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
from optax_ext.curvature.gradient_penalty import (
    add_gradient_norm_penalty,
    gradient_regularized_value_and_grad,
)
from optax_ext.curvature.hessian_aided import (
    HessianAidedState,
    scale_by_hessian_aided_momentum,
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
    "HessianAidedState",
    "KeyState",
    "SophiaState",
    "adahessian",
    "add_gradient_norm_penalty",
    "diagonal_fisher",
    "ema_hessian_diag",
    "external_hessian_diag",
    "gauss_newton_bartlett_diag",
    "gradient_regularized_value_and_grad",
    "hutchinson_diag",
    "precondition_by_hessian_diag",
    "scale_by_adahessian",
    "scale_by_hessian_aided_momentum",
    "scale_by_sophia",
    "sophia",
    "sophia_win_rate",
]

"""Measurements of a training run, and laws fitted to several."""

from optax_ext.diagnostics.distance import (
    LogFit,
    weight_distance_log_fit,
)
from optax_ext.diagnostics.range_test import (
    lr_range_test,
)
from optax_ext.diagnostics.record import (
    RecordState,
    record,
    recorded,
)
from optax_ext.diagnostics.scaling_law import (
    ScalingLaw,
    fit_scaling_law,
)
from optax_ext.diagnostics.spectrum import (
    ExtremeEigenvalues,
    hessian_extreme_eigenvalues,
)

__all__ = [
    "ExtremeEigenvalues",
    "LogFit",
    "RecordState",
    "ScalingLaw",
    "fit_scaling_law",
    "hessian_extreme_eigenvalues",
    "lr_range_test",
    "record",
    "recorded",
    "weight_distance_log_fit",
]

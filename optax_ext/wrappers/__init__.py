"""Wrappers: links that take another link first."""

from optax_ext._core.quantization import (
    Blockwise,
)
from optax_ext._core.views import (
    full_precision,
    inject_hyperparams,
)
from optax_ext.wrappers.agreement import (
    cautious,
    grams,
    grams_adamw,
    scale_by_grams,
)
from optax_ext.wrappers.bucketing import (
    bucketed,
)
from optax_ext.wrappers.combinators import (
    BranchState,
    GraftState,
    branch,
    graft,
)
from optax_ext.wrappers.compression import (
    ErrorFeedbackState,
    compress_with_error_feedback,
    lowrank_compressor,
    select_levels_lgreco,
    topk_compressor,
)
from optax_ext.wrappers.domains import (
    FishState,
    fish,
)
from optax_ext.wrappers.freezing import (
    FreezeConvergedState,
    freeze_converged,
    frozen_fraction,
)
from optax_ext.wrappers.matrices import (
    as_matrices,
    matrix_axes,
)
from optax_ext.wrappers.prediction import (
    XGradState,
    xgrad,
    xgrad_predict,
)
from optax_ext.wrappers.proxies import (
    AdaptiveEtaState,
    adaptive_eta,
    proxy_prox,
)
from optax_ext.wrappers.resets import (
    RefactorizeState,
    ResetState,
    refactorize,
    refactorize_every,
    reset_state_every,
)
from optax_ext.wrappers.sharpness import (
    AscentState,
    adversarial_weight_perturbation,
    sharpness_aware,
)
from optax_ext.wrappers.sphere import (
    LawnState,
    lawn,
    normalize_and_project,
)
from optax_ext.wrappers.spikes import (
    SkipSpikesState,
    skip_spikes,
    spike_statistics,
)
from optax_ext.wrappers.storage import (
    StoredState,
    stored,
    unpack_stored_state,
)
from optax_ext.wrappers.surrogate import (
    TargetSurrogateState,
    target_surrogate,
)
from optax_ext.wrappers.transport import (
    TransportState,
    igt_eval_params,
    implicit_gradient_transport,
    normalized_igt,
)
from optax_ext.wrappers.unlearning import (
    RefreshState,
    refresh,
)

__all__ = [
    "AdaptiveEtaState",
    "AscentState",
    "Blockwise",
    "BranchState",
    "ErrorFeedbackState",
    "FishState",
    "FreezeConvergedState",
    "GraftState",
    "LawnState",
    "RefactorizeState",
    "RefreshState",
    "ResetState",
    "SkipSpikesState",
    "StoredState",
    "TargetSurrogateState",
    "TransportState",
    "XGradState",
    "adaptive_eta",
    "adversarial_weight_perturbation",
    "as_matrices",
    "branch",
    "bucketed",
    "cautious",
    "compress_with_error_feedback",
    "fish",
    "freeze_converged",
    "frozen_fraction",
    "full_precision",
    "graft",
    "grams",
    "grams_adamw",
    "igt_eval_params",
    "implicit_gradient_transport",
    "inject_hyperparams",
    "lawn",
    "lowrank_compressor",
    "matrix_axes",
    "normalize_and_project",
    "normalized_igt",
    "proxy_prox",
    "refactorize",
    "refactorize_every",
    "refresh",
    "reset_state_every",
    "scale_by_grams",
    "select_levels_lgreco",
    "sharpness_aware",
    "skip_spikes",
    "spike_statistics",
    "stored",
    "target_surrogate",
    "topk_compressor",
    "unpack_stored_state",
    "xgrad",
    "xgrad_predict",
]

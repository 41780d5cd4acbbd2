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
from optax_ext.wrappers.domains import (
    FishState,
    fish,
)
from optax_ext.wrappers.freezing import (
    FreezeConvergedState,
    freeze_converged,
    frozen_fraction,
)
from optax_ext.wrappers.matrices import as_matrices, matrix_axes
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
from optax_ext.wrappers.unlearning import (
    RefreshState,
    refresh,
)

__all__ = [
    "AdaptiveEtaState",
    "Blockwise",
    "BranchState",
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
    "XGradState",
    "adaptive_eta",
    "as_matrices",
    "branch",
    "bucketed",
    "cautious",
    "fish",
    "freeze_converged",
    "frozen_fraction",
    "full_precision",
    "graft",
    "grams",
    "grams_adamw",
    "inject_hyperparams",
    "lawn",
    "matrix_axes",
    "normalize_and_project",
    "proxy_prox",
    "refactorize",
    "refactorize_every",
    "refresh",
    "reset_state_every",
    "scale_by_grams",
    "skip_spikes",
    "spike_statistics",
    "stored",
    "target_surrogate",
    "unpack_stored_state",
    "xgrad",
    "xgrad_predict",
]

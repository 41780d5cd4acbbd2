"""Optimizers by name: the tuned ones of the quickstart, and the whole catalogue.

The learning rates are the best of `Recipe.grid` after the quickstart's default number
of steps (``python -m benchmarks.quickstart --sweep``, which uses a seed of its own). A
base method and its cautious variant share their grid, and a learning rate times its
weight decay is of the same size in all of them.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import optax
import optax.contrib

import optax_ext as ox
from optax_ext._core import catalogue

_ADAM_GRID = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
_SIGN_GRID = (2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3)
_UNTUNED = 1e-3

_KINDS = ("optimizer", "link", "wrapper", "aggregator")

Make = Callable[..., optax.GradientTransformation]


class Recipe(NamedTuple):
    """How to make an optimizer.

    Attributes:
      make: schedule of the learning rate in, optimizer out.
      learning_rate: peak of the schedule.
      grid: learning rates of the sweep.
      needs: extra arguments to pass, beside those that every step passes.
      gradient_at: where to take the gradient, if not at the parameters.
      layered: whether `make` also takes ``layers``, as `training.flax_layers` has them.
    """

    make: Make
    learning_rate: float
    grid: tuple[float, ...]
    needs: tuple[str, ...] = ()
    gradient_at: Callable[[Any, Any], Any] | None = None
    layered: bool = False


def _adamw(learning_rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(learning_rate, b1=0.9, b2=0.95, weight_decay=0.1)


def _cautious_adamw(learning_rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.chain(
        ox.cautious(optax.scale_by_adam(b1=0.9, b2=0.95)),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(learning_rate),
    )


def _lion(learning_rate: optax.Schedule) -> optax.GradientTransformation:
    return ox.lion_k(learning_rate, b1=0.95, b2=0.98, weight_decay=1.0)


def _cautious_lion(learning_rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.chain(
        ox.cautious(ox.scale_by_lion_k(b1=0.95, b2=0.98)),
        optax.add_decayed_weights(1.0),
        optax.scale_by_learning_rate(learning_rate),
    )


def _sophia_g(learning_rate: optax.Schedule) -> optax.GradientTransformation:
    return ox.sophia(
        learning_rate,
        b1=0.965,
        b2=0.99,
        gamma=0.05,
        weight_decay=1.0,
        estimator=ox.gauss_newton_bartlett_diag(),
    )


def _flagship(learning_rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.chain(
        ox.cautious(
            optax.chain(
                optax.scale_by_lion(b1=0.95, b2=0.98),
                ox.precondition_by_hessian_diag(
                    ox.gauss_newton_bartlett_diag(), gamma=0.05, update_interval=10
                ),
                optax.clip(1.0),
            )
        ),
        ox.add_cautious_decayed_weights(1.0),  # as the other sign methods here
        optax.scale_by_learning_rate(learning_rate),
    )


OPTIMIZERS: dict[str, Recipe] = {
    "adamw": Recipe(_adamw, 4e-3, _ADAM_GRID),
    "cautious_adamw": Recipe(_cautious_adamw, 4e-3, _ADAM_GRID),
    "lion": Recipe(_lion, 8e-4, _SIGN_GRID),
    "cautious_lion": Recipe(_cautious_lion, 8e-4, _SIGN_GRID),
    "sophia_g": Recipe(_sophia_g, 8e-4, _SIGN_GRID),
    "flagship": Recipe(_flagship, 8e-4, _SIGN_GRID),
}


def spectral(
    b1: float, fallback: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Orthogonalised momentum for matrices, at the size of Adam's steps.

    An orthogonal matrix [m, n] has a root mean square of 1 / sqrt(max(m, n)); 0.2 is
    about that of Adam's direction, so that one learning rate serves both.
    """

    def init(p):
        del p
        return ()

    def update(g, slots, p, t):
        del p, t
        return 0.2 * max(g.shape) ** 0.5 * g, slots

    direction = ox.scale_by_trust_region("spectral", b1=b1)
    sized = ox.leafwise(optax.EmptyState, init, update)
    return ox.as_matrices(ox.bucketed(optax.chain(direction, sized)), fallback)


def _spectral(learning_rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.chain(
        spectral(0.95, optax.scale_by_adam(b1=0.9, b2=0.95)),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(learning_rate),
    )


def _kron(learning_rate: optax.Schedule) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(b1=0.9, b2=0.95)
    return optax.chain(
        ox.as_matrices(ox.bucketed(ox.scale_by_kron()), adam),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(learning_rate),
    )


def _muon(learning_rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.contrib.muon(
        learning_rate,
        weight_decay=0.1,
        adam_b2=0.95,
        adam_weight_decay=0.1,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=ox.matrix_axes,
    )


def _stored(dtype: str) -> Make:
    return lambda learning_rate: ox.stored(_adamw(learning_rate), dtype)


FURTHER: dict[str, Recipe] = {
    "adamw_bfloat16": Recipe(_stored("bfloat16"), 4e-3, _ADAM_GRID),
    "adamw_8bit": Recipe(_stored("uint8"), 4e-3, _ADAM_GRID),
    "spectral": Recipe(_spectral, 4e-3, _ADAM_GRID),
    "kron_matrices": Recipe(_kron, 1e-3, tuple(r / 4 for r in _ADAM_GRID)),
    "muon": Recipe(_muon, 4e-3, _ADAM_GRID),
}
"""Recipes that run by name only."""

_GRADIENT_AT: dict[str, Callable[[Any, Any], Any]] = {"xgrad": ox.xgrad_predict}
"""Methods that take the gradient elsewhere, and where."""

_ARGUMENTS: dict[str, dict[str, Any]] = {
    "gradient_regularized_newton": {"hessian": "diag"},
    "saddle_free_newton": {"rank": 20},
    "scale_by_saddle_free_newton": {"rank": 20},
    "sketch_gradients": {"sketch_dim": 4096},
}
"""Arguments that half a million parameters need."""

_FURTHER_NEEDS = {
    "gradient_regularized_newton": ("hessian_diag",),
    "scale_by_mkor": ("preact_grads",),
}

_BEHIND = {"precondition_by_hessian_diag": optax.clip(1.0)}
"""Links that ask for another one behind them."""


def recipes(names: str) -> dict[str, Recipe]:
    """Recipes for names separated by commas, from the table above or the catalogue.

    ``NAME=LR`` sets the learning rate. A link of the catalogue is followed by the
    learning rate; a wrapper goes around Adam (around Adam with its learning rate, if it
    wraps finished optimizers); an aggregator takes the gradients of the examples.

    Raises:
      ValueError: for a name that is in neither, or a learning rate that is no number.
    """
    found = {}
    for item in filter(None, (item.strip() for item in names.split(","))):
        name, _, rate = item.partition("=")
        recipe = OPTIMIZERS.get(name) or FURTHER.get(name) or _from_catalogue(name)
        if rate:
            recipe = recipe._replace(learning_rate=_positive(rate, item))
        found[name] = recipe
    if not found:
        raise ValueError(f"no optimizer in {names!r}; {_known()}")
    return found


def _from_catalogue(name: str) -> Recipe:
    known = {e.name: e for e in catalogue.entries(*_KINDS)}
    if name not in known:
        raise ValueError(f"unknown optimizer {name!r}; {_known()}")
    entry = known[name]
    required = {
        key: value
        for key, value in entry.example().items()
        if inspect.signature(entry.make).parameters[key].default is inspect._empty
    } | _ARGUMENTS.get(name, {})

    parameters = inspect.signature(entry.make).parameters

    def make(
        learning_rate: optax.Schedule, **layers: Any
    ) -> optax.GradientTransformation:
        descend = optax.scale_by_learning_rate(learning_rate)
        if entry.kind == "optimizer" and "learning_rate" not in parameters:
            return entry.make(**required)  # it finds its step itself
        if entry.kind == "optimizer":
            rate = {"learning_rate": learning_rate}
            if "schedule" in parameters:  # decay goes by the schedule alone
                rate = {"learning_rate": 1.0, "schedule": learning_rate}
            return entry.make(**{**required, **rate})
        adam = optax.scale_by_adam(b1=0.9, b2=0.95)
        if "init_eta" in parameters:  # takes a direction, emits a step
            steps = optax.chain(adam, optax.scale_by_schedule(learning_rate))
            return entry.make(**{**required, "inner": steps, "init_eta": 1.0})
        if name in _GRADIENT_AT or (entry.terminal and entry.kind == "wrapper"):
            return entry.make(**{**required, "inner": optax.chain(adam, descend)})
        if entry.terminal:
            return optax.chain(adam, descend, entry.make(**required))
        if entry.kind == "wrapper":
            required["inner"] = adam
        link = entry.make(**{**required, **layers})
        if entry.matrices:
            link = ox.as_matrices(link, adam)
        if entry.kind == "aggregator":
            link = _of_examples(link)
        return optax.chain(link, _BEHIND.get(name, optax.identity()), descend)

    needs = (*entry.needs, *_FURTHER_NEEDS.get(name, ()))
    if entry.kind == "aggregator":
        needs = (*needs, "per_example_grads")
    grid = tuple(_UNTUNED * 2.0**k for k in range(-2, 3))
    layered = "layers" in parameters
    return Recipe(make, _UNTUNED, grid, needs, _GRADIENT_AT.get(name), layered)


def _of_examples(aggregator: Any) -> optax.GradientTransformationExtraArgs:
    """Give an aggregator the gradients of the examples in place of their mean."""

    def update(updates, state, params=None, **extra):
        del updates
        return aggregator.update(extra["per_example_grads"], state, params, **extra)

    aggregator = optax.with_extra_args_support(aggregator)
    return optax.GradientTransformationExtraArgs(aggregator.init, update)


def _positive(rate: str, item: str) -> float:
    try:
        value = float(rate)
    except ValueError:
        value = -1.0
    if not value > 0.0:
        raise ValueError(f"{item!r}: expected NAME=LR with a positive number")
    return value


def _known() -> str:
    others = [e.name for e in catalogue.entries(*_KINDS)]
    return (
        f"tuned here: {', '.join([*OPTIMIZERS, *FURTHER])}; "
        f"in the catalogue: {', '.join(n for n in others if n not in OPTIMIZERS)}"
    )

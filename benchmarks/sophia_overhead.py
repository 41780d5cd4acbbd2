"""What Sophia adds to a training step of AdamW, on the quickstart's language model.

    python -m benchmarks.sophia_overhead [--repeats=24] [--short]

Two numbers for each estimator: what the recipe costs on average over compiled chunks
of ten steps, one of which refreshes the curvature, against AdamW; and the same without
a refresh in sight (``update_interval`` far away), which is the price of the rule alone.
Each pair of programs runs in turn in one process, on the same batches; the ratio is the
median of neighbours, with its quartiles. The bar is 1.10.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from absl import app, flags

import optax_ext as ox
from benchmarks import _data, _optimizers, _report, _timing, _training

_REPEATS = flags.DEFINE_integer("repeats", 24, "Timed pairs of chunks.", lower_bound=4)
_SHORT = flags.DEFINE_bool("short", False, "A tiny model, to see that it runs.")
_OUTPUT = flags.DEFINE_string("output", "benchmarks/results", "Folder of the JSON.")
_FOLDER = flags.DEFINE_string(
    "folder", None, "Text to train on; by default Python's standard library."
)

_BAR = 1.10
_NEVER = 10**6  # steps between refreshes: none but the first


def _sophia(estimator: Callable[[], Any], gamma: float, interval: int):
    def make(learning_rate: optax.Schedule) -> optax.GradientTransformation:
        return ox.sophia(
            learning_rate,
            b1=0.965,
            gamma=gamma,
            weight_decay=1.0,
            update_interval=interval,
            estimator=estimator(),
        )

    return _optimizers.OPTIMIZERS["sophia_g"]._replace(make=make)


def _gaussian_hutchinson() -> optax.GradientTransformationExtraArgs:
    return ox.hutchinson_diag("gaussian")


_ESTIMATORS = {
    "Gauss-Newton-Bartlett": (ox.gauss_newton_bartlett_diag, 0.05),
    "Hutchinson": (_gaussian_hutchinson, 0.01),
}


def chunks(trainer: _training.Trainer) -> Callable[[], Any]:
    """A function without arguments that trains for one chunk, on the same batches."""
    problem = trainer.problem
    starts = trainer.corpus.train_starts(
        0, _training.CHUNK, problem.batch, problem.length
    )
    # Too small to change anything, so that all programs see the same numbers.
    state, rate = trainer.initial(0), jnp.float32(1e-9)

    def call():
        nonlocal state
        state, loss = trainer.advance(state, trainer.text, starts, rate)
        return loss

    return call


def main(argv: list[str]) -> None:
    """Measure, print, keep."""
    if argv[1:]:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    small = {"batch": 2, "length": 16, "width": 32, "layers": 1, "validation": 1}
    problem = _training.Problem(**(small if _SHORT.value else {}))
    corpus = _data.Corpus.of_standard_library(_FOLDER.value)

    def trainer(recipe):
        return _training.Trainer(recipe, problem, corpus)

    adamw = chunks(trainer(_optimizers.OPTIMIZERS["adamw"]))
    results = {**_report.environment(), "bar": _BAR, "short": _SHORT.value, "rows": []}
    for name, (estimator, gamma) in _ESTIMATORS.items():
        for interval in (_training.CHUNK, _NEVER):
            sophia = chunks(trainer(_sophia(estimator, gamma, interval)))
            sophia()  # the first step refreshes, whatever the interval
            ratio = _timing.alternate(sophia, adamw, _REPEATS.value)
            steps = _training.CHUNK
            results["rows"].append(
                {
                    "estimator": name,
                    "update interval": interval,
                    "time over AdamW": ratio.median,
                    "quartiles": [ratio.low, ratio.high],
                    "ms a step": 1e3 * ratio.first_seconds / steps,
                    "AdamW, ms a step": 1e3 * ratio.second_seconds / steps,
                }
            )
    console = _report.console()
    columns = list(results["rows"][0])
    table = [[_text(row[column]) for column in columns] for row in results["rows"]]
    _report.print_table(console, "Sophia's steps over AdamW's", columns, table)
    path = pathlib.Path(_OUTPUT.value) / "sophia_overhead.json"
    _report.write_json(path, results)
    console.print(path)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(f"{x:.3f}" for x in value)
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    app.run(main)

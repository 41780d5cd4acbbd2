"""What the quickstart's runs say: table, picture, sweep."""

import math
import pathlib
import statistics
from typing import Any

import matplotlib.figure
import numpy as np
import rich.console

from benchmarks import _report, _training


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The final table, and each cautious variant against its base, seed by seed."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        by_name.setdefault(run["optimizer"], []).append(run)
    target = {r["seed"]: _final(r) for r in by_name.get("adamw", [])}
    rows = []
    for name, group in by_name.items():
        final = [_final(run) for run in group]
        reached = [_reaching(run, target.get(run["seed"])) for run in group]
        rows.append(
            {
                "optimizer": name,
                "learning_rate": group[0]["learning_rate"],
                "final_validation_loss": {
                    "median": statistics.median(final),
                    "min": min(final),
                    "max": max(final),
                },
                "steps_to_adamw": statistics.median(step for step, _ in reached),
                "seconds_to_adamw": statistics.median(time for _, time in reached),
                "seeds_that_reach_adamw": sum(math.isfinite(s) for s, _ in reached),
                "seeds": len(group),
                **{
                    field: statistics.median(run[field] for run in group)
                    for field in (
                        "ms_per_step",
                        "compile_seconds",
                        "state_bytes_per_parameter",
                    )
                },
            }
        )
    against_base = {
        name: {
            "base": base,
            "differences": [
                _final(ours) - _final(theirs)
                for ours, theirs in zip(group, by_name[base], strict=True)
            ],
        }
        for name, group in by_name.items()
        if (base := _base(name)) != name and base in by_name
    }
    return {"table": rows, "against_base": against_base}


def _final(run: dict[str, Any]) -> float:
    loss = run["final_validation_loss"]
    return math.inf if loss is None or math.isnan(loss) else loss


def _reaching(run: dict[str, Any], target: float | None) -> tuple[float, float]:
    """Step and seconds of training at which `run` first reaches `target`."""
    curve = run["curve"]
    losses = [math.inf if x is None else x for x in curve["validation_loss"]]
    if target is None or not math.isfinite(target) or not min(losses) <= target:
        return math.inf, math.inf
    at = next(at for at, loss in enumerate(losses) if loss <= target)
    step = float(curve["validation_step"][at])
    if at and math.isfinite(losses[at - 1]):
        part = (losses[at - 1] - target) / (losses[at - 1] - losses[at])
        before = curve["validation_step"][at - 1]
        step = before + part * (step - before)
    seconds = np.cumsum([0.0, *curve["chunk_seconds"]])
    steps = _training.CHUNK * np.arange(len(seconds))
    return step, float(np.interp(step, steps, seconds))


def print_summary(console: rich.console.Console, summary: dict[str, Any]) -> None:
    """Prints the table and what each cautious variant gains."""
    rows = []
    for row in summary["table"]:
        loss = row["final_validation_loss"]
        spread = f"{loss['min']:.3f}-{loss['max']:.3f}" if row["seeds"] > 1 else ""
        rows.append(
            (
                row["optimizer"],
                f"{row['learning_rate']:g}",
                f"{loss['median']:.3f}",
                spread,
                _or_dash(row["steps_to_adamw"], ".0f"),
                _or_dash(row["seconds_to_adamw"], ".1f"),
                f"{row['ms_per_step']:.1f}",
                f"{row['compile_seconds']:.1f}",
                f"{row['state_bytes_per_parameter']:.2f}",
            )
        )
    columns = (
        "optimizer",
        "learning\nrate",
        "final\nloss",
        "over\nseeds",
        "steps to\nAdamW's",
        "seconds\nto it",
        "ms a\nstep",
        "compile\nseconds",
        "state\nB/param",
    )
    title = "Validation loss in nats per byte, median over seeds; a dash: not reached"
    _report.print_table(console, title, columns, rows)
    for name, pair in summary["against_base"].items():
        differences = pair["differences"]
        below = sum(difference < 0.0 for difference in differences)
        console.print(
            f"{name} - {pair['base']}: {statistics.median(differences):+.3f} "
            f"({min(differences):+.3f} to {max(differences):+.3f}), "
            f"below in {below} of {len(differences)}",
            highlight=False,
        )


def _or_dash(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"


def best_learning_rates(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The learning rate of the least final loss, for each optimizer of a sweep."""
    grids: dict[str, dict[float, float]] = {}
    for run in runs:
        grids.setdefault(run["optimizer"], {})[run["learning_rate"]] = _final(run)
    best = {name: min(grid, key=grid.__getitem__) for name, grid in grids.items()}
    return {"best_learning_rate": best}


def print_sweep(
    console: rich.console.Console, runs: list[dict[str, Any]], summary: dict[str, Any]
) -> None:
    """Prints the final loss at each learning rate."""
    rows = [
        (
            name,
            f"{best:g}",
            "  ".join(
                f"{run['learning_rate']:g}: {_final(run):.3f}"
                for run in runs
                if run["optimizer"] == name
            ),
        )
        for name, best in summary["best_learning_rate"].items()
    ]
    columns = ("optimizer", "best rate", "final validation loss at each rate")
    _report.print_table(console, "Sweep of learning rates", columns, rows)


def plot(
    path: pathlib.Path,
    runs: list[dict[str, Any]],
    summary: dict[str, Any],
    environment: dict[str, Any],
) -> None:
    """Draws the curves on the left, and on the right the final losses of all seeds."""
    figure = matplotlib.figure.Figure(figsize=(11.5, 4.8), layout="constrained")
    curves, finals = figure.subplots(1, 2, width_ratios=(1.25, 1.0))
    rows = sorted(
        summary["table"],
        key=lambda row: row["final_validation_loss"]["median"],
        reverse=True,
    )
    colors = _colors([row["optimizer"] for row in summary["table"]])
    for height, row in enumerate(rows):
        name = row["optimizer"]
        group = [run for run in runs if run["optimizer"] == name]
        steps = group[0]["curve"]["validation_step"]
        losses = np.array([r["curve"]["validation_loss"] for r in group], float)
        style = {"color": colors[name], "lw": 2.0}
        dashes = "-" if _base(name) != name or name == "flagship" else (0, (4, 1.5))
        curves.plot(steps, np.median(losses, 0), label=name, ls=dashes, **style)
        if len(group) > 1:
            band = losses.min(0), losses.max(0)
            curves.fill_between(steps, *band, color=colors[name], alpha=0.15, lw=0)
        final = losses[:, -1]
        finals.plot(final, [height] * len(final), "o", color=colors[name], alpha=0.55)
        median = float(np.median(final))
        finals.plot([median] * 2, [height - 0.28, height + 0.28], **style)
        note = f"{median:.3f}"
        if name != "adamw" and math.isfinite(row["steps_to_adamw"]):
            note += f", AdamW's {steps[-1]} steps in {row['steps_to_adamw']:.0f}"
        finals.annotate(
            note,
            (float(final.max()), height),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color="0.3",
        )
        if name == "adamw":
            for axes, line in ((curves, "axhline"), (finals, "axvline")):
                getattr(axes, line)(median, color="0.6", lw=0.8, ls=":", zorder=0)
    everything = [r["curve"]["validation_loss"] for r in runs]
    if (shown := np.array(everything, float)[:, 1:]).size:
        low, high = np.nanmin(shown), np.nanmax(shown)
        curves.set_ylim(low - 0.05 * (high - low), high + 0.03 * (high - low))
    curves.set(xlabel="training steps", ylabel="validation loss, nats per byte")
    curves.legend(reverse=True, frameon=False, loc="upper right")
    finals.set_yticks(range(len(rows)), [row["optimizer"] for row in rows])
    finals.set(xlabel="final validation loss, each seed and the median")
    finals.set_ylim(-0.6, len(rows) - 0.4)
    finals.margins(x=0.1)
    left, right = finals.get_xlim()
    finals.set_xlim(left, right + 0.55 * (right - left))  # room for the notes
    for axes in (curves, finals):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.92", zorder=-1)
    seeds = max(row["seeds"] for row in rows)
    device = environment["device"]
    figure.suptitle(
        f"Bytes of Python's standard library, {runs[0]['parameters'] / 1e6:.2f} M "
        f"parameters, {runs[0]['curve']['step']} steps, {seeds} "
        f"seed{'s' if seeds > 1 else ''}, {device['cores']} cores ({device['kind']})",
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _base(name: str) -> str:
    return name.removeprefix("cautious_")


def _colors(names: list[str]) -> dict[str, str]:
    """One colour for a base and its cautious variant together."""
    bases = list(dict.fromkeys(_base(name) for name in names))
    return {name: f"C{bases.index(_base(name)) % 10}" for name in names}

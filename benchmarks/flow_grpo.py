r"""Importance ratios of a denoising policy: Flow-GRPO's plain clip against GRPO-Guard.

    python -m benchmarks.flow_grpo                 # ten seeds, about a minute
    python -m benchmarks.flow_grpo --short         # seconds: does everything work?

A small flow-matching model of four Gaussians in the plane is (A) perturbed, to measure
the mean and variance of the importance ratio at every denoising step beside their
closed forms, and (B) fine-tuned by policy optimisation towards a point off the data.
The reward of that is the proxy; how far samples are from the data is the gold metric,
which training never sees. Table, figure and JSON go to the output folder.
"""

import functools
import pathlib
import shlex
import sys
import time
from typing import Any

import jax
import numpy as np
import rich.console
import rich.progress
from absl import app, flags

from benchmarks import _flow_figure, _report
from benchmarks import _flow_policy as fp

# name: default, value of --short, help.
_FLAGS: dict[str, tuple[Any, Any, str]] = {
    "seeds": (10, 2, "Number of seeds."),
    "pretrain_steps": (1500, 150, "Steps of flow matching."),
    "perturbation": (0.02, 0.02, "Standard deviation added to every weight in part A."),
    "pairs": (131072, 8192, "Mirrored pairs of trajectories a seed in part A."),
    "iterations": (40, 3, "Rollouts in part B."),
    "epochs": (6, 3, "Updates on each rollout."),
    "trajectories": (256, 128, "Trajectories in a rollout."),
    "held_out": (1024, 256, "Samples in an evaluation."),
    "learning_rate": (1e-3, 1e-3, "Adam's, for both methods."),
    "plain_clip": (0.05, 0.05, "Clip range of Flow-GRPO."),
    "guard_clip": (0.01, 0.01, "Clip range of GRPO-Guard."),
    "output": ("runs/flow_grpo", "runs/flow_grpo", "Folder of the results."),
}
_BARS = {"raw": 2e-3, "normalized": 1e-3}
_CHUNK = 4096
_LABELS = _flow_figure.METHODS


def run_seed(seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Both parts for one seed, as arrays."""
    started = time.perf_counter()
    model, noise, measure, train, draw = jax.random.split(jax.random.key(seed), 5)
    base = fp.pretrain(model, settings["pretrain_steps"])
    moments = fp.measure_ratios(
        base,
        fp.perturb(base, noise, settings["perturbation"]),
        measure,
        pairs=settings["pairs"],
        chunk=min(_CHUNK, settings["pairs"]),
    )
    methods = {
        "flow_grpo": fp.Method(guard=False, clip_range=settings["plain_clip"]),
        "grpo_guard": fp.Method(guard=True, clip_range=settings["guard_clip"]),
    }
    final = {"pretrained": base}
    training = {}
    for name, method in methods.items():
        final[name], metrics, statistics = fp.fine_tune(
            base,
            train,
            settings["learning_rate"],
            method=method,
            iterations=settings["iterations"],
            epochs=settings["epochs"],
            count=settings["trajectories"],
            held_out=settings["held_out"],
        )
        training[name] = {**_to_numpy(metrics), **_per_step(_to_numpy(statistics))}
    law = {
        name: _ratio_statistics(_to_numpy(m), settings["pairs"])
        for name, m in moments.items()
    }
    clouds = {
        name: np.asarray(fp.final_samples(p, draw, 200)) for name, p in final.items()
    }
    seconds = time.perf_counter() - started
    return {"law": law, "training": training, "clouds": clouds, "seconds": seconds}


def _to_numpy(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def _to_lists(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.tolist() if hasattr(x, "tolist") else x, tree)


def _ratio_statistics(moments: dict[str, np.ndarray], pairs: int) -> dict[str, Any]:
    """Statistics [steps] from the moments of chunks, and their Monte-Carlo errors."""
    m = {name: chunks.mean(0) for name, chunks in moments.items()}
    return {
        "mean": 1 + m["mean"],
        "mean_error": np.sqrt((m["mean_square"] - m["mean"] ** 2) / pairs),
        "law": 1 + m["law"],
        "gap": m["gap"],
        "gap_error": np.sqrt((m["gap_square"] - m["gap"] ** 2) / pairs),
        "variance": m["ratio_square"] - m["mean"] ** 2,
    }


def _per_step(statistics: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Ratio and clipped fraction [steps], over all updates but the first of a rollout.

    At the first, the policy is the one that drew the rollout, and the ratio is 1.
    """
    m = {name: x[:, 1:].mean((0, 1)) for name, x in statistics.items()}
    return {
        "ratio_mean": 1 + m["mean"],
        "ratio_variance": m["square"] - m["mean"] ** 2,
        "clipped": m["clipped"],
    }


def _stack(runs: list[dict[str, Any]], part: str) -> dict[str, dict[str, np.ndarray]]:
    """One array [seeds, ...] for every name and quantity of a part."""
    return {
        name: {key: np.stack([run[part][name][key] for run in runs]) for key in values}
        for name, values in runs[0][part].items()
    }


def check_bars(law: dict[str, dict[str, np.ndarray]], pairs: int) -> dict[str, Any]:
    """How far the mean ratio is from its law and from 1, at the worst step.

    Both for the mean over seeds and for the worst seed, where ``closed_form`` is the
    value that the mean ratio has without Monte-Carlo error.
    """
    off = {"raw": law["raw"]["gap"], "normalized": law["normalized"]["mean"] - 1}
    keys = {"raw": "gap_error", "normalized": "mean_error"}
    checked = {}
    for name, bar in _BARS.items():
        distance, error = np.abs(off[name]), law[name][keys[name]]
        seed, step = np.unravel_index(distance.argmax(), distance.shape)
        over_seeds = np.abs(off[name].mean(0)).max()
        checked[name] = {
            "bar": bar,
            "mean_over_seeds": over_seeds,
            "mean_over_seeds_met": bool(over_seeds < bar),
            "seeds_met": int((distance.max(1) < bar).sum()),
            "worst": distance[seed, step],
            "worst_error": error[seed, step],
            "worst_seed": int(seed),
            "worst_step": int(step) + 1,
            "closed_form": law[name]["law"][seed, step],
            "pairs_needed": int(np.ceil(pairs * (error.max() / (0.1 * bar)) ** 2)),
        }
    return checked


def print_law(console: rich.console.Console, law, checked, pairs: int) -> None:
    """The table of part A and its verdict."""
    raw, normalized = ({k: v.mean(0) for k, v in law[n].items()} for n in _BARS)
    rows = [
        (
            f"{k + 1}",
            f"{fp.GRID[k]:.3f}",
            f"{raw['mean'][k]:.5f}",
            f"{raw['law'][k]:.5f}",
            f"{np.abs(law['raw']['gap'][:, k]).max():.1e}",
            f"{raw['gap_error'][k]:.1e}",
            f"{raw['variance'][k]:.1e}",
            f"{normalized['mean'][k]:.5f}",
            f"{np.abs(law['normalized']['mean'][:, k] - 1).max():.1e}",
            f"{normalized['mean_error'][k]:.1e}",
            f"{normalized['variance'][k]:.1e}",
        )
        for k in range(fp.STEPS)
    ]
    columns = "step,sigma,raw mean,its law,|mean-law|,error,variance,"
    columns += "normalised mean,|mean-1|,error,variance"
    title = (
        "A. Importance ratio after a perturbation of the weights: means over seeds, "
    )
    title += "but |.| is the worst seed's, and error is one seed's Monte-Carlo error"
    _report.print_table(console, title, columns.split(","), rows)
    what = {
        "raw": "Raw: |mean - exp(-KL/D + KL/D^2)|",
        "normalized": "Normalised: |mean - 1|",
    }
    seeds = len(law["raw"]["mean"])
    lines = [
        f"{what[name]} at the worst step: {c['mean_over_seeds']:.1e} for the mean over "
        f"seeds, bar {c['bar']:g} {'met' if c['mean_over_seeds_met'] else 'MISSED'}; "
        f"{c['seeds_met']} of {seeds} seeds meet the bar. "
        f"Worst: {c['worst']:.1e}, Monte-Carlo error {c['worst_error']:.1e} (seed "
        f"{c['worst_seed']}, step {c['worst_step']})."
        for name, c in checked.items()
    ]
    exact = checked["normalized"]["closed_form"] - 1
    needed = max(c["pairs_needed"] for c in checked.values())
    lines += [
        f"There, its closed form exp(s^2 KL/D^2) - 1 is {exact:.1e}: only the "
        "log-ratio has mean 0 exactly.",
        f"An error of a tenth of the bar needs {needed} pairs a seed; {pairs} were "
        "drawn.\n",
    ]
    for line in lines:
        console.print(line, highlight=False)


def print_training(console: rich.console.Console, training) -> None:
    """The tables of part B and what they say about over-optimisation."""
    means = {n: {k: v.mean(0) for k, v in t.items()} for n, t in training.items()}
    rows = [
        (
            f"{k + 1}",
            *(
                text
                for t in means.values()
                for text in (
                    f"{t['ratio_mean'][k]:.5f}",
                    f"{t['ratio_variance'][k]:.1e}",
                    f"{t['clipped'][k]:.3f}",
                )
            ),
        )
        for k in range(fp.STEPS)
    ]
    columns = ["step"]
    for name in training:
        columns += [f"{_LABELS[name]}: mean", "variance", "clipped A > 0"]
    title = "B. Importance ratio in training, and the share of samples of positive"
    _report.print_table(console, f"{title} advantage that is clipped", columns, rows)

    def cell(values: np.ndarray) -> str:
        return f"{values.mean():.3f} ({values.min():.3f}, {values.max():.3f})"

    first = next(iter(training.values()))
    rows = [("before", *(cell(first[m][:, 0]) for m in fp.METRICS))]
    for name, t in training.items():
        rows.append((_LABELS[name], *(cell(t[m][:, -1]) for m in fp.METRICS)))
    columns = ["", "proxy reward", "gold: distance to data", "gold: log-likelihood"]
    title = "Before and after training: mean over seeds, least and greatest"
    _report.print_table(console, title, columns, rows)
    for name, t in means.items():
        gold = t["distance"]
        at = int(gold.argmin())
        console.print(
            f"{_LABELS[name]}: the proxy goes from {t['proxy'][0]:.2f} to "
            f"{t['proxy'][-1]:.2f}. The distance to the data is least after {at} "
            f"iterations, {gold[at]:.2f}, and {gold[-1]:.2f} at the end.",
            highlight=False,
        )


def main(argv: list[str]) -> int:
    if argv[1:]:
        raise app.UsageError(f"unexpected arguments: {shlex.join(argv[1:])}")
    settings = _settings()
    if settings["pairs"] % min(_CHUNK, settings["pairs"]):
        raise app.UsageError(f"--pairs must be below {_CHUNK} or a multiple of it")
    if settings["epochs"] < 2:
        raise app.UsageError(
            "--epochs must be 2 or more: at the first, all ratios are 1"
        )
    started = time.perf_counter()
    environment = _report.environment()
    console = _report.console()
    seeds = range(settings["seeds"])
    track = functools.partial(
        rich.progress.track, console=console, disable=not console.is_terminal
    )
    runs = [run_seed(seed, settings) for seed in track(seeds, "Seeds")]
    law, training = _stack(runs, "law"), _stack(runs, "training")
    checked = check_bars(law, settings["pairs"])
    print_law(console, law, checked, settings["pairs"])
    print_training(console, training)

    output = pathlib.Path(settings["output"], "flow_grpo")
    device = environment["device"]
    _flow_figure.plot(
        output.with_suffix(".png"),
        law,
        training,
        runs[0]["clouds"],
        _BARS["normalized"],
        f"Flow-GRPO against GRPO-Guard on a 2-D flow: mean and range of {len(runs)} "
        f"seeds, on {device['cores']} cores of {device['processor']}",
    )
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.flow_grpo", *sys.argv[1:]]),
        "wall_seconds": time.perf_counter() - started,
        **environment,
        "settings": settings,
        "seeds": list(seeds),
        "seed_seconds": [run["seconds"] for run in runs],
        **_to_lists({"bars": checked, "law": law, "training": training}),
    }
    _report.write_json(output.with_suffix(".json"), result)
    console.print(
        f"Results: {output}.*, {result['wall_seconds']:.0f} s in all, of which "
        f"{runs[0]['seconds']:.0f} s for the first seed, with compilation",
        highlight=False,
    )
    return 0


def define_flags() -> None:
    """One flag for every line of the table, and ``--short``."""
    define = {
        int: functools.partial(flags.DEFINE_integer, lower_bound=1),
        float: functools.partial(flags.DEFINE_float, lower_bound=0.0),
        str: flags.DEFINE_string,
    }
    for name, (default, _, text) in _FLAGS.items():
        define[type(default)](name, default, text)
    flags.DEFINE_boolean("short", False, "Small numbers: does everything work?")


def _settings() -> dict[str, Any]:
    """Settings from the flags; ``--short`` changes those that are not given."""
    short = flags.FLAGS["short"].value
    return {
        name: small
        if short and not flags.FLAGS[name].present
        else flags.FLAGS[name].value
        for name, (_, small, _) in _FLAGS.items()
    }


if __name__ == "__main__":
    define_flags()
    app.run(main)

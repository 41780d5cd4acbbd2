"""The figure of the flow_grpo benchmark."""

import functools
import pathlib
from typing import Any

import matplotlib.axes
import matplotlib.figure
import numpy as np

from benchmarks import _flow_policy as fp

METHODS = {"flow_grpo": "Flow-GRPO", "grpo_guard": "GRPO-Guard"}
_RATIOS = {"raw": "raw", "normalized": "normalised"}
_COLORS = {"raw": "C1", "normalized": "C0", "flow_grpo": "C1", "grpo_guard": "C0"}
_METRICS = {
    "proxy": ("Proxy reward, which training sees", "minus distance to the target"),
    "distance": ("Gold: distance to the data", "distance to the nearest centre"),
    "log_likelihood": ("Gold: likelihood under the data", "log-likelihood, nats"),
}

Statistics = dict[str, dict[str, np.ndarray]]


def plot(
    path: pathlib.Path,
    law: Statistics,
    training: Statistics,
    clouds: dict[str, np.ndarray],
    bar: float,
    title: str,
) -> None:
    """Draws the ratios of parts A and B above, rewards and samples of B below."""
    figure = matplotlib.figure.Figure(figsize=(17, 8.4), layout="constrained")
    above, below = figure.subplots(2, 4)
    _ratios(above, law, training, bar)
    for name, label in METHODS.items():
        for axes, metric in zip(below, _METRICS, strict=False):
            values = training[name][metric]
            x = np.arange(values.shape[1])
            _curve(axes, x, values, color=_COLORS[name], label=label)
    for axes, (heading, unit) in zip(below, _METRICS.values(), strict=False):
        axes.set(title=f"B. {heading}", xlabel="iteration", ylabel=unit)
        axes.legend(frameon=False)
    _samples(below[3], clouds)
    for axes in (*above, *below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _ratios(panels, law: Statistics, training: Statistics, bar: float) -> None:
    steps = np.arange(1, fp.STEPS + 1)
    curve = functools.partial(_curve, x=steps, marker="o", ms=4)
    mean, variance, training_mean, clipped = panels
    mean.axhspan(1 - bar, 1 + bar, color="0.9", lw=0, label=f"1 ± {bar:g}")
    for name, label in _RATIOS.items():
        style = {"color": _COLORS[name], "label": label}
        curve(mean, values=law[name]["mean"], **style)
        curve(variance, values=law[name]["variance"], **style)
    exact = law["raw"]["law"].mean(0)
    mean.plot(steps, exact, "k--", lw=1, label="exp(-KL/D + KL/D²)", zorder=3)
    for name, label in METHODS.items():
        style = {"color": _COLORS[name], "label": label}
        curve(training_mean, values=training[name]["ratio_mean"], **style)
        curve(clipped, values=100 * training[name]["clipped"], **style)
    training_mean.axhline(1, color="0.6", lw=0.8, ls=":")
    training_mean.ticklabel_format(useOffset=False)
    variance.set_yscale("log")
    clipped.set_ylim(bottom=0)
    headings = {
        "A. Weights perturbed: mean ratio": "mean importance ratio",
        "A. Weights perturbed: variance": "variance of the importance ratio",
        "B. In training: mean ratio": "mean importance ratio",
        "B. In training: clipped": "share of samples with A > 0, %",
    }
    for axes, (title, unit) in zip(panels, headings.items(), strict=True):
        axes.set(title=title, xlabel="denoising step", ylabel=unit, xticks=steps)
        axes.legend(frameon=False)


def _samples(axes: matplotlib.axes.Axes, clouds: dict[str, np.ndarray]) -> None:
    looks: dict[str, dict[str, Any]] = {
        "pretrained": {"label": "before", "marker": ".", "color": "0.6"},
        "grpo_guard": {"label": "GRPO-Guard", "marker": ".", "color": "C0"},
        "flow_grpo": {"label": "Flow-GRPO", "marker": "o", "mfc": "none", "mec": "C1"},
    }
    for name, look in looks.items():
        axes.plot(*clouds[name].T, ls="", ms=4, **look)
    axes.plot(*fp.CENTRES.T, "k+", ms=9, label="data centres")
    axes.plot(*fp.TARGET, "k*", ms=11, label="target of the proxy")
    axes.set(title="B. Samples, seed 0", xlabel="x", ylabel="y", aspect="equal")
    axes.set(xlim=(-3.2, 4.4), ylim=(-3.2, 4.2))
    axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)


def _curve(axes: matplotlib.axes.Axes, x, values: np.ndarray, color, **style) -> None:
    """The mean over seeds, with the least and the greatest as a band."""
    axes.plot(x, values.mean(0), color=color, lw=1.8, **style)
    axes.fill_between(x, values.min(0), values.max(0), color=color, alpha=0.18, lw=0)

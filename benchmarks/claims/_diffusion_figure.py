"""The figure of the diffusion_weightings claims."""

import pathlib
from typing import Any

import jax.numpy as jnp
import matplotlib.axes
import matplotlib.figure
import matplotlib.ticker
import numpy as np

from benchmarks.claims import _digits_diffusion as dd

_LABELS = {
    "eps": "plain ε",
    "p2": "P2",
    "debiased": "debiased",
    "elbo": "ELBO",
    "eps_adaptive": "plain ε, adaptive",
    "v_adaptive": "plain v, adaptive",
    "sigmoid_adaptive": "sigmoid, adaptive",
    "elbo_adaptive": "ELBO, adaptive",
}
_METRICS = {
    "frechet": "samples: Fréchet distance of features",
    "sliced": "samples: sliced distance of pixels",
    "bound": "held-out likelihood bound, nats a pixel",
}
_COLORS = {name: f"C{at}" for at, name in enumerate(_LABELS)}
_NETWORKS = {"eps": "Network that predicts ε", "v": "Network that predicts v"}

Runs = dict[str, dict[str, dict[str, Any]]]


def plot(
    path: pathlib.Path,
    runs: Runs,
    floor: dict[str, float],
    data: np.ndarray,
    logsnrs: np.ndarray,
    title: str,
) -> None:
    """Draws weights, errors, metrics by seed, and samples of the first seed."""
    figure = matplotlib.figure.Figure(figsize=(16, 15), layout="constrained")
    panels = figure.subplots(4, 3, height_ratios=(1.1, 1, 1, 1.5))
    _weights(panels[0, 0])
    for axes, (network, of_network) in zip(panels[0, 1:], runs.items(), strict=True):
        _errors(axes, of_network, logsnrs)
        axes.set_title(f"{_NETWORKS[network]}: held-out error")
    for row, (network, of_network) in zip(panels[1:3], runs.items(), strict=True):
        for axes, (metric, label) in zip(row, _METRICS.items(), strict=True):
            _by_seed(axes, of_network, metric, floor.get(metric))
            axes.set(xlabel=f"{label}")
        row[1].set_title(f"{_NETWORKS[network]} (dot: a seed, bar: mean)")
    for axes in panels[:3].flat:
        axes.spines[["top", "right"]].set_visible(False)
    grid = panels[3, 0].get_gridspec()
    for axes in panels[3]:
        axes.remove()
    _samples(figure.add_subplot(grid[3, :]), runs, data)
    figure.suptitle(title, fontsize=14)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _weights(axes: matplotlib.axes.Axes) -> None:
    logsnr = jnp.linspace(-dd.LOGSNR_LIMIT, dd.LOGSNR_LIMIT, 201)
    for name, weighting in dd.WEIGHTINGS.items():
        if name in ("eps_adaptive", "elbo_adaptive"):  # the same weights as without
            continue
        weight = np.asarray(weighting(logsnr))
        label = _LABELS[name].split(",")[0]
        axes.plot(logsnr, weight / weight.max(), color=_COLORS[name], label=label, lw=2)
    axes.set(title="Weight of the ε error", yscale="log", ylim=(1e-5, 2))
    axes.set(xlabel="log-SNR (noise on the left)", ylabel="weight, over its largest")
    axes.legend(frameon=False, loc="lower left")


def _errors(axes: matplotlib.axes.Axes, runs, logsnrs: np.ndarray) -> None:
    plain = np.array(runs["eps"]["errors"]).mean(0)
    for name, run in runs.items():
        ratio, color = np.array(run["errors"]) / plain, _COLORS[name]
        axes.plot(logsnrs, ratio.mean(0), color=color, label=_LABELS[name], lw=1.8)
        low, high = ratio.min(0), ratio.max(0)
        axes.fill_between(logsnrs, low, high, color=color, alpha=0.15, lw=0)
    axes.axhline(1, color="0.6", lw=0.8, ls=":")
    axes.set(yscale="log", xlabel="log-SNR (noise on the left)")
    axes.set(ylabel="error of ε, over that of plain ε")
    axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.legend(frameon=False, fontsize=8, ncols=2)


def _by_seed(axes: matplotlib.axes.Axes, runs, metric: str, floor: Any) -> None:
    for at, name in enumerate(runs):
        values = np.array(runs[name][metric])
        axes.plot(values, np.full(len(values), at), "o", ms=5, color=_COLORS[name])
        axes.plot(values.mean(), at, "k|", ms=14)
    if floor is not None:
        axes.axvline(floor, color="0.5", ls="--", lw=1)
        style: dict[str, Any] = {"color": "0.4", "fontsize": 9, "rotation": 90}
        style["transform"] = axes.get_xaxis_transform()
        axes.text(floor, 0.03, " training digits", **style)
    axes.set_yticks(range(len(runs)), [_LABELS[name] for name in runs])
    axes.invert_yaxis()


def _samples(axes: matplotlib.axes.Axes, runs: Runs, data: np.ndarray) -> None:
    """One column a network, one row a weighting; held-out digits on top."""
    width, apart = 9 * len(data), 9 * len(data) + 12
    names = list(_LABELS)
    canvas = np.full((9 * (len(names) + 1), apart + width), np.nan)
    for column, (network, of_network) in enumerate(runs.items()):
        rows = [data, *(of_network[name]["samples"] for name in names)]
        for row, images in enumerate(rows):
            for k, image in enumerate(images):
                top, left = 9 * row, column * apart + 9 * k
                canvas[top : top + 8, left : left + 8] = image.reshape(8, 8)
        centre = column * apart + width / 2
        heading = f"{_NETWORKS[network]}: samples of the first seed"
        axes.text(centre, -3, heading, ha="center", fontsize=12)
    for row, label in enumerate(["held-out digits", *_LABELS.values()]):
        axes.text(-3, 9 * row + 4, label, ha="right", va="center", fontsize=11)
    axes.imshow(canvas, cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
    axes.axis("off")

"""The figure of the diffusion_weightings claims."""

import pathlib
from typing import Any

import jax.numpy as jnp
import matplotlib.axes
import matplotlib.figure
import numpy as np

from benchmarks.claims import _digits_diffusion as dd

_LABELS = {
    "eps": "plain ε",
    "v": "plain v",
    "p2": "P2",
    "debiased": "debiased",
    "sigmoid": "sigmoid",
    "elbo": "ELBO",
    "elbo_adaptive": "ELBO, adaptive",
}
_METRICS = {
    "frechet": "Samples: Fréchet distance of features",
    "sliced": "Samples: sliced distance of pixels",
    "bound": "Held-out likelihood bound, nats a pixel",
}
_COLORS = {name: f"C{at}" for at, name in enumerate(_LABELS)}


def plot(
    path: pathlib.Path,
    runs: dict[str, dict[str, Any]],
    floor: dict[str, float],
    data: np.ndarray,
    logsnrs: np.ndarray,
    title: str,
) -> None:
    """Draws weights, errors, metrics by seed, and samples of the first seed."""
    figure = matplotlib.figure.Figure(figsize=(15, 12.5), layout="constrained")
    grid = figure.add_gridspec(3, 6, height_ratios=(1, 1, 1.35))
    weights = figure.add_subplot(grid[0, :3])
    errors = figure.add_subplot(grid[0, 3:])
    _weights(weights)
    _errors(errors, runs, logsnrs)
    for at, (metric, label) in enumerate(_METRICS.items()):
        axes = figure.add_subplot(grid[1, 2 * at : 2 * at + 2])
        _by_seed(axes, runs, metric, label, floor.get(metric))
    _samples(figure.add_subplot(grid[2, :]), runs, data)
    figure.suptitle(title, fontsize=13)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _bare(axes: matplotlib.axes.Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _weights(axes: matplotlib.axes.Axes) -> None:
    logsnr = jnp.linspace(-dd.LOGSNR_LIMIT, dd.LOGSNR_LIMIT, 201)
    for name, weighting in dd.WEIGHTINGS.items():
        if name == "elbo_adaptive":  # the same weight as ELBO
            continue
        weight = np.asarray(weighting(logsnr))
        label, color = _LABELS[name], _COLORS[name]
        axes.plot(logsnr, weight / weight.max(), label=label, color=color, lw=1.8)
    axes.set(title="Weight of the ε error", yscale="log", ylim=(1e-5, 2))
    axes.set(xlabel="log-SNR (noise on the left)", ylabel="weight, over its largest")
    axes.legend(frameon=False, fontsize=9, loc="lower left")
    _bare(axes)


def _errors(axes: matplotlib.axes.Axes, runs, logsnrs: np.ndarray) -> None:
    plain = np.array(runs["eps"]["errors"]).mean(0)
    for name, run in runs.items():
        ratio = np.array(run["errors"]) / plain
        style = {"color": _COLORS[name], "label": _LABELS[name]}
        axes.plot(logsnrs, ratio.mean(0), lw=1.8, **style)
        axes.fill_between(
            logsnrs, ratio.min(0), ratio.max(0), color=style["color"], alpha=0.15, lw=0
        )
    axes.axhline(1, color="0.6", lw=0.8, ls=":")
    axes.set(title="Error of the noise on held-out digits", yscale="log")
    axes.set(xlabel="log-SNR (noise on the left)", ylabel="error, over that of plain ε")
    axes.legend(frameon=False, fontsize=9, ncols=2)
    _bare(axes)


def _by_seed(axes: matplotlib.axes.Axes, runs, metric, label, floor) -> None:
    names = list(runs)
    for at, name in enumerate(names):
        values = np.array(runs[name][metric])
        axes.plot(values, np.full(len(values), at), "o", ms=5, color=_COLORS[name])
        axes.plot(values.mean(), at, "k|", ms=16)
    if floor is not None:
        axes.axvline(floor, color="0.5", ls="--", lw=1)
        axes.annotate(
            "training digits",
            (floor, 0.02),
            xycoords=("data", "axes fraction"),
            xytext=(4, 0),
            textcoords="offset points",
            color="0.4",
            fontsize=8,
        )
    axes.set(title=label, xscale="log", xlabel="a dot a seed, | their mean")
    axes.set_yticks(range(len(names)), [_LABELS[name] for name in names])
    axes.invert_yaxis()
    _bare(axes)


def _samples(axes: matplotlib.axes.Axes, runs, data: np.ndarray) -> None:
    rows = {"held-out digits": data}
    rows |= {_LABELS[name]: run["samples"] for name, run in runs.items()}
    width = min(len(images) for images in rows.values())
    half = (len(rows) + 1) // 2
    # Two columns of rows, with images framed by a line of background.
    canvas = np.full((9 * half, 2 * 9 * width + 40), np.nan)
    for at, (label, images) in enumerate(rows.items()):
        column, row = divmod(at, half)
        left = column * (9 * width + 40)
        for k, image in enumerate(images[:width]):
            top, side = 9 * row, left + 9 * k
            canvas[top : top + 8, side : side + 8] = image.reshape(8, 8)
        axes.text(left - 2, 9 * row + 4, label, ha="right", va="center", fontsize=10)
    axes.imshow(canvas, cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
    axes.set_title("Samples of the first seed")
    axes.axis("off")

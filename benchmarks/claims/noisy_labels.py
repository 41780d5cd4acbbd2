r"""Early-learning regularisation against cross-entropy on digits with wrong labels.

    python -m benchmarks.claims.noisy_labels            # five seeds, about a minute
    python -m benchmarks.claims.noisy_labels --short    # seconds: does it all work?

The claim (2007.00151): at 40% wrong labels a network first learns the right classes,
also of the images whose labels are wrong, and then memorises the labels; cross-entropy
lets that ruin its accuracy on clean test data, and early-learning regularisation (ELR)
does not.

1300 images are trained on; of exactly 40% the label is another class, drawn at random.
The other 497 are the test set. Controls: cross-entropy stopped at its best epoch, which
needs clean data to know, and cross-entropy with all labels right. Network, optimizer
and number of steps are the same for all. Everything differs from seed to seed.
"""

# Arrays, trees and flax models, which the types of jax and optax leave open.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportReturnType=false, reportOptionalMemberAccess=false

import functools
import pathlib
import shlex
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax
import rich.progress
from absl import app

import optax_ext as ox
from benchmarks import _report
from benchmarks.claims import _digits

TRAIN = 1300
WRONG = 0.4
_BATCH = 100
_WIDTH = 256
_LEARNING_RATE = 1e-3


class Method(NamedTuple):
    """Strength of the regulariser, and whether training sees the wrong labels."""

    label: str
    lam: float
    noisy: bool = True


METHODS = {
    "cross_entropy": Method("cross-entropy", 0.0),
    "elr": Method("ELR", 3.0),
    "clean": Method("cross-entropy, all labels right", 0.0, noisy=False),
}
CONTROL, TREATED = "cross_entropy", "elr"
_COLORS = {"cross_entropy": "C1", "elr": "C0", "clean": "0.45"}


class Split(NamedTuple):
    """One seed's data.

    Attributes:
      train: images to train on [TRAIN].
      test: the others.
      given: labels of the training images, 40% of them wrong.
      params: where the network starts.
      rows: places in `train` by step [epochs, steps, batch].
    """

    train: np.ndarray
    test: np.ndarray
    given: np.ndarray
    params: _digits.Params
    rows: np.ndarray


def split(seed: int, epochs: int) -> Split:
    """Another test set and other wrong labels for every seed."""
    random = np.random.default_rng(seed)
    labels = _digits.load().labels
    order = random.permutation(len(labels))
    train, test = order[:TRAIN], order[TRAIN:]
    offset = np.zeros(TRAIN, np.int32)
    wrong = random.permutation(TRAIN)[: round(WRONG * TRAIN)]
    offset[wrong] = random.integers(1, _digits.CLASSES, len(wrong))
    given = (labels[train] + offset) % _digits.CLASSES
    params = _digits.init_network(random, _WIDTH, features=_WIDTH)
    rows = _digits.batches(random, np.arange(TRAIN), _BATCH, epochs)
    return Split(train, test, given, params, rows)


def curves(data: Split, *, method: str) -> dict[str, jax.Array]:
    """Shares after each epoch [epochs]: right on test data, and on wrong labels.

    Of the training images with a wrong label, ``memorised`` have that label predicted,
    and ``corrected`` their true class.
    """
    recipe, digits = METHODS[method], _digits.load()
    images, labels = jnp.asarray(digits.images), jnp.asarray(digits.labels)
    x, true, given = images[data.train], labels[data.train], data.given
    wrong = given != true
    elr = ox.losses.early_learning_regularization(
        TRAIN, _digits.CLASSES, beta=0.7, lam=recipe.lam
    )
    tx = optax.adam(_LEARNING_RATE)

    def step(carry, index):
        params, state, table = carry
        seen = given if recipe.noisy else true

        def loss_fn(params):
            logits = _digits.network(params, x[index])
            losses, new_table = elr.apply(table, logits, seen[index], index)
            return jnp.mean(losses), new_table

        grads, table = jax.grad(loss_fn, has_aux=True)(params)
        updates, state = tx.update(grads, state)
        return (optax.apply_updates(params, updates), state, table), None

    def epoch(carry, rows):
        carry, _ = jax.lax.scan(step, carry, rows)

        def found(images):
            return jnp.argmax(_digits.network(carry[0], images), -1)

        on_test, on_train = found(images[data.test]), found(x)
        share = functools.partial(jnp.mean, where=wrong)
        return carry, {
            "test": jnp.mean(on_test == labels[data.test]),
            "memorised": share(on_train == given),
            "corrected": share(on_train == true),
        }

    params = jax.tree.map(jnp.asarray, data.params)
    start = params, tx.init(params), elr.init()
    return jax.lax.scan(epoch, start, data.rows)[1]


def run(method: str, seeds: range, epochs: int) -> dict[str, np.ndarray]:
    """All seeds of a method at once: curves [seeds, epochs]."""
    splits = _digits.stack([split(seed, epochs) for seed in seeds])
    found = jax.jit(jax.vmap(functools.partial(curves, method=method)))(splits)
    return {name: np.asarray(x, np.float64) for name, x in found.items()}


def judge(runs: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
    """Paired differences at the end of training, and what cross-entropy lost."""
    plain, ours = (runs[name]["test"] for name in (CONTROL, TREATED))
    loss, kept = (x.max(1) - x[:, -1] for x in (plain, ours))
    memorised = {name: found["memorised"][:, -1] for name, found in runs.items()}
    return {
        "end": _digits.judge(ours[:, -1] - plain[:, -1]),
        "against_best_epoch": _digits.judge(ours[:, -1] - plain.max(1)),
        "lost_by_control": _digits.judge(loss),
        "lost_by_treated": _digits.judge(kept),
        "memorised_less": _digits.judge(memorised[CONTROL] - memorised[TREATED]),
    }


def print_results(console, runs: dict[str, Any], judged: dict[str, Any]) -> None:
    rows = []
    for name, found in runs.items():
        best = found["test"].max(1)
        last = [found[key][:, -1] for key in ("test", "memorised", "corrected")]
        rows.append((METHODS[name].label, *map(_digits.percent, (best, *last))))
    columns = ["", "test, best epoch", "test, end", "memorised", "corrected"]
    title = (
        "Percent, mean over seeds, least and greatest. Of training images with a wrong "
        "label: memorised are predicted as that label, corrected as their true class"
    )
    _report.print_table(console, title, columns, rows)
    lines = {
        "ELR - cross-entropy, test accuracy at the end": "end",
        "ELR at the end - cross-entropy at its best epoch": "against_best_epoch",
        "Cross-entropy, best epoch - end": "lost_by_control",
        "ELR, best epoch - end": "lost_by_treated",
        "Cross-entropy - ELR, wrong labels memorised": "memorised_less",
    }
    for text, key in lines.items():
        console.print(f"{text}: {_digits.points(judged[key])}", highlight=False)


def plot(path: pathlib.Path, runs: dict[str, Any], title: str) -> None:
    """Test accuracy, and what becomes of the wrong labels, over epochs."""
    figure = matplotlib.figure.Figure(figsize=(14, 4.8), layout="constrained")
    panels = {
        "test": ("Clean test data", "accuracy, %"),
        "memorised": ("Wrong labels: memorised", "predicted as labelled, %"),
        "corrected": ("Wrong labels: corrected", "predicted as they truly are, %"),
    }
    every = figure.subplots(1, 3)
    for axes, (key, (heading, unit)) in zip(every, panels.items(), strict=True):
        for name, found in runs.items():
            epochs = np.arange(1, found[key].shape[1] + 1)
            style = {"color": _COLORS[name], "label": METHODS[name].label}
            _digits.curve(axes, epochs, found[key], **style)
        axes.set(title=heading, xlabel="epoch", ylabel=unit)
        axes.spines[["top", "right"]].set_visible(False)
    every[0].legend(frameon=False)
    every[1].set_ylim(-2, 102)
    figure.suptitle(title, fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(argv: list[str]) -> int:
    if argv[1:]:
        raise app.UsageError(f"unexpected arguments: {shlex.join(argv[1:])}")
    settings = _digits.settings(epochs=(100, 5))
    seeds = range(settings["seeds"])
    started = time.perf_counter()
    environment = _report.environment()
    console = _report.console()
    names = rich.progress.track(
        METHODS, "Methods", console=console, disable=not console.is_terminal
    )
    runs = {name: run(name, seeds, settings["epochs"]) for name in names}
    judged = judge(runs)
    print_results(console, runs, judged)
    shown = judged["end"]["shown"] and judged["lost_by_control"]["shown"]
    console.print(
        "Claim, ELR keeps the clean accuracy that cross-entropy loses at 40% wrong "
        f"labels: {'shown' if shown else 'not shown'}.",
        highlight=False,
    )
    output = pathlib.Path(settings["output"], "noisy_labels")
    plot(
        output.with_suffix(".png"),
        runs,
        f"Digits with 40% wrong labels: mean and range of {len(seeds)} seeds",
    )
    result = {
        "command": shlex.join(
            ["python", "-m", "benchmarks.claims.noisy_labels", *sys.argv[1:]]
        ),
        "wall_seconds": time.perf_counter() - started,
        "processor_seconds": time.process_time(),
        **environment,
        "data": {**_digits.facts(), "train": TRAIN, "wrong": WRONG},
        "settings": {**settings, "learning_rate": _LEARNING_RATE, "batch": _BATCH},
        "seeds": list(seeds),
        "claim": {"treated": TREATED, "control": CONTROL, "shown": shown},
        "judged": judged,
        "curves": runs,
    }
    _report.write_json(output.with_suffix(".json"), _digits.to_lists(result))
    console.print(
        f"Results: {output}.*, {result['wall_seconds']:.0f} s in all", highlight=False
    )
    return 0


if __name__ == "__main__":
    _digits.define_flags()
    app.run(main)

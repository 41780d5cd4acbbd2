r"""LDAM-DRW against cross-entropy on digits of which some are a hundred times rarer.

    python -m benchmarks.claims.long_tail            # five seeds, about a minute
    python -m benchmarks.claims.long_tail --short    # seconds: does everything work?

The claim (1906.07413): margins that are larger for rare classes, and weights that
balance the classes in the last fifth of training, lift the accuracy on rare classes
over that of cross-entropy.

Class sizes fall geometrically from 100 to 1; which digit is how rare, and which of its
images are trained on, differs from seed to seed. All other images are the test set. One
network, optimizer and number of steps serve all methods, and images move by up to a
pixel; LDAM and one control have cosines for logits, as the paper has it. Each method
has the learning rate that is best for it, by the mean accuracy over classes, on as many
seeds that are not reported.
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
from collections.abc import Callable
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

# Images of each class to train on, commonest first.
COUNTS = np.round(100 * 100.0 ** (-np.arange(10) / 9)).astype(int)
GROUPS = {"head": slice(0, 4), "middle": slice(4, 7), "tail": slice(7, 10)}
LEARNING_RATES = (0.01, 0.03, 0.1, 0.3)
_TUNING = 1000  # the first of the seeds that only choose learning rates
_BATCH = 50
_WIDTH = 128
_EVALUATIONS = 20
_SWITCH = 0.8  # of all epochs: the learning rate falls, and the weights set in
_DECAY = 2e-4

Loss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Method(NamedTuple):
    """A loss of (logits, labels, counts), what it reads, and when weights set in."""

    label: str
    loss: Loss
    cosine: bool = False
    reweight: bool = False


def _cross_entropy(logits, labels, counts):
    del counts
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)


_no_margin = functools.partial(ox.losses.ldam_loss, max_margin=0.0)
_adjusted = functools.partial(ox.losses.vector_scaling_loss, gamma=0.0)
METHODS = {
    "cross_entropy": Method("cross-entropy", _cross_entropy),
    "cross_entropy_cosine": Method("cross-entropy of cosines", _no_margin, cosine=True),
    "cross_entropy_drw": Method("cross-entropy, DRW", _cross_entropy, reweight=True),
    "ldam": Method("LDAM", ox.losses.ldam_loss, cosine=True),
    "ldam_drw": Method("LDAM-DRW", ox.losses.ldam_loss, cosine=True, reweight=True),
    "logit_adjustment": Method("logit adjustment", _adjusted),
    "vector_scaling": Method("vector scaling", ox.losses.vector_scaling_loss),
}
CONTROL, TREATED = "cross_entropy", "ldam_drw"


class Split(NamedTuple):
    """Which digit is how rare, which images are trained on, and in which order.

    Attributes:
      classes: the digits [10], from the commonest to the rarest.
      counts: training images of each digit [10].
      index: the training images.
      params: where the network starts.
      rows: training images by step [epochs, steps, batch].
      moves: how they are shifted, of the same shape.
    """

    classes: np.ndarray
    counts: np.ndarray
    index: np.ndarray
    params: _digits.Params
    rows: np.ndarray
    moves: np.ndarray


def split(seed: int, epochs: int) -> Split:
    """A long tail of its own for every seed."""
    random = np.random.default_rng(seed)
    labels, classes = _digits.load().labels, random.permutation(10)
    chosen = [
        random.permutation(np.flatnonzero(labels == digit))[:count]
        for digit, count in zip(classes, COUNTS, strict=True)
    ]
    counts = np.empty(10, np.int32)
    counts[classes] = COUNTS
    index = np.concatenate(chosen)
    rows = _digits.batches(random, index, _BATCH, epochs)
    moves = random.integers(0, len(_digits.shifted()), rows.shape, np.int32)
    params = _digits.init_network(random, _WIDTH, features=64)
    return Split(classes, counts, index, params, rows, moves)


def accuracies(data: Split, learning_rate: jax.Array, *, method: str) -> jax.Array:
    """Test accuracy of each class, commonest first, during training: [times, 10]."""
    recipe, digits = METHODS[method], _digits.load()
    images, labels = jnp.asarray(digits.images), jnp.asarray(digits.labels)
    moved = jnp.asarray(_digits.shifted())
    test = jnp.ones(len(labels)).at[data.index].set(0)
    members = test * (labels == jnp.asarray(data.classes)[:, None])
    epochs, steps, _ = data.rows.shape
    weights_at = ox.losses.deferred_reweighting(
        data.counts, start_step=round(_SWITCH * epochs)
    )
    schedule = optax.piecewise_constant_schedule(
        1.0, {round(at * epochs) * steps: 0.01 for at in (_SWITCH, 0.9)}
    )
    tx = optax.chain(
        optax.add_decayed_weights(_DECAY),
        optax.trace(0.9),
        optax.scale_by_schedule(schedule),
    )

    def loss_fn(params, batch, epoch):
        move, index = batch
        y = labels[index]
        logits = _digits.network(params, moved[move, index], recipe.cosine)
        weights = weights_at(epoch)[y] if recipe.reweight else jnp.ones(len(y))
        losses = recipe.loss(logits, y, data.counts)
        return jnp.sum(weights * losses) / jnp.sum(weights)

    def step(carry, batch):
        params, state, epoch = carry
        grads = jax.grad(loss_fn)(params, batch, epoch)
        updates, state = tx.update(grads, state, params)
        params = optax.tree.add_scale(params, -learning_rate, updates)
        return (params, state, epoch), None

    def one_epoch(carry, inputs):
        epoch, batches = inputs
        carry, _ = jax.lax.scan(step, (*carry, epoch), batches)
        return carry[:2], None

    def part(carry, inputs):
        carry, _ = jax.lax.scan(one_epoch, carry, inputs)
        found = jnp.argmax(_digits.network(carry[0], images, recipe.cosine), -1)
        right = (found == labels).astype(members.dtype)
        return carry, members @ right / jnp.sum(members, 1)

    parts = min(_EVALUATIONS, epochs)
    inputs = (jnp.arange(epochs), (data.moves, data.rows))
    inputs = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), inputs)
    params = jax.tree.map(jnp.asarray, data.params)
    _, curve = jax.lax.scan(part, (params, tx.init(params)), inputs)
    return curve


def run(method: str, seeds: range, epochs: int) -> dict[str, Any]:
    """Tunes a method on other seeds, and trains it: accuracies [seeds, times, 10]."""
    of_seeds = jax.jit(
        jax.vmap(functools.partial(accuracies, method=method), (0, None))
    )

    def train(seeds: range, rate: float) -> np.ndarray:
        splits = _digits.stack([split(seed, epochs) for seed in seeds])
        return np.asarray(of_seeds(splits, rate), np.float64)

    tuning = range(_TUNING, _TUNING + len(seeds))
    tuned = {rate: float(train(tuning, rate)[:, -1].mean()) for rate in LEARNING_RATES}
    best = max(tuned, key=lambda rate: tuned[rate])
    curve = train(seeds, best)
    groups = {name: curve[..., part].mean(-1) for name, part in GROUPS.items()}
    return {
        "learning_rate": best,
        "tuning": {f"{rate:g}": accuracy for rate, accuracy in tuned.items()},
        "classes": curve[:, -1],
        "curves": {**groups, "mean": curve.mean(-1)},
    }


def judge(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What every method does to rare classes and to the mean, against cross-entropy."""

    def against(control: str, method: str, part: str) -> dict[str, Any]:
        ours, theirs = (runs[n]["curves"][part][:, -1] for n in (method, control))
        return _digits.judge(ours - theirs)

    return {
        method: {part: against(CONTROL, method, part) for part in ("tail", "mean")}
        for method in runs
        if method != CONTROL
    }


def print_results(console, runs: dict[str, Any], judged: dict[str, Any]) -> None:
    rows = []
    for name, found in runs.items():
        last = {part: curve[:, -1] for part, curve in found["curves"].items()}
        cells = [_digits.percent(last[part]) for part in (*GROUPS, "mean")]
        rows.append((METHODS[name].label, f"{found['learning_rate']:g}", *cells))
    sizes = [
        f"{name}: {COUNTS[part][0]} to {COUNTS[part][-1]} images"
        for name, part in GROUPS.items()
    ]
    columns = ["", "learning rate", *sizes, "mean over classes"]
    title = "Test accuracy in percent: mean over seeds, least and greatest"
    _report.print_table(console, title, columns, rows)
    for name, parts in judged.items():
        for part, words in (("tail", "on the tail"), ("mean", "over all classes")):
            console.print(
                f"{METHODS[name].label} - cross-entropy {words}: "
                f"{_digits.points(parts[part])}",
                highlight=False,
            )


def plot(path: pathlib.Path, runs: dict[str, Any], title: str) -> None:
    """Accuracy by class, that of the tail while training, and differences by seed."""
    figure = matplotlib.figure.Figure(figsize=(16, 5.2), layout="constrained")
    by_class, training, paired = figure.subplots(1, 3)
    ranks = np.arange(10)
    for at, (name, found) in enumerate(runs.items()):
        bold = name in (CONTROL, TREATED)
        style: dict[str, Any] = {"color": f"C{at}", "label": METHODS[name].label}
        style |= {"lw": 2.2, "zorder": 3} if bold else {"lw": 1.1, "ls": "--"}
        by_class.plot(ranks, 100 * found["classes"].mean(0), **style)
        tail = 100 * found["curves"]["tail"]
        share = 100 * np.arange(1, tail.shape[1] + 1) / tail.shape[1]
        training.plot(share, tail.mean(0), **style)
        gain = tail[:, -1] - 100 * runs[CONTROL]["curves"]["tail"][:, -1]
        paired.barh(at, gain.mean(), color=f"C{at}", alpha=0.35)
        paired.plot(gain, np.full(len(gain), at), "o", ms=5, color=f"C{at}")
    by_class.set(
        title="At the end, by class",
        xlabel="training images of the class",
        ylabel="test accuracy, %",
        xticks=ranks,
        xticklabels=COUNTS,
    )
    training.axvline(100 * _SWITCH, color="0.6", lw=0.8, ls=":")
    note = "rate falls,\nweights set in "
    training.text(100 * _SWITCH - 1, 2, note, ha="right", color="0.4", fontsize=9)
    training.set(
        title="The three rarest classes, while training",
        xlabel="epochs, %",
        ylabel="test accuracy, %",
    )
    paired.axvline(0, color="0.3", lw=0.8)
    paired.set(
        title="The three rarest classes: each seed, and the mean",
        xlabel="difference to cross-entropy on the same seed, points",
        yticks=range(len(runs)),
        yticklabels=[METHODS[name].label for name in runs],
    )
    paired.invert_yaxis()
    by_class.legend(frameon=False, fontsize=9, loc="lower left")
    for axes in (by_class, training, paired):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(argv: list[str]) -> int:
    if argv[1:]:
        raise app.UsageError(f"unexpected arguments: {shlex.join(argv[1:])}")
    settings = _digits.settings(epochs=(200, 20))
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
    claimed = judged[TREATED]["tail"]
    console.print(
        "Claim, LDAM-DRW lifts the accuracy of rare classes over cross-entropy: "
        f"{_digits.verdict(claimed)}, {_digits.points(claimed)}.",
        highlight=False,
    )
    output = pathlib.Path(settings["output"], "long_tail")
    plot(
        output.with_suffix(".png"),
        runs,
        f"Digits with class sizes from 100 to 1: lines are means of {len(seeds)} seeds",
    )
    result = {
        "command": shlex.join(
            ["python", "-m", "benchmarks.claims.long_tail", *sys.argv[1:]]
        ),
        "wall_seconds": time.perf_counter() - started,
        "processor_seconds": time.process_time(),
        **environment,
        "data": _digits.facts(),
        "settings": {**settings, "counts": COUNTS, "learning_rates": LEARNING_RATES},
        "seeds": list(seeds),
        "claim": {"treated": TREATED, "control": CONTROL, **claimed},
        "methods": runs,
        "against_cross_entropy": judged,
    }
    _report.write_json(output.with_suffix(".json"), _digits.to_lists(result))
    console.print(
        f"Results: {output}.*, {result['wall_seconds']:.0f} s in all", highlight=False
    )
    return 0


if __name__ == "__main__":
    _digits.define_flags()
    app.run(main)

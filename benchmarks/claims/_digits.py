"""Handwritten digits, a small network for them, and how a claim is judged."""

# Arrays, trees and flax models, which the types of jax and optax leave open.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportReturnType=false, reportOptionalMemberAccess=false

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.axes
import numpy as np
from absl import flags

CLASSES = 10
Params = dict[str, Any]

# Quantiles 0.975 of Student's t for 1 to 9 degrees of freedom, then the normal's.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Digits(NamedTuple):
    """Scikit-learn's 1797 images of 8 x 8 pixels.

    Attributes:
      images: float32 [1797, 64], from 0 to 1.
      labels: int32 [1797], 0 to 9.
    """

    images: np.ndarray
    labels: np.ndarray


@functools.cache
def load() -> Digits:
    """The data, which comes with the package."""
    import sklearn.datasets

    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    return Digits(images.astype(np.float32) / 16, labels.astype(np.int32))


@functools.cache
def shifted() -> np.ndarray:
    """Every image moved by up to one pixel in each direction: float32 [9, 1797, 64]."""
    padded = np.pad(load().images.reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1)))
    moves = [padded[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    return np.stack(moves).reshape(9, -1, 64)


def facts() -> dict[str, Any]:
    """What the data is, for the results file."""
    import sklearn

    return {
        "source": f"sklearn.datasets.load_digits of scikit-learn {sklearn.__version__}",
        "images": len(load().labels),
        "examples_a_class": np.bincount(load().labels).tolist(),
    }


def init_network(random: np.random.Generator, width: int, features: int) -> Params:
    """A perceptron with two hidden layers, whose last one gives the features.

    Drawn outside of jit, as everything random is here: compiled generators would take
    longer to compile than the networks take to train.
    """
    sizes = (64, width, features, CLASSES)
    params = {}
    for at, (m, n) in enumerate(itertools.pairwise(sizes)):
        kernel = random.normal(0, math.sqrt(2 / m), (m, n))
        params[f"kernel{at}"] = kernel.astype(np.float32)
        params[f"bias{at}"] = np.zeros(n, np.float32)
    return params


def network(params: Params, images: jax.Array, cosine: bool = False) -> jax.Array:
    """Logits [..., 10]; with `cosine`, those of features and class vectors."""
    x = images
    for at in (0, 1):
        x = jax.nn.relu(x @ params[f"kernel{at}"] + params[f"bias{at}"])
    head = params["kernel2"]
    if not cosine:
        return x @ head + params["bias2"]
    return (x / _length(x, -1)) @ (head / _length(head, 0))


def _length(x: jax.Array, axis: int) -> jax.Array:
    return jnp.sqrt(jnp.sum(x**2, axis, keepdims=True) + 1e-12)


def batches(
    random: np.random.Generator, index: np.ndarray, batch: int, epochs: int
) -> np.ndarray:
    """Elements of `index` in a new order every epoch: [epochs, steps, batch]."""
    steps = len(index) // batch
    orders = [random.permutation(index)[: steps * batch] for _ in range(epochs)]
    return np.stack(orders).reshape(epochs, steps, batch).astype(np.int32)


def stack(trees: list[Any]) -> Any:
    """One tree of all seeds, stacked along a new first axis."""
    return jax.tree.map(lambda *x: np.stack(x), *trees)


def judge(differences: np.ndarray) -> dict[str, Any]:
    """Mean of paired differences and its 95% interval; shown if that is above 0."""
    n = len(differences)
    mean = float(np.mean(differences))
    half = math.inf
    if n > 1:
        t = _T[n - 2] if n - 2 < len(_T) else 1.96
        half = t * float(np.std(differences, ddof=1)) / math.sqrt(n)
    return {
        "differences": np.asarray(differences).tolist(),
        "mean": mean,
        "interval": [mean - half, mean + half],
        "shown": bool(mean - half > 0),
    }


def points(judged: dict[str, Any]) -> str:
    """Differences of accuracies in words."""
    low, high = judged["interval"]
    text = f"{100 * judged['mean']:+.1f} points"
    if math.isfinite(low):
        text += f" (95% interval {100 * low:+.1f} to {100 * high:+.1f})"
    return text


def verdict(judged: dict[str, Any]) -> str:
    """Whether a difference that a paper claims is there."""
    _, high = judged["interval"]
    opposite = "refuted" if high < 0 else "not shown"
    return "shown" if judged["shown"] else opposite


def percent(values: np.ndarray) -> str:
    """Mean and range of accuracies over seeds."""
    values = 100 * np.asarray(values)
    return f"{values.mean():.1f} ({values.min():.1f}, {values.max():.1f})"


def define_flags() -> None:
    """The flags of a claim."""
    flags.DEFINE_integer("seeds", 5, "Number of seeds.", lower_bound=1)
    flags.DEFINE_boolean("short", False, "Small numbers: does everything work?")
    flags.DEFINE_string("output", "benchmarks/results/claims", "Folder of the results.")


def settings(epochs: tuple[int, int]) -> dict[str, Any]:
    """Settings from the flags; ``--short`` has fewer epochs, and seeds if not given."""
    given, short = flags.FLAGS, flags.FLAGS["short"].value
    few = short and not given["seeds"].present
    return {
        "seeds": 2 if few else given["seeds"].value,
        "epochs": epochs[short],
        "short": short,
        "output": given["output"].value,
    }


def to_lists(tree: Any) -> Any:
    """Arrays as lists, for JSON."""
    return jax.tree.map(lambda x: x.tolist() if hasattr(x, "tolist") else x, tree)


def curve(axes: matplotlib.axes.Axes, x: Any, values: np.ndarray, **style: Any) -> None:
    """The mean over seeds of accuracies, in percent, with the range as a band."""
    values = 100 * values
    (line,) = axes.plot(x, values.mean(0), lw=1.8, **style)
    low, high = values.min(0), values.max(0)
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, lw=0)

"""Real text, and the same small byte model in three forms."""

import pathlib
import sysconfig
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

WINDOW, CLASSES, WIDTH, HIDDEN = 8, 128, 16, 64


@pytest.fixture(autouse=True)
def _strict(strict):
    """No implicit promotion of dtypes or ranks."""


class Text(NamedTuple):
    """Windows of bytes and the byte after each.

    Attributes:
      train: windows [n, WINDOW] and next bytes [n].
      held: the same, 4096 windows that are not in `train`.
      unigram: entropy of the next byte without its window, in nats.
    """

    train: tuple[np.ndarray, np.ndarray]
    held: tuple[np.ndarray, np.ndarray]
    unigram: float

    def batches(self, steps: int, size: int = 64, seed: int = 1):
        rng = np.random.default_rng(seed)
        x, y = self.train
        for _ in range(steps):
            chosen = rng.integers(len(y), size=size)
            yield jnp.asarray(x[chosen]), jnp.asarray(y[chosen])


@pytest.fixture(scope="session")
def text() -> Text:
    """A module of the standard library, as the bytes it is made of."""
    path = pathlib.Path(sysconfig.get_paths()["stdlib"]) / "argparse.py"
    data = np.frombuffer(path.read_bytes(), np.uint8).clip(0, CLASSES - 1)
    data = data.astype(np.int32)
    x = np.lib.stride_tricks.sliding_window_view(data, WINDOW)[:-1]
    y = data[WINDOW:]
    order = np.random.default_rng(0).permutation(len(y))
    held, train = order[:4096], order[4096:]
    p = np.bincount(y, minlength=CLASSES) / len(y)
    entropy = -np.sum(p * np.log(p, where=p > 0, out=np.zeros_like(p)))
    return Text((x[train], y[train]), (x[held], y[held]), float(entropy))


class LinenBytes(linen.Module):
    """Embedding of a window, one hidden layer, logits of the next byte."""

    @linen.compact
    def __call__(self, x):
        h = linen.Embed(CLASSES, WIDTH)(x).reshape(x.shape[0], -1)
        h = linen.relu(linen.Dense(HIDDEN)(h))
        return linen.Dense(CLASSES)(h)


class NnxBytes(nnx.Module):
    """The same with batch statistics and dropout: variables beside parameters."""

    def __init__(self, rngs: nnx.Rngs, dropout: float = 0.1):
        self.embed = nnx.Embed(CLASSES, WIDTH, rngs=rngs)
        self.hidden = nnx.Linear(WINDOW * WIDTH, HIDDEN, rngs=rngs)
        self.norm = nnx.BatchNorm(HIDDEN, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.out = nnx.Linear(HIDDEN, CLASSES, rngs=rngs)

    def __call__(self, x):
        h = self.hidden(self.embed(x).reshape(x.shape[0], -1))
        return self.out(self.dropout(nnx.relu(self.norm(h))))


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, y))


@pytest.fixture(scope="session")
def linen_bytes() -> Any:
    """The linen model."""
    return LinenBytes()


@pytest.fixture
def nnx_bytes() -> NnxBytes:
    """A fresh nnx model."""
    return NnxBytes(nnx.Rngs(0))

"""Real text with nothing to download: the source of Python's own standard library."""

import hashlib
import os
import pathlib
import sysconfig
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

# Some distributions ship Python without these folders, or with other contents.
_NOT_EVERYWHERE = frozenset(
    "distutils dist-packages ensurepip idlelib lib2to3 site-packages test tests "
    "tkinter turtledemo".split()
)
_MADE_BY_THE_BUILD = ("_sysconfigdata", "sitecustomize", "usercustomize")


class Corpus(NamedTuple):
    """A text in bytes, split by files.

    Attributes:
      train: uint8 array of the training files, one after the other.
      validation: the same of the validation files.
      facts: files, bytes and SHA-256 of both parts together.
    """

    train: np.ndarray
    validation: np.ndarray
    facts: dict[str, Any]

    @classmethod
    def of_standard_library(cls, folder: str | None = None) -> "Corpus":
        """Reads every ``*.py`` file below `folder`, this Python's library by default.

        One file in ten is for validation. Its relative path decides, so that a file
        that is missing elsewhere moves no other file across the split.
        """
        root = pathlib.Path(folder or sysconfig.get_paths()["stdlib"])
        parts: tuple[list[bytes], list[bytes]] = [], []
        for path in sorted(_source_files(root)):
            held_out = zlib.crc32(path.encode()) % 10 == 0
            parts[held_out].append((root / path).read_bytes())
        train, validation = map(b"".join, parts)
        return cls(
            np.frombuffer(train, np.uint8),
            np.frombuffer(validation, np.uint8),
            {
                "source": "standard library of this Python, *.py",
                "train_files": len(parts[0]),
                "train_bytes": len(train),
                "validation_files": len(parts[1]),
                "validation_bytes": len(validation),
                "sha256": hashlib.sha256(train + validation).hexdigest(),
            },
        )

    def train_starts(
        self, seed: int, steps: int, batch: int, length: int
    ) -> np.ndarray:
        """Where the windows of each step begin: int32 [steps, batch], given by seed."""
        random = np.random.default_rng(seed)
        last = len(self.train) - length
        return random.integers(last, size=(steps, batch), dtype=np.int32)

    def validation_windows(self, count: int, length: int) -> np.ndarray:
        """`count` windows of `length` + 1 bytes, evenly spread: uint8."""
        last = len(self.validation) - length - 1
        starts = np.linspace(0, last, count, dtype=np.int64)
        return self.validation[starts[:, None] + np.arange(length + 1)]


def windows(text: jax.Array, starts: jax.Array, length: int) -> jax.Array:
    """The windows of `length` + 1 bytes that begin at `starts`: uint8 [batch, ...]."""
    return jax.vmap(lambda at: jax.lax.dynamic_slice(text, (at,), (length + 1,)))(
        starts
    )


def _source_files(root: pathlib.Path) -> Iterator[str]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = set(subfolders) - _NOT_EVERYWHERE
        for name in names:
            if name.endswith(".py") and not name.startswith(_MADE_BY_THE_BUILD):
                yield pathlib.Path(folder, name).relative_to(root).as_posix()

"""Every test of a loss runs under strict dtype and rank promotion."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_promotion() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def x64() -> Iterator[None]:
    """64-bit floats for one test; the configuration is restored behind it."""
    with jax.enable_x64(True):
        yield

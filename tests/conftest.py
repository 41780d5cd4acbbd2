"""Fixtures that every folder of tests may use."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture
def x64() -> Iterator[None]:
    """float64 arrays during one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def strict() -> Iterator[None]:
    """No implicit promotion of dtypes or ranks during one test."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield

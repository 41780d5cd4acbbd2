"""Fixtures that every folder of tests may use, and which tests belong together."""

import os
from collections.abc import Iterator

import jax
import pytest

# Programs this small run in microseconds; compiling them is what takes the time. The
# environment is for processes that tests start.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
jax.config.update("jax_disable_most_optimizations", True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``--dist loadgroup``: one process has all tests that share a costly fixture."""
    for item in items:
        if "/benchmarks/" in item.nodeid or "benchmark" in item.path.stem:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture
def optimized() -> Iterator[None]:
    """Programs as users compile them, during one test."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


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

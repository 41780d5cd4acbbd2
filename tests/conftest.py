"""Fixtures that every folder of tests may use, and which tests belong together."""

import gc
import os
import pathlib
import sys
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


_MAPS = pathlib.Path("/proc/self/maps")
_MOST_MAPS = 30_000  # Linux allows 65,530 a process, and XLA crashes at the next one
_CHECKED_EVERY = 25
_tests = 0


def pytest_runtest_teardown() -> None:
    """Let compiled programs go before they are too many: each takes several maps."""
    global _tests
    _tests += 1
    if _tests % _CHECKED_EVERY or not _MAPS.exists():
        return
    with _MAPS.open() as maps:
        if sum(1 for _ in maps) < _MOST_MAPS:
            return
    for name, module in list(sys.modules.items()):
        if name.startswith("tests."):  # what they remember holds programs
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
    jax.clear_caches()
    gc.collect()


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

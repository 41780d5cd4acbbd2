"""The whole suite runs under strict promotion, and compiles without optimising."""

from collections.abc import Iterator

import jax
import pytest

from tests.conformance.methods import Method


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``--dist loadgroup``: one process has all tests of a method, which share runs."""
    for item in items:
        callspec = getattr(item, "callspec", None)
        given = callspec.params if callspec else {}
        for role in ("method", "wrapper"):
            if isinstance(given.get(role), Method):  # items of all folders come by
                item.add_marker(pytest.mark.xdist_group(given[role].name))


@pytest.fixture(autouse=True)
def _conformance(strict: None) -> Iterator[None]:
    # Programs this small run in microseconds; compiling them is what takes the time.
    optimizing = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", optimizing)

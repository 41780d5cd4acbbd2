"""The whole suite runs under strict promotion, a method's tests in one process."""

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
def _conformance(strict: None) -> None:
    """Every test of this folder runs under strict promotion."""

"""Every test of this folder runs without implicit promotion."""

import pytest


@pytest.fixture(autouse=True)
def _strict(strict):
    """No implicit promotion of dtypes or ranks."""

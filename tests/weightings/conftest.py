"""Every test of a weighting runs under strict dtype and rank promotion."""

import pytest


@pytest.fixture(autouse=True)
def always_strict(strict: None) -> None:
    """Applies `strict` to the whole folder."""

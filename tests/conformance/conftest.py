"""The whole suite runs under strict promotion, and compiles without optimising."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def _conformance(strict: None) -> Iterator[None]:
    # Programs this small run in microseconds; compiling them is what takes the time.
    optimizing = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", optimizing)

"""What every benchmark says about itself: where it ran, and results that never tear."""

import importlib.metadata
import json
import math
import os
import pathlib
import platform
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import rich.box
import rich.console
import rich.table

_PACKAGES = ("optax_ext", "jax", "jaxlib", "optax", "flax", "numpy")


def environment() -> dict[str, Any]:
    """Versions and device of this process, for the head of a results file."""
    device = jax.devices()[0]
    return {
        "versions": {
            "python": platform.python_version(),
            **{package: _version(package) for package in _PACKAGES},
        },
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
            "system": platform.platform(),
            "load_average": load_average(),
        },
    }


def load_average() -> float | None:
    """Processes that wanted a core in the last minute: was the machine busy?"""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes `value` to `path` at once or not at all; NaN and infinity become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with unfinished.open("w") as file:
        json.dump(_finite(value), file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def console() -> rich.console.Console:
    """A console of the terminal's width, and of 120 columns where there is none."""
    return rich.console.Console(width=None if sys.stdout.isatty() else 120)


def print_table(
    console: rich.console.Console,
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
) -> None:
    """Prints a table whose first column is left-aligned text, the others numbers."""
    table = rich.table.Table(
        title=title, title_justify="left", box=rich.box.SIMPLE_HEAD
    )
    for at, column in enumerate(columns):
        table.add_column(column, justify="right" if at else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def where(results: dict[str, Any]) -> str:
    """The `environment` of a results file in a sentence."""
    versions, device = results["versions"], results["device"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{device['processor']}, {device['cores']} cores; {packages}."


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        # A checkout on PYTHONPATH has no metadata.
        return getattr(sys.modules.get(package), "__version__", None)


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":")[1].strip() for line in lines if "model name" in line)
    return next(names, platform.processor())

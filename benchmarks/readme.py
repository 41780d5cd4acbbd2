"""Write the README's tables from the catalogue and from the results.

    python -m benchmarks.readme

Each table stands between two markers, and is made of what a command left in
benchmarks/results. The tests check that the README is up to date.
"""

import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from absl import app

from benchmarks import _report
from optax_ext.__main__ import markdown_table, reused_table
from optax_ext._core.catalogue import entries

_ROOT = pathlib.Path(__file__).parents[1]
RESULTS = _ROOT / "benchmarks" / "results"
README = _ROOT / "README.md"


def tables() -> dict[str, str]:
    """Every table of the README by the name of its markers."""
    return {
        "methods": markdown_table(entries()),
        "reused": reused_table(),
        "quickstart": _quickstart(
            json.loads((RESULTS / "quickstart.json").read_text())
        ),
        "stored": _quickstart(
            json.loads((RESULTS / "quickstart_stored.json").read_text())
        ),
        "foundation": _foundation(
            json.loads((RESULTS / "foundation.json").read_text())
        ),
    }


def render(text: str) -> str:
    """The README with its tables made anew.

    Raises:
      ValueError: for a table without markers.
    """
    for name, table in tables().items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, found = re.subn(
            pattern, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.DOTALL
        )
        if found != 1:
            raise ValueError(f"README.md has {found} tables marked {name!r}, not one")
    return text


def _quickstart(results: dict[str, Any]) -> str:
    rows = []
    for row in results["table"]:
        loss = row["final_validation_loss"]
        steps, seconds = row["steps_to_adamw"], row["seconds_to_adamw"]
        rows.append(
            (
                f"`{row['optimizer']}`",
                f"{row['learning_rate']:g}",
                f"{loss['median']:.3f} ({loss['min']:.3f} to {loss['max']:.3f})",
                "-" if steps is None else f"{steps:.0f}",
                "-" if seconds is None else f"{seconds:.1f}",
                f"{row['ms_per_step']:.1f}",
                f"{row['compile_seconds']:.1f}",
                f"{row['state_bytes_per_parameter']:.2f}",
            )
        )
    columns = (
        "optimizer",
        "learning rate",
        "validation loss, nats a byte: median (range over seeds)",
        "steps to AdamW's",
        "seconds to it",
        "ms a step",
        "compile s",
        "state bytes a parameter",
    )
    settings, minutes = results["settings"], results["wall_seconds"] / 60
    head = (
        f"`{re.sub(' --output=[^ ]+', '', results['command'])}`, "
        f"{settings['steps']} steps each, {minutes:.0f} minutes in all. "
        f"{_report.where(results)}"
    )
    return f"{head}\n\n{_report.markdown(columns, rows)}"


def _foundation(results: dict[str, Any]) -> str:
    rows = [
        (name, "; ".join(f"{key} {value:.3g}" for key, value in row.items()))
        for name, row in results["rows"].items()
    ]
    return f"{_report.where(results)}\n\n{_report.markdown(('what', 'measured'), rows)}"


def main(argv: Sequence[str]) -> None:
    """Rewrite the README."""
    del argv
    README.write_text(render(README.read_text()))


if __name__ == "__main__":
    app.run(main)

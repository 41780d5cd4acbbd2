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
        "claims": _claims(RESULTS / "claims"),
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


def _points(judged: dict[str, Any]) -> str:
    """A paired difference of accuracies with its interval, in points."""
    low, high = judged["interval"]
    return f"{100 * judged['mean']:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"


def _of_long_tail(results: dict[str, Any]) -> str:
    found = results["against_cross_entropy"]["ldam_drw"]
    return (
        f"{_verdict(found['tail'])}: accuracy of the three rarest classes "
        f"{_points(found['tail'])}, of all {_points(found['mean'])}"
    )


def _of_noisy_labels(results: dict[str, Any]) -> str:
    found = results["judged"]
    return (
        f"{_verdict(found['end'])}: {_points(found['end'])} at the end; from its best "
        f"epoch on, cross-entropy loses {_points(found['lost_by_control'])}, "
        f"early-learning regularisation {_points(found['lost_by_treated'])}"
    )


def _of_preferences(results: dict[str, Any]) -> str:
    parts = []
    for line in results["claims"]:
        growth = [
            f"{100 * sum(line[m]['growth']) / len(line[m]['growth']):+.0f}%"
            for m in ("simpo", "dpo")
        ]
        parts.append(
            f"bias {line['bias']:g}: {line['claim']} ({growth[0]}, DPO {growth[1]})"
        )
    return "; ".join(parts)


def _of_diffusion(results: dict[str, Any]) -> str:
    parts = [
        f"{line['weighting']} over {line['control']}, {line['network']}-network: "
        f"{line['verdict']} ({100 * line['relative']:+.0f}%)"
        for line in results["claims"]
        if line["metric"] == "frechet"
    ]
    return "Frechet distance of samples: " + "; ".join(parts)


def _verdict(judged: dict[str, Any]) -> str:
    low, high = judged["interval"]
    return "shown" if low > 0 else "refuted" if high < 0 else "not shown"


_CLAIMS = {
    "long_tail": ("LDAM-DRW lifts rare classes over cross-entropy", _of_long_tail),
    "noisy_labels": (
        "early-learning regularisation keeps clean accuracy at 40% wrong labels",
        _of_noisy_labels,
    ),
    "preference_length": (
        "SimPO does not grow length where raters favour it",
        _of_preferences,
    ),
    "diffusion_weightings": (
        "each weighting makes better samples than its control",
        _of_diffusion,
    ),
}


def _claims(folder: pathlib.Path) -> str:
    rows = []
    for name, (claim, tell) in _CLAIMS.items():
        results = json.loads((folder / f"{name}.json").read_text())
        seeds = results.get("seeds") or results["settings"]["seeds"]
        count = len(seeds) if isinstance(seeds, list) else seeds
        link = f"[picture](benchmarks/results/claims/{name}.png)"
        rows.append((f"`{name}`", claim, tell(results), f"{count}, {link}"))
    columns = ("benchmarks.claims.", "claim", "what came out", "seeds")
    return _report.markdown(columns, rows)


def main(argv: Sequence[str]) -> None:
    """Rewrite the README."""
    del argv
    README.write_text(render(README.read_text()))


if __name__ == "__main__":
    app.run(main)

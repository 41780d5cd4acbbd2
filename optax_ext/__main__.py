"""The catalogue in the terminal: ``python -m optax_ext [words]``."""

import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence

from absl import app, flags

import optax_ext as ox
from optax_ext._core.catalogue import KINDS, Entry, entries
from optax_ext._core.reused import IN_OPTAX, Reused

_KIND = flags.DEFINE_enum("kind", None, KINDS, "Only methods of this kind.")
_MARKDOWN = flags.DEFINE_bool("markdown", False, "Print a Markdown table.")
_CITE = flags.DEFINE_bool("cite", False, "Print BibTeX of the methods found.")

_COLUMNS = ("name", "paper", "kind", "needs", "state per parameter", "compared with")


def search(words: Sequence[str], kind: str | None = None) -> list[Entry]:
    """Entries that contain every word, in any field, whatever its case."""

    def text(entry):
        make = entry.make
        return f"{entry.name} {entry.kind} {make.__module__} {make.__doc__}".lower()

    chosen = entries(kind) if kind else entries()
    return [e for e in chosen if all(w.lower() in text(e) for w in words)]


def _row(entry: Entry) -> tuple[str, ...]:
    needs = ", ".join(entry.needs) or ("-" if entry.kind == "helper" else "gradients")
    return (
        entry.name,
        entry.reference,
        entry.kind,
        needs,
        entry.state,
        entry.compared,
    )


def markdown_table(found: Iterable[Entry]) -> str:
    """The table of the README."""
    rows = [_COLUMNS, ("---",) * len(_COLUMNS)]
    for entry in found:
        name, _, *rest = _row(entry)
        link = f"[{entry.title}](https://arxiv.org/abs/{entry.arxiv})"
        rows.append((f"`{name}`", link if entry.arxiv else entry.title, *rest))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def search_optax(words: Sequence[str]) -> list[Reused]:
    """Methods that optax has, with every word in any field."""
    return [r for r in IN_OPTAX if all(w.lower() in " ".join(r).lower() for w in words)]


def reused_table() -> str:
    """The README's table of methods that optax has."""
    rows = [("method", "use", "what to know"), ("---",) * 3]
    for method, arxiv, use, note in IN_OPTAX:
        link = f"[{method}](https://arxiv.org/abs/{arxiv})"
        rows.append((link, f"`{use}`", note))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _terminal_table(found: Iterable[Entry], width: int) -> str:
    """Columns wrapped to the width of the terminal."""
    rows = [_COLUMNS, *map(_row, found)]
    shares = (0.2, 0.28, 0.1, 0.12, 0.12, 0.18)
    widths = [max(10, int(share * (width - 2 * len(shares)))) for share in shares]
    lines = []
    for row in rows:
        cells = [
            textwrap.wrap(cell, w, break_long_words=True)
            for cell, w in zip(row, widths, strict=True)
        ]
        for i in range(max(map(len, cells))):
            line = [
                (cell[i] if i < len(cell) else "").ljust(w)
                for cell, w in zip(cells, widths, strict=True)
            ]
            lines.append("  ".join(line).rstrip())
        lines.append("-" * width if row is _COLUMNS else "")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Search the catalogue and print what was found."""
    found = search(argv[1:], _KIND.value)
    in_optax = [] if _KIND.value else search_optax(argv[1:])
    if not found and not in_optax:
        sys.exit(f"Nothing in the catalogue matches {' '.join(argv[1:])!r}.")
    if _CITE.value:
        print(ox.cite(*(entry.name for entry in found)))
    elif _MARKDOWN.value:
        print(markdown_table(found))
    else:
        print(_terminal_table(found, shutil.get_terminal_size((120, 24)).columns))
        print(f"{len(found)} of {len(list(entries()))} methods")
        for method, arxiv, use, note in in_optax:
            print(
                textwrap.fill(f"{method}, arXiv:{arxiv}: optax has it, {use}; {note}")
            )


if __name__ == "__main__":
    app.run(main)

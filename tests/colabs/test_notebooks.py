"""Notebooks run from top to bottom, and what is committed came from such a run.

They run in the short mode (environment variable ``OPTAX_EXT_SHORT``): all of their
code, few steps. One run takes about 35 s of one core.
"""

import pathlib
from typing import Any

import nbclient
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "colabs"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: pathlib.Path) -> Any:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def kinds(cell: Any) -> set[str]:
    """What a cell shows: names of streams, MIME types of pictures and values."""
    shown: set[str] = set()
    for output in cell.outputs:
        shown |= {output.name} if "name" in output else set(output.data)
    return shown


def stdout(notebook: Any) -> str:
    return "".join(o.text for o in outputs(notebook) if o.get("name") == "stdout")


def test_there_are_notebooks():
    assert NOTEBOOKS


@each_notebook
def test_a_run_in_short_mode_shows_what_the_committed_notebook_shows(
    path, tmp_path, monkeypatch
):
    monkeypatch.setenv("OPTAX_EXT_SHORT", "1")
    before, committed, fresh = path.read_bytes(), read(path), read(path)
    # Raises where a cell does; starts by clearing the outputs of each cell.
    nbclient.NotebookClient(
        fresh,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    assert "short run" in stdout(fresh)
    for ours, theirs in zip(code_cells(committed), code_cells(fresh), strict=True):
        assert kinds(ours) == kinds(theirs) - {"stderr"}, ours.source
    assert path.read_bytes() == before


@each_notebook
def test_a_committed_notebook_comes_from_one_full_run_without_errors(path):
    notebook = read(path)
    cells = code_cells(notebook)
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    assert all(output.output_type != "error" for output in outputs(notebook))
    assert "full run" in stdout(notebook)


@each_notebook
def test_a_committed_notebook_shows_neither_warnings_nor_local_paths(path):
    for output in outputs(read(path)):
        assert output.get("name") != "stderr", output.text
        text = output.get("text") or output.get("data", {}).get("text/plain", "")
        assert not any(root in text for root in ("/home/", "/root/", "/tmp/", ".py:"))


@each_notebook
def test_a_committed_notebook_is_valid_and_small(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert path.stat().st_size < 400_000

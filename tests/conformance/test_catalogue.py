"""What the catalogue says of a method, and its documentation."""

import inspect
import re

import pytest

from optax_ext._core import catalogue
from tests.test_goldens import NAMES

ENTRIES = pytest.mark.parametrize("entry", [*catalogue.entries()], ids=lambda e: e.name)


@ENTRIES
def test_the_method_is_public_under_its_name(entry):
    assert NAMES.get(entry.name) is entry.make


@ENTRIES
def test_the_docstring_has_every_section(entry):
    text = inspect.getdoc(entry.make) or ""
    sections = ["Args:", "Returns:", "Example:", "References:"]
    lines = ["*Variant*: ", "*Compared with*: ", "*State per parameter*: "]
    absent = [part for part in (*sections, *lines) if part not in text]
    if not inspect.signature(entry.make).parameters:
        absent.remove("Args:")
    assert not absent, f"{entry.name}: no {', '.join(absent)}"
    assert ">>> " in text, f"{entry.name}: the example is no doctest"
    assert re.search(r"^[A-Z`].*\.$", text.splitlines()[0]), "no summary line"


@ENTRIES
def test_every_argument_is_documented(entry):
    text = inspect.getdoc(entry.make) or ""
    for name in inspect.signature(entry.make).parameters:
        assert re.search(rf"^\s+\**{name}: ", text, re.M), f"{entry.name}: {name}"


@ENTRIES
def test_the_ledger_line_is_complete(entry):
    assert entry.title
    assert entry.variant
    assert entry.compared
    assert re.fullmatch(r"(\d{4}\.\d{4,5})?", entry.arxiv)
    inspect.signature(entry.make).bind(**entry.example())

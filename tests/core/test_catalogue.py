"""The ledger: entering, finding and citing methods."""

import dataclasses
import inspect
from typing import Any

import pytest

import optax_ext as ox
from optax_ext._core import catalogue
from optax_ext._core.catalogue import KINDS, catalogued, cite, entries, find


@pytest.fixture
def ledger(monkeypatch):
    """An empty catalogue for one test."""
    monkeypatch.setattr(catalogue, "_entries", {})


def enter(name, **changes: Any):
    def method():
        """One line.

        Args:
          none: at all.
        """

    method.__name__ = name
    fields: dict[str, Any] = {
        "title": "A Paper",
        "arxiv": "2401.00001",
        "kind": "link",
        "variant": "the plain one.",
        "compared": "closed form",
    }
    return catalogued(**(fields | changes))(method)


def test_the_docstring_gets_its_last_lines(ledger):
    method = enter("method", state="2 (moments)")
    assert method.__doc__ == inspect.cleandoc(
        """One line.

        Args:
          none: at all.

        *Variant*: the plain one.

        *Compared with*: closed form

        *State per parameter*: 2 (moments)

        References:
          A Paper, arXiv:2401.00001
        """
    )


def test_the_method_itself_is_returned(ledger):
    def method():
        """One line."""

    decorate = catalogued(title="T", kind="helper", variant="v", compared="c")
    assert decorate(method) is method
    assert find("method").make is method
    assert find(method) is find("method")


def test_a_name_cannot_be_entered_twice(ledger):
    first = enter("method")
    with pytest.raises(ValueError, match=r"^method is in the catalogue already$"):
        enter("method")
    assert find("method").make is first


def test_an_unknown_kind_is_refused_before_anything_is_entered(ledger):
    with pytest.raises(
        ValueError, match=r"^kind must be one of .*'link'.*, got 'lnk'$"
    ):
        enter("method", kind="lnk")
    assert not list(entries())


def test_entries_come_in_order_of_names_and_by_kind(ledger):
    for name, kind in (("c", "link"), ("a", "loss"), ("b", "link")):
        enter(name, kind=kind)
    assert [e.name for e in entries()] == ["a", "b", "c"]
    assert [e.name for e in entries("link")] == ["b", "c"]
    assert [e.name for e in entries("loss", "schedule")] == ["a"]


def test_near_names_are_suggested(ledger):
    enter("lion_k")
    enter("cautious")
    with pytest.raises(ValueError, match=r"^'loin_k' is not in.*did you mean lion_k\?"):
        find("loin_k")
    with pytest.raises(ValueError, match=r"^'zzz' is not in the catalogue$"):
        find("zzz")


def test_entries_cannot_be_changed(ledger):
    enter("method")
    with pytest.raises(dataclasses.FrozenInstanceError):
        find("method").title = "Another Paper"  # pyright: ignore


def test_each_paper_is_cited_once_and_in_the_order_of_the_arguments(ledger):
    enter("one", title="First Paper", arxiv="2401.00001")
    enter("two", title="Second Paper", arxiv="1905.12345")
    enter("three", title="First Paper", arxiv="2401.00001")
    assert cite("two", "one", "three") == (
        "@misc{arxiv_1905_12345,\n"
        "  title = {Second Paper},\n"
        "  year = {2019},\n"
        "  eprint = {1905.12345},\n"
        "  archivePrefix = {arXiv}\n"
        "}\n\n"
        "@misc{arxiv_2401_00001,\n"
        "  title = {First Paper},\n"
        "  year = {2024},\n"
        "  eprint = {2401.00001},\n"
        "  archivePrefix = {arXiv}\n"
        "}"
    )


def test_a_paper_outside_arxiv_is_cited_by_its_title(ledger):
    enter("method", title="A Method of the Old Days", arxiv="")
    assert cite("method") == (
        "@misc{a_method_of,\n  title = {A Method of the Old Days}\n}"
    )
    assert find("method").reference == "A Method of the Old Days"


def test_citing_what_is_not_there_says_so():
    with pytest.raises(ValueError, match="'scale_by_lion' is not in the catalogue; di"):
        cite("scale_by_lion")


def test_public_functions_can_be_cited_by_themselves():
    text = cite(ox.lion_k, ox.scale_by_lion_k, "sophia")
    assert text.count("@misc") == 2
    assert "2310.05898" in text and "2305.14342" in text


def test_examples_are_functions_that_name_arguments_of_the_method():
    # Functions, so that an import computes nothing.
    for entry in entries():
        assert entry.kind in KINDS
        inspect.signature(entry.make).bind_partial(**entry.example())

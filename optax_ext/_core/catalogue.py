"""The ledger: one decorator where a method is defined, and everything else follows.

`catalogued` records what a method is, where it comes from, what it needs, what it
costs and what it was compared with. The table in the README, ``python -m optax_ext``,
`cite`, the conformance tests and the cost benchmark read these records, so a method is
added by writing its module and nothing else. The decorator also completes the
docstring, so that the ledger and the documentation cannot drift apart.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

KINDS = (
    "link",  # scale_by_*, add_*: one step of a chain
    "wrapper",  # takes `inner` first
    "optimizer",  # a finished optimizer: takes learning_rate first
    "aggregator",  # takes gradients of single examples and emits their mean
    "estimator",  # estimates curvature for the links that use it
    "loss",
    "weighting",
    "schedule",
    "diagnostic",
    "helper",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the ledger.

    Attributes:
      name: public name.
      make: the public function.
      title: title of the paper.
      arxiv: its arXiv identifier, or "" where there is none.
      kind: one of `KINDS`.
      needs: what it takes beside gradients: "params", or names of extra arguments; for
        a loss, what it takes.
      state: state per parameter in words and floats, as the docstring says it.
      slots: the same as a number of parameter-sized trees, checked by the tests; None
        where it has no state of its own (wrappers, losses).
      variant: which of the published forms this is.
      compared: golden file or closed form it was compared with.
      example: keyword arguments of a small working call.
      terminal: whether it works on steps, with sign and learning rate inside, not on
        directions: a wrapper of finished optimizers, a link for the end of a chain.
      matrices: whether it takes nothing but matrices, shown to it by `as_matrices`.
    """

    name: str
    make: Callable[..., Any]
    title: str
    arxiv: str
    kind: str
    needs: tuple[str, ...]
    state: str
    slots: float | None
    variant: str
    compared: str
    example: Callable[[], Mapping[str, Any]]
    terminal: bool = False
    matrices: bool = False

    @property
    def reference(self) -> str:
        """Title and arXiv identifier on one line."""
        return f"{self.title}, arXiv:{self.arxiv}" if self.arxiv else self.title


_entries: dict[str, Entry] = {}
F = TypeVar("F", bound=Callable[..., Any])


def catalogued(
    *,
    title: str,
    kind: str,
    variant: str,
    compared: str,
    arxiv: str = "",
    needs: tuple[str, ...] = (),
    state: str = "none",
    slots: float | None = None,
    example: Callable[[], Mapping[str, Any]] = dict,
    terminal: bool = False,
    matrices: bool = False,
) -> Callable[[F], F]:
    """Enter a public method into the catalogue and complete its docstring.

    Args:
      title: title of the paper.
      kind: one of `KINDS`.
      variant: which of the published forms this is, in one sentence.
      compared: the golden files or closed forms it is compared with.
      arxiv: arXiv identifier.
      needs: "params" or extra arguments that `update` needs; inputs of a loss.
      state: state per parameter, in words.
      slots: the same as a number of parameter-sized trees, for links and optimizers.
      example: a function without arguments that returns keyword arguments of a small
        working call (a function, so that importing the package computes nothing).
      terminal: for wrappers of finished optimizers and links for the end of a chain.
      matrices: for links that take nothing but matrices.

    Returns:
      A decorator that returns the method unchanged but for its docstring.

    Raises:
      ValueError: for an unknown kind, or a name that is taken.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")

    def decorate(fn: F) -> F:
        name = fn.__name__
        if name in _entries:
            raise ValueError(f"{name} is in the catalogue already")
        _entries[name] = entry = Entry(
            name=name,
            make=fn,
            title=title,
            arxiv=arxiv,
            kind=kind,
            needs=needs,
            state=state,
            slots=slots,
            variant=variant,
            compared=compared,
            example=example,
            terminal=terminal,
            matrices=matrices,
        )
        fn.__doc__ = (
            f"{inspect.cleandoc(fn.__doc__ or '')}\n\n"
            f"*Variant*: {variant}\n\n"
            f"*Compared with*: {compared}\n\n"
            f"*State per parameter*: {state}\n\n"
            f"References:\n  {entry.reference}"
        )
        return fn

    return decorate


def entries(*kinds: str) -> Iterator[Entry]:
    """The catalogue in order of names, all of it or only some kinds."""
    for name in sorted(_entries):
        if not kinds or _entries[name].kind in kinds:
            yield _entries[name]


def find(method: str | Callable[..., Any]) -> Entry:
    """The entry of a method, given by name or as the function itself.

    Raises:
      ValueError: if it is not in the catalogue; similar names are suggested.
    """
    import difflib

    name = method if isinstance(method, str) else method.__name__
    if name not in _entries:
        near = difflib.get_close_matches(name, _entries, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"{name!r} is not in the catalogue{hint}")
    return _entries[name]


def cite(*methods: str | Callable[..., Any]) -> str:
    """BibTeX for the papers behind the given methods, each paper once.

    Args:
      *methods: names or functions of the package, for example ``"lion_k"`` or
        ``ox.cautious``.

    Returns:
      BibTeX entries, in the order of the arguments, separated by blank lines.

    Raises:
      ValueError: for a method that is not in the catalogue.

    Example:
      >>> import optax_ext as ox
      >>> print(ox.cite(ox.cautious).splitlines()[0])
      @misc{arxiv_2411_16085,
    """
    papers = dict.fromkeys((e.title, e.arxiv) for e in map(find, methods))
    return "\n\n".join(_bibtex(title, arxiv) for title, arxiv in papers)


def _bibtex(title: str, arxiv: str) -> str:
    if not arxiv:
        return (
            f"@misc{{{'_'.join(title.lower().split()[:3])},\n  title = {{{title}}}\n}}"
        )
    return (
        f"@misc{{arxiv_{arxiv.replace('.', '_')},\n"
        f"  title = {{{title}}},\n"
        f"  year = {{20{arxiv[:2]}}},\n"
        f"  eprint = {{{arxiv}}},\n"
        f"  archivePrefix = {{arXiv}}\n}}"
    )

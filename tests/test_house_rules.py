"""What the code must look like: short modules, short rules."""

import ast
import inspect
import pathlib
import statistics
import textwrap

import optax_ext
from optax_ext._core import catalogue

PACKAGE = pathlib.Path(optax_ext.__file__).parent


def rule_lines(make) -> int:
    """Lines in the bodies of the functions that a method defines inside."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(make)))
    method = tree.body[0]
    assert isinstance(method, ast.FunctionDef)
    inner = [node for node in method.body if isinstance(node, ast.FunctionDef)]
    return sum((f.end_lineno or 0) - f.body[0].lineno + 1 for f in inner)


def test_no_module_is_longer_than_400_lines():
    lengths = {
        path.relative_to(PACKAGE): len(path.read_text().splitlines())
        for path in PACKAGE.rglob("*.py")
    }
    assert {p: n for p, n in lengths.items() if n > 400} == {}


def test_the_median_rule_has_at_most_20_lines():
    kinds = ("link", "wrapper", "optimizer", "aggregator", "estimator")
    lengths = {e.name: rule_lines(e.make) for e in catalogue.entries(*kinds)}
    own = {name: n for name, n in lengths.items() if n}
    print(f"{len(own)} methods with a rule of their own, median", end=" ")
    print(
        statistics.median(own.values()), dict(sorted(own.items(), key=lambda x: x[1]))
    )
    assert statistics.median(own.values()) <= 20

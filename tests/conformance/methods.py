"""The methods of the catalogue as the conformance tests see them."""

import contextlib
import copy
import dataclasses
import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

import optax_ext as ox
from optax_ext._core import catalogue
from tests.conformance.problem import Inputs, Objective, extra, recorded

GRADIENT_KINDS = ("link", "wrapper", "optimizer")
ALL_KINDS = (*GRADIENT_KINDS, "estimator")


_GIVEN = ox.external_hessian_diag()


@dataclasses.dataclass(frozen=True)
class Method:
    """An entry of the catalogue.

    Attributes:
      entry: the entry.
      light: whether curvature is given from outside, not estimated; this compiles
        three times faster, for tests to which curvature does not matter.
    """

    entry: catalogue.Entry
    light: bool = False

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def arguments(self) -> dict[str, Any]:
        """The example of the catalogue."""
        given = {"estimator": _GIVEN} if self.light else {}
        return {**self.entry.example(), **given}

    @property
    def needs(self) -> tuple[str, ...]:
        if not self.light:
            return self.entry.needs
        return ("params", "hessian_diag")

    def is_random(self) -> bool:
        """Whether the method itself draws random numbers."""
        return "key" in self.parameters()

    def lightened(self) -> "Method":
        """The method with curvature from outside, if it has any."""
        return Method(self.entry, light="estimator" in self.parameters())

    @property
    def factory(self) -> Any:
        """The public function; matrices are shown to one that takes nothing else."""
        if not self.entry.matrices:
            return self.entry.make

        @functools.wraps(self.entry.make)
        def make(**arguments):
            return ox.as_matrices(self.entry.make(**arguments), optax.identity())

        return make

    def make(self, **changed: Any) -> optax.GradientTransformationExtraArgs:
        """The example of the catalogue, with some arguments changed."""
        arguments = {**self.arguments, **changed}
        return optax.with_extra_args_support(self.factory(**arguments))

    def bucketed(self) -> optax.GradientTransformationExtraArgs:
        """The example in buckets, which stand inside `as_matrices`."""
        if not self.entry.matrices:
            return ox.bucketed(self.make())
        inner = ox.bucketed(self.entry.make(**self.arguments))
        return ox.as_matrices(inner, optax.identity())

    def parameters(self) -> dict[str, inspect.Parameter]:
        """The arguments of `make`."""
        return dict(inspect.signature(self.entry.make).parameters)

    def floats(self) -> dict[str, float]:
        """The hyper-parameters that may be traced: those annotated as floats."""
        return {
            name: value
            for name, parameter in self.parameters().items()
            if "float" in str(parameter.annotation)
            and isinstance(value := self.arguments.get(name, parameter.default), float)
        }


def _core_wrapper(make: Any) -> catalogue.Entry:
    """An entry for a wrapper that is plumbing and not in the catalogue."""
    return catalogue.Entry(
        name=make.__name__,
        make=make,
        title="",
        arxiv="",
        kind="wrapper",
        needs=(),
        state="that of inner",
        slots=None,
        variant="",
        compared="",
        example=lambda: {"inner": ox.scale_by_lion_k()},
    )


CORE_WRAPPERS = [
    _core_wrapper(make) for make in (ox.bucketed, ox.full_precision, ox.stored)
]


def methods(*kinds: str) -> list[Method]:
    """The methods of some kinds, those that are no entry of the catalogue included."""
    entries = [*catalogue.entries(*kinds)]
    if "wrapper" in kinds:
        entries += [e for e in CORE_WRAPPERS if e not in entries]
    return [Method(e) for e in entries]


def each(*kinds: str, **where: bool) -> pytest.MarkDecorator:
    """Run a test for each method of some kinds, gradient methods by default."""
    chosen = [
        method
        for method in methods(*(kinds or GRADIENT_KINDS))
        if all(bool(getattr(method, name)()) is want for name, want in where.items())
    ]
    return pytest.mark.parametrize("method", chosen, ids=lambda m: m.name)


@contextlib.contextmanager
def about(method: Method, given: str) -> Iterator[None]:
    """Say in a failure which method it was, and what it was given."""
    try:
        yield
    except Exception as error:
        error.add_note(f"\nMETHOD {method.name}\nINPUT  {given}")
        raise


LOOPS = {"while", "scan", "cond"}


@dataclasses.dataclass
class Run:
    """A link, jitted or not, over recorded inputs.

    `jit` None compiles what has loops inside, which is compiled anyway, and nothing
    else: the operations of all other links are compiled once for all of them.
    """

    tx: optax.GradientTransformation
    problem: Objective
    needs: tuple[str, ...]
    jit: bool | None = True
    traces: int = 0
    states: list[Any] = dataclasses.field(default_factory=list)
    updates: list[Any] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        self.step = jax.jit(self.apply) if self.jit else self.apply

    def afresh(self) -> "Run":
        """The same compiled program, without its past."""
        other = copy.copy(self)
        other.states, other.updates = [], []
        return other

    def apply(self, state: Any, inputs: Inputs, **unknown: Any) -> tuple[Any, Any]:
        self.traces += 1
        arguments = {**extra(self.problem, inputs, self.needs), **unknown}
        update = optax.with_extra_args_support(self.tx).update
        return update(inputs.grads, state, inputs.params, **arguments)

    def over(self, sequence: Sequence[Inputs], state: Any = None) -> "Run":
        """Take one step an input, and keep what comes out."""
        state = self.tx.init(sequence[0].params) if state is None else state
        if self.jit is None:
            program = jax.make_jaxpr(self.apply)(state, sequence[0])
            self.jit = bool(LOOPS & primitives(program.jaxpr))
            self.step = jax.jit(self.apply) if self.jit else self.apply
        for inputs in sequence:
            updates, state = self.step(state, inputs)
            self.updates.append(updates)
            self.states.append(state)
        return self


def primitives(jaxpr: Any) -> set[str]:
    """Names of all primitives in a program and its parts."""
    names = set()
    for equation in jaxpr.eqns:
        names.add(equation.primitive.name)
        for part in jaxprs_in_params(equation.params):
            names |= primitives(part)
    return names


@functools.cache
def standard_run(method: Method, dtype: str = "float32") -> Run:
    """The jitted run of a method over the standard inputs."""
    problem, inputs = recorded(dtype)
    return Run(method.make(), problem, method.needs).over(inputs)


def spec(tree: Any) -> Any:
    """Structure, shapes, dtypes and weak types of a tree, comparable with ==."""
    leaves, treedef = jax.tree.flatten(tree)
    kinds = [(x.shape, x.dtype, bool(getattr(x, "weak_type", False))) for x in leaves]
    return treedef, kinds


def assert_equal(got: Any, want: Any) -> None:
    """Two trees are the same, bit by bit."""
    jax.tree.map(np.testing.assert_array_equal, got, want)


def assert_close(got: Any, want: Any, rtol: float) -> None:
    """Two trees agree, relative to the largest entry of each leaf."""

    def check(path, a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        atol = rtol * np.max(np.abs(b), initial=0.0)
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(
            a, b, rtol, atol, equal_nan=False, err_msg=f"leaf {where}"
        )

    jax.tree_util.tree_map_with_path(check, got, want)


def assert_no_nan(tree: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jax.numpy.issubdtype(leaf.dtype, jax.numpy.inexact):
            where = jax.tree_util.keystr(path)
            assert not np.isnan(np.asarray(leaf, np.float64)).any(), f"NaN in {where}"

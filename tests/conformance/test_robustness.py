"""Gradients at the edges of float32, trees of every kind, arguments left out."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from flax.core import FrozenDict

from optax_ext._core import catalogue
from tests.conformance.methods import (
    ALL_KINDS,
    Run,
    about,
    assert_no_nan,
    each,
    spec,
    standard_run,
)
from tests.conformance.problem import Inputs, Softmax, extra, record, recorded

SIZES = {"zero": 0.0, "huge": 1e30, "tiny": 1e-30}


@each()
@pytest.mark.parametrize("size", SIZES)
def test_finite_gradients_never_make_a_nan(method, size):
    method = method.lightened()
    _, inputs = recorded()

    def scaled(tree):
        return jax.tree.map(lambda g: jnp.sign(g) * SIZES[size], tree)

    gradients = ("grad", "per_example_grads", "aux_grads")
    extreme = [
        x._replace(
            arrays={k: scaled(v) if k in gradients else v for k, v in x.arrays.items()}
        )
        for x in inputs
    ]
    with about(method, f"gradients of {SIZES[size]}, three steps"):
        run = standard_run(method).afresh().over(extreme)
        assert_no_nan({"updates": run.updates, "states": run.states})


class Pair(NamedTuple):
    first: Any
    second: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Block:
    kernel: Any
    bias: Any


KERNEL, BIAS, NUMBER = jnp.ones((2, 3)) / 7, jnp.ones((3,)) / 5, jnp.float32(0.5)
TREES = {
    "bare array": KERNEL,
    "bare scalar": NUMBER,
    "empty dict": {},
    "size-0 leaf": {"none": jnp.zeros((0, 3)), "some": BIAS},
    "None leaf": {"none": None, "some": BIAS},
    "nested": {"a": [{"b": (KERNEL, BIAS)}, {}], "c": NUMBER},
    "FrozenDict": FrozenDict({"a": {"kernel": KERNEL, "bias": BIAS}}),
    "NamedTuple": Pair(KERNEL, Pair(BIAS, NUMBER)),
    "dataclass": {"block": Block(KERNEL, BIAS)},
    "nnx.State": nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param),
}


@functools.cache
def record_tree(name: str | None = None) -> tuple[Softmax, list[Inputs]]:
    """Two steps on one tree, or on all at once."""
    return record(TREES if name is None else TREES[name], steps=2)


@each(*ALL_KINDS)
@pytest.mark.parametrize("name", TREES)
def test_any_tree_comes_back_with_its_structure(method, name):
    problem, (inputs, _) = record_tree(name)
    with about(method, f"parameters: {name}"):
        run = Run(method.make(), problem, method.needs, jit=False)
        state = run.tx.init(inputs.params)
        updates, after = jax.eval_shape(run.apply, state, inputs)
        assert jax.tree.structure(updates) == jax.tree.structure(TREES[name])
        assert spec(after) == spec(state)


@each(*ALL_KINDS)
def test_all_these_trees_at_once_give_finite_numbers(method):
    method = method.lightened()
    problem, inputs = record_tree()
    with about(method, f"one tree of {list(TREES)}"):
        run = Run(method.make(), problem, method.needs, jit=None).over(inputs)
        assert_no_nan((run.updates, run.states))


@each(*ALL_KINDS)
def test_the_example_needs_what_the_catalogue_says(method):
    problem, (inputs, *_) = recorded()
    tx = method.make()
    given = {"params": inputs.params, **extra(problem, inputs, method.needs)}
    given = {name: given[name] for name in method.needs}

    def update(**arguments):
        params = arguments.pop("params", None)
        state = jax.eval_shape(tx.init, inputs.params)
        return jax.eval_shape(
            lambda g, s: tx.update(g, s, params, **arguments), inputs.grads, state
        )

    names = [entry.name for entry in catalogue.entries()]
    with about(method, f"exactly {method.needs}"):
        update(**given)
    for missing in method.needs:
        rest = {name: value for name, value in given.items() if name != missing}
        with about(method, f"{method.needs} without {missing}"):
            with pytest.raises(ValueError, match=missing) as raised:
                update(**rest)
            # A finished optimizer may name the link or estimator that it is made of.
            assert any(name in str(raised.value) for name in names)

"""Every wrapper around every link."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest

import optax_ext as ox
from tests.conformance.methods import (
    Method,
    Run,
    about,
    assert_close,
    assert_no_nan,
    each,
    methods,
    spec,
    standard_run,
)
from tests.conformance.problem import Inputs, Softmax, record, recorded, tree_like

SMALL = {"a": (4, 3), "b": (4, 3), "bias": (3,)}
PAIRS = list(itertools.product(methods("wrapper"), methods("link")))
PAIR_NAMES = [f"{wrapper.name}-{link.name}" for wrapper, link in PAIRS]


@functools.cache
def small(dtype: str) -> tuple[Softmax, list[Inputs]]:
    """A matrix, another one of its shape, and a vector: there are many pairs."""
    return record(tree_like(SMALL, dtype))


def wrapped(wrapper: Method, link: Method, dtype: str, *, jit: bool | None) -> Run:
    problem, _ = small(dtype)
    needs = tuple(dict.fromkeys((*wrapper.needs, *link.needs)))
    if wrapper.entry.make is ox.bucketed:
        return Run(link.bucketed(), problem, needs, jit)
    return Run(wrapper.make(inner=link.make()), problem, needs, jit)


@pytest.mark.parametrize(("wrapper", "link"), PAIRS, ids=PAIR_NAMES)
def test_every_wrapper_keeps_the_dtypes_of_every_link(wrapper, link):
    inputs = small("bfloat16")[1][0]
    with about(wrapper, f"around {link.name}, bfloat16 parameters"):
        run = wrapped(wrapper, link, "bfloat16", jit=False)
        state = jax.eval_shape(run.tx.init, inputs.params)
        updates, after = jax.eval_shape(run.apply, state, inputs)
        assert spec(updates) == spec(jax.eval_shape(lambda: inputs.grads))
        assert spec(after) == spec(state)
        for path, leaf in jax.tree_util.tree_leaves_with_path(after):
            if jnp.issubdtype(leaf.dtype, jnp.inexact):
                assert leaf.dtype == jnp.float32, jax.tree_util.keystr(path)


@pytest.mark.parametrize(("wrapper", "link"), PAIRS, ids=PAIR_NAMES)
def test_every_wrapper_runs_around_every_link(wrapper, link):
    link = link.lightened()
    with about(wrapper, f"around {link.name}, three steps"):
        run = wrapped(wrapper, link, "float32", jit=None).over(small("float32")[1])
        assert_no_nan((run.updates, run.states))


@each("link", "optimizer", is_random=False)
def test_buckets_change_nothing(method):
    """Curvature comes from outside: random numbers for a stack are other numbers."""
    method = method.lightened()
    problem, inputs = recorded()
    with about(method, "ox.bucketed"):
        run = Run(method.bucketed(), problem, method.needs).over(inputs)
        assert_close(run.updates, standard_run(method).updates, rtol=1e-5)


@each("link", "optimizer")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_precision_changes_nothing(method, dtype):
    """The methods of the package are in float32 already."""
    method = method.lightened()
    problem, inputs = recorded(dtype)
    with about(method, f"ox.full_precision, {dtype} parameters"):
        run = Run(ox.full_precision(method.make()), problem, method.needs, jit=None)
        got = run.over(inputs).updates
        assert_close(got, standard_run(method, dtype).updates, rtol=1e-5)

"""Dtypes: strict promotion, float32 moments, float64 that stays float64."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, jaxprs_in_params

from tests.conformance.methods import ALL_KINDS, Method, Run, about, each
from tests.conformance.problem import record, recorded, tree_like


@functools.cache
def abstract_step(method: Method, dtype: str):
    """Inputs, state, updates and next state of one step, as shapes and dtypes."""
    problem, (inputs, *_) = recorded(dtype)
    run = Run(method.make(), problem, method.needs, jit=False)
    state = jax.eval_shape(run.tx.init, inputs.params)
    return inputs, state, *jax.eval_shape(run.apply, state, inputs)


@each(*ALL_KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_runs_under_strict_promotion_of_dtypes_and_ranks(method, dtype):
    with about(method, f"{dtype} parameters"):
        abstract_step(method, dtype)  # promotion is decided while tracing


@each()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_updates_have_the_dtypes_and_shapes_of_the_gradients(method, dtype):
    with about(method, f"{dtype} parameters"):
        inputs, _, updates, _ = abstract_step(method, dtype)
        got = jax.tree.map(lambda x: (x.shape, x.dtype), updates)
        assert got == jax.tree.map(lambda x: (x.shape, x.dtype), inputs.grads)


@each("link", "optimizer", "estimator")  # the state of a wrapper is its inner link's
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_moments_of_16_bit_parameters_are_float32(method, dtype):
    with about(method, f"{dtype} parameters"):
        _, state, _, after = abstract_step(method, dtype)
        for path, leaf in jax.tree_util.tree_leaves_with_path((state, after)):
            if jnp.issubdtype(leaf.dtype, jnp.inexact):
                where = jax.tree_util.keystr(path)
                assert leaf.dtype == jnp.float32, f"{where} is {leaf.dtype}"


@each("estimator")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_estimates_are_float32(method, dtype):
    with about(method, f"{dtype} parameters"):
        inputs, _, estimate, _ = abstract_step(method, dtype)
        want = jax.tree.map(lambda x: (x.shape, np.dtype(np.float32)), inputs.params)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), estimate) == want


@each(*ALL_KINDS)
def test_float64_leaves_are_computed_in_float64(method):
    with jax.enable_x64(True), about(method, "float64 parameters"):
        problem, (inputs,) = record(tree_like({"w": (4, 3), "b": (3,)}, "float64"), 1)
        run = Run(method.make(), problem, method.needs, jit=False)
        program = jax.make_jaxpr(run.apply)(run.tx.init(inputs.params), inputs)
        narrow = narrow_arithmetic(program)
        assert not narrow, f"narrow arithmetic: {sorted(narrow)}"


def narrow_arithmetic(program: ClosedJaxpr) -> set[str]:
    """The equations of a program that compute floats below float64."""
    return {
        f"{equation.primitive} of {variable.aval.dtype}"
        for equation, variable in _results(program.jaxpr)
        if jnp.issubdtype(variable.aval.dtype, jnp.inexact)
        and jnp.finfo(variable.aval.dtype).bits < 64
    }


def _results(jaxpr: Any) -> Iterator[tuple[Any, Any]]:
    """All variables that the equations of a program and of its parts compute."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield equation, variable
        for part in jaxprs_in_params(equation.params):
            yield from _results(part)

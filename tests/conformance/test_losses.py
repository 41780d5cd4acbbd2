"""The same ideas for losses: pure functions of arrays."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_ext._core import catalogue
from tests.conformance.methods import assert_close, assert_equal
from tests.conformance.test_dtypes import narrow_arithmetic

MAPS = ("gradient_entanglement", "nested_dropout", "pairwise_normalized_gradient")
"""Maps of gradients or features, whose results have the dtype of what they take."""


def array_entries() -> list[catalogue.Entry]:
    """What takes arrays, among the losses."""
    return [
        e
        for e in catalogue.entries()
        if e.make.__module__.startswith("optax_ext.losses")
        and e.name not in MAPS
        and any(isinstance(x, jax.Array | np.ndarray) for x in e.example().values())
    ]


LOSSES = pytest.mark.parametrize("entry", array_entries(), ids=lambda e: e.name)
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])


def split(entry: catalogue.Entry, dtype: Any = jnp.float32) -> tuple[dict, dict]:
    """The arrays of the example, floats in a dtype, and its other arguments."""
    arrays, rest = {}, {}
    for name, value in entry.example().items():
        if not isinstance(value, jax.Array | np.ndarray):
            rest[name] = value
        elif jnp.issubdtype(value.dtype, jnp.floating):
            arrays[name] = jnp.asarray(value, dtype)
        else:
            arrays[name] = jnp.asarray(value)
    return arrays, rest


@LOSSES
def test_jit_changes_nothing(entry):
    arrays, rest = split(entry)
    plain = entry.make(**arrays, **rest)
    jitted = jax.jit(lambda arrays: entry.make(**arrays, **rest))(arrays)
    assert_close(jitted, plain, rtol=1e-6)


@LOSSES
def test_a_further_batch_axis_by_vmap_is_a_loop(entry):
    arrays, rest = split(entry)
    # The example, and the example with its rows in another order.
    other = {k: x[::-1] if x.ndim else x for k, x in arrays.items()}
    both = jax.tree.map(lambda *x: jnp.stack(x), arrays, other)
    mapped = jax.jit(jax.vmap(lambda arrays: entry.make(**arrays, **rest)))(both)
    for i, each in enumerate((arrays, other)):
        row = jax.tree.map(lambda x, i=i: x[i], mapped)
        assert_close(row, entry.make(**each, **rest), rtol=1e-6)


@LOSSES
@DTYPES
def test_results_are_float32_of_whatever_floats(entry, dtype):
    arrays, rest = split(entry, dtype)
    for leaf in jax.tree.leaves(entry.make(**arrays, **rest)):
        assert leaf.dtype == jnp.float32
        assert jnp.isfinite(leaf).all()


@LOSSES
@DTYPES
def test_gradients_are_finite_and_in_the_dtype_of_their_argument(entry, dtype):
    arrays, rest = split(entry, dtype)
    floats = {k: x for k, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}

    def total(floats):
        out = entry.make(**{**arrays, **floats}, **rest)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(out))

    grads = jax.jit(jax.grad(total))(floats)
    assert_equal(jax.tree.map(jnp.isfinite, grads), jax.tree.map(jnp.ones_like, grads))
    assert {k: g.dtype for k, g in grads.items()} == dict.fromkeys(floats, dtype)


@LOSSES
def test_float64_arguments_are_computed_in_float64(entry):
    with jax.enable_x64(True):
        arrays, rest = split(entry, jnp.float64)
        program = jax.make_jaxpr(lambda arrays: entry.make(**arrays, **rest))(arrays)
        assert not narrow_arithmetic(program)


@LOSSES
def test_hyperparameters_are_keyword_only_and_arrays_come_first(entry):
    kinds = inspect.Parameter
    for name, parameter in inspect.signature(entry.make).parameters.items():
        required = parameter.default in (kinds.empty, None)  # None: an array left out
        listed = name in entry.needs
        assert required or listed or parameter.kind is kinds.KEYWORD_ONLY, name

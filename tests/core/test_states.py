"""Finding a state, filling holes, dtypes of scalars, keys."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_ext._core.keys import key_state
from optax_ext._core.states import fill, find_state, scalar_dtype


class Wanted(NamedTuple):
    inner: Any


@pytest.mark.parametrize(
    "state",
    [
        Wanted(1),
        (optax.EmptyState(), Wanted(1)),
        {"opt_state": [None, (Wanted(1),)]},
        optax.MaskedState(Wanted(1)),
    ],
    ids=["itself", "chain", "dict", "masked"],
)
def test_the_one_state_is_found_anywhere(state):
    assert find_state("me", state, Wanted) == Wanted(1)


@pytest.mark.parametrize(
    ("state", "count"),
    [(optax.EmptyState(), 0), ((Wanted(1), Wanted(2)), 2), (Wanted((Wanted(1),)), 2)],
    ids=["none", "two", "one inside another"],
)
def test_none_or_several_states_are_an_error_that_counts_them(state, count):
    with pytest.raises(ValueError, match=f"me needs .* one Wanted, got {count} in a"):
        find_state("me", state, Wanted)


def test_fill_takes_holes_and_dtypes_from_the_present_tree():
    present = {"a": jnp.ones(2, jnp.bfloat16), "b": {"c": jnp.ones(1)}, "d": None}
    tree = {"a": jnp.full(2, 3.0), "b": optax.MaskedNode(), "d": None}
    filled = fill(tree, present)
    assert filled["a"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(filled["a"], [3, 3])
    assert filled["b"] is present["b"] or filled["b"] == present["b"]
    assert filled["d"] is None


def test_scalars_of_state_are_float32_unless_a_leaf_is_float64():
    assert scalar_dtype({}) == jnp.float32
    assert scalar_dtype(jnp.ones(1, jnp.bfloat16)) == jnp.float32
    assert scalar_dtype(jnp.ones(1, jnp.complex64)) == jnp.float32
    with jax.enable_x64(True):
        mixed = [jnp.ones(1, jnp.float32), jnp.ones(1, jnp.float64)]
        assert scalar_dtype(mixed) == jnp.float64


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_typed_and_raw_keys_give_the_same_data(make):
    data, impl = key_state(make(3))
    key = jax.random.wrap_key_data(data, impl=impl)
    assert data.dtype == jnp.uint32
    assert jax.random.bits(key) == jax.random.bits(jax.random.key(3))


def test_no_key_is_key_0():
    np.testing.assert_array_equal(key_state(None)[0], key_state(jax.random.key(0))[0])

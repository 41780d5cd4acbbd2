"""Checks of hyper-parameters and extra arguments, and what they say."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_ext._core.checks import (
    check_choice,
    check_hyperparam,
    check_interval,
    check_params,
    check_rate,
)
from optax_ext._core.extra_args import (
    ALIASES,
    FUNCTIONS,
    TREE_FUNCTIONS,
    TREES,
    require,
)


def says(message):
    return pytest.raises(ValueError, match="^" + re.escape(message))


@pytest.mark.parametrize(
    ("value", "interval", "text"),
    [
        (-0.1, {"low": 0.0}, "[0.0, inf], got -0.1"),
        (0.0, {"low": 0.0, "open_low": True}, "(0.0, inf], got 0.0"),
        (1.5, {"high": 1.0}, "[-inf, 1.0], got 1.5"),
        (1, {"high": 1.0, "open_high": True}, "[-inf, 1.0), got 1.0"),
        (float("nan"), {}, "[-inf, inf], got nan"),
        (np.float32(2.0), {"high": 1.0}, "[-inf, 1.0], got 2.0"),
        (jnp.ones(()), {"high": 0.5}, "[-inf, 0.5], got 1.0"),
    ],
)
def test_a_value_outside_the_interval_is_named_with_the_interval(value, interval, text):
    with says(f"method: b must lie in {text}"):
        check_hyperparam("method", **interval, b=value)


@pytest.mark.parametrize(
    "value",
    [0.0, 1.0, 1, np.float32(0.5), np.asarray(0.5), jnp.ones(()), None, lambda t: -1.0],
    ids=["0", "1", "int", "np.float32", "numpy", "jax", "None", "schedule"],
)
def test_values_inside_the_interval_and_schedules_and_none_pass(value):
    check_hyperparam("method", low=0.0, high=1.0, b=value)


@pytest.mark.parametrize("value", ["0.9", [0.9], (0.9,), {"a": 1}, 1j], ids=str)
def test_what_is_no_number_is_a_type_error(value):
    with pytest.raises(
        TypeError, match=f"^method: b must be a number, got {type(value).__name__}$"
    ):
        check_hyperparam("method", b=value)


def test_arrays_that_are_no_scalars_are_refused():
    with says("method: b must be a scalar, got shape (2,)"):
        check_hyperparam("method", b=jnp.ones(2))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_hyper_parameters_are_refused_with_the_way_out(dtype):
    with says(f"method: b2 came as {dtype}, which rounds 0.999 to 1.") as caught:
        check_hyperparam("method", b2=jnp.asarray(0.999, dtype))
    assert "optax_ext.inject_hyperparams" in str(caught.value)
    assert "hyperparam_dtype=jnp.float32" in str(caught.value)


def test_traced_values_are_checked_for_their_dtype_only():
    @jax.jit
    def traced(b):
        check_rate("method", b=b)  # 5.0 lies outside, but cannot be looked at
        return b

    assert traced(5.0) == 5.0
    with says("method: b came as bfloat16"):
        traced(jnp.asarray(0.5, jnp.bfloat16))


def test_several_values_are_checked_at_once_and_the_wrong_one_is_named():
    with says("method: b2 must lie in [0.0, 1.0), got 1.0"):
        check_rate("method", b1=0.9, b2=1.0)


@pytest.mark.parametrize("value", [0, -3, 1.0, True, "2", None, np.int32(2)], ids=repr)
def test_intervals_are_python_integers_of_1_or_more(value):
    with says(f"method: k must be an integer of 1 or more, got {value!r}"):
        check_interval("method", k=value)


def test_an_interval_that_became_an_array_is_sent_to_static_args():
    with pytest.raises(ValueError, match=r"name it in static_args=\('k',\)"):
        check_interval("method", k=jnp.asarray(3))
    check_interval("method", k=1)


def test_choices_are_listed():
    with says("method: how must be one of 'a', 'b', got 'c'"):
        check_choice("method", "how", "c", ("a", "b"))
    check_choice("method", "how", "a", ("a", "b"))


def test_missing_params_say_how_to_call():
    with says("method needs the parameters: call tx.update(grads, state, params)"):
        check_params("method", None)
    check_params("method", {})


def test_a_missing_extra_argument_says_how_to_pass_it():
    for extra in ({}, {"value_fn": None}, {"logits_fn": abs}):
        with says(
            "method needs the extra argument 'value_fn': call tx.update(grads, state, "
            "params, value_fn=...), or let optax_ext.make_train_step pass it"
        ):
            require("method", extra, "value_fn")


def test_value_fn_is_also_known_as_obj_fn():
    assert ALIASES == {"value_fn": "obj_fn"}
    assert require("method", {"obj_fn": abs}, "value_fn") is abs
    assert require("method", {"obj_fn": abs, "value_fn": min}, "value_fn") is min


def test_each_extra_argument_has_one_translation():
    every = [*TREES, *FUNCTIONS, *TREE_FUNCTIONS]
    assert len(every) == len(set(every))
    assert set(ALIASES) | set(ALIASES.values()) <= set(FUNCTIONS)

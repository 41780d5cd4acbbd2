"""Aggregators: links whose updates are the gradients of single examples."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import serialization

from optax_ext._core import catalogue
from tests.conformance.methods import (
    Method,
    about,
    assert_close,
    assert_equal,
    assert_no_nan,
    each,
    spec,
)
from tests.conformance.problem import BATCH, recorded
from tests.conformance.test_dtypes import narrow_arithmetic

DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
MASK = {
    "conv": {"kernel": True},
    "dense": {"kernel": False, "bias": True},
    "head": {"kernel": True},
    "scale": False,
}


def given(dtype: str = "float32") -> tuple[Any, Any]:
    """Parameters, and the gradients of five examples there."""
    inputs = recorded(dtype)[1][0]
    return inputs.params, inputs.arrays["per_example_grads"]


def only(mask: Any, tree: Any) -> Any:
    """The tree with None where the mask is False."""
    return jax.tree.map(lambda keep, x: x if keep else None, mask, tree)


def wide(tree: Any, dtype: Any = jnp.float32) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype), tree)


@each("aggregator")
@DTYPES
def test_it_emits_trees_like_params_in_the_dtype_of_the_examples(method, dtype):
    params, examples = given(dtype)
    tx = method.make()
    with about(method, f"{dtype} examples"):
        state = jax.eval_shape(tx.init, params)
        out, after = jax.eval_shape(tx.update, examples, state)
        assert spec(out) == spec(jax.eval_shape(lambda: params))
        assert spec(after) == spec(state)


@each("aggregator")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_examples_are_computed_in_float32_and_rounded_once(method, dtype):
    params, examples = given(dtype)
    tx = method.make()
    with about(method, f"{dtype} examples against the same in float32"):
        out, _ = tx.update(examples, tx.init(params))
        want, _ = tx.update(wide(examples), tx.init(wide(params)))
        assert_equal(out, wide(want, dtype))


@each("aggregator")
def test_float64_examples_are_computed_in_float64(method):
    with jax.enable_x64(True), about(method, "float64 examples"):
        params, examples = wide(given(), jnp.float64)
        tx = method.make()
        narrow = narrow_arithmetic(jax.make_jaxpr(tx.update)(examples, tx.init(params)))
        assert not narrow, f"narrow arithmetic: {sorted(narrow)}"


@each("aggregator")
def test_parameters_and_unknown_extra_arguments_change_nothing(method):
    params, examples = given()
    tx = method.make()
    with about(method, "params and no_such_argument=<object>"):
        state = tx.init(params)
        want = tx.update(examples, state)
        got = tx.update(examples, state, params, no_such_argument=object())
        assert_equal(got, want)


@each("aggregator")
def test_jit_changes_nothing_and_traces_once(method):
    params, examples = given()
    tx, traces = method.make(), []

    @jax.jit
    def step(examples, state):
        traces.append(1)
        return tx.update(examples, state)

    with about(method, "three steps, without jit against with jit"):
        s = r = tx.init(params)
        for _ in range(3):
            out, s = step(examples, s)
            want, r = tx.update(examples, r)
            assert_close(out, want, rtol=1e-5)
        assert len(traces) == 1


@each("aggregator")
@DTYPES
def test_the_state_is_stable_under_scan(method, dtype):
    params, examples = given(dtype)
    tx = method.make()

    def scan(state):
        return jax.lax.scan(lambda s, _: tx.update(examples, s)[::-1], state, length=3)[
            0
        ]

    with about(method, f"{dtype} examples"):
        state = jax.eval_shape(tx.init, params)
        assert spec(jax.eval_shape(scan, state)) == spec(state)


@each("aggregator")
def test_flax_serialization_resumes_bit_equal(method):
    params, examples = given()
    tx = method.make()
    with about(method, "flax.serialization after one step"):
        _, state = tx.update(examples, tx.init(params))
        saved = serialization.to_bytes(state)
        restored = serialization.from_bytes(method.make().init(params), saved)
        restored = jax.tree.map(jnp.asarray, restored)
        assert spec(restored) == spec(state)
        assert_equal(tx.update(examples, restored), tx.update(examples, state))


@each("aggregator")
def test_the_state_can_be_donated(method):
    params, examples = given()
    tx = method.make()
    with about(method, "jax.jit with the state donated, two steps"):
        step = jax.jit(tx.update, donate_argnums=1)
        state, other = tx.init(params), tx.init(params)
        for _ in range(2):
            old = jax.tree.leaves(state)
            _, state = step(examples, state)
            assert all(x.is_deleted() for x in old)
        assert_no_nan(other)  # the key that the link was made with is still there
        tx.init(params)


@each("aggregator")
@pytest.mark.parametrize("size", [0.0, 1e30, 1e-30])
def test_finite_examples_never_make_a_nan(method, size):
    params, examples = given()
    tx = method.make()

    def scaled(where):
        signs = jax.tree.map(jnp.sign, examples)
        return jax.tree.map(lambda g, s: where(g, size * s), examples, signs)

    cases = {
        "all": scaled(lambda g, extreme: extreme),
        "the first": scaled(lambda g, extreme: g.at[0].set(extreme[0])),
    }
    for name, case in cases.items():
        with about(method, f"{name} of the examples {size}"):
            out, state = tx.update(case, tx.init(params))
            assert_no_nan((out, state))


@each("aggregator")
def test_a_chain_behind_it_sees_ordinary_gradients(method):
    params, examples = given()
    aggregate = method.make()
    tx = optax.chain(aggregate, optax.sgd(0.1, momentum=0.9))
    with about(method, "before optax.sgd, two steps"):
        state, alone = tx.init(params), aggregate.init(params)
        buffer = jax.tree.map(jnp.zeros_like, params)
        for _ in range(2):
            updates, state = tx.update(examples, state, params)
            g, alone = aggregate.update(examples, alone)
            buffer = jax.tree.map(lambda b, g: 0.9 * b + g, buffer, g)
            assert_close(updates, jax.tree.map(lambda b: -0.1 * b, buffer), 1e-5)
        optax.apply_updates(params, updates)


@each("aggregator")
def test_masked_leaves_keep_their_examples_and_the_others_see_only_each_other(method):
    params, examples = given()
    tx = method.make()
    with about(method, f"optax.masked with {MASK}"):
        masked = optax.masked(tx, MASK)
        out, _ = masked.update(examples, masked.init(params), params)
        hidden = jax.tree.map(lambda keep: not keep, MASK)
        assert_equal(only(hidden, out), only(hidden, examples))
        alone, _ = tx.update(only(MASK, examples), tx.init(only(MASK, params)))
        assert_close(only(MASK, out), alone, rtol=1e-5)


@each("aggregator")
def test_partition_aggregates_each_group_by_itself(method):
    params, examples = given()
    labels = jax.tree.map(lambda keep: "a" if keep else "b", MASK)
    with about(method, f"optax.partition with {labels}"):
        tx = optax.partition({"a": method.make(), "b": method.make()}, labels)
        out, _ = tx.update(examples, tx.init(params), params)
        for keep in (True, False):
            mask = jax.tree.map(lambda m, keep=keep: m is keep, MASK)
            one = method.make()
            want, _ = one.update(only(mask, examples), one.init(only(mask, params)))
            assert_close(only(mask, out), want, rtol=1e-5)


@each("aggregator")
def test_odd_trees_come_back_with_their_structure(method):
    trees = {
        "bare array": jnp.ones((BATCH, 3)),
        "bare scalar": jnp.ones((BATCH,)),
        "empty": {},
        "size-0 leaf": {"none": jnp.zeros((BATCH, 0)), "some": jnp.ones((BATCH, 2))},
        "holes": {"none": None, "some": jnp.ones((BATCH, 2))},
    }
    tx = method.make()
    for name, examples in trees.items():
        with about(method, f"examples: {name}"):
            params = jax.tree.map(lambda g: g[0], examples)
            out, _ = tx.update(examples, tx.init(params))
            assert spec(out) == spec(params)


@each("aggregator")
def test_a_batch_of_one_is_allowed(method):
    params, examples = given()
    tx = method.make()
    with about(method, "one example"):
        first = jax.tree.map(lambda g: g[:1], examples)
        out, _ = tx.update(first, tx.init(params))
        assert spec(out) == spec(params)


@each("aggregator", floats=True)
def test_hyperparameters_can_be_mapped_over(method: Method):
    params, examples = given()
    pairs = {n: jnp.asarray([0.9 * x, x]) for n, x in method.floats().items()}

    def update(hyperparameters):
        tx = method.make(**hyperparameters)
        return tx.update(examples, tx.init(params))[0]

    with about(method, f"0.9 and 1 times {method.floats()}"):
        mapped = jax.jit(jax.vmap(update))(pairs)
        want = update({})
        assert_close(jax.tree.map(lambda x: x[1], mapped), want, rtol=1e-5)


def test_there_are_aggregators():
    assert list(catalogue.entries("aggregator"))

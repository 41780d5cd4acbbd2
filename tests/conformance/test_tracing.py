"""Tracing: one program for all steps, the same numbers with and without it."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_ext as ox
from tests.conformance.methods import (
    ALL_KINDS,
    GRADIENT_KINDS,
    Run,
    about,
    assert_close,
    assert_equal,
    each,
    spec,
    standard_run,
)
from tests.conformance.problem import recorded

# Adam's b2 = 0.999 in float32 makes 1 - b2 wrong by 5e-5, b2 = 0.9999 by 5e-4.
HYPERPARAMETER_ROUNDING = 1e-3


@each(*ALL_KINDS)
def test_traces_once(method):
    with about(method, "three steps from init"):
        assert standard_run(method).traces == 1


@each(*ALL_KINDS)
def test_jit_changes_nothing(method):
    problem, inputs = recorded()
    with about(method, "three steps, without jit against with jit"):
        eager = Run(method.make(), problem, method.needs, jit=False).over(inputs)
        # Rounding of 1 - b2^t (5e-5 at t = 1 and b2 = 0.999) may differ.
        assert_close(eager.updates, standard_run(method).updates, rtol=1e-4)


@each(*ALL_KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_is_stable_under_scan(method, dtype):
    problem, inputs = recorded(dtype)
    run = Run(method.make(), problem, method.needs, jit=False)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *inputs)

    def scan(state):
        return jax.lax.scan(lambda s, x: run.apply(s, x)[::-1], state, stacked)[0]

    with about(method, f"{dtype} parameters"):
        state = jax.eval_shape(run.tx.init, inputs[0].params)
        assert spec(jax.eval_shape(scan, state)) == spec(state)


@each(*ALL_KINDS)
def test_unknown_extra_arguments_change_nothing(method):
    problem, (inputs, *_) = recorded()
    run = Run(method.make(), problem, method.needs, jit=False)

    def program(**unknown):
        state = run.tx.init(inputs.params)
        return str(
            jax.make_jaxpr(lambda s, x: run.apply(s, x, **unknown))(state, inputs)
        )

    with about(method, "no_such_argument=<object>"):
        assert program(no_such_argument=object()) == program()


@each(*ALL_KINDS, floats=True)
def test_hyperparameters_can_be_mapped_over(method):
    problem, inputs = recorded()
    floats = method.floats()

    def last_updates(hyperparameters):
        tx = method.make(**hyperparameters)
        run = Run(tx, problem, method.needs, jit=False).over(inputs)
        return run.updates[-1]

    pairs = {name: jnp.asarray([0.9 * x, x]) for name, x in floats.items()}
    with about(method, f"0.9 and 1 times {floats}"):
        mapped = jax.jit(jax.vmap(last_updates))(pairs)
        got = jax.tree.map(lambda x: x[1], mapped)
        want = standard_run(method).updates[-1]
        assert_close(got, want, rtol=HYPERPARAMETER_ROUNDING)


@each(*GRADIENT_KINDS, floats=True)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_injected_hyperparameters_are_float32_and_change_nothing(method, dtype):
    problem, inputs = recorded(dtype)
    method = method.lightened()
    tx = ox.inject_hyperparams(method.factory)(**method.arguments)
    with about(method, f"ox.inject_hyperparams, {dtype} parameters"):
        run = Run(tx, problem, method.needs, jit=None).over(inputs)
        for state in run.states:
            want = {name: jnp.float32(x) for name, x in method.floats().items()}
            assert_equal(state.hyperparams, want)
        # Half an ulp of bfloat16 on either side.
        rtol = HYPERPARAMETER_ROUNDING if dtype == "float32" else 2.0**-8
        assert_close(run.updates, standard_run(method, dtype).updates, rtol)


@each(*GRADIENT_KINDS, floats=True)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_hyperparameters_are_refused_with_the_way_out(method, dtype):
    """optax.inject_hyperparams casts to the parameters' dtype unless told otherwise."""
    params = recorded(dtype)[1][0].params
    static = set(method.parameters()) - set(method.floats())

    def init(**options) -> Any:
        inject = optax.inject_hyperparams(method.factory, static, **options)
        return inject(**method.arguments).init(params)

    with about(method, f"optax.inject_hyperparams, {dtype} parameters"):
        with pytest.raises(ValueError, match=r"optax_ext\.inject_hyperparams"):
            init()
        for name, x in init(hyperparam_dtype=jnp.float32).hyperparams.items():
            assert x == jnp.float32(method.floats()[name]), name

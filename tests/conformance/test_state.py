"""States: abstract, donated, saved, restored, and as large as the catalogue says."""

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from flax import serialization

from tests.conformance.methods import (
    ALL_KINDS,
    about,
    assert_equal,
    each,
    spec,
    standard_run,
)
from tests.conformance.problem import extra, recorded, tree_like


def strong(tree):
    """`spec` without weak types, which a ShapeDtypeStruct may not carry."""
    structure, leaves = spec(tree)
    return structure, [leaf[:2] for leaf in leaves]


@each(*ALL_KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_abstract_init_has_the_structure_of_the_real_one(method, dtype):
    params = recorded(dtype)[1][0].params
    tx = method.make()
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    with about(method, f"{dtype} parameters, as arrays and as shapes"):
        real = tx.init(params)
        assert spec(jax.eval_shape(tx.init, params)) == spec(real)
        assert strong(tx.init(shapes)) == strong(real)


@each()
def test_parameters_and_state_can_be_donated(method):
    method = method.lightened()
    problem, (inputs, *_) = recorded()
    tx = method.make()

    def step(params, state, arrays):
        given = inputs._replace(params=params, arrays=arrays)
        arguments = extra(problem, given, method.needs)
        updates, state = tx.update(given.grads, state, params, **arguments)
        return jax.tree.map(lambda p, u: p - u, params, updates), state

    with about(method, "jax.jit with params and state donated, two steps"):
        donating = jax.jit(step, donate_argnums=(0, 1))
        carry = jax.tree.map(jnp.copy, inputs.params)
        carry = carry, tx.init(carry)
        for _ in range(2):
            leaves = [x for x in jax.tree.leaves(carry) if x.size]
            buffers = {x.unsafe_buffer_pointer() for x in leaves}
            assert len(buffers) == len(leaves), "one buffer is in two places"
            given = jax.tree.leaves(carry[0])
            carry = donating(*carry, inputs.arrays)
            assert all(x.is_deleted() for x in given)


def assert_resumes(method, state):
    """The third step from a restored state is the third step of an unbroken run."""
    run = standard_run(method)
    assert_equal(state, run.states[1])
    updates, last = run.step(state, recorded()[1][2])
    assert_equal((updates, last), (run.updates[2], run.states[2]))
    assert run.traces == 1, "the restored state was compiled for anew"


@each(*ALL_KINDS)
def test_flax_serialization_resumes_bit_equal(method):
    with about(method, "flax.serialization after two steps"):
        saved = serialization.to_bytes(standard_run(method).states[1])
        fresh = method.make().init(recorded()[1][0].params)
        restored = serialization.from_bytes(fresh, saved)
        assert_resumes(method, jax.tree.map(jnp.asarray, restored))


@each(*ALL_KINDS)
def test_an_orbax_checkpoint_resumes_bit_equal(method, tmp_path):
    state = standard_run(method).states[1]
    fresh = jax.eval_shape(method.make().init, recorded()[1][0].params)
    with about(method, "an Orbax checkpoint after two steps"):
        with ocp.StandardCheckpointer() as checkpointer:
            # Orbax refuses an empty tree.
            checkpointer.save(tmp_path / "state", {"state": state, "step": 2})
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(
                tmp_path / "state", {"state": fresh, "step": 0}
            )
        assert_resumes(method, restored["state"])


@each("link", "optimizer", "estimator")
def test_the_state_is_as_large_as_the_catalogue_says(method):
    if method.entry.slots is None:
        pytest.fail(f"{method.name} has no slots in the catalogue")
    params = tree_like({"w": (64, 64), "v": (32, 128)})
    with about(method, "matrices of 64 x 64 and 32 x 128"):
        state = jax.eval_shape(method.make().init, params)
        floats = sum(
            leaf.size
            for leaf in jax.tree.leaves(state)
            if jnp.issubdtype(leaf.dtype, jnp.inexact)
        )
        # Counts, and scalars that a method keeps a leaf, weigh less than 0.01.
        slots = floats / sum(p.size for p in jax.tree.leaves(params))
        assert abs(slots - method.entry.slots) < 0.01

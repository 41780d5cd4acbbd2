"""The step count of `leafwise`, and schedules as hyper-parameters."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_ext import leafwise
from optax_ext._core.leaves import at_step


def recorded(schedule):
    """A link that emits its scheduled hyper-parameter."""

    class Count(NamedTuple):
        count: jax.Array

    def update(g, slots, p, t):
        return jnp.full_like(g, at_step(schedule, t)), slots

    return leafwise(Count, lambda p: (), update)


def test_schedules_are_called_with_0_at_the_first_step():
    tx = recorded(lambda count: 10.0 * count)
    state = tx.init(jnp.ones(()))
    values = []
    for _ in range(3):
        value, state = tx.update(jnp.ones(()), state)
        values.append(float(value))
    assert values == [0.0, 10.0, 20.0]


def test_schedules_see_the_same_values_as_optax_gives_them():
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, 3, 10, 0.1)
    ours, theirs = recorded(schedule), optax.scale_by_schedule(schedule)
    a, b = ours.init(jnp.ones(())), theirs.init(jnp.ones(()))
    for _ in range(12):
        u, a = ours.update(jnp.ones(()), a)
        with jax.numpy_dtype_promotion("standard"):
            v, b = theirs.update(jnp.ones(()), b)
        np.testing.assert_array_equal(u, v)


def test_schedules_keep_the_accuracy_of_float64_leaves():
    # An int32 count over a Python integer is float32 in jax, also under x64.
    with jax.enable_x64(True):
        tx = recorded(lambda count: (count + 1) / 3)
        one = jnp.ones((), jnp.float64)
        state = tx.init(one)
        for t in range(1, 6):
            value, state = tx.update(one, state)
            assert float(value) == t / 3


def test_the_step_is_a_scalar_of_the_computing_dtype_and_counts_from_1():
    seen = []

    class Count(NamedTuple):
        count: jax.Array

    def update(g, slots, p, t):
        seen.append((float(t), t.dtype, t.shape))
        return g, slots

    tx = leafwise(Count, lambda p: (), update)
    g = jnp.ones(2, jnp.bfloat16)
    state = tx.init(g)
    for _ in range(2):
        _, state = tx.update(g, state)
    assert seen == [(1.0, jnp.float32, ()), (2.0, jnp.float32, ())]


def test_the_count_stops_at_the_largest_int32():
    tx = recorded(lambda count: count)
    largest = np.iinfo(np.int32).max
    state = tx.init(jnp.ones(2))._replace(count=jnp.asarray(largest, jnp.int32))
    _, state = tx.update(jnp.ones(2), state)
    assert state.count == largest


def test_a_rule_without_count_gets_no_step():
    def update(g, slots, p, t):
        assert t is None
        return g, slots

    tx = leafwise(optax.EmptyState, lambda p: (), update)
    tx.update(jnp.ones(2), tx.init(jnp.ones(2)))

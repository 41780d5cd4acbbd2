"""Every schedule of the catalogue: counts, dtypes, and the ends of int32."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox
from optax_ext._core import catalogue
from tests.conformance.methods import assert_equal, spec
from tests.conformance.test_dtypes import narrow_arithmetic

SCHEDULES = pytest.mark.parametrize(
    "entry", [*catalogue.entries("schedule")], ids=lambda e: e.name
)
COUNTS = [0, 1, 2, 3, 7, 10, 29, 45, 100, 101, 1000]
LAST = 2**31 - 1
# A sum in another order, or a root that is not the same under jit: some roundings.
ROUNDINGS = 1e-6


def made(entry: catalogue.Entry) -> tuple[Any, ...]:
    """The schedules of the example: most methods make one, some a pair."""
    result = entry.make(**entry.example())
    return result if isinstance(result, tuple) else (result,)


def int32(count: int) -> jax.Array:
    return jnp.asarray(count, jnp.int32)


@SCHEDULES
def test_it_makes_functions_of_the_count(entry):
    schedules = made(entry)
    assert schedules
    assert all(callable(schedule) for schedule in schedules)


@SCHEDULES
def test_its_value_is_one_float32_number_for_every_form_of_count(entry):
    for schedule in made(entry):
        for count in COUNTS:
            for form in (count, np.int32(count), int32(count)):
                value = schedule(form)
                assert (value.shape, value.dtype) == ((), jnp.float32)
                np.testing.assert_allclose(value, schedule(count), ROUNDINGS, 1e-12)


@SCHEDULES
def test_jit_and_vmap_change_nothing_and_trace_once(entry):
    for schedule in made(entry):
        one_by_one, traced = jnp.stack([schedule(count) for count in COUNTS]), []

        def once(count, schedule=schedule, traced=traced):
            traced.append(count)
            return schedule(count)

        jitted, mapped = jax.jit(once), jax.vmap(schedule)
        got = jnp.stack([jitted(int32(count)) for count in COUNTS])
        np.testing.assert_allclose(got, one_by_one, ROUNDINGS, 1e-12)
        assert len(traced) == 1
        got = mapped(jnp.asarray(COUNTS, jnp.int32))
        np.testing.assert_allclose(got, one_by_one, ROUNDINGS, 1e-12)


@SCHEDULES
def test_under_x64_an_int32_count_gives_float64_to_the_last_digit(entry):
    with jax.enable_x64(True):
        for schedule in made(entry):
            narrow = narrow_arithmetic(jax.make_jaxpr(schedule)(int32(3)))
            assert not narrow, f"narrow arithmetic: {sorted(narrow)}"
            for count in COUNTS:
                value = schedule(int32(count))
                assert value.dtype == jnp.float64
                np.testing.assert_allclose(value, schedule(count), 1e-14, 1e-20)


@SCHEDULES
def test_a_schedule_made_before_x64_was_switched_on_is_float64_all_the_same(entry):
    schedules = made(entry)
    with jax.enable_x64(True):
        for schedule, fresh in zip(schedules, made(entry), strict=True):
            assert_equal(schedule(7), fresh(7))


@SCHEDULES
def test_float32_is_float64_rounded(entry):
    schedules = made(entry)
    narrow = [[float(s(count)) for count in COUNTS] for s in schedules]
    with jax.enable_x64(True):
        wide = [[float(s(count)) for count in COUNTS] for s in schedules]
    # What is subtracted inside may cancel three of the seven digits.
    largest = np.max(np.abs(wide))
    np.testing.assert_allclose(narrow, wide, rtol=1e-3, atol=1e-6 * largest)


@SCHEDULES
@pytest.mark.parametrize("count", [0, LAST - 1, LAST])
def test_its_value_is_finite_from_the_first_count_to_the_last(entry, count):
    for schedule in made(entry):
        for form in (count, int32(count)):
            assert jnp.isfinite(schedule(form))
            assert jnp.isfinite(jax.jit(schedule)(form))


@SCHEDULES
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_scales_updates_under_full_precision(entry, dtype):
    grads = {"w": jnp.asarray([1.0, -2.0], dtype)}
    for schedule in made(entry):
        tx = ox.full_precision(
            optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(schedule))
        )
        state, update = tx.init(grads), jax.jit(tx.update)
        for count in range(3):
            before, (updates, state) = state, update(grads, state)
            assert spec(state) == spec(before)
            assert updates["w"].dtype == dtype
            # Adam's direction is the sign while the gradient stays the same.
            want = np.float32(schedule(count)) * np.array([1, -1])
            got = np.asarray(updates["w"], np.float32)
            np.testing.assert_allclose(got, want, rtol=2.0**-8, atol=1e-12)


@SCHEDULES
def test_it_scales_updates_under_strict_promotion(entry):
    grads = {"w": jnp.ones((2,), jnp.bfloat16)}
    for schedule in made(entry):
        tx = optax.scale_by_schedule(schedule)
        updates, _ = jax.jit(tx.update)(grads, tx.init(grads))
        assert updates["w"].dtype == jnp.bfloat16

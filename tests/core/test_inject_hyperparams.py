"""`ox.inject_hyperparams`: hyper-parameters in the state, exact and traced."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox

BF16 = jnp.bfloat16
ONES = {"w": jnp.ones((2,), BF16)}


def test_hyper_parameters_of_bfloat16_parameters_are_exact_in_float32():
    tx = ox.inject_hyperparams(ox.sophia)(3e-4, b1=0.965, eps=1e-12)
    values = tx.init(ONES).hyperparams
    expected = {
        "learning_rate": 3e-4,
        "b1": 0.965,
        "b2": 0.99,
        "eps": 1e-12,
        "weight_decay": 0.2,
        "gamma": 0.01,
        "clip_threshold": 1.0,
    }
    assert set(values) == set(expected)  # update_interval, mask, ... are not there
    for name, value in expected.items():
        assert values[name].dtype == jnp.float32
        assert values[name] == np.float32(value)


def test_an_injected_optimizer_equals_the_plain_one():
    plain = ox.lion_k(1e-2, b1=0.95, kappa=ox.lion_kernel("huber", e=0.1))
    injected = ox.inject_hyperparams(ox.lion_k)(
        1e-2, b1=0.95, kappa=ox.lion_kernel("huber", e=0.1)
    )
    params = {"w": jnp.array([1.0, -2.0, 0.0])}
    a, b = plain.init(params), injected.init(params)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        g = {"w": jnp.asarray(rng.normal(size=3), jnp.float32)}
        u, a = plain.update(g, a, params)
        v, b = jax.jit(injected.update)(g, b, params)
        # 1 - b1 and the sums are rounded in float32 here, in float64 there: m, u and
        # their sum with the decay carry a few ulp of terms of size |g| lr / e.
        np.testing.assert_allclose(u["w"], v["w"], rtol=1e-5, atol=1e-8)


def test_the_learning_rate_in_the_state_is_the_one_that_is_used():
    tx = ox.inject_hyperparams(ox.lion_k)(1e-2, weight_decay=0.0)
    params = {"w": jnp.ones(2)}
    state = tx.init(params)
    state.hyperparams["learning_rate"] = jnp.asarray(0.5, jnp.float32)
    updates, _ = tx.update({"w": jnp.ones(2)}, state, params)
    np.testing.assert_array_equal(updates["w"], [-0.5, -0.5])


@pytest.mark.parametrize(
    ("schedule", "value"),
    [
        (lambda count: 1e-3 / (count + 1), lambda t: 1e-3 / t),
        (
            optax.cosine_decay_schedule(1e-3, 10),
            lambda t: 1e-3 * (1 + np.cos(np.pi * (t - 1) / 10)) / 2,
        ),
    ],
    ids=["own", "optax.cosine_decay_schedule"],
)
def test_scheduled_hyper_parameters_are_not_rounded_to_bfloat16(schedule, value):
    tx = ox.inject_hyperparams(ox.lion_k)(schedule)
    state = tx.init(ONES)
    for t in range(1, 4):
        _, state = tx.update(ONES, state, ONES)
        np.testing.assert_allclose(
            state.hyperparams["learning_rate"], value(t), rtol=5e-7
        )


@pytest.mark.parametrize("static", ["b1", ("b1", "gamma")], ids=str)
def test_static_arguments_stay_python_values(static):
    tx = ox.inject_hyperparams(ox.sophia, static_args=static)(1e-3)
    names = {static} if isinstance(static, str) else set(static)
    assert not names & set(tx.init(ONES).hyperparams)
    assert "b2" in tx.init(ONES).hyperparams


def test_update_interval_stays_a_python_integer():
    calls = []

    def value_fn(p):
        calls.append(1)
        return jnp.sum(p["w"].astype(jnp.float32) ** 2)

    tx = ox.inject_hyperparams(ox.sophia)(1e-3, update_interval=2)
    state = tx.init(ONES)
    for _ in range(2):
        _, state = jax.jit(lambda g, s: tx.update(g, s, ONES, value_fn=value_fn))(
            ONES, state
        )
    assert optax.tree.get(state, "hessian")["w"].dtype == jnp.float32


def test_optaxs_own_injection_is_refused_with_the_way_out():
    tx = optax.inject_hyperparams(ox.scale_by_lion_k)()
    with pytest.raises(ValueError, match=r"use optax_ext\.inject_hyperparams"):
        tx.init(ONES)
    tx = optax.inject_hyperparams(ox.ema_hessian_diag)(ox.external_hessian_diag())
    with pytest.raises(ValueError, match=r"static_args=\('update_interval',\)"):
        tx.init({"w": jnp.ones(2)})


def test_injected_adamw_is_finite_on_bfloat16_parameters():
    # optax alone: b2 = 0.999 becomes 1 in bfloat16, and the first step is 0 / 0.
    with jax.numpy_dtype_promotion("standard"):
        alone = optax.inject_hyperparams(optax.adamw)(1e-3)
        updates, _ = alone.update(ONES, alone.init(ONES), ONES)
    assert np.isnan(updates["w"].astype(jnp.float32)).all()

    def adamw(learning_rate: float, b2: float = 0.999):
        return ox.full_precision(optax.adamw(learning_rate, b2=b2))

    for tx in (
        ox.inject_hyperparams(adamw)(1e-3),
        ox.full_precision(optax.inject_hyperparams(optax.adamw)(1e-3)),
    ):
        updates, state = tx.update(ONES, tx.init(ONES), ONES)
        # The first step of Adam is the sign; decay adds 1e-4 of the parameter.
        np.testing.assert_allclose(
            updates["w"].astype(jnp.float32), -1e-3 * 1.0001, rtol=2**-8
        )
        assert state.hyperparams["b2"] == np.float32(0.999)


def test_annotations_in_quotes_are_read():
    # Every annotation is a string under `from __future__ import annotations`.
    def factory(
        learning_rate: "optax.ScalarOrSchedule",
        momentum: "jax.Array | float" = 0.9,
        every: "int" = 3,
    ):
        assert every == 3 and isinstance(every, int)
        return optax.sgd(learning_rate, momentum)

    tx = ox.inject_hyperparams(factory)(1e-3)
    assert set(tx.init(ONES).hyperparams) == {"learning_rate", "momentum"}


def test_arrays_are_hyper_parameters():
    def factory(learning_rate: jax.Array):
        return optax.sgd(learning_rate)

    tx = ox.inject_hyperparams(factory)(jnp.asarray(1e-3))
    assert set(tx.init(ONES).hyperparams) == {"learning_rate"}


@pytest.mark.parametrize("factory", [ox.scale_by_lion_k, ox.scale_by_sophia])
def test_links_take_float32_hyper_parameters_on_float64_leaves(factory, x64):
    tx = ox.inject_hyperparams(factory)(b1=0.5)
    x = jnp.ones(2, jnp.float64)
    updates, _ = tx.update(x, tx.init(x), x, value_fn=lambda x: jnp.sum(x**2))
    assert updates.dtype == jnp.float64


def test_arguments_without_annotation_are_treated_as_optax_does():
    def factory(learning_rate, momentum=0.9):
        return optax.sgd(learning_rate, momentum)

    tx = ox.inject_hyperparams(factory)(1e-3)
    assert set(tx.init(ONES).hyperparams) == {"learning_rate", "momentum"}

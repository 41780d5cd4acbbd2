"""`finish` and `adam_direction`: what finished optimizers share."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox
from optax_ext._core.optimizers import adam_direction, finish


def test_finish_is_direction_then_decay_then_learning_rate():
    tx = finish(
        optax.scale(3.0), learning_rate=0.1, weight_decay=0.5, owner="something"
    )
    p, g = jnp.array([2.0]), jnp.array([1.0])
    updates, _ = tx.update(g, tx.init(p), p)
    np.testing.assert_allclose(updates, [-0.1 * (3.0 + 0.5 * 2.0)], rtol=3e-7)


def test_finish_without_decay_needs_no_params():
    tx = finish(optax.scale(3.0), learning_rate=0.1, owner="something")
    updates, _ = tx.update(jnp.ones(1), tx.init(jnp.ones(1)))
    np.testing.assert_allclose(updates, [-0.3], rtol=3e-7)


def test_finish_names_the_optimizer_in_its_errors():
    with pytest.raises(ValueError, match="something: learning_rate must lie in"):
        finish(optax.scale(3.0), learning_rate=-0.1, owner="something")
    with pytest.raises(TypeError, match="something: weight_decay must be a number"):
        finish(optax.scale(3.0), learning_rate=0.1, weight_decay="a", owner="something")


def test_finish_masks_the_decay_only():
    tx = finish(
        optax.identity(),
        learning_rate=1.0,
        weight_decay=1.0,
        mask={"w": True, "b": False},
        owner="something",
    )
    p = {"w": jnp.ones(1), "b": jnp.ones(1)}
    updates, _ = tx.update(p, tx.init(p), p)
    assert (float(updates["w"][0]), float(updates["b"][0])) == (-2.0, -1.0)


def test_adams_hyper_parameters_are_checked_in_the_name_of_the_method():
    good = {"b1": 0.9, "b2": 0.99, "eps": 0.0, "eps_root": 0.0, "mu_dtype": None}
    adam_direction("something", **good)
    for name, value in {"b1": 1.0, "b2": -0.1, "eps": -1.0, "eps_root": -1.0}.items():
        with pytest.raises(ValueError, match=f"something: {name} must lie in"):
            adam_direction("something", **(good | {name: value}))


@pytest.mark.parametrize(
    "make", [ox.adamw_cwd, ox.grams_adamw], ids=lambda m: m.__name__
)
def test_optimizers_around_adam_refuse_a_decay_rate_of_1(make):
    with pytest.raises(ValueError, match=r"b2 must lie in \[0.0, 1.0\), got 1.0"):
        make(0.1, b2=1.0)


@pytest.mark.usefixtures("x64")
def test_schedules_are_read_in_float64_under_x64():
    schedule = optax.linear_schedule(0.3, 0.1, 7)
    tx = ox.lion_k(schedule, weight_decay=0.0)
    x = jnp.ones(1)
    state = tx.init(x)
    for step in range(4):
        updates, state = tx.update(x, state, x)
        want = -(0.3 + (0.1 - 0.3) * step / 7)
        np.testing.assert_allclose(updates, [want], rtol=1e-15)

"""`xgrad` and `xgrad_predict`."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox
from tests.test_goldens import HERE, NAMES, Golden, gradient_source


def waves(x):
    """A non-convex function."""
    return jnp.sum(jnp.cos(2 * x) + x**2 / 5)


def walk(tx, x, steps, point=lambda state, x: x, value=waves):
    """Parameters, and points of the gradients, of all steps."""
    state, xs, points = tx.init(x), [], []
    update = jax.jit(tx.update)
    for _ in range(steps):
        points.append(point(state, x))
        updates, state = update(jax.grad(value)(points[-1]), state, x)
        x = optax.apply_updates(x, updates)
        xs.append(x)
    return np.asarray(xs), np.asarray(points)


@pytest.mark.usefixtures("x64")
def test_predictions_around_sgd_are_the_iterates_of_nesterovs_method():
    x = jnp.linspace(-2.0, 2.0, 7)
    tx = ox.xgrad(optax.sgd(0.05, momentum=0.9), steps=0.9)
    _, points = walk(tx, x, 41, ox.xgrad_predict)
    nesterov, _ = walk(optax.sgd(0.05, momentum=0.9, nesterov=True), x, 40)
    np.testing.assert_array_equal(points[0], x)
    # Both sum some 40 terms of size 1: a few roundings.
    np.testing.assert_allclose(points[1:], nesterov, rtol=0, atol=4e-15)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("name", "scale"), [("sgdm", 1.0), ("adamw", -0.01)])
def test_the_goldens_gradients_are_taken_at_its_predicted_points(name, scale):
    golden = Golden.load(HERE / f"wrappers_schedules/xgrad_{name}.npz")
    tx = eval(golden.meta["call"], dict(NAMES))
    params, gradient = golden.tree("p0"), gradient_source(golden, NAMES)
    state = tx.init(params)
    for t in range(5):
        point = ox.xgrad_predict(state, params, scale=scale)
        for leaf, want in golden.flat("out/predicted").items():
            golden.check(f"step {t}, {leaf}", point[leaf], want[t])
        grads = gradient(params, state, {})[0]
        with jax.numpy_dtype_promotion("standard"):  # optax's Adam in float64
            updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)


def test_no_steps_are_inner_exactly():
    x = jnp.linspace(-2.0, 2.0, 7)
    inner = optax.sgd(0.05, momentum=0.9)
    got, points = walk(ox.xgrad(inner, steps=0.0), x, 10, ox.xgrad_predict)
    want, _ = walk(inner, x, 10)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(points[1:], got[:-1])


def test_momentum_moves_the_prediction_although_the_gradient_is_zero():
    tx = ox.xgrad(optax.sgd(1.0, momentum=0.5))
    x = jnp.zeros(1)
    _, state = tx.update(jnp.ones(1), tx.init(x), x)
    _, state = tx.update(jnp.zeros(1), state, x)
    np.testing.assert_array_equal(ox.xgrad_predict(state, x), [-0.5])


def test_the_prediction_looks_ahead_by_steps_times_scale():
    tx = ox.xgrad(optax.scale(3.0), steps=1.5)
    x = jnp.ones(1)
    out, state = tx.update(jnp.ones(1), tx.init(x), x)
    np.testing.assert_array_equal(out, [3.0])
    np.testing.assert_array_equal(ox.xgrad_predict(state, x, -0.5), [1 - 2.25])
    for scale in (jnp.float32(-0.5), np.float64(-0.5)):
        np.testing.assert_array_equal(ox.xgrad_predict(state, x, scale), [1 - 2.25])


def test_hidden_leaves_are_predicted_where_they_are():
    x = {"seen": jnp.ones(1, jnp.bfloat16), "hidden": {"a": jnp.ones(2)}}
    tx = optax.masked(ox.xgrad(optax.scale(2.0)), {"seen": True, "hidden": False})
    _, state = tx.update(x, tx.init(x), x)
    point = ox.xgrad_predict(state, x)
    np.testing.assert_array_equal(point["seen"], [3.0])
    assert point["seen"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(point["hidden"]["a"], [1.0, 1.0])


def test_it_is_found_in_a_chain_and_around_buckets():
    tx = optax.chain(optax.clip(1.0), ox.xgrad(ox.bucketed(optax.sgd(0.5))))
    x = {"a": jnp.ones(1), "b": jnp.zeros(1)}
    _, state = tx.update(x, tx.init(x), x)
    point = jax.jit(ox.xgrad_predict)(state, x)
    assert (point["a"][0], point["b"][0]) == (0.5, 0.0)


def test_none_or_two_states_are_an_error():
    x = jnp.ones(1)
    with pytest.raises(ValueError, match=r"xgrad_predict needs .* got 0"):
        ox.xgrad_predict(optax.sgd(0.1).init(x), x)
    two = optax.chain(ox.xgrad(optax.identity()), ox.xgrad(optax.identity()))
    with pytest.raises(ValueError, match="one XGradState, got 2"):
        ox.xgrad_predict(two.init(x), x)


def test_steps_that_are_no_number_are_named():
    with pytest.raises(TypeError, match="xgrad: steps must be a number, got str"):
        ox.xgrad(optax.identity(), steps="1")

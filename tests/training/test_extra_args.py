"""Extra arguments that a caller adds, and gradients taken elsewhere."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_ext as ox
from tests.training.test_train_step import X, Y, assert_equal, loss_fn, params, spy


def aux_loss(p, x, y):
    del x, y
    return jnp.sum(p["w"] ** 2)


def test_values_are_evaluated_at_the_parameters_and_functions_get_the_batch():
    seen: dict[str, Any] = {}
    further = {"aux_grads": jax.grad(aux_loss), "proxy_value_fn": loss_fn}
    step = ox.make_train_step(loss_fn, spy(seen), extra_args=further, jit=False)
    p = params()
    step(p, optax.EmptyState(), X, Y)
    assert_equal(seen["aux_grads"], jax.grad(aux_loss)(p, X, Y))
    other = jax.tree.map(lambda a: a + 1, p)
    np.testing.assert_array_equal(seen["proxy_value_fn"](other), loss_fn(other, X, Y))


def test_functions_of_params_accept_masked_trees_and_keep_their_holes_in_gradients():
    seen: dict[str, Any] = {}
    further = {"aux_value_fn": loss_fn}
    step = ox.make_train_step(loss_fn, spy(seen), extra_args=further, jit=False)
    p = params()
    step(p, optax.EmptyState(), X, Y)
    holed = {"w": p["w"], "b": optax.MaskedNode()}
    np.testing.assert_array_equal(seen["aux_value_fn"](holed), loss_fn(p, X, Y))
    gradient = seen["grad_fn"](holed)
    assert gradient["b"] == optax.MaskedNode()
    np.testing.assert_array_equal(gradient["w"], jax.grad(loss_fn)(p, X, Y)["w"])


@pytest.mark.parametrize("name", ["aux_gradients", "value", "grad_fn"])
def test_a_name_that_no_link_knows_or_that_is_taken_is_refused(name):
    with pytest.raises(ValueError, match=rf"extra_args has '{name}'.*aux_grads"):
        ox.make_train_step(loss_fn, optax.sgd(0.1), extra_args={name: loss_fn})


def test_the_gradient_is_taken_where_it_is_asked_for_and_applied_to_the_parameters():
    def ahead(opt_state, p):
        return jax.tree.map(lambda a: a + opt_state, p)

    def update(updates, state, params=None):
        del params
        return jax.tree.map(lambda g: -0.1 * g, updates), state

    tx = optax.GradientTransformation(lambda p: jnp.float32(1.0), update)
    p = params()
    step = ox.make_train_step(loss_fn, tx, gradient_at=ahead)
    want = jax.grad(loss_fn)(ahead(1.0, p), X, Y)
    value = loss_fn(ahead(1.0, p), X, Y)
    new, _, metrics = step(params(), jnp.float32(1.0), X, Y)
    np.testing.assert_allclose(metrics.loss, value, rtol=1e-6)
    for name in p:
        np.testing.assert_allclose(new[name], p[name] - 0.1 * want[name], rtol=1e-5)


def test_nnx_models_get_the_same():
    seen: dict[str, Any] = {}
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))

    def model_loss(model, x, y):
        return jnp.mean((model(x) - y) ** 2)

    def errors(model, x, y):
        return jnp.tanh(model_loss(model, x, y))

    further = {"aux_value_fn": model_loss, "error_mass": errors}
    step = ox.make_train_step(model_loss, spy(seen), extra_args=further, jit=False)
    want = model_loss(model, X, Y)
    state = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    step(model, optax.EmptyState(), X, Y)
    np.testing.assert_array_equal(seen["aux_value_fn"](state), want)
    np.testing.assert_array_equal(seen["error_mass"], jnp.tanh(want))

"""What the leaf driver says when trees, shapes, dtypes or arguments do not fit."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox
from optax_ext import leafwise


def test_an_integer_gradient_is_a_type_error_that_names_the_leaf():
    tx = ox.scale_by_lion_k()
    state = tx.init({"a": {"ids": jnp.ones(2)}})
    with pytest.raises(TypeError, match=r"leaf \['a'\]\['ids'\].*int32.*optax.masked"):
        tx.update({"a": {"ids": jnp.ones(2, jnp.int32)}}, state)


@pytest.mark.parametrize(
    "tx", [ox.scale_by_lion_k(), ox.lion_k(0.1)], ids=["link", "finished optimizer"]
)
def test_an_integer_parameter_is_a_type_error_that_names_the_leaf(tx):
    with pytest.raises(TypeError, match=r"leaf \['a'\]\['ids'\].*int32.*optax.masked"):
        tx.init({"a": {"ids": jnp.ones(2, jnp.int32), "w": jnp.ones(2)}})


@pytest.mark.parametrize(
    "tx", [ox.scale_by_lion_k(), ox.lion_k(0.1)], ids=["link", "finished optimizer"]
)
def test_a_leaf_that_is_no_array_is_a_type_error_that_names_it(tx):
    with pytest.raises(
        TypeError, match=r"leaf \['a'\]: a leaf must be an array, got fl"
    ):
        tx.init({"a": 1.0})
    state = tx.init({"a": jnp.asarray(1.0)})
    with pytest.raises(
        TypeError, match=r"leaf \['a'\]: a leaf must be an array, got fl"
    ):
        tx.update({"a": 1.0}, state, {"a": jnp.asarray(1.0)})


def test_a_gradient_leaf_without_state_is_named():
    tx = ox.scale_by_lion_k()
    state = tx.init({"a": jnp.ones(2)})
    with pytest.raises(
        ValueError, match=r"scale_by_lion_k: leaf \['b'\] is in the gradients"
    ):
        tx.update({"a": jnp.ones(2), "b": jnp.ones(2)}, state)


def test_a_state_leaf_without_gradient_is_named():
    tx = ox.scale_by_lion_k()
    state = tx.init({"a": jnp.ones(2), "b": {"c": jnp.ones(2)}})
    with pytest.raises(
        ValueError, match=r"scale_by_lion_k: leaf \['b'\]\['c'\] is missing from"
    ):
        tx.update({"a": jnp.ones(2)}, state)


def test_trees_of_different_containers_are_told_apart():
    tx = ox.scale_by_lion_k()
    state = tx.init([jnp.ones(2), jnp.ones(2)])
    with pytest.raises(ValueError, match=r"the gradients are a tuple tree.* list"):
        tx.update((jnp.ones(2), jnp.ones(2)), state)


@pytest.mark.parametrize("shape", [(3,), (1,), (), (2, 1)], ids=str)
@pytest.mark.parametrize("with_params", [True, False], ids=["params", "no params"])
def test_a_gradient_of_the_wrong_shape_is_named(shape, with_params):
    tx = ox.scale_by_lion_k()
    params = {"w": jnp.ones(2), "x": jnp.ones(2)}
    state = tx.init(params)
    grads = {"w": jnp.ones(2), "x": jnp.ones(shape)}
    with pytest.raises(ValueError, match=r"scale_by_lion_k: leaf \['x'\]"):
        tx.update(grads, state, params if with_params else None)


def test_links_that_are_not_leafwise_name_the_leaf_of_a_wrong_shape():
    tx = ox.scale_by_sophia(estimator=ox.external_hessian_diag())
    params = {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"scale_by_sophia: leaf \['w'\]"):
        tx.update({"w": jnp.ones(3)}, tx.init(params), params, hessian_diag=params)


def needy():
    def update(g, slots, p, t):
        return g + p, slots

    return leafwise(optax.EmptyState, lambda p: (), update, needs_params=True)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (needy, "needy"),
        (ox.add_cautious_decayed_weights, "add_cautious_decayed_weights"),
    ],
    ids=["own", "add_cautious_decayed_weights"],
)
def test_missing_params_are_a_value_error_that_names_the_method(make, name):
    tx = make()
    message = f"^{name} needs the parameters: call tx.update\\(grads, state, params\\)$"
    with pytest.raises(ValueError, match=message):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


def test_a_rule_that_looks_at_traced_values_gets_jaxs_own_error():
    def update(g, slots, p, t):
        return (g if g[0] > 0 else -g), slots

    tx = leafwise(optax.EmptyState, lambda p: (), update)
    state = tx.init({"w": jnp.ones(2)})
    with pytest.raises(jax.errors.TracerBoolConversionError):
        jax.jit(tx.update)({"w": jnp.ones(2)}, state)


def test_unknown_extra_arguments_are_ignored():
    tx = ox.scale_by_lion_k()
    state = tx.init(jnp.ones(2))
    plain, _ = tx.update(jnp.ones(2), state)
    extra, _ = tx.update(jnp.ones(2), state, None, weather="fine", value=jnp.ones(()))
    np.testing.assert_array_equal(plain, extra)

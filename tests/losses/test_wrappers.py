"""Loss wrappers: what each adds, and that they nest."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox

L = ox.losses
rng = np.random.default_rng(0)
X, LABELS = rng.normal(size=(8, 3)), jnp.asarray(rng.integers(0, 4, 8))
PARAMS = {"w": 0.5 * rng.normal(size=(3, 4)), "b": rng.normal(size=4)}


def inputs(dtype=float):
    cast = jax.tree.map(lambda x: jnp.asarray(x, dtype), (PARAMS, X))
    return cast[0], (cast[1], LABELS)


def loss_fn(params, x, labels):
    """Cross-entropy, and its logits."""
    logits = x @ params["w"] + params["b"][None]
    rows = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(rows), logits


def plain(params, x, labels):
    return loss_fn(params, x, labels)[0]


def l2(params):
    return optax.tree.norm(
        jax.tree.map(lambda p: p.astype(float), params), squared=True
    )


WRAPPERS = {
    "flooding": functools.partial(L.flooding, flood_level=1.0, has_aux=True),
    "regularizer": functools.partial(
        L.with_regularizer, penalty_fn=l2, weight=0.1, has_aux=True
    ),
    "z_loss": functools.partial(L.with_z_loss, coef=0.1),
    "gradient_penalty": functools.partial(
        L.with_gradient_penalty, weight=0.2, has_aux=True
    ),
    "perturbation": functools.partial(
        L.with_weight_perturbation, gamma=0.05, has_aux=True
    ),
}


def close(got, want, rtol=1e-9):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol), got, want)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("level", [0.0, 0.5, 3.0])
def test_flooding_turns_the_gradient_round_below_the_level(level):
    params, batch = inputs()
    value, grads = jax.value_and_grad(plain)(params, *batch)
    got, flooded = jax.value_and_grad(L.flooding(plain, flood_level=level))(
        params, *batch
    )
    np.testing.assert_allclose(got, abs(value - level) + level, rtol=1e-14)
    sign = 1.0 if value > level else -1.0
    close(flooded, jax.tree.map(lambda g: sign * g, grads))


def test_at_the_level_flooding_has_no_gradient():
    gradient = jax.grad(L.flooding(jnp.sum, flood_level=2.0))(jnp.ones(2))
    np.testing.assert_array_equal(gradient, np.zeros(2))


@pytest.mark.usefixtures("x64")
def test_a_regularizer_adds_its_penalty():
    params, batch = inputs()
    got = L.with_regularizer(plain, l2, weight=0.3)(params, *batch)
    np.testing.assert_allclose(
        got, plain(params, *batch) + 0.3 * l2(params), rtol=1e-14
    )


@pytest.mark.usefixtures("x64")
def test_z_loss_is_added_to_the_loss_with_its_logits():
    params, batch = inputs()
    got, logits = L.with_z_loss(loss_fn, coef=0.3)(params, *batch)
    want = L.cross_entropy_with_z_loss(logits, LABELS, coef=0.3)
    np.testing.assert_allclose(got, want.mean(), rtol=1e-14)


@pytest.mark.usefixtures("x64")
def test_z_loss_finds_logits_and_mask_in_what_comes_along():
    params, batch = inputs()
    where = jnp.arange(8) < 3

    def with_more(params, *batch):
        loss, logits = loss_fn(params, *batch)
        return loss, {"logits": logits, "where": where}

    got, aux = L.with_z_loss(
        with_more,
        coef=0.3,
        logits_of=lambda aux: aux["logits"],
        where_of=lambda aux: aux["where"],
    )(params, *batch)
    penalty = L.z_loss(aux["logits"][:3], coef=0.3).mean()
    np.testing.assert_allclose(got, plain(params, *batch) + penalty, rtol=1e-14)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("squared", [True, False])
def test_the_gradient_penalty_on_a_quadratic(squared):
    a = jnp.asarray(rng.normal(size=(3, 3)))
    h, x = a @ a.T, jnp.asarray(rng.normal(size=3))
    g = h @ x
    fn = L.with_gradient_penalty(lambda x: x @ h @ x / 2, weight=0.4, squared=squared)
    value, gradient = jax.value_and_grad(fn)(x)
    size = jnp.linalg.norm(g)
    penalty, slope = (size**2, 2 * h @ g) if squared else (size, h @ g / size)
    np.testing.assert_allclose(value, x @ g / 2 + 0.4 * penalty, rtol=1e-12)
    np.testing.assert_allclose(gradient, g + 0.4 * slope, rtol=1e-12)


@pytest.mark.parametrize("squared", [True, False])
def test_at_a_minimum_the_gradient_penalty_is_finite(squared):
    def fn(params):
        return jnp.sum(params["w"] ** 2) + 0 * jnp.sum(params["b"])

    params = {"w": jnp.zeros((2, 2)), "b": jnp.ones(3), "none": None}
    fn = L.with_gradient_penalty(fn, weight=1.0, squared=squared)
    value, grads = jax.value_and_grad(fn)(params)
    assert value == 0
    for leaf in jax.tree.leaves(grads):
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", WRAPPERS)
def test_every_wrapper_keeps_what_comes_along_and_takes_keywords(name):
    params, (x, labels) = inputs()
    wrapped = WRAPPERS[name](loss_fn)
    loss, logits = wrapped(params, x, labels=labels)
    assert loss.shape == ()
    assert logits.shape == (8, 4)
    if name == "z_loss":
        return
    alone = functools.partial(
        WRAPPERS[name].func, **{**WRAPPERS[name].keywords, "has_aux": False}
    )
    np.testing.assert_allclose(alone(plain)(params, x, labels), loss, rtol=1e-14)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("outer", "inner"), [*itertools.permutations(WRAPPERS, 2)], ids="-of-".join
)
def test_wrappers_nest_in_any_order(outer, inner):
    params, batch = inputs()
    nested = WRAPPERS[outer](WRAPPERS[inner](loss_fn))
    value_and_grad = jax.value_and_grad(nested, has_aux=True)
    (loss, logits), grads = jax.jit(value_and_grad)(params, *batch)
    assert loss != plain(params, *batch)
    assert logits.shape == (8, 4)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))
    close(jax.tree.leaves(grads), jax.tree.leaves(value_and_grad(params, *batch)[1]))


@pytest.mark.usefixtures("x64")
def test_order_has_a_meaning():
    params, batch = inputs()
    value, penalty = plain(params, *batch), l2(params)
    level = float(value) + 0.05
    flooded_sum = L.flooding(
        L.with_regularizer(plain, l2, weight=0.1), flood_level=level
    )
    sum_of_flooded = L.with_regularizer(
        L.flooding(plain, flood_level=level), l2, weight=0.1
    )
    got = flooded_sum(params, *batch)
    want = abs(value + 0.1 * penalty - level) + level
    np.testing.assert_allclose(got, want, rtol=1e-14)
    got = sum_of_flooded(params, *batch)
    np.testing.assert_allclose(got, level + 0.05 + 0.1 * penalty, rtol=1e-14)


def all_of_them():
    wrapped = loss_fn
    for name in ("z_loss", "gradient_penalty", "perturbation", "regularizer"):
        wrapped = WRAPPERS[name](wrapped)
    return wrapped


@pytest.mark.usefixtures("x64")
def test_vmap_is_a_loop_over_models():
    params, batch = inputs()
    models = jax.tree.map(lambda p: jnp.stack([p, 2 * p, -p]), params)
    gradient = jax.grad(all_of_them(), has_aux=True)
    mapped = jax.vmap(lambda p: gradient(p, *batch))(models)
    for i in range(3):
        one = jax.tree.map(lambda p, i=i: p[i], models)
        close(jax.tree.map(lambda g, i=i: g[i], mapped), gradient(one, *batch))


@pytest.mark.parametrize("has_aux", [True, False])
def test_a_train_step_takes_a_wrapped_loss_as_any_other(has_aux):
    params, batch = inputs(jnp.float32)
    wrapped = all_of_them()
    fn = wrapped if has_aux else lambda *args: wrapped(*args)[0]
    tx = optax.sgd(0.1)
    step = ox.make_train_step(fn, tx, has_aux=has_aux, donate=False)
    after, _, metrics = step(params, tx.init(params), *batch)
    (value, logits), grads = jax.value_and_grad(wrapped, has_aux=True)(params, *batch)
    np.testing.assert_allclose(metrics.loss, value, rtol=1e-6)
    close(after, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), rtol=2e-5)
    if has_aux:
        np.testing.assert_allclose(metrics.aux, logits, rtol=1e-5)


def test_a_train_step_of_single_examples_takes_wrapped_losses():
    params, batch = inputs(jnp.float32)
    fn = L.with_regularizer(plain, l2, weight=0.1)
    tx = optax.sgd(0.1)
    step = ox.make_train_step(fn, tx, per_example_grads=True, donate=False)
    _, _, metrics = step(params, tx.init(params), *batch)
    np.testing.assert_allclose(metrics.loss, fn(params, *batch), rtol=1e-5)


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_short_parameters_get_gradients_in_their_dtype(name, dtype):
    params, batch = inputs(dtype)
    (loss, _), grads = jax.jit(
        jax.value_and_grad(WRAPPERS[name](loss_fn), has_aux=True)
    )(params, *batch)
    assert jnp.isfinite(loss)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(dtype)}
    if name != "perturbation":  # which adds nothing to the value
        assert loss.dtype == jnp.float32


def test_what_does_not_fit_is_named():
    params, batch = inputs(jnp.float32)

    def rows(params, x, labels):
        return (x @ params["w"])[:, 0]

    for make in (
        functools.partial(L.flooding, flood_level=0.1),
        functools.partial(L.with_regularizer, penalty_fn=l2, weight=0.1),
        functools.partial(L.with_gradient_penalty, weight=0.1),
    ):
        with pytest.raises(AssertionError, match="loss_fn must return a scalar"):
            make(rows)(params, *batch)
    penalized = L.with_regularizer(plain, lambda p: p["b"], weight=0.1)
    with pytest.raises(AssertionError, match="penalty_fn must return a scalar"):
        penalized(params, *batch)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: L.flooding(plain, flood_level=-1.0), "flooding: flood_level"),
        (lambda: L.with_z_loss(loss_fn, coef=-1.0), "with_z_loss: coef"),
        (
            lambda: L.with_gradient_penalty(plain, weight=-1.0),
            "with_gradient_penalty: weight",
        ),
    ],
)
def test_hyperparameters_outside_their_range_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

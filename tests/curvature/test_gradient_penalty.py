"""`add_gradient_norm_penalty` and `gradient_regularized_value_and_grad`."""

# Arrays and trees, which the types of jax and optax leave open.
# pyright: reportOperatorIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox

MODES = pytest.mark.parametrize("mode", ["forward", "backward", "double_backprop"])
rng = np.random.default_rng(0)
ROOT = rng.normal(size=(5, 5))
START = {"a": rng.normal(size=(2, 2)), "b": rng.normal(size=1)}


def hessian(dtype=float):
    return jnp.asarray(ROOT @ ROOT.T, dtype)


def start(dtype=float):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), START)


def flat(tree):
    return jnp.concatenate([jnp.ravel(tree["a"]), tree["b"]])


def unflat(vector):
    return {"a": vector[:4].reshape(2, 2), "b": vector[4:]}


def quadratic(x):
    v = flat(x)
    return v @ hessian(v.dtype) @ v / 2


def quartic(x):
    return quadratic(x) + jnp.sum(flat(x) ** 4)


def emitted(tx, x, f, g=None):
    g = jax.grad(f)(x) if g is None else g
    return tx.update(g, tx.init(x), x, value_fn=f)[0]


def assert_close(got, want, rtol=1e-12):
    np.testing.assert_allclose(flat(got), flat(want), rtol=rtol, atol=rtol)


@pytest.mark.usefixtures("x64")
@MODES
@pytest.mark.parametrize("eps", [0.01, 0.5, 3.0])
def test_on_a_quadratic_every_difference_is_the_hessian_times_the_gradient(mode, eps):
    x = start()
    tx = ox.add_gradient_norm_penalty(gamma=0.3, eps=eps, mode=mode)
    h, g = hessian(), flat(jax.grad(quadratic)(x))
    # Cancellation in a difference over eps = 0.01: a hundred roundings.
    assert_close(emitted(tx, x, quadratic), unflat(g + 0.3 * h @ g))


@pytest.mark.usefixtures("x64")
def test_where_gamma_is_eps_it_is_the_gradient_uphill():
    x = start()
    tx = ox.add_gradient_norm_penalty(gamma=0.2, eps=0.2)
    g = jax.grad(quartic)(x)
    uphill = jax.tree.map(lambda x, g: x + 0.2 * g, x, g)
    assert_close(emitted(tx, x, quartic), jax.grad(quartic)(uphill), 1e-14)


@MODES
def test_without_strength_it_changes_nothing(mode):
    x = start()
    g = jax.grad(quartic)(x)
    tx = ox.add_gradient_norm_penalty(gamma=0.0, mode=mode)
    np.testing.assert_array_equal(flat(emitted(tx, x, quartic)), flat(g))


@pytest.mark.usefixtures("x64")
@MODES
def test_differences_approach_the_slope_of_the_penalty(mode):
    x = start()

    def squared(x):
        return jnp.sum(flat(jax.grad(quartic)(x)) ** 2) / 2

    def norm(x):
        return jnp.linalg.norm(flat(jax.grad(quartic)(x)))

    g = flat(jax.grad(quartic)(x))
    for penalty, normalize in ((squared, False), (norm, True)):
        tx = ox.add_gradient_norm_penalty(0.7, 1e-7, mode, normalize)
        want = unflat(g + 0.7 * flat(jax.grad(penalty)(x)))
        # First order in eps times |g| of some tens, or rounding over eps.
        assert_close(emitted(tx, x, quartic), want, 1e-4)


@pytest.mark.usefixtures("x64")
def test_normalized_with_gamma_equal_to_eps_it_is_sharpness_aware():
    x = start()
    tx = ox.add_gradient_norm_penalty(0.1, 0.1, normalize=True)
    sam = ox.sharpness_aware(optax.identity(), rho=0.1)
    assert_close(emitted(tx, x, quartic), emitted(sam, x, quartic))


@MODES
@pytest.mark.parametrize("normalize", [True, False])
def test_a_zero_gradient_stays_zero(mode, normalize):
    x = jax.tree.map(jnp.zeros_like, start())
    tx = ox.add_gradient_norm_penalty(mode=mode, normalize=normalize)
    assert not flat(emitted(tx, x, quartic)).any()


@MODES
def test_it_evaluates_one_gradient_or_one_product(mode):
    calls = []

    def counted(x):
        calls.append(1)
        return quartic(x)

    x = start()
    g = jax.grad(quartic)(x)
    emitted(ox.add_gradient_norm_penalty(mode=mode), x, counted, g)
    assert len(calls) == 1  # a product evaluates the function once, with tangents


def test_frozen_leaves_do_not_move():
    x = {"w": jnp.ones(2), "frozen": jnp.full(2, 5.0, jnp.bfloat16)}

    def f(p):
        assert p["frozen"].dtype == jnp.bfloat16
        return jnp.sum(p["w"] ** 2 * p["frozen"].astype(jnp.float32)) / 2

    g = {"w": 5 * x["w"], "frozen": None}
    out = emitted(ox.add_gradient_norm_penalty(gamma=0.1), x, f, g)
    assert out["frozen"] is None
    # g + gamma H g, H = 5; differences in float32 over eps = 0.05 lose 1e-5.
    np.testing.assert_allclose(out["w"], [7.5, 7.5], rtol=1e-5)


def test_a_missing_function_or_parameters_are_named():
    x = start()
    tx = ox.add_gradient_norm_penalty()
    with pytest.raises(ValueError, match=r"add_gradient_norm_penalty.*'value_fn'"):
        tx.update(x, tx.init(x), x)
    with pytest.raises(ValueError, match=r"add_gradient_norm_penalty.*parameters"):
        tx.update(x, tx.init(x), value_fn=quartic)


@pytest.mark.parametrize(
    ("argument", "value"), [("gamma", -1.0), ("eps", 0.0), ("mode", "central")]
)
def test_hyperparameters_outside_their_range_are_refused_by_name(argument, value):
    with pytest.raises(ValueError, match=f"add_gradient_norm_penalty: {argument}"):
        ox.add_gradient_norm_penalty(**{argument: value})
    with pytest.raises(ValueError, match=f"value_and_grad: {argument}"):
        ox.gradient_regularized_value_and_grad(quartic, **{argument: value})


@pytest.mark.usefixtures("x64")
@MODES
def test_the_function_returns_the_gradient_of_the_link_and_the_penalised_loss(mode):
    x = start()
    value, grads = ox.gradient_regularized_value_and_grad(
        quartic, gamma=0.3, eps=0.02, mode=mode
    )(x)
    g = flat(jax.grad(quartic)(x))
    np.testing.assert_allclose(value, quartic(x) + 0.15 * g @ g, rtol=1e-14)
    tx = ox.add_gradient_norm_penalty(gamma=0.3, eps=0.02, mode=mode)
    assert_close(grads, emitted(tx, x, quartic), 1e-14)


@pytest.mark.usefixtures("x64")
def test_by_double_backpropagation_it_differentiates_the_loss_wrapper():
    x = start()
    ours = ox.gradient_regularized_value_and_grad(
        quartic, gamma=0.3, mode="double_backprop"
    )
    loss = ox.losses.with_gradient_penalty(quartic, weight=0.15, squared=True)
    (value, grads), (want, slope) = ours(x), jax.value_and_grad(loss)(x)
    np.testing.assert_allclose(value, want, rtol=1e-14)
    assert_close(grads, slope)


def test_aux_is_that_at_the_parameters_and_arguments_are_handed_on():
    def loss_fn(x, scale, *, shift):
        return scale * quadratic(x) + shift, flat(x)

    regularized = ox.gradient_regularized_value_and_grad(loss_fn, has_aux=True)
    x = start()
    (value, aux), grads = jax.jit(regularized)(x, jnp.float32(2.0), shift=1.0)
    np.testing.assert_array_equal(aux, flat(x))
    g = 2 * hessian() @ flat(x)
    # One part in a million of float32, and the difference over eps = 0.05.
    np.testing.assert_allclose(flat(grads), g + 0.1 * hessian() @ g, rtol=2e-4)
    want = 2 * quadratic(x) + 1 + 0.025 * g @ g
    np.testing.assert_allclose(value, want, rtol=1e-5)


def test_the_function_keeps_bfloat16_gradients_and_returns_a_float32_loss():
    x = start(jnp.bfloat16)
    value, grads = ox.gradient_regularized_value_and_grad(
        quartic, mode="double_backprop"
    )(x)
    assert value.dtype == jnp.float32
    assert jax.tree.map(lambda g: g.dtype, grads) == {
        "a": jnp.bfloat16,
        "b": jnp.bfloat16,
    }

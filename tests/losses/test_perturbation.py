"""Adversarial and robust weight perturbation."""

# Arrays, trees and flax models, which the types of jax and optax leave open.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportReturnType=false, reportOptionalMemberAccess=false

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ext as ox

AWP, RWP = ox.losses.awp_value_and_grad, ox.losses.rwp_value_and_grad
WITH = ox.losses.with_weight_perturbation
rng = np.random.default_rng(0)
X, Y = rng.normal(size=(6, 3)), rng.normal(size=(6, 2))
PARAMS = {
    "in": rng.normal(size=(3, 4)),
    "bias": rng.normal(size=4),
    "out": rng.normal(size=(4, 2)),
}


def inputs(dtype=float):
    cast = jax.tree.map(lambda x: jnp.asarray(x, dtype), (PARAMS, X, Y))
    return cast[0], cast[1:]


def losses(params, x, y):
    hidden = jax.nn.relu(x @ params["in"] + params["bias"][None])
    return jnp.mean((hidden @ params["out"] - y) ** 2, axis=-1)


def loss(params, x, y):
    return jnp.mean(losses(params, x, y))


def norm(x):
    return float(jnp.linalg.norm(jnp.ravel(x)))


def moved_by(make, params, batch):
    """d, from the gradient of a loss that is linear where it is evaluated."""
    # Of sum(w^2)/2 the gradient at w + d is w + d.
    _, grads = make(lambda p, *_: 0.5 * sum(jnp.sum(w**2) for w in jax.tree.leaves(p)))(
        params, *batch
    )
    return jax.tree.map(lambda at, w: at - w, grads, params)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("gamma", [0.01, 0.3])
def test_each_kernel_moves_by_gamma_of_its_norm_and_biases_stay(gamma):
    params, batch = inputs()
    d = moved_by(lambda f: AWP(f, gamma=gamma, ascent_loss_fn=loss), params, batch)
    g = jax.grad(loss)(params, *batch)
    for name in ("in", "out"):
        ratio = norm(d[name]) / norm(params[name])
        np.testing.assert_allclose(ratio, gamma, rtol=1e-12)
        unit = g[name] / norm(g[name])
        np.testing.assert_allclose(d[name] / norm(d[name]), unit, rtol=1e-9)
    np.testing.assert_array_equal(d["bias"], np.zeros(4))


@pytest.mark.usefixtures("x64")
def test_value_and_gradient_are_those_at_the_perturbed_weights():
    params, batch = inputs()
    d = moved_by(lambda f: AWP(f, gamma=0.2, ascent_loss_fn=loss), params, batch)
    there = jax.tree.map(jnp.add, params, d)
    value, grads = AWP(loss, gamma=0.2)(params, *batch)
    want, slope = jax.value_and_grad(loss)(there, *batch)
    np.testing.assert_allclose(value, want, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), grads, slope)
    assert AWP(loss, gamma=1e-3)(params, *batch)[0] > loss(params, *batch)


@pytest.mark.parametrize("make", [AWP, lambda f, gamma: RWP(losses, gamma=gamma)])
def test_gamma_zero_is_the_plain_gradient(make):
    params, batch = inputs(jnp.float32)
    got = make(loss, gamma=0.0)(params, *batch)
    want = jax.value_and_grad(loss)(params, *batch)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.usefixtures("x64")
def test_a_rescaling_that_cancels_changes_nothing():
    params, batch = inputs()
    scaled = {
        "in": 7 * params["in"],
        "bias": 7 * params["bias"],
        "out": params["out"] / 7,
    }
    got, want = (AWP(loss, gamma=0.1)(p, *batch)[0] for p in (scaled, params))
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_weights_or_gradients_of_zero_do_not_move():
    params = {"w": jnp.zeros((2, 2)), "u": jnp.ones((2, 2))}

    def fn(p):
        return jnp.sum(p["w"]) + 0 * jnp.sum(p["u"] ** 2)

    value, grads = AWP(fn, gamma=0.5)(params)
    assert value == 0
    np.testing.assert_array_equal(grads["w"], np.ones((2, 2)))
    np.testing.assert_array_equal(grads["u"], np.zeros((2, 2)))


@pytest.mark.parametrize("size", [1e-12, 1e18, 1e30])
def test_gradients_of_any_size_give_the_same_perturbation(size):
    def fn(w):
        return size * jnp.sum(w)

    value, _ = AWP(fn, gamma=0.5)(jnp.ones((2, 2)))
    np.testing.assert_allclose(value / size, 6, rtol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("make", ["awp", "rwp"])
def test_a_mask_says_which_leaves_move(make):
    params, batch = inputs()
    mask = {"in": False, "bias": True, "out": False}
    for given in (mask, lambda p: mask):
        if make == "awp":
            d = moved_by(
                lambda f: AWP(f, gamma=0.1, mask=given, ascent_loss_fn=loss),
                params,
                batch,
            )
            want = norm(params["bias"])
        else:
            kwargs = {"gamma": 0.1, "mask": given, "loss_threshold": 1e9}
            d = rwp_moves(params, batch, **kwargs)
            want = norm(params["bias"])
        np.testing.assert_allclose(norm(d["bias"]), 0.1 * want, rtol=1e-9)
        np.testing.assert_array_equal(d["in"], np.zeros((3, 4)))


@pytest.mark.usefixtures("x64")
def test_eps_bounds_what_a_small_gradient_does():
    def fn(w):
        return 1e-3 * jnp.sum(w)

    value, _ = AWP(fn, gamma=0.5, eps=2e-3)(jnp.ones((2, 2)))
    # |g| = 2e-3 = eps: half of the perturbation.
    np.testing.assert_allclose(value, 1e-3 * (4 + 1), rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_the_wrappers_gradient_is_awps():
    params, batch = inputs()
    kwargs = {"gamma": 0.1, "ascent_loss_fn": lambda p, x, y: -loss(p, x, y)}
    got = jax.jit(jax.value_and_grad(WITH(loss, **kwargs)))(params, *batch)
    want = AWP(loss, **kwargs)(params, *batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), got, want)
    assert got[0] < loss(params, *batch)  # it climbed down


def rwp_moves(params, batch, per_example=losses, **kwargs):
    """d, the perturbation: where the last call of the loss was."""
    points = []

    def spied(p, *args):
        jax.debug.callback(lambda p: points.append(p), p)
        return per_example(p, *args)

    RWP(spied, **kwargs)(params, *batch)
    jax.effects_barrier()
    return jax.tree.map(lambda at, w: jnp.asarray(at) - w, points[-1], params)


@pytest.mark.usefixtures("x64")
def test_rwp_as_printed():
    params, batch = inputs()
    gamma, threshold, steps = 0.3, float(jnp.median(losses(params, *batch))), 4
    kernels = ("in", "out")
    radius = gamma * np.hypot(*(norm(params[k]) for k in kernels))
    climbed = {k: np.zeros(params[k].shape) for k in kernels}
    d = jax.tree.map(jnp.zeros_like, params)

    def small(p):
        l = losses(p, *batch)
        return jnp.sum(jnp.where(l < threshold, l, 0)) / 6

    for _ in range(steps):
        g = jax.grad(small)(jax.tree.map(jnp.add, params, d))
        climbed = {k: climbed[k] + g[k] for k in kernels}
        size = np.hypot(*(norm(climbed[k]) for k in kernels))
        d = {**d, **{k: radius / size * climbed[k] for k in kernels}}
    want = jax.value_and_grad(loss)(jax.tree.map(jnp.add, params, d), *batch)
    got = jax.jit(RWP(losses, gamma=gamma, loss_threshold=threshold, steps=steps))(
        params, *batch
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), got, want)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("steps", [1, 3])
def test_rwps_perturbation_has_gamma_of_the_norm_of_all_kernels(steps):
    params, batch = inputs()
    d = rwp_moves(params, batch, gamma=0.05, loss_threshold=1e9, steps=steps)
    want = 0.05 * np.hypot(norm(params["in"]), norm(params["out"]))
    got = np.hypot(norm(d["in"]), norm(d["out"]))
    np.testing.assert_allclose(got, want, rtol=1e-10)
    np.testing.assert_array_equal(d["bias"], np.zeros(4))


def test_with_no_loss_below_the_threshold_it_is_the_plain_gradient():
    params, batch = inputs(jnp.float32)
    got = RWP(losses, loss_threshold=0.0)(params, *batch)
    want = jax.value_and_grad(loss)(params, *batch)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.usefixtures("x64")
def test_one_step_on_one_kernel_is_awp():
    params, batch = inputs()
    mask = {"in": True, "bias": False, "out": False}
    got = RWP(losses, gamma=0.2, loss_threshold=1e9, steps=1, mask=mask)
    want = AWP(loss, gamma=0.2, mask=mask)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11),
        got(params, *batch),
        want(params, *batch),
    )


@pytest.mark.usefixtures("x64")
def test_an_outlier_does_not_drive_the_perturbation():
    params, (x, y) = inputs()
    points = [
        rwp_moves(params, (x, y.at[0].set(far)), loss_threshold=20.0, steps=3)
        for far in (1e3, 1e4)
    ]
    jax.tree.map(np.testing.assert_array_equal, *points)


@pytest.mark.parametrize("make", [AWP, lambda f, gamma: RWP(losses, gamma=gamma)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_of_short_parameters_keep_their_dtype(make, dtype):
    params, batch = inputs(dtype)
    params["none"] = None
    value, grads = jax.jit(make(loss, gamma=0.1))(params, *batch)
    assert jnp.isfinite(value)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(dtype)}
    assert grads["none"] is None


def test_what_cannot_be_is_named():
    params, batch = inputs(jnp.float32)
    with pytest.raises(ValueError, match="awp_value_and_grad: gamma must lie in"):
        AWP(loss, gamma=-0.1)
    with pytest.raises(ValueError, match="with_weight_perturbation: eps"):
        WITH(loss, eps=-1.0)
    with pytest.raises(ValueError, match="rwp_value_and_grad: steps must be an int"):
        RWP(losses, steps=0)
    with pytest.raises(AssertionError, match="per_example_loss_fn must return a vec"):
        RWP(loss)(params, *batch)

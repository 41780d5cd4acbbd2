"""Scaled gradient descent: one matrix, pairs, and the paper's sensing experiment."""

# Trees of arrays, which the types of optax leave open.
# pyright: reportOperatorIssue=false

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox

PAIR = (("left", "right"),)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def once(tx, grads, params):
    return tx.update(grads, tx.init(params), params)[0]


def pair(layout="nr"):
    params = {"left": normal(7, 2), "right": normal(5, 2, seed=1), "bias": normal(3)}
    grads = {"left": normal(7, 2, seed=2), "right": normal(5, 2, seed=3)}
    grads["bias"] = normal(3, seed=4)
    if layout == "rn":
        params["right"], grads["right"] = params["right"].T, grads["right"].T
    return params, grads


# Full observation: n = 30, true rank 3, fitted rank 6, step 0.3.
RANK, ETA = 3, 0.3


def steps_to_fit(kappa, preconditioned, limit):
    """Steps until XX' is within 1e-6 of M, with condition number kappa."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(30, RANK)))[0]
    m = jnp.asarray(basis * np.geomspace(1, 1 / kappa, RANK) @ basis.T)
    x = jnp.asarray(1e-5 * rng.normal(size=(30, 6)))
    tx = ox.scale_by_scaled_gd(0.1 / kappa) if preconditioned else optax.identity()
    state = tx.init(x)

    def error(x):
        return jnp.linalg.norm(x @ x.T - m) / jnp.linalg.norm(m)

    def step(carry):
        x, k = carry
        u, _ = tx.update((x @ x.T - m) @ x, state, x)
        return x - ETA * u, k + 1

    def goes_on(carry):
        return (error(carry[0]) > 1e-6) & (carry[1] < limit)

    return int(jax.jit(lambda x: jax.lax.while_loop(goes_on, step, (x, 0)))(x)[1])


@pytest.mark.parametrize("kappa", [1, 10, 100, 1000])
def test_the_condition_number_does_not_matter_to_matrix_sensing(kappa, x64):
    # 27, 22, 21, 25 in the specification, from another draw.
    assert 18 <= steps_to_fit(kappa, True, 100) <= 30


def test_it_matters_to_gradient_descent(x64):
    # 67 and 578 in the specification.
    assert 60 <= steps_to_fit(1, False, 1000) <= 75
    assert 500 <= steps_to_fit(10, False, 1000) <= 650


def test_a_matrix_is_divided_by_its_own_damped_gram_matrix(x64):
    x, g = normal(8, 3), normal(8, 3, seed=1)
    got = once(ox.scale_by_scaled_gd(0.3), g, x)
    want = g @ np.linalg.inv(x.T @ x + 0.3 * np.eye(3))
    np.testing.assert_allclose(got, want, rtol=1e-10)


def test_in_a_pair_each_factor_is_divided_by_the_gram_matrix_of_the_other(x64):
    p, g = pair()
    got = once(ox.scale_by_scaled_gd(0.3, PAIR), g, p)
    for name, other in (("left", "right"), ("right", "left")):
        want = g[name] @ np.linalg.inv(p[other].T @ p[other] + 0.3 * np.eye(2))
        np.testing.assert_allclose(got[name], want, rtol=1e-10)
    np.testing.assert_array_equal(got["bias"], g["bias"])


def test_the_two_layouts_are_one_method(x64):
    (p, g), (q, h) = pair("nr"), pair("rn")
    plain = once(ox.scale_by_scaled_gd(0.3, PAIR, "nr"), g, p)
    turned = once(ox.scale_by_scaled_gd(0.3, PAIR, "rn"), h, q)
    np.testing.assert_allclose(turned["left"], plain["left"], rtol=1e-12)
    np.testing.assert_allclose(turned["right"].T, plain["right"], rtol=1e-12)


def test_without_damping_the_product_does_not_depend_on_its_factors(x64):
    p, _ = pair()
    target = normal(7, 5, seed=5)
    mix = normal(2, 2, seed=6) + 3 * jnp.eye(2)

    def product_after_step(left, right):
        residual = left @ right.T - target
        g = {"left": residual @ right, "right": residual.T @ left}
        params = {"left": left, "right": right}
        u = once(ox.scale_by_scaled_gd(0.0, PAIR), g, params)
        return (left - 0.1 * u["left"]) @ (right - 0.1 * u["right"]).T

    np.testing.assert_allclose(
        product_after_step(p["left"] @ mix, p["right"] @ jnp.linalg.inv(mix).T),
        product_after_step(p["left"], p["right"]),
        atol=1e-12,
    )


def test_with_large_damping_it_is_the_gradient_over_the_damping(x64):
    x, g = normal(8, 3), normal(8, 3, seed=1)
    got = 1e9 * once(ox.scale_by_scaled_gd(1e9), g, x)
    np.testing.assert_allclose(got, g, rtol=1e-6)


def test_without_damping_a_singular_matrix_has_its_pseudo_inverse(x64):
    x, g = normal(8, 2) @ normal(2, 3, seed=1), normal(8, 3, seed=2)
    got = once(ox.scale_by_scaled_gd(0.0), g, x)
    np.testing.assert_allclose(got, g @ np.linalg.pinv(x.T @ x), rtol=1e-8)
    zero = once(ox.scale_by_scaled_gd(0.0), g, 0 * x)
    assert not zero.any()


def test_the_damping_may_be_traced(x64):
    x, g = normal(8, 3), normal(8, 3, seed=1)
    tx = ox.scale_by_scaled_gd
    dampings = jnp.array([0.0, 1e-3])
    got = jax.jit(jax.vmap(lambda d: once(tx(d), g, x)))(dampings)
    for u, damping in zip(got, dampings.tolist(), strict=True):
        np.testing.assert_allclose(u, once(tx(damping), g, x), rtol=1e-10)


def test_leaves_that_are_no_matrices_pass():
    p = {"conv": normal(2, 2, 1, 3), "bias": normal(3), "scale": normal()}
    jax.tree.map(np.testing.assert_array_equal, once(ox.scale_by_scaled_gd(), p, p), p)


def test_stacks_of_matrices_are_matrices():
    p = {"a": normal(4, 2), "b": normal(4, 2, seed=1), "c": normal(3)}
    got = once(ox.bucketed(ox.scale_by_scaled_gd()), p, p)
    want = once(ox.scale_by_scaled_gd(), p, p)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5), got, want)


def test_a_nested_pair_is_named_by_its_keys():
    p, g = pair()
    tx = ox.scale_by_scaled_gd(0.3, (("layer/left", "layer/right"),))
    got = once(tx, {"layer": g}, {"layer": p})["layer"]
    want = once(ox.scale_by_scaled_gd(0.3, PAIR), g, p)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ox.scale_by_scaled_gd(-1.0), "damping must lie in"),
        (lambda: ox.scale_by_scaled_gd(right_layout="rr"), "right_layout must be one"),
        (
            lambda: once(ox.scale_by_scaled_gd(1.0, (("left", "r"),)), *pair()[::-1]),
            "'r', which is no matrix of the parameters; their paths are 'bias', 'left'",
        ),
        (
            lambda: once(
                ox.scale_by_scaled_gd(1.0, PAIR, right_layout="rn"), *pair()[::-1]
            ),
            "no common rank with right_layout='rn'",
        ),
        (lambda: ox.scale_by_scaled_gd().update(normal(2, 2), None), "needs the param"),
    ],
)
def test_errors_say_what_to_change(make, message):
    with pytest.raises(ValueError, match=message):
        make()

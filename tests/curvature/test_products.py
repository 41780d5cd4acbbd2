"""Products with curvature matrices against the matrices themselves."""

# pyright: reportIndexIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import optax_ext as ox

RNG = np.random.default_rng(0)
X = RNG.normal(size=(7, 3))
LABELS = RNG.integers(4, size=7)


def parameters(seed=1):
    rng = np.random.default_rng(seed)
    return {
        "in": jnp.asarray(rng.normal(size=(3, 5))),
        "out": jnp.asarray(rng.normal(size=(5, 4))),
    }


def logits_fn(p):
    return jnp.tanh(jnp.asarray(X, p["in"].dtype) @ p["in"]) @ p["out"]


def loss(logits):
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()


def value_fn(p):
    return loss(logits_fn(p))


def flat(function, params):
    vector, unravel = ravel_pytree(params)
    return lambda v: function(unravel(v)), vector, unravel


def matrix_of(product, params):
    """The matrix whose products they are, column by column."""
    vector, unravel = ravel_pytree(params)

    @jax.jit
    def columns(params, eye):
        return jax.vmap(lambda v: ravel_pytree(product(params, unravel(v)))[0])(eye)

    return columns(params, jnp.eye(vector.size, dtype=vector.dtype)).T


def test_hvp_is_the_hessian(x64):
    params = parameters()
    f, vector, _ = flat(value_fn, params)
    got = matrix_of(ox.hvp(value_fn), params)
    want = jax.jit(jax.hessian(f))(vector)
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-14)


def test_gnvp_is_the_jacobian_on_both_sides_of_the_losss_hessian(x64):
    params = parameters()
    z, vector, _ = flat(logits_fn, params)
    j = np.asarray(jax.jit(jax.jacobian(z))(vector)).reshape(28, -1)
    p = np.asarray(jax.nn.softmax(logits_fn(params)))
    h = np.zeros((28, 28))
    for i in range(7):  # of the mean over 7 examples: (diag(p) - p p') / 7
        at = slice(4 * i, 4 * i + 4)
        h[at, at] = (np.diag(p[i]) - np.outer(p[i], p[i])) / 7
    got = matrix_of(ox.gnvp(logits_fn, loss), params)
    np.testing.assert_allclose(got, j.T @ h @ j, rtol=1e-10, atol=1e-14)


def test_gnvp_is_never_negative_where_the_hessian_is(x64):
    params = parameters()
    gauss_newton = np.linalg.eigvalsh(matrix_of(ox.gnvp(logits_fn, loss), params))
    assert gauss_newton.min() > -1e-14
    assert np.linalg.eigvalsh(matrix_of(ox.hvp(value_fn), params)).min() < -1e-2


def test_gnvp_is_the_hessian_where_logits_are_linear(x64):
    x = jnp.asarray(X)
    params = jnp.asarray(RNG.normal(size=(3, 4)))
    got = matrix_of(ox.gnvp(lambda w: x @ w, loss), params)
    want = matrix_of(ox.hvp(lambda w: loss(x @ w)), params)
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("step", [1e-2, 1e-3, None])
def test_finite_differences_err_by_the_square_of_their_step(x64, step):
    """((x + hv)^3 - (x - hv)^3) / 2h = 3 x^2 v + h^2 v^3."""
    x, v = jnp.array([1.0, -2.0, 0.5]), jnp.array([0.3, 0.1, -0.7])
    product = ox.finite_difference_hvp(lambda x: x**3, step)
    delta = np.finfo(np.float64).eps ** (1 / 3) if step is None else step
    h = delta * (1 + np.linalg.norm(x)) / np.linalg.norm(v)
    # The gradient, up to 8, is rounded to 1e-15, and divided by 2h.
    want = 3 * x**2 * v + h**2 * v**3
    np.testing.assert_allclose(
        jax.jit(product)(x, v), want, rtol=0, atol=16 * 2.2e-16 / h
    )


def test_finite_differences_of_a_network_agree_with_hvp(x64):
    params, v = parameters(), parameters(2)
    got = jax.jit(ox.finite_difference_hvp(jax.grad(value_fn)))(params, v)
    want = jax.jit(ox.hvp(value_fn))(params, v)
    h = 6e-6 * (1 + float(optax.tree.norm(params)))
    # h^2 |v|^2 / 6 times a derivative of order 1, and rounding of 1e-16 over h.
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=10 * h**2)


@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float32, 1e-3), (jnp.bfloat16, 0.05)])
def test_the_default_step_suits_the_coarsest_leaf(dtype, rtol):
    """On x^2 the differences are exact but for rounding: 2^-8 / 0.16 in bfloat16."""
    params = {"a": jnp.ones(4, dtype), "b": jnp.ones(3)}
    gradient = jax.grad(
        lambda p: sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in p.values())
    )
    got = jax.jit(ox.finite_difference_hvp(gradient))(params, params)
    assert got["a"].dtype == dtype
    for name in params:
        x = np.asarray(got[name], np.float32)
        np.testing.assert_allclose(x, 2.0, rtol=rtol)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_finite_differences_are_linear_in_the_length_of_the_vector(size):
    product = ox.finite_difference_hvp(lambda x: 3 * x)
    got = jax.jit(product)(jnp.ones(2), jnp.full(2, size))
    np.testing.assert_allclose(got, 3 * size, rtol=1e-3)


def test_holes_stay_holes():
    params = {"a": jnp.ones(2), "b": None, "c": optax.MaskedNode()}

    def f(p):
        return jnp.sum(p["a"] ** 3)

    for product in (ox.hvp(f), ox.finite_difference_hvp(jax.grad(f))):
        got = product(params, params)
        assert got["b"] is None and got["c"] == optax.MaskedNode()
        np.testing.assert_allclose(got["a"], 6.0, rtol=1e-2)


@pytest.mark.parametrize(("probe", "fourth"), [("rademacher", 1), ("gaussian", 3)])
def test_probes_have_the_moments_of_their_distribution(probe, fourth):
    def draw(key):
        return ox.hvp_probe(lambda x: jnp.sum(x**2), jnp.ones(3), key, probe)

    hz, z = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 4096))
    np.testing.assert_array_equal(hz, 2 * z)
    # Standard errors of means of 4096 * 3 draws, times five.
    assert abs(np.mean(z)) < 0.05
    assert abs(np.mean(z**2) - 1) < 0.07
    assert abs(np.mean(z**4) - fourth) < 0.5


def test_a_probe_has_the_dtypes_of_the_parameters():
    params = {"w": jnp.ones(3, jnp.bfloat16), "none": None}
    hz, z = ox.hvp_probe(
        lambda p: jnp.sum(p["w"].astype(jnp.float32) ** 2), params, jax.random.key(0)
    )
    assert hz["w"].dtype == z["w"].dtype == jnp.bfloat16
    assert z["none"] is None


def test_arguments_outside_their_range_are_named():
    with pytest.raises(ValueError, match=r"finite_difference_hvp: step must lie in"):
        ox.finite_difference_hvp(lambda x: x, 0.0)
    with pytest.raises(ValueError, match=r"hvp_probe: probe must be one of 'radem"):
        ox.hvp_probe(jnp.sum, jnp.ones(2), jax.random.key(0), "uniform")

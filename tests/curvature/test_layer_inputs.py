"""TrAct: gradients times the inverse second moments of a layer's inputs."""

# pyright: reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), float)


def once(g, inputs, **options):
    tx = ox.precondition_by_inputs(**options)
    return jax.jit(tx.update)(g, tx.init(g), inputs=inputs)[0]


@pytest.mark.parametrize("rows", [4, 6, 20])
def test_it_is_the_ridge_regression_on_the_step_of_the_outputs(x64, rows):
    x, gz, damping = normal(rows, 6), normal(rows, 3, seed=1), 0.3
    # argmin over D of |X D - N gz|^2 / N + damping |D|^2, as least squares.
    top = np.concatenate([x / rows**0.5, damping**0.5 * np.eye(6)])
    right = np.concatenate([rows**0.5 * gz, np.zeros((6, 3))])
    want = np.linalg.lstsq(top, right, rcond=None)[0]
    got = once(x.T @ gz, x, damping=damping)
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


def test_with_much_damping_it_divides_by_it(x64):
    g = normal(6, 3)
    for rows in (4, 20):
        got = once(g, normal(rows, 6), damping=1e12)
        np.testing.assert_allclose(1e12 * got, g, rtol=1e-10)


def test_with_little_damping_the_change_of_outputs_knows_no_units_of_inputs(x64):
    x, gz = normal(20, 6), normal(20, 3, seed=1)
    for c in (1.0, 100.0):
        got = c * x @ once(c * x.T @ gz, c * x, damping=1e-12)
        want = 20 * x @ np.linalg.lstsq(np.asarray(x), np.asarray(gz), rcond=None)[0]
        np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-8)


def test_leaves_without_rows_pass_and_the_others_know_nothing_of_each_other():
    g = {"a": normal(4, 3), "b": normal(4, 3, seed=1), "bias": normal(3)}
    x = {"a": normal(7, 4), "b": normal(7, 4, seed=1), "bias": None}
    out = once(g, x)
    np.testing.assert_array_equal(out["bias"], g["bias"])
    for name in "ab":
        np.testing.assert_allclose(out[name], once(g[name], x[name]), rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "kernel", "strides", "padding", "dilation"),
    [
        ((2, 7, 6, 3), (3, 2), 1, "SAME", 1),
        ((2, 7, 6, 3), (3, 2), (2, 1), "VALID", 1),
        ((2, 7, 6, 3), (2, 2), 1, ((1, 0), 2), (1, 2)),
        ((2, 9, 3), (4,), 2, 1, 1),
        ((1, 4, 3, 4, 2), (2, 2, 2), 1, "SAME", 1),
    ],
)
def test_rows_times_the_kernel_are_the_convolution(
    shape, kernel, strides, padding, dilation
):
    from flax import linen

    images, kernel = normal(*shape), normal(*kernel, shape[-1], 4, seed=1)
    size = kernel.shape[:-2]
    conv = linen.Conv(
        4, size, strides, padding, kernel_dilation=dilation, use_bias=False
    )
    want = conv.apply({"params": {"kernel": kernel}}, images)
    rows = ox.im2col_inputs(images, kernel.shape, strides, padding, dilation)
    got = rows @ kernel.reshape(-1, 4)
    np.testing.assert_allclose(got, want.reshape(-1, 4), rtol=0, atol=1e-5)


def test_on_a_first_layer_the_output_moves_along_its_gradient(x64):
    # Full-rank inputs, fewer rows than inputs, next to no damping: outputs can move
    # anywhere, and one step of the link is a step of the outputs themselves.
    x, y, w = normal(5, 8), normal(5, 2, seed=1), normal(8, 2, seed=2)

    def loss(z):
        return jnp.mean((z - y) ** 2)

    tx = optax.chain(ox.precondition_by_inputs(1e-7), optax.scale(-1.0))
    g = jax.grad(lambda w: loss(x @ w))(w)
    u, _ = tx.update(g, tx.init(w), w, inputs=x)
    np.testing.assert_allclose(x @ u, -5 * jax.grad(loss)(x @ w), rtol=1e-4)


def test_16_bit_gradients_are_solved_in_float32():
    g, x = normal(6, 3).astype(jnp.bfloat16), normal(9, 6)
    out = once(g, x)
    assert out.dtype == jnp.bfloat16
    want = once(g.astype(jnp.float32), x)
    np.testing.assert_allclose(
        out.astype(jnp.float32), want, rtol=2.0**-8, atol=2.0**-12
    )


def test_what_does_not_fit_is_named():
    g = {"w": jnp.ones((4, 3))}
    with pytest.raises(ValueError, match=r"precondition_by_inputs: leaf \['w'\].*rows"):
        once(g, {"w": jnp.ones((7, 5))})
    with pytest.raises(ValueError, match="needs the extra argument 'inputs'"):
        once(g, None)
    with pytest.raises(ValueError, match="damping must lie in"):
        ox.precondition_by_inputs(0.0)
    with pytest.raises(ValueError, match="padding must be 'SAME'"):
        ox.im2col_inputs(jnp.ones((1, 4, 4, 1)), (2, 2), padding="CIRCULAR")
    with pytest.raises(ValueError, match="im2col_inputs: images of shape"):
        ox.im2col_inputs(jnp.ones((4, 1)), (2,))

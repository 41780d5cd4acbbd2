"""The regulariser for vanishing gradients, and generalised teacher forcing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ext as ox

REGULARIZER = ox.losses.vanishing_gradient_regularizer
ROLLOUT = ox.losses.generalized_teacher_forcing_rollout


def normal(seed, *shape, dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def orthogonal(n=4):
    return jnp.linalg.qr(normal(0, n, n))[0]


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({}, 0.09),
        ({"reduction": "sum"}, 0.54),
        ({"squared_ratio": True}, 0.2601),
        ({"squared_ratio": True, "reduction": "sum"}, 6 * 0.2601),
    ],
)
def test_multiple_of_an_orthogonal_kernel_has_the_closed_form(x64, options, want):
    errors = normal(1, 6, 3, 4)
    got = REGULARIZER(0.7 * orthogonal(), jnp.ones((6, 3, 4)), errors, **options)
    assert got == pytest.approx(want, rel=1e-12)


def test_orthogonal_kernel_has_no_penalty(x64):
    errors = normal(2, 6, 3, 4)
    assert REGULARIZER(orthogonal(), jnp.ones((6, 3, 4)), errors) < 1e-28


def test_regularizer_is_the_printed_formula(x64):
    kernel, slopes, errors = normal(3, 4, 4), normal(4, 6, 3, 4), normal(5, 6, 3, 4)
    back = np.asarray(errors * slopes) @ np.asarray(kernel).T
    q = (back**2).sum(-1) / (np.asarray(errors) ** 2).sum(-1)
    got = REGULARIZER(kernel, slopes, errors)
    assert got == pytest.approx(((np.sqrt(q) - 1) ** 2).mean(), rel=1e-12)
    got = REGULARIZER(kernel, slopes, errors, squared_ratio=True, reduction="sum")
    assert got == pytest.approx(((q - 1) ** 2).sum(0).mean(), rel=1e-12)


def test_the_size_of_the_errors_does_not_matter():
    kernel, slopes, errors = (
        normal(i, *s, dtype=jnp.float32)
        for i, s in ((6, (4, 4)), (7, (6, 3, 4)), (8, (6, 3, 4)))
    )
    want = REGULARIZER(kernel, slopes, errors)
    for size in (1e-8, 1e30):
        np.testing.assert_allclose(
            REGULARIZER(kernel, slopes, size * errors), want, rtol=1e-5
        )


def test_gradient_agrees_with_differences_and_goes_to_the_kernel_alone(x64):
    arguments = normal(9, 3, 3), normal(10, 4, 2, 3), normal(11, 4, 2, 3)
    kernel, slopes, errors = jax.grad(REGULARIZER, (0, 1, 2))(*arguments)
    assert not slopes.any()
    assert not errors.any()
    h, want, value = 1e-6, np.zeros((3, 3)), jax.jit(REGULARIZER)
    for i in np.ndindex(3, 3):
        step = np.zeros((3, 3))
        step[i] = h
        both = (value(arguments[0] + s, *arguments[1:]) for s in (step, -step))
        high, low = map(float, both)
        want[i] = (high - low) / (2 * h)
    np.testing.assert_allclose(kernel, want, rtol=1e-6, atol=1e-8)


def test_errors_below_the_bound_are_left_out():
    kernel = 0.5 * jnp.eye(2)
    errors = jnp.array([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 1e-3], [0.0, 2.0]]])
    slopes = jnp.ones_like(errors)

    def value(**options):
        out, grad = jax.value_and_grad(
            lambda k: REGULARIZER(k, slopes, errors, **options)
        )(kernel)
        assert jnp.isfinite(grad).all()
        return out

    np.testing.assert_allclose(value(), 0.25, rtol=1e-6)
    np.testing.assert_allclose(value(reduction="sum"), 3 * 0.25 / 2, rtol=1e-6)
    summed = value(reduction="sum", bound=1e-4)
    np.testing.assert_allclose(summed, 2 * 0.25 / 2, rtol=1e-6)
    assert value(bound=100.0) == 0


def test_dead_activations_have_a_finite_gradient():
    zeros = jnp.zeros((3, 2, 2))
    value, grad = jax.value_and_grad(REGULARIZER)(jnp.eye(2), zeros, zeros + 1)
    assert value == 1
    np.testing.assert_array_equal(grad, jnp.zeros((2, 2)))


def test_bad_arguments_of_the_regularizer_are_named():
    kernel, x = jnp.eye(2), jnp.ones((3, 1, 2))
    with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum'"):
        REGULARIZER(kernel, x, x, reduction="max")
    with pytest.raises(ValueError, match="bound must lie in"):
        REGULARIZER(kernel, x, x, bound=0.0)
    with pytest.raises(AssertionError, match="recurrent_kernel"):
        REGULARIZER(jnp.eye(3), x, x)
    with pytest.raises(AssertionError, match="activation_grads"):
        REGULARIZER(kernel, x[:2], x)
    with pytest.raises(AssertionError, match="error_signals"):
        REGULARIZER(kernel, x[0], x[0])


def cell(z):
    return jnp.tanh(z @ (0.9 * jnp.eye(3, dtype=z.dtype)) + 0.1)


@pytest.mark.parametrize("forced_features", [3, 2])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_rollout_is_the_loop(x64, alpha, forced_features):
    start, forced = normal(12, 2, 3), normal(13, 5, 2, forced_features)
    got = ROLLOUT(cell, start, forced, alpha)
    z, want = start, []
    for data in forced:
        p = cell(z)
        want.append(p)
        blended = (1 - alpha) * p[:, :forced_features] + alpha * data
        z = jnp.concatenate([blended, p[:, forced_features:]], -1)
    np.testing.assert_allclose(got, jnp.stack(want), rtol=1e-14)


def test_full_forcing_cuts_the_gradient_and_none_is_a_free_run(x64):
    start, forced = normal(14, 3), normal(15, 4, 3)

    def last(z, alpha):
        return ROLLOUT(cell, z, forced, alpha)[-1]

    assert not jax.jacobian(last)(start, 1.0).any()
    free = start
    for _ in range(4):
        free = cell(free)
    np.testing.assert_allclose(last(start, 0.0), free, rtol=1e-14)


def lorenz(z, dt=0.02):
    x, y, w = z
    return z + dt * jnp.stack([10 * (y - x), x * (28 - w) - y, x * y - 8 / 3 * w])


def test_forcing_tames_the_gradient_of_lorenz_63(x64):
    """Norms of the specification: 8867, 1.9e-3 and 9e-26."""
    steps, start = 300, jnp.array([1.0, 2.0, 20.0])
    trajectory = ROLLOUT(lorenz, start, jnp.zeros((steps, 3)), 0.0)
    jacobians = jax.vmap(jax.jacobian(lorenz))(
        jnp.concatenate([start[None], trajectory[:-1]])
    )
    for alpha, norm in ((0.0, 8867), (0.05, 1.9e-3), (0.2, 9e-26)):
        got = jax.jit(
            jax.jacfwd(lambda z, a=alpha: ROLLOUT(lorenz, z, trajectory, a)[-1])
        )(start)
        product = jnp.eye(3)
        for t, jacobian in enumerate(jacobians):
            product = (1 - alpha if t else 1.0) * jacobian @ product
        # Chaos amplifies rounding by the norm itself, 1e4 times 1e-16.
        np.testing.assert_allclose(got, product, rtol=1e-8)
        assert jnp.linalg.norm(got, 2) == pytest.approx(norm, rel=0.06)


def test_optimal_forcing_of_diagonal_jacobians_is_in_closed_form(x64):
    sizes = jnp.array([[1.0, 4.0, 2.0], [0.5, 0.5, 0.5]])
    jacobians = jnp.einsum("bt,ij->btij", sizes, jnp.diag(jnp.array([1.0, -0.5])))
    forcing = ox.losses.optimal_forcing
    assert forcing(jacobians) == pytest.approx(0.5)  # (1 * 4 * 2)^(1/3) = 2
    assert forcing(jacobians, method="max") == pytest.approx(0.75)
    assert forcing(jacobians, method="mean") == pytest.approx(1 - 3 / 7)


@pytest.mark.parametrize("method", ["product", "max", "mean"])
@pytest.mark.parametrize("size", [0.0, 0.5, 1.0])
def test_contracting_models_need_no_forcing(method, size):
    jacobians = size * jnp.tile(jnp.eye(2), (2, 3, 1, 1))
    assert ox.losses.optimal_forcing(jacobians, method=method) == 0


def test_forcing_rises_at_once_falls_slowly_and_is_detached():
    update = ox.losses.update_forcing
    assert update(0.3, 0.8) == pytest.approx(0.8)
    assert update(0.3, 0.1) == pytest.approx(0.3 - 0.001 * 0.2)
    assert update(0.3, 0.1, decay=0.0) == pytest.approx(0.1)
    assert jax.grad(update)(0.3, 0.1) == 0
    jacobians = 2 * jnp.tile(jnp.eye(2), (1, 3, 1, 1))
    assert not jax.grad(ox.losses.optimal_forcing)(jacobians).any()


def test_bad_arguments_of_forcing_are_named():
    z, data = jnp.ones((2, 3)), jnp.ones((4, 2, 3))
    with pytest.raises(ValueError, match="alpha must lie in"):
        ROLLOUT(cell, z, data, 1.5)
    for bad in (data[:, :1], jnp.ones((4, 2, 5)), data[0]):
        with pytest.raises(AssertionError, match="forced_states"):
            ROLLOUT(cell, z, bad, 0.5)
    with pytest.raises(ValueError, match="method must be one of"):
        ox.losses.optimal_forcing(jnp.ones((1, 1, 2, 2)), method="min")
    with pytest.raises(AssertionError, match="jacobians"):
        ox.losses.optimal_forcing(jnp.ones((1, 2, 2)))
    with pytest.raises(ValueError, match="decay must lie in"):
        ox.losses.update_forcing(0.5, 0.5, decay=1.1)

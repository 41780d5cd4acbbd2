"""Distillation from earlier models and from ensembles."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox


def outputs(seed=0, shape=(3, 6, 4)):
    return jnp.asarray(np.random.default_rng(seed).normal(0, 1, shape))


def test_all_weight_on_the_labels_is_the_plain_loss(x64):
    f, y, t = outputs()
    squared = ox.losses.self_distillation_loss(f, y, t, alpha=1.0)
    np.testing.assert_allclose(squared, ((f - y) ** 2).sum(-1) / 2, rtol=1e-15)
    labels = jax.nn.softmax(y)
    entropy = ox.losses.self_distillation_loss(
        f, labels, t, alpha=1.0, kind="cross_entropy"
    )
    want = optax.losses.softmax_cross_entropy(f, labels)
    np.testing.assert_allclose(entropy, want, rtol=1e-15)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5])
def test_the_loss_is_the_printed_mixture(x64, alpha):
    f, y, t = outputs(1)
    squared = ox.losses.self_distillation_loss(f, y, t, alpha=alpha)
    want = alpha / 2 * ((f - y) ** 2).sum(-1) + (1 - alpha) / 2 * ((f - t) ** 2).sum(-1)
    np.testing.assert_allclose(squared, want, rtol=1e-14)
    labels = jax.nn.softmax(y)
    entropy = ox.losses.self_distillation_loss(
        f, labels, t, alpha=alpha, kind="cross_entropy"
    )
    mixed = alpha * labels + (1 - alpha) * jax.nn.softmax(t)
    want = -(mixed * jax.nn.log_softmax(f)).sum(-1)
    np.testing.assert_allclose(entropy, want, rtol=1e-14)


@pytest.mark.parametrize("kind", ["squared", "cross_entropy"])
def test_the_teacher_has_no_gradient(kind):
    f, y, t = outputs(2).astype(jnp.float32)
    grads = jax.grad(
        lambda t: ox.losses.self_distillation_loss(f, y, t, kind=kind).sum()
    )(t)
    np.testing.assert_array_equal(grads, 0)


def kernel_ridge():
    """A kernel matrix with eigenvalues of all sizes, the ridge, and targets."""
    rng = np.random.default_rng(3)
    basis = np.linalg.qr(rng.normal(0, 1, (8, 8)))[0]
    d = np.geomspace(0.05, 3, 8)
    return basis, d, 0.3, rng.normal(0, 1, 8)


def distill(kernel, ridge, y, alpha, steps):
    """Self-distilled kernel ridge regression, each step by its gradient equation.

    Of sum_i l_i + (ridge / 2) c'Kc in f = Kc the gradient in f, times K, is linear.
    """
    teacher = jnp.asarray(y)
    for step in range(steps):
        weight = 1.0 if step == 0 else alpha

        def total(f, weight=weight, teacher=teacher):
            return ox.losses.self_distillation_loss(
                f[:, None], jnp.asarray(y)[:, None], teacher[:, None], alpha=weight
            ).sum()

        zero = jnp.zeros(len(y))
        offset, slope = jax.grad(total)(zero), jax.hessian(total)(zero)
        # K slope f + K offset + ridge f = 0
        teacher = jnp.linalg.solve(
            kernel @ slope + ridge * jnp.eye(len(y)), -kernel @ offset
        )
    return teacher


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_without_labels_the_ridge_filter_is_a_power(x64, steps):
    basis, d, ridge, y = kernel_ridge()
    kernel = jnp.asarray(basis * d @ basis.T)
    want = basis @ ((d / (d + ridge)) ** steps * (basis.T @ y))
    got = distill(kernel, ridge, y, alpha=0.0, steps=steps)
    np.testing.assert_allclose(got, want, atol=1e-13)


def test_with_labels_distillation_tends_to_a_smaller_kernel(x64):
    basis, d, ridge, y = kernel_ridge()
    kernel = jnp.asarray(basis * d @ basis.T)
    alpha = 0.4
    want = basis @ (alpha * d / (alpha * d + ridge) * (basis.T @ y))
    # The error shrinks by (1 - alpha) d / (d + ridge) < 0.55 a step: 0.55^60 < 1e-15.
    got = distill(kernel, ridge, y, alpha=alpha, steps=60)
    np.testing.assert_allclose(got, want, atol=1e-13)


def test_the_optimal_weight_is_that_of_a_grid_search(x64):
    y, a, b = outputs(4, (3, 50))
    got = ox.losses.optimal_distillation_weight(y, a, b)
    grid = jnp.linspace(-1, 2, 3001)
    errors = jax.vmap(lambda w: ((y - w * a - (1 - w) * b) ** 2).sum())(grid)
    assert abs(got - grid[errors.argmin()]) <= 0.5e-3
    want = (y - b) @ (a - b) / ((a - b) @ (a - b))
    np.testing.assert_allclose(got, want, rtol=1e-13)


def test_equal_predictions_have_weight_1_and_a_finite_gradient():
    y, a = jnp.array([1.0, 2.0]), jnp.array([0.5, 0.5])
    value, grads = jax.value_and_grad(ox.losses.optimal_distillation_weight, (0, 1, 2))(
        y, a, a
    )
    assert value == 1
    np.testing.assert_array_equal(jnp.stack(grads), 0)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_probabilities_of_teachers_are_averaged_not_logits(x64, temperature):
    z, teachers = outputs(5)[0], outputs(6)[:2]
    got = ox.losses.ensemble_distillation_loss(z, teachers, temperature=temperature)
    p = jax.nn.softmax(teachers / temperature).mean(0)
    log_q = jax.nn.log_softmax(z / temperature)
    want = temperature**2 * (p * (jnp.log(p) - log_q)).sum(-1)
    np.testing.assert_allclose(got, want, rtol=1e-13)


def test_gradient_is_the_difference_of_the_probabilities(x64):
    z, teachers = outputs(7)[0], outputs(8)[:2]
    grads, none = jax.grad(
        lambda z, t: ox.losses.ensemble_distillation_loss(z, t).sum(), (0, 1)
    )(z, teachers)
    want = jax.nn.softmax(z) - jax.nn.softmax(teachers).mean(0)
    np.testing.assert_allclose(grads, want, rtol=1e-12, atol=1e-15)
    np.testing.assert_array_equal(none, 0)


def test_a_student_of_the_averaged_probabilities_has_no_loss(x64):
    teachers = outputs(9)[:2]
    z = jnp.log(jax.nn.softmax(teachers).mean(0))
    got = ox.losses.ensemble_distillation_loss(z, teachers)
    np.testing.assert_allclose(got, 0, atol=1e-15)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_certain_teachers_and_students_are_finite(size):
    z = jnp.array([[size, 0.0], [0.0, size]])
    for teachers in (z[None], -z[None], jnp.stack([z, -z])):
        for loss in (
            lambda x, t=teachers: ox.losses.ensemble_distillation_loss(x, t).sum(),
            lambda x, t=teachers[0]: ox.losses.self_distillation_loss(
                x, jnp.eye(2), t, kind="cross_entropy"
            ).sum(),
            lambda x, t=teachers[0]: ox.losses.distillation_discriminator_loss(x, t),
        ):
            value, grads = jax.value_and_grad(loss)(z)
            assert jnp.isfinite(value) and jnp.isfinite(grads).all()


def test_the_discriminator_is_cross_entropy_with_student_first(x64):
    student, teacher = outputs(10, (2, 5, 2))
    rows = jnp.concatenate([student, teacher])
    target = jnp.concatenate([jnp.array([[1.0, 0.0]] * 5), jnp.array([[0.0, 1.0]] * 5)])
    want = optax.losses.sigmoid_binary_cross_entropy(rows, target).mean()
    got = ox.losses.distillation_discriminator_loss(student, teacher)
    np.testing.assert_allclose(got, want, rtol=1e-14)
    both = jax.grad(ox.losses.distillation_discriminator_loss, (0, 1))(student, teacher)
    assert all(jnp.abs(g).min() > 0 for g in both)


def test_mistakes_are_named():
    f, y, t = outputs()
    loss = ox.losses.self_distillation_loss
    with pytest.raises(ValueError, match="kind must be one of"):
        loss(f, y, t, kind="kl")
    with pytest.raises(ValueError, match="alpha must lie"):
        loss(f, y, t, alpha=1.5)
    with pytest.raises(AssertionError, match="targets must have the shape"):
        loss(f, y[:2], t)
    with pytest.raises(AssertionError, match="teacher must have the shape"):
        loss(f, y, t[:2])
    with pytest.raises(AssertionError, match="must have one shape"):
        ox.losses.optimal_distillation_weight(f, y, t[:2])
    with pytest.raises(AssertionError, match=r"teacher_logits must be \[models"):
        ox.losses.ensemble_distillation_loss(f, t)
    with pytest.raises(ValueError, match="temperature must lie"):
        ox.losses.ensemble_distillation_loss(f, t[None], temperature=0.0)
    with pytest.raises(AssertionError, match="axis of 2"):
        ox.losses.distillation_discriminator_loss(f, t)
    with pytest.raises(AssertionError, match="must have one shape"):
        ox.losses.distillation_discriminator_loss(f, t[:2])

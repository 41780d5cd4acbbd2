"""Aligning tokens with those of an encoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ext as ox


def tokens(seed=0, shape=(3, 9, 5)):
    return jnp.asarray(np.random.default_rng(seed).normal(1.0, 2.0, shape))


@pytest.mark.parametrize(("gamma", "eps"), [(0.6, 1e-6), (1.0, 0.5), (0.0, 1e-6)])
def test_tokens_lose_a_share_of_their_mean_and_all_of_their_scale(x64, gamma, eps):
    x = np.asarray(tokens())
    want = x - gamma * x.mean(1, keepdims=True)
    want /= x.std(1, ddof=1, keepdims=True) + eps
    got = ox.losses.spatial_normalize(tokens(), gamma=gamma, eps=eps)
    np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("options", [{}, {"gamma": 0.9, "eps": 0.1}])
def test_a_student_that_is_the_normalised_teacher_has_loss_minus_one(x64, options):
    student = ox.losses.spatial_normalize(tokens(), **options)
    loss = ox.losses.representation_alignment_loss(3 * student, tokens(), **options)
    np.testing.assert_allclose(loss, -np.ones(3), rtol=1e-14)


def test_without_spatial_norm_it_is_minus_the_mean_cosine(x64):
    student, teacher = tokens(1), tokens(2)
    got = ox.losses.representation_alignment_loss(student, teacher, spatial_norm=False)
    lengths = np.linalg.norm(student, axis=-1) * np.linalg.norm(teacher, axis=-1)
    want = -np.mean(np.sum(student * teacher, -1) / lengths, -1)
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_what_all_tokens_share_does_not_count_when_gamma_is_one(x64):
    student, teacher = tokens(3), tokens(4)
    moved = teacher + tokens(5, (3, 1, 5))
    loss = ox.losses.representation_alignment_loss
    np.testing.assert_allclose(
        loss(student, moved, gamma=1.0), loss(student, teacher, gamma=1.0), rtol=1e-11
    )
    assert abs(loss(student, moved) - loss(student, teacher)).max() > 0.01


def test_losses_lie_between_minus_one_and_one(x64):
    teacher = tokens(6)
    opposite = -ox.losses.spatial_normalize(teacher)
    for student in (opposite, tokens(7), 1e3 * tokens(8)):
        loss = ox.losses.representation_alignment_loss(student, teacher)
        assert (abs(loss) <= 1 + 1e-12).all()
    np.testing.assert_allclose(
        ox.losses.representation_alignment_loss(opposite, teacher), 1.0, rtol=1e-12
    )


def test_no_gradient_flows_into_the_teacher():
    student, teacher = (x.astype(jnp.float32) for x in (tokens(9), tokens(10)))
    grad = jax.grad(
        lambda t: ox.losses.representation_alignment_loss(student, t).sum()
    )(teacher)
    assert not grad.any()


@pytest.mark.parametrize("spatial_norm", [True, False])
@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_constant_and_zero_tokens_have_finite_values_and_gradients(spatial_norm, fill):
    x = jnp.full((2, 4, 3), fill)

    def loss(student, teacher):
        return ox.losses.representation_alignment_loss(
            student, teacher, spatial_norm=spatial_norm
        ).sum()

    value, grad = jax.value_and_grad(loss)(x, x)
    assert jnp.isfinite(value)
    assert (abs(grad) < 10).all()
    through = jax.grad(lambda x: ox.losses.spatial_normalize(x).sum())(x)
    assert jnp.isfinite(through).all()


def test_tokens_below_the_floor_count_less(x64):
    student = jnp.array([[[1e-13, 0.0], [2.0, 0.0]]])
    teacher = jnp.array([[[1.0, 0.0], [1.0, 0.0]]])
    loss = ox.losses.representation_alignment_loss(student, teacher, spatial_norm=False)
    np.testing.assert_allclose(loss, [-(0.1 + 1) / 2], rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ox.losses.spatial_normalize(x[:, :1]), "needs at least 2"),
        (lambda x: ox.losses.spatial_normalize(x[0, 0]), "tokens: "),
        (lambda x: ox.losses.spatial_normalize(x.astype(int)), "tokens must be float"),
        (
            lambda x: ox.losses.representation_alignment_loss(x, x[:1]),
            "student, teacher",
        ),
    ],
)
def test_tokens_that_do_not_fit_are_named(call, message):
    with pytest.raises(AssertionError, match=message):
        call(tokens())


def test_eps_must_be_positive():
    with pytest.raises(ValueError, match="eps must lie"):
        ox.losses.spatial_normalize(tokens(), eps=0.0)

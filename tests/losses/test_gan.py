"""The critic of a Wasserstein GAN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ext as ox


def batches(seed=0, shape=(5, 3, 2)):
    rng = np.random.default_rng(seed)
    return (jnp.asarray(rng.normal(size=shape)) for _ in range(2))


def critic(params, x):
    down, up = params
    return jnp.tanh(x.reshape(len(x), -1) @ down) @ up


def weights(seed=1):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=s)) for s in ((6, 4), (4,)))


@pytest.mark.parametrize(
    ("options", "penalty"),
    [
        ({}, 16.0),
        ({"target": 2.0}, 9.0),
        ({"target": 7.0}, 4.0),
        ({"target": 7.0, "one_sided": True}, 0.0),
        ({"one_sided": True}, 16.0),
    ],
)
def test_penalty_of_a_linear_critic_is_the_same_everywhere(options, penalty):
    w = jnp.array([3.0, 4.0])
    x = jnp.array([[0.0, 0.0], [5.0, -2.0], [1e3, 1.0]])
    got = ox.losses.gradient_penalty(lambda x: x @ w, x, **options)
    np.testing.assert_allclose(got, np.full(3, penalty), rtol=1e-6)


def test_slope_is_that_of_each_example(x64):
    x, _ = batches()
    params = weights()
    got = ox.losses.gradient_penalty(lambda x: critic(params, x), x)
    for one, penalty in zip(x, got, strict=True):
        grad = jax.grad(lambda x: critic(params, x[None])[0])(one)
        want = (np.sqrt(np.sum(np.asarray(grad) ** 2)) - 1) ** 2
        np.testing.assert_allclose(penalty, want, rtol=1e-12)


@pytest.mark.parametrize(("one_sided", "penalty"), [(False, 1.0), (True, 0.0)])
def test_constant_critic_has_a_finite_penalty_and_gradient_zero(one_sided, penalty):
    x, _ = (a.astype(jnp.float32) for a in batches())
    params = (jnp.zeros((6, 4)), jnp.zeros(4))

    def loss(params):
        return ox.losses.gradient_penalty(
            lambda x: critic(params, x), x, one_sided=one_sided
        ).mean()

    value, grads = jax.value_and_grad(loss)(params)
    assert value == penalty
    assert not any(g.any() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("one_sided", [False, True])
def test_loss_is_the_printed_formula(x64, one_sided):
    (real, fake), params = batches(2), weights()
    u = jnp.array([0.0, 0.2, 0.5, 0.7, 1.0])

    def critic_fn(x):
        return critic(params, x)

    mixed = u[:, None, None] * real + (1 - u)[:, None, None] * fake
    penalty = ox.losses.gradient_penalty(critic_fn, mixed, one_sided=one_sided)
    want = critic_fn(fake).mean() - critic_fn(real).mean() + 3.0 * penalty.mean()
    got = ox.losses.wgan_gp_loss(
        critic_fn,
        real,
        fake,
        interpolation=u,
        penalty_weight=3.0,
        one_sided=one_sided,
    )
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_key_draws_one_uniform_number_an_example(x64):
    (real, fake), params = batches(3), weights()
    key = jax.random.key(4)
    u = jax.random.uniform(key, (5,))

    def loss(*args, **options):
        return ox.losses.wgan_gp_loss(lambda x: critic(params, x), *args, **options)

    np.testing.assert_allclose(
        loss(real, fake, key), loss(real, fake, interpolation=u), rtol=1e-12
    )


def test_best_slope_between_two_points_exceeds_one_by_their_distance(x64):
    real, fake = jnp.full((2, 1), 3.0), jnp.zeros((2, 1))

    def loss(slope):
        return ox.losses.wgan_gp_loss(
            lambda x: slope * x[:, 0], real, fake, interpolation=jnp.array([0.2, 0.6])
        )

    np.testing.assert_allclose(jax.grad(loss)(1.15), 0.0, atol=1e-13)
    assert jax.grad(loss)(1.1) < 0 < jax.grad(loss)(1.2)


def test_gradient_of_the_parameters_is_that_of_finite_differences(x64):
    (real, fake), (down, up) = batches(5), weights()
    u = jnp.full(5, 0.4)

    def loss(up):
        return ox.losses.wgan_gp_loss(
            lambda x: critic((down, up), x), real, fake, interpolation=u
        )

    grad = jax.grad(loss)(up)
    for i, unit in enumerate(jnp.eye(4)):
        slope = (loss(up + 1e-5 * unit) - loss(up - 1e-5 * unit)) / 2e-5
        np.testing.assert_allclose(grad[i], slope, rtol=1e-7)


X = jnp.ones((2, 3))
SUM = jax.vmap(jnp.sum)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either key or interpolation, got neither"),
        ({"key": jax.random.key(0), "interpolation": X[:, 0]}, "got both"),
        ({"key": jax.random.key(0), "penalty_weight": -1.0}, "penalty_weight must lie"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ox.losses.wgan_gp_loss(SUM, X, X, **options)


def test_target_must_not_be_negative():
    with pytest.raises(ValueError, match="target must lie"):
        ox.losses.gradient_penalty(SUM, X, target=-1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda u: ox.losses.wgan_gp_loss(SUM, X, X[:1], interpolation=u),
            "real, fake",
        ),
        (
            lambda u: ox.losses.wgan_gp_loss(SUM, X, X, interpolation=u[:1]),
            "interpolation must be one number",
        ),
        (
            lambda u: ox.losses.wgan_gp_loss(jnp.sin, X, X, interpolation=u),
            "critic_fn must return one score",
        ),
        (lambda u: ox.losses.gradient_penalty(jnp.sin, X), "fn must return one score"),
        (lambda u: ox.losses.gradient_penalty(SUM, u[0]), "x needs a batch axis"),
    ],
)
def test_shapes_that_do_not_fit_are_named(call, message):
    with pytest.raises(AssertionError, match=message):
        call(jnp.ones(2))

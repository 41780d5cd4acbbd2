"""Auto-encoders whose residual is a score."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ext as ox


def network(seed=0, shape=(4, 3, 2)):
    """A function of one example, and a batch of them."""
    rng = np.random.default_rng(seed)
    size = shape[1] * shape[2]
    down, up, x = (rng.normal(size=s) for s in ((size, 5), (5, size), shape))

    def recon_fn(x):
        return (jnp.tanh(x.ravel() @ down) @ up).reshape(x.shape)

    return recon_fn, jnp.asarray(x)


def test_exact_loss_is_the_error_and_the_jacobian(x64):
    recon_fn, x = network()
    got = ox.losses.contractive_reconstruction_loss(recon_fn, x, 0.3)
    jacobians = jax.vmap(jax.jacrev(recon_fn))(x)
    want = np.sum((jax.vmap(recon_fn)(x) - x) ** 2, (1, 2))
    want += 0.09 * np.sum(jacobians**2, (1, 2, 3, 4))
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_unit_probes_times_the_root_of_their_number_are_exact(x64):
    recon_fn, x = network(1)
    units = np.sqrt(6) * np.eye(6).reshape(6, 1, 3, 2)
    probes = jnp.asarray(np.broadcast_to(units, (6, 4, 3, 2)))
    np.testing.assert_allclose(
        ox.losses.contractive_reconstruction_loss(recon_fn, x, 0.5, probes=probes),
        ox.losses.contractive_reconstruction_loss(recon_fn, x, 0.5),
        rtol=1e-12,
    )


def test_every_example_has_its_own_probes(x64):
    recon_fn, x = network(2)
    probes = jnp.asarray(np.random.default_rng(3).normal(size=(2, 4, 3, 2)))
    got = ox.losses.contractive_reconstruction_loss(recon_fn, x, 0.5, probes=probes)
    error = np.sum((jax.vmap(recon_fn)(x) - x) ** 2, (1, 2))
    for b in range(4):
        jv = [jax.jvp(recon_fn, (x[b],), (probes[k, b],))[1] for k in range(2)]
        want = error[b] + 0.25 * np.mean([np.sum(v**2) for v in jv])
        np.testing.assert_allclose(got[b], want, rtol=1e-12)


def test_best_linear_reconstruction_gives_the_score_of_noisy_gaussian_data(x64):
    s2, sigma = 2.0, 0.3
    x = jnp.sqrt(s2) * jnp.array([[1.0], [-1.0]])
    best = s2 / (s2 + sigma**2)

    def expected(slope):
        return ox.losses.contractive_reconstruction_loss(
            lambda x: slope * x, x, sigma
        ).mean()

    np.testing.assert_allclose(jax.grad(expected)(best), 0.0, atol=1e-15)
    assert jax.grad(expected)(1.01 * best) > 0 > jax.grad(expected)(0.99 * best)
    score = ox.losses.score_from_reconstruction(lambda x: best * x, x, sigma)
    np.testing.assert_allclose(score / x, -0.47847, rtol=1e-5)


def test_denoising_loss_is_the_error_from_the_noisy_example(x64):
    recon_fn, x = network(4)
    noise = jnp.asarray(np.random.default_rng(5).normal(size=x.shape))
    got = ox.losses.denoising_reconstruction_loss(recon_fn, x, noise, 0.7)
    want = np.sum((jax.vmap(recon_fn)(x + 0.7 * noise) - x) ** 2, (1, 2))
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_contractive_and_denoising_losses_agree_to_second_order(x64):
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    x, noise = jnp.full((20, 1), 0.4), jnp.asarray(nodes)[:, None]

    def gap(sigma):
        def recon_fn(x):
            return x + sigma**2 * jnp.sin(3 * x)

        denoising = ox.losses.denoising_reconstruction_loss(recon_fn, x, noise, sigma)
        contractive = ox.losses.contractive_reconstruction_loss(recon_fn, x[:1], sigma)
        return abs(denoising @ weights / weights.sum() - contractive[0]) / sigma**2

    # o(sigma^2): what is left of it falls with a higher power.
    assert gap(0.05) < gap(0.1) / 3.5 < gap(0.2) / 10
    assert gap(0.05) < 0.05


def test_gradients_flow_through_the_jacobian(x64):
    def loss(slope):
        return ox.losses.contractive_reconstruction_loss(
            lambda x: slope * x, jnp.ones((1, 2)), 2.0
        )[0]

    # (a - 1)^2 * 2 + 4 * 2 a^2 at a = 3
    np.testing.assert_allclose(jax.grad(loss)(3.0), 2 * 2 * 2 + 4 * 2 * 2 * 3)


X = jnp.ones((2, 3))


@pytest.mark.parametrize(
    "call",
    [
        lambda sigma: ox.losses.contractive_reconstruction_loss(jnp.sin, X, sigma),
        lambda sigma: ox.losses.denoising_reconstruction_loss(jnp.sin, X, X, sigma),
        lambda sigma: ox.losses.score_from_reconstruction(jnp.sin, X, sigma),
    ],
)
def test_sigma_must_be_positive(call):
    with pytest.raises(ValueError, match="sigma must lie"):
        call(0.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ox.losses.contractive_reconstruction_loss(
                jnp.sin, X, 0.1, probes=X
            ),
            "probes must be",
        ),
        (
            lambda: ox.losses.contractive_reconstruction_loss(
                jnp.sin, X, 0.1, probes=jnp.ones((4, 1, 3))
            ),
            "probes must be",
        ),
        (
            lambda: ox.losses.denoising_reconstruction_loss(jnp.sin, X, X[0], 0.1),
            "x, noise",
        ),
        (
            lambda: ox.losses.score_from_reconstruction(jnp.sum, X, 0.1),
            "recon_fn's result",
        ),
        (
            lambda: ox.losses.score_from_reconstruction(jnp.sin, X[0, 0], 0.1),
            "x needs a batch axis",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_named(call, message):
    with pytest.raises(AssertionError, match=message):
        call()

"""The SDE step of Flow-GRPO and the log-probability of a denoising step."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ext as ox


def shifted_grid(steps, shift=3.0):
    """Noise levels from 1 to 0, dense near 1 for a shift above 1."""
    u = jnp.linspace(1.0, 0.0, steps + 1)
    return shift * u / (1 + (shift - 1) * u)


def reference_step(velocity, sample, sigma, next_sigma, sigma_max, noise, level):
    """The printed formulas in NumPy, for one sigma."""
    dt = sigma - next_sigma
    sigma_k = level * np.sqrt(sigma / (1 - (sigma_max if sigma == 1 else sigma)))
    mean = sample * (1 - sigma_k**2 / (2 * sigma) * dt)
    mean -= velocity * (1 + sigma_k**2 * (1 - sigma) / (2 * sigma)) * dt
    std = sigma_k * np.sqrt(dt)
    after = mean + std * noise
    log_prob = -((after - mean) ** 2) / (2 * std**2) - np.log(std)
    log_prob -= np.log(2 * np.pi) / 2
    return after, log_prob.reshape(len(sample), -1).mean(-1), mean, sigma_k


def random_latents(seed, shape=(3, 2, 4), dtype: Any = np.float64):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for _ in range(3))


@pytest.mark.parametrize("level", [0.7, 0.3, 1.5])
@pytest.mark.parametrize("step", [0, 1, 4, 9])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_step_is_the_printed_one(x64, level, step, shift):
    velocity, sample, noise = random_latents(0)
    grid = shifted_grid(10, shift)
    got = ox.losses.flow_sde_step(
        velocity, sample, grid[step], grid[step + 1], grid[1], noise, noise_level=level
    )
    sigma, next_sigma, sigma_max = (float(grid[i]) for i in (step, step + 1, 1))
    v, x, e = map(np.asarray, (velocity, sample, noise))
    want = reference_step(v, x, sigma, next_sigma, sigma_max, e, level)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-12, atol=1e-14)


def test_velocity_counts_alike_at_every_step_but_the_first(x64):
    level, grid = 0.7, shifted_grid(10)
    zero = jnp.zeros((1, 2))
    for step in range(10):
        sigma, next_sigma = grid[step], grid[step + 1]
        jacobian = jax.jacobian(
            lambda v: ox.losses.flow_sde_step(v, zero, sigma, next_sigma, grid[1], zero)
        )(zero)[2].reshape(2, 2)
        factor = (sigma - next_sigma) * (1 + level**2 / 2 * (step > 0))
        np.testing.assert_allclose(jacobian, -factor * np.eye(2), rtol=1e-13)


def final_variance(steps):
    """Variance of the samples for data N(0, 1) and its exact velocity.

    Both are linear in the sample, so the variance obeys a recursion, without sampling
    error. It starts on the path at 0.9: the first steps after 1 have noise of order 1
    however fine the grid.
    """
    grid = np.linspace(0.9, 0.0, steps + 1)
    one, zero = jnp.ones((1, 1)), jnp.zeros((1, 1))
    variance = 0.9**2 + 0.1**2
    for sigma, next_sigma in itertools.pairwise(grid):
        slope = (2 * sigma - 1) / (sigma**2 + (1 - sigma) ** 2)
        _, _, mean, sigma_k = ox.losses.flow_sde_step(
            slope * one, one, sigma, next_sigma, grid[0], zero
        )
        variance = float(mean[0, 0] ** 2 * variance + sigma_k**2 * (sigma - next_sigma))
    return variance


def test_sde_draws_from_the_data_as_the_grid_gets_finer(x64):
    coarse, fine = (abs(final_variance(steps) - 1) for steps in (40, 80))
    assert coarse < 0.05
    assert fine == pytest.approx(coarse / 2, rel=0.1)  # first order in the step


def test_log_prob_holds_the_next_sample_as_data(x64):
    velocity, sample, noise = random_latents(1)
    sigma, next_sigma, sigma_max = 0.5, 0.3, 0.9
    grad = jax.grad(
        lambda v: ox.losses.flow_sde_step(
            v, sample, sigma, next_sigma, sigma_max, noise
        )[1].sum()
    )(velocity)
    dt, sigma_k = sigma - next_sigma, 0.7
    d_mean = -dt * (1 + sigma_k**2 / 2)
    np.testing.assert_allclose(
        grad, d_mean * noise / (sigma_k * np.sqrt(dt) * 8), rtol=1e-12
    )


def test_every_sample_may_have_its_own_noise_level():
    velocity, sample, noise = random_latents(2, dtype=np.float32)
    sigma = jnp.array([1.0, 0.6, 0.25])
    next_sigma, sigma_max = sigma - jnp.array([0.1, 0.2, 0.25]), jnp.float32(0.9)
    together = ox.losses.flow_sde_step(
        velocity, sample, sigma, next_sigma, sigma_max, noise
    )
    assert together[3].shape == (3,)
    for i in range(3):
        at = slice(i, i + 1)
        alone = ox.losses.flow_sde_step(
            velocity[at], sample[at], sigma[i], next_sigma[i], sigma_max, noise[at]
        )
        for g, w in zip(together, alone, strict=True):
            np.testing.assert_allclose(g[i], w if w.ndim == 0 else w[0], rtol=1e-6)


def test_step_is_the_same_under_jit_and_vmap():
    velocity, sample, noise = random_latents(3, (5, 2, 3), np.float32)
    sigma, next_sigma = jnp.linspace(1.0, 0.2, 5), jnp.linspace(0.9, 0.1, 5)

    def step(v, x, s, n, e):
        return ox.losses.flow_sde_step(v, x, s, n, 0.9, e)

    mapped = jax.vmap(step)(velocity, sample, sigma, next_sigma, noise)
    jitted = jax.jit(jax.vmap(step))(velocity, sample, sigma, next_sigma, noise)
    for i in range(5):
        plain = step(velocity[i], sample[i], sigma[i], next_sigma[i], noise[i])
        for m, j, p in zip(mapped, jitted, plain, strict=True):
            np.testing.assert_allclose(m[i], p, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(j[i], p, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sigma", [1.0, 0.5])
def test_bfloat16_step_is_computed_in_float32(sigma):
    velocity, sample, noise = random_latents(4, dtype=jnp.bfloat16)
    bf16: dict[str, Any] = {
        "velocity": velocity,
        "sample": sample,
        "sigma": jnp.bfloat16(sigma),
        "next_sigma": jnp.bfloat16(0.25),
        "sigma_max": jnp.bfloat16(0.75),
        "noise": noise,
    }
    f32 = {name: x.astype(jnp.float32) for name, x in bf16.items()}
    got, want = ox.losses.flow_sde_step(**bf16), ox.losses.flow_sde_step(**f32)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == jnp.float32
        np.testing.assert_array_equal(g, w)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("event_ndim", [None, 0, 1, 2, 3])
def test_log_prob_is_the_normal_density_over_the_event_axes(x64, event_ndim, reduction):
    sample, mean, _ = random_latents(5)
    batch_ndim = 1 if event_ndim is None else 3 - event_ndim
    std = np.random.default_rng(6).uniform(0.1, 2.0, sample.shape[:batch_ndim])
    got = ox.losses.gaussian_step_log_prob(
        sample, mean, jnp.asarray(std), event_ndim=event_ndim, reduction=reduction
    )
    scale = std.reshape(std.shape + (1,) * (3 - batch_ndim))
    with jax.numpy_rank_promotion("allow"):
        density = jax.scipy.stats.norm.logpdf(sample, mean, scale)
    reduce = jnp.mean if reduction == "mean" else jnp.sum
    want = reduce(density, tuple(range(batch_ndim, 3)))
    np.testing.assert_allclose(got, want, rtol=1e-13)


def test_std_of_a_step_broadcasts_over_the_samples():
    sample, mean, _ = random_latents(7, dtype=np.float32)
    got = ox.losses.gaussian_step_log_prob(
        sample, mean, jnp.array([0.5, 2.0]), event_ndim=1
    )
    for step, std in enumerate((0.5, 2.0)):
        want = ox.losses.gaussian_step_log_prob(sample[:, step], mean[:, step], std)
        np.testing.assert_allclose(got[:, step], want, rtol=1e-6)


def test_log_prob_of_a_tiny_step_is_finite():
    sample = jnp.array([[1e-18, -1e-18]])
    loss, grad = jax.value_and_grad(
        lambda m: ox.losses.gaussian_step_log_prob(sample, m, 1e-18).sum()
    )(jnp.zeros((1, 2)))
    assert loss == pytest.approx(-0.5 - np.log(1e-18) - np.log(2 * np.pi) / 2, rel=1e-6)
    np.testing.assert_allclose(grad, [[5e17, -5e17]], rtol=1e-6)


def test_bad_arguments_of_the_log_prob_are_named():
    x, fn = jnp.zeros((2, 3)), ox.losses.gaussian_step_log_prob
    with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum'"):
        fn(x, x, 1.0, reduction="none")
    for event_ndim in (-1, 3):
        with pytest.raises(ValueError, match="event_ndim must lie in"):
            fn(x, x, 1.0, event_ndim=event_ndim)
    with pytest.raises(AssertionError, match="sample, mean"):
        fn(x, jnp.zeros((3, 2)), 1.0)
    with pytest.raises(AssertionError, match="std must broadcast"):
        fn(x, x, jnp.ones(3))
    with pytest.raises(AssertionError, match="batch axis"):
        fn(x[0], x[0], 1.0)
    with pytest.raises(AssertionError, match=r"\[std must be floating point"):
        fn(x, x, 1)


def test_bad_arguments_of_the_step_are_named():
    x = jnp.zeros((2, 3))
    good = {
        "velocity": x,
        "sample": x,
        "sigma": 0.5,
        "next_sigma": 0.4,
        "sigma_max": 0.9,
        "noise": x,
    }
    for name in good:
        with pytest.raises(AssertionError, match=rf"\[{name} must be floating point"):
            ox.losses.flow_sde_step(**{**good, name: jnp.zeros((2, 3), jnp.int32)})
    for name in ("velocity", "noise"):
        with pytest.raises(AssertionError, match=name):
            ox.losses.flow_sde_step(**{**good, name: jnp.zeros((2, 4))})
    for name in ("sigma", "next_sigma", "sigma_max"):
        with pytest.raises(AssertionError, match=rf"\[{name} must be a scalar"):
            ox.losses.flow_sde_step(**{**good, name: jnp.full(3, 0.5)})
    with pytest.raises(ValueError, match="noise_level must lie in"):
        ox.losses.flow_sde_step(**good, noise_level=0.0)

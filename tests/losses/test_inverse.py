"""Inverse problems: RED-diff and proximal matching."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ext as ox

WEIGHTS = {
    "linear": lambda z: z,
    "sqrt": np.sqrt,
    "square": np.square,
    "log": lambda z: np.log(1 + z),
    "trunc_linear": lambda z: np.minimum(z, 1),
    "power2over3": lambda z: z ** (2 / 3),
    "const": np.ones_like,
}


def problem(seed=0):
    rng = np.random.default_rng(seed)
    mu, noise = (jnp.asarray(rng.normal(size=(4, 3, 2))) for _ in range(2))
    matrix, y = (jnp.asarray(rng.normal(size=s)) for s in ((5, 6), (4, 5)))
    return mu, y, noise, matrix


@pytest.mark.parametrize("weighting", WEIGHTS)
@pytest.mark.parametrize("alpha_bar", [0.3, np.array([0.1, 0.4, 0.6, 0.95])])
def test_gradient_is_the_denoiser_s_error_and_that_of_the_measurement(
    x64, weighting, alpha_bar
):
    mu, y, noise, matrix = problem()
    alpha_bar = jnp.asarray(alpha_bar)
    levels = np.broadcast_to(alpha_bar, (4,))
    x_t = (
        np.sqrt(levels)[:, None, None] * mu + np.sqrt(1 - levels)[:, None, None] * noise
    )

    def loss(mu):
        return ox.losses.red_diff_loss(
            mu,
            y,
            alpha_bar,
            noise,
            lambda x, alpha_bar: jnp.sin(x),
            lambda x: x.reshape(len(x), -1) @ matrix.T,
            reg_weight=0.7,
            obs_weight=1.3,
            weighting=weighting,
        )

    w = WEIGHTS[weighting](np.sqrt((1 - levels) / levels))
    error = np.sin(x_t) - noise
    residual = np.asarray(y) - np.asarray(mu).reshape(4, -1) @ np.asarray(matrix).T
    want = 0.7 * w * (error * mu).mean((1, 2)) + 1.3 * (residual**2).mean(1) / 2
    np.testing.assert_allclose(loss(mu), want, rtol=1e-11)
    pull = 0.7 * w[:, None, None] * error / 6
    push = 1.3 * (residual @ matrix).reshape(mu.shape) / 5
    got = jax.grad(lambda mu: loss(mu).sum())(mu)
    np.testing.assert_allclose(got, pull - push, rtol=1e-10, atol=1e-14)


def test_no_gradient_flows_through_the_denoiser():
    mu, y, noise, matrix = (a.astype(jnp.float32) for a in problem(1))

    def loss(scale):
        return ox.losses.red_diff_loss(
            mu,
            y,
            jnp.float32(0.5),
            noise,
            lambda x, alpha_bar: scale * x,
            lambda x: x.reshape(len(x), -1) @ matrix.T,
        ).sum()

    assert jax.grad(loss)(jnp.float32(2.0)) == 0


def test_fixed_point_of_a_gaussian_prior_is_the_closed_form(x64):
    y, s2, strength = 2.0, 1.5, 0.8
    alpha_bar = jnp.linspace(0.05, 0.95, 19)

    def expected(mu):
        # The denoiser is linear, so noise of -1 and 1 has the expectation of all noise.
        both = jnp.stack([jnp.full((19, 1), -1.0), jnp.full((19, 1), 1.0)])
        rows = jnp.full((19, 1), mu)

        def denoiser(x, alpha_bar):
            a = alpha_bar[:, None]
            return jnp.sqrt(1 - a) * x / (a * s2 + 1 - a)

        losses = [
            ox.losses.red_diff_loss(
                rows,
                jnp.full((19, 1), y),
                alpha_bar,
                noise,
                denoiser,
                lambda x: x,
                reg_weight=strength,
            )
            for noise in both
        ]
        return jnp.mean(jnp.stack(losses))

    pull = np.mean((1 - alpha_bar) / (alpha_bar * s2 + 1 - alpha_bar))
    fixed = y / (1 + strength * pull)
    np.testing.assert_allclose(jax.grad(expected)(fixed), 0.0, atol=1e-14)
    assert abs(jax.grad(expected)(1.01 * fixed)) > 1e-3


@pytest.mark.parametrize("axis", [None, -1, (0, 2)])
def test_proximal_loss_is_the_printed_formula(x64, axis):
    mu, _, other, _ = problem(2)
    axes = (1, 2) if axis is None else axis
    squares = np.sum(np.asarray(mu - other) ** 2, axes)
    got = ox.losses.proximal_matching_loss(mu, other, 3.0, axis=axis)
    np.testing.assert_allclose(got, 1 - np.exp(-squares / 9), rtol=1e-12)


def test_proximal_loss_of_a_large_gamma_is_the_squared_error():
    row = jnp.array([[0.3, -0.4]])
    loss = ox.losses.proximal_matching_loss(row, jnp.zeros((1, 2)), gamma=1e5)
    np.testing.assert_allclose(1e10 * loss, [0.25], rtol=1e-5)


def test_proximal_gradient_vanishes_far_away_and_stays_finite():
    rows = jnp.array([[0.0, 0.0], [1e4, -1e4]])
    value, grad = jax.value_and_grad(
        lambda x: ox.losses.proximal_matching_loss(x, jnp.zeros((2, 2)), 0.1).sum()
    )(rows)
    assert value == 1
    assert not grad.any()


def test_best_constant_of_a_small_gamma_is_the_mode_not_the_mean(x64):
    x = jnp.linspace(-4.0, 6.0, 4001)
    density = 0.3 * jax.scipy.stats.norm.pdf(x, -1.0, 0.15)
    density += 0.7 * jax.scipy.stats.norm.pdf(x, 1.5, 0.6)
    share = (density / density.sum())[:, None]
    candidates = jnp.linspace(-2.0, 2.5, 451)

    def best(gamma):
        def expected(p):
            loss = ox.losses.proximal_matching_loss(
                jnp.full((4001, 1), p), x[:, None], gamma
            )
            return jnp.sum(share[:, 0] * loss)

        return float(candidates[jnp.argmin(jax.vmap(expected)(candidates))])

    # The other mode pulls by less than a cell of the grid.
    assert best(0.3) == pytest.approx(-1.0, abs=0.011)
    assert best(100.0) == pytest.approx(0.75, abs=0.011)


@pytest.mark.parametrize(("total", "stages"), [(40, 4), (43, 4), (10, 3), (7, 1)])
def test_gamma_halves_from_stage_to_stage(total, stages):
    schedule = ox.losses.proximal_matching_gamma_schedule(
        0.25, total, num_stages=stages
    )
    got = jax.jit(jax.vmap(schedule))(jnp.arange(total + 5))
    stage = np.minimum(np.arange(total + 5) // (total // stages), stages - 1)
    np.testing.assert_array_equal(got, 0.25 * 2.0 ** (stages - 1 - stage))


X = jnp.ones((2, 3))


def red_diff(mu=X, y=X, alpha_bar=X[0, 0], noise=X, estimate=X, measured=X, **options):
    return ox.losses.red_diff_loss(
        mu, y, alpha_bar, noise, lambda *_: estimate, lambda _: measured, **options
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: red_diff(weighting="cubic"), "weighting must be one of 'linear'"),
        (lambda: red_diff(reg_weight=-1.0), "reg_weight must lie"),
        (lambda: red_diff(obs_weight=-1.0), "obs_weight must lie"),
        (lambda: ox.losses.proximal_matching_loss(X, X, 0.0), "gamma must lie"),
        (
            lambda: ox.losses.proximal_matching_gamma_schedule(0.0, 9),
            "gamma_min must lie",
        ),
        (
            lambda: ox.losses.proximal_matching_gamma_schedule(1.0, 3),
            "total_steps must lie",
        ),
        (
            lambda: ox.losses.proximal_matching_gamma_schedule(1.0, 9, num_stages=0),
            "num_stages must be",
        ),
    ],
)
def test_bad_hyperparameters_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: red_diff(noise=X[:1]), "mu, noise"),
        (lambda: red_diff(alpha_bar=jnp.ones(3)), "alpha_bar must be a scalar"),
        (lambda: red_diff(estimate=X[:1]), "denoiser_fn's result"),
        (lambda: red_diff(measured=X[:1]), "forward_fn's result"),
        (lambda: ox.losses.proximal_matching_loss(X, X[0], 1.0), "targets"),
        (lambda: ox.losses.proximal_matching_loss(X[0, 0], X[0, 0], 1.0), "batch axis"),
    ],
)
def test_shapes_that_do_not_fit_are_named(call, message):
    with pytest.raises(AssertionError, match=message):
        call()

"""Weights of noise levels, and the diffusion loss that they define."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ext as ox

LOGSNR = np.linspace(-8.0, 8.0, 33)
KINDS = ("elbo", "sigmoid", "iddpm", "v_cosine", "fm_ot", "edm", "edm_monotonic")


def latents(seed=0, shape=(9, 3, 2)):
    """Estimates of eps, x and v that are one estimate, and their targets."""
    rng = np.random.default_rng(seed)
    snr = rng.uniform(0.01, 90.0, shape[0])
    alpha, sigma = (
        s[:, None, None] for s in (np.sqrt(snr / (1 + snr)), np.sqrt(1 / (1 + snr)))
    )
    x, eps, error = (rng.normal(size=shape) for _ in range(3))
    z = alpha * x + sigma * eps
    target = {"eps": eps, "x": x, "v": alpha * eps - sigma * x}
    eps_hat = eps + error
    x_hat = (z - sigma * eps_hat) / alpha
    pred = {"eps": eps_hat, "x": x_hat, "v": alpha * eps_hat - sigma * x_hat}
    return jnp.asarray(snr), pred, target


def test_debiased_weight_of_the_eps_error_is_one_over_the_root_of_the_snr(x64):
    snr = jnp.array([0.25, 1.0, 4.0, 999.0])
    weight = ox.losses.debiased_diffusion_weight(snr)
    np.testing.assert_allclose(weight[:3], [2.0, 1.0, 0.5], rtol=1e-15)
    np.testing.assert_allclose(weight, np.sqrt(1.0 * (1 / snr)), rtol=1e-14)
    assert (jnp.diff(weight) < 0).all()


def test_debiased_weight_is_clamped_and_a_clean_example_has_one():
    snr = jnp.array([8.0, 16.0, 17.0, jnp.inf])
    for name, last in {"eps": 0.25, "x": 4.0, "v": 4 / 17}.items():
        weight = ox.losses.debiased_diffusion_weight(
            snr, max_snr=16.0, parameterization=name
        )
        np.testing.assert_allclose(weight[1:], np.full(3, last), rtol=1e-6)
        assert abs(weight[0] - last) > 0.05


def test_debiased_weight_of_pure_noise_is_infinite_only_for_eps():
    zero = jnp.zeros(1)
    weights = [
        ox.losses.debiased_diffusion_weight(zero, parameterization=name)[0]
        for name in ("eps", "x", "v")
    ]
    assert weights == [jnp.inf, 0.0, 0.0]


def test_p2_weight_with_defaults_is_one_minus_alpha_bar(x64):
    alpha_bar = jnp.linspace(0.001, 0.999, 50)
    weight = ox.losses.p2_diffusion_weight(alpha_bar / (1 - alpha_bar))
    np.testing.assert_allclose(weight, 1 - alpha_bar, rtol=1e-12)
    assert (jnp.diff(weight) < 0).all()


def test_p2_weight_follows_k_and_gamma():
    snr = jnp.array([0.0, 2.0, 7.0])
    weight = ox.losses.p2_diffusion_weight(snr, k=2.0, gamma=0.5)
    np.testing.assert_allclose(weight, [2**-0.5, 0.5, 1 / 3], rtol=1e-6)
    plain = ox.losses.p2_diffusion_weight(snr, gamma=0.0)
    np.testing.assert_array_equal(plain, jnp.ones(3))


@pytest.mark.parametrize("name", ["eps", "x", "v"])
def test_p2_weight_of_clean_and_of_pure_noise_is_the_limit(name):
    ends = jnp.array([0.0, jnp.inf])
    got = ox.losses.p2_diffusion_weight(ends, parameterization=name)
    want = {"eps": [1.0, 0.0], "x": [0.0, 1.0], "v": [0.0, 0.0]}[name]
    np.testing.assert_allclose(got, want, atol=1e-29)
    grad = jax.grad(
        lambda s: ox.losses.p2_diffusion_weight(s, parameterization=name).sum()
    )(ends)
    assert jnp.isfinite(grad).all()


@pytest.mark.parametrize(
    "weight_of",
    [
        ox.losses.debiased_diffusion_weight,
        lambda snr, **k: ox.losses.p2_diffusion_weight(snr, k=0.7, gamma=0.5, **k),
    ],
)
def test_eps_x_and_v_weights_give_one_loss_on_explicit_latents(x64, weight_of):
    snr, pred, target = latents()
    loss = {
        name: weight_of(snr, parameterization=name)
        * np.sum((pred[name] - target[name]) ** 2, (1, 2))
        for name in pred
    }
    np.testing.assert_allclose(loss["x"], loss["eps"], rtol=1e-11)
    np.testing.assert_allclose(loss["v"], loss["eps"], rtol=1e-11)


@pytest.mark.parametrize("weighting", ["elbo", "sigmoid", "edm"])
def test_eps_x_and_v_forms_of_the_loss_agree_on_explicit_latents(x64, weighting):
    snr, pred, target = latents(1)
    losses = [
        ox.losses.weighted_diffusion_loss(
            jnp.asarray(pred[name]),
            jnp.asarray(target[name]),
            jnp.log(snr),
            jnp.linspace(-20.0, -1.0, 9),
            weighting=weighting,
            parameterization=name,
        )
        for name in ("eps", "x", "v")
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-11)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-11)


def test_weighted_loss_is_the_sum_worked_out_by_hand():
    got = ox.losses.weighted_diffusion_loss(
        jnp.array([[1.0, 2.0], [0.0, 1.0]]),
        jnp.array([[0.0, 0.0], [0.0, 3.0]]),
        0.0,
        jnp.array([-2.0, -4.0]),
        weighting=lambda logsnr: 3.0 + logsnr,
        parameterization="v",
    )
    # 1/2 * 3 * 2 * 1/2 * 5 and 1/2 * 3 * 4 * 1/2 * 4
    np.testing.assert_allclose(got, [7.5, 12.0], rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_two_schedules_with_the_same_ends_have_the_same_expected_loss(x64, kind):
    def expected(schedule):
        t = (jnp.arange(4000.0) + 0.5) / 4000
        logsnr, slope = jax.jvp(schedule, (t,), (jnp.ones_like(t),))
        error = (1 + jnp.tanh(logsnr))[:, None]  # of a network, by noise level
        return ox.losses.weighted_diffusion_loss(
            error, jnp.zeros_like(error), logsnr, slope, weighting=kind
        ).mean()

    linear = expected(lambda t: 6 - 12 * t)
    curved = expected(lambda t: 6 - 12 * (t + 0.1 * jnp.sin(2 * jnp.pi * t)))
    # The error of the midpoint rule.
    np.testing.assert_allclose(curved, linear, rtol=1e-5)


def implied(schedule, t, factor):
    """The weight per log-SNR of a plain loss, up to a constant."""
    logsnr, slope = jax.jvp(schedule, (t,), (jnp.ones_like(t),))
    return logsnr, factor(logsnr) / -slope


@pytest.mark.parametrize(
    ("kind", "schedule", "factor"),
    [
        ("iddpm", lambda t: -2 * jnp.log(jnp.tan(jnp.pi * t / 2)), jnp.ones_like),
        # |v err|^2 = |eps err|^2 / sigmoid(lambda) = (1 + exp(-lambda)) |eps err|^2
        (
            "v_cosine",
            lambda t: -2 * jnp.log(jnp.tan(jnp.pi * t / 2)),
            lambda logsnr: 1 / jax.nn.sigmoid(logsnr),
        ),
        # z = (1-t) x + t eps: the velocity eps - x errs by |eps err| / (1-t).
        (
            "fm_ot",
            lambda t: 2 * jnp.log((1 - t) / t),
            lambda logsnr: (1 + jnp.exp(-logsnr / 2)) ** 2,
        ),
    ],
)
def test_weightings_are_those_that_plain_objectives_imply(x64, kind, schedule, factor):
    t = jnp.linspace(0.02, 0.98, 49)
    logsnr, want = implied(schedule, t, factor)
    got = ox.losses.diffusion_weighting(kind)(logsnr)
    np.testing.assert_allclose(got / got[24], want / want[24], rtol=1e-9)


def test_edm_weight_is_the_normal_density_times_the_paper_s_factor(x64):
    got = ox.losses.diffusion_weighting("edm", mean=1.0, std=1.5, sigma_data=0.8)(
        jnp.asarray(LOGSNR)
    )
    density = np.exp(-(((LOGSNR - 1) / 1.5) ** 2) / 2) / (1.5 * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(got, density * (np.exp(-LOGSNR) + 0.64), rtol=1e-12)


def test_edm_monotonic_is_flat_below_the_maximum_of_edm(x64):
    weight = ox.losses.diffusion_weighting("edm_monotonic")
    best, largest = -3.3077775, 0.2710272
    np.testing.assert_allclose(weight(jnp.array([-50.0, best])), largest, rtol=3e-7)
    just_below, just_above = weight(jnp.array([best - 1e-3, best + 1e-3]))
    assert just_above < just_below
    above = jnp.linspace(best + 1e-3, 12.0, 20)
    edm = ox.losses.diffusion_weighting("edm")(above)
    np.testing.assert_allclose(weight(above), edm, rtol=1e-15)


@pytest.mark.parametrize(
    ("mean", "std", "sigma_data"),
    [(2.4, 2.4, 0.5), (0.0, 1.0, 1.0), (6.0, 4.0, 0.5), (9.0, 4.0, 0.3)],
)
def test_edm_monotonic_starts_at_the_largest_of_several_maxima(
    x64, mean, std, sigma_data
):
    grid = jnp.linspace(mean - std**2 - 1, mean + 1, 100_001)
    constants = {"mean": mean, "std": std, "sigma_data": sigma_data}
    edm = ox.losses.diffusion_weighting("edm", **constants)(grid)
    flat = ox.losses.diffusion_weighting("edm_monotonic", **constants)(grid[:1])
    np.testing.assert_allclose(flat[0], edm.max(), rtol=1e-7)


@pytest.mark.parametrize("kind", ["elbo", "sigmoid", "v_cosine", "edm_monotonic"])
def test_monotonic_weightings_do_not_increase_with_the_log_snr(x64, kind):
    weight = ox.losses.diffusion_weighting(kind)(jnp.linspace(-20.0, 20.0, 401))
    assert (jnp.diff(weight) <= 1e-16).all()


def test_bias_moves_the_sigmoid():
    weight = ox.losses.diffusion_weighting("sigmoid", bias=-1.0)
    np.testing.assert_allclose(
        weight(jnp.array([-1.0, 0.0])), [0.5, 0.26894142], rtol=1e-6
    )


def test_a_function_is_returned_as_it_is():
    assert ox.losses.diffusion_weighting(jnp.square) is jnp.square


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_finite_float32_at_extreme_log_snrs(kind, dtype):
    logsnr = jnp.array([-1e4, -200.0, 0.0, 200.0, 1e4], dtype)
    weight = ox.losses.diffusion_weighting(kind)
    assert weight(logsnr).dtype == jnp.float32
    assert jnp.isfinite(weight(logsnr)).all()
    grad = jax.grad(lambda x: weight(x).sum())(logsnr)
    assert grad.dtype == dtype
    assert jnp.isfinite(grad).all()


@pytest.mark.parametrize("kind", ["sigmoid", "iddpm", "edm", "edm_monotonic"])
def test_bounded_losses_stay_finite_at_extreme_log_snrs(kind):
    logsnr, ones = jnp.array([-1e4, 1e4]), jnp.full((2, 3), 0.5)
    for name in ("eps", "x", "v"):

        def loss(pred, logsnr, name=name):
            return ox.losses.weighted_diffusion_loss(
                pred, ones, logsnr, -1.0, weighting=kind, parameterization=name
            ).sum()

        value, grads = jax.value_and_grad(loss, (0, 1))(2 * ones, logsnr)
        assert jnp.isfinite(value)
        assert all(jnp.isfinite(g).all() for g in grads)


def test_weighting_works_under_jit_and_vmap():
    logsnr = jnp.asarray(LOGSNR, jnp.float32)
    for kind in KINDS:
        weight = ox.losses.diffusion_weighting(kind)
        np.testing.assert_allclose(jax.jit(weight)(logsnr), weight(logsnr), rtol=1e-6)
        np.testing.assert_allclose(jax.vmap(weight)(logsnr), weight(logsnr), rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ox.losses.debiased_diffusion_weight(LOGSNR, max_snr=0.0), "max_snr"),
        (lambda: ox.losses.p2_diffusion_weight(LOGSNR, k=0.0), "k must lie"),
        (lambda: ox.losses.p2_diffusion_weight(LOGSNR, gamma=-1.0), "gamma must lie"),
        (
            lambda: ox.losses.p2_diffusion_weight(LOGSNR, parameterization="eta"),
            "parameterization must be one of 'eps', 'x', 'v'",
        ),
        (lambda: ox.losses.diffusion_weighting("vlb"), "kind must be one of 'elbo'"),
        (lambda: ox.losses.diffusion_weighting("edm", std=0.0), "std must lie"),
        (lambda: ox.losses.diffusion_weighting(sigma_data=0.0), "sigma_data must lie"),
    ],
)
def test_bad_hyperparameters_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("shapes", "named"),
    [
        (((3, 2), (3, 1), (3,), (3,)), "pred, target"),
        (((3, 2), (3, 2), (2,), (3,)), "logsnr must be a scalar or one value"),
        (((3, 2), (3, 2), (3,), (3, 1)), "dlogsnr_dt must be a scalar"),
        (((), (), (), ()), "pred needs a batch axis"),
    ],
)
def test_shapes_that_do_not_fit_are_named(shapes, named):
    with pytest.raises(AssertionError, match=named):
        ox.losses.weighted_diffusion_loss(*(jnp.zeros(shape) for shape in shapes))

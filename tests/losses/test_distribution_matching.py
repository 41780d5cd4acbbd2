"""Losses that use a density ratio."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ext as ox

GENERATORS = {  # f of each divergence, and f''(r) r^2 / h(r)
    "rkl": (lambda r: -jnp.log(r), 1.0),
    "kl": (lambda r: r * jnp.log(r), 1.0),
    "js": (lambda r: r * jnp.log(r) - (r + 1) * jnp.log((r + 1) / 2), 1.0),
    "softened_rkl": (lambda r: (r + 1) * jnp.log((r + 1) / r), 1.0),
    "neyman": (lambda r: (1 - r) ** 2 / r, 2.0),
    "hellinger": (lambda r: (1 - jnp.sqrt(r)) ** 2, 0.5),
    "jeffreys": (lambda r: (r - 1) * jnp.log(r), 1.0),
}


def normals(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape)) for shape in shapes]


def test_tiw_is_the_printed_formula_with_a_weight_an_example(x64):
    score, cond, log_ratio, grad, weighting = normals(
        (4, 3, 2), (4, 3, 2), (4,), (4, 3, 2), (4,)
    )
    got = ox.losses.tiw_dsm_loss(score, cond, log_ratio, grad, weighting=weighting)
    squares = np.sum(np.asarray(score - cond - grad) ** 2, (1, 2))
    want = 0.5 * weighting * np.exp(log_ratio) * squares
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_tiw_at_ratio_one_is_denoising_score_matching():
    score, cond = normals((4, 3), (4, 3), seed=1)
    got = ox.losses.tiw_dsm_loss(score, cond, 0.0, jnp.zeros((4, 3)))
    np.testing.assert_allclose(got, ((score - cond) ** 2).sum(-1) / 2, rtol=1e-6)


def test_no_gradient_flows_into_the_ratio_of_tiw():
    score, cond, log_ratio, grad = normals((4, 3), (4, 3), (4,), (4, 3), seed=2)
    grads = jax.grad(
        lambda a, b: ox.losses.tiw_dsm_loss(score, cond, a, b).sum(), (0, 1)
    )(log_ratio, grad)
    assert not any(g.any() for g in grads)


def mixture(x, share, var):
    """Log-density of two Gaussians at -1 and 1."""
    logs = jnp.stack([-((x - m) ** 2) / (2 * var) for m in (-1.0, 1.0)])
    shares = jnp.log(jnp.array([share, 1 - share]))
    shares = shares.reshape((2,) + (1,) * x.ndim)
    return jax.nn.logsumexp(logs + shares, axis=0) - jnp.log(2 * jnp.pi * var) / 2


def test_minimiser_of_tiw_on_biased_data_is_the_unbiased_score(x64):
    var, sigma2 = 0.3**2, 0.5**2
    x0 = jnp.linspace(-6.0, 6.0, 4001)

    def log_ratio_fn(x, t):
        del t
        return mixture(x, 0.5, var + sigma2) - mixture(x, 0.8, var + sigma2)

    for at in (-1.5, 0.1, 0.8):
        x_t = jnp.full_like(x0, at)
        posterior = jax.nn.softmax(
            mixture(x0, 0.8, var) - (x_t - x0) ** 2 / (2 * sigma2)
        )
        log_ratio, slope = ox.losses.log_ratio_and_grad(log_ratio_fn, x_t, 0.0)

        def expected(score, x_t=x_t, p=posterior, log_ratio=log_ratio, slope=slope):
            losses = ox.losses.tiw_dsm_loss(
                jnp.full_like(x0, score), -(x_t - x0) / sigma2, log_ratio, slope
            )
            return jnp.sum(p * losses)

        unbiased = jax.grad(lambda x: mixture(x, 0.5, var + sigma2))(at)
        # The expected loss is a parabola: one Newton step from 0 is its minimum.
        slope_at_0, curvature = (
            jax.grad(expected)(0.0),
            jax.grad(jax.grad(expected))(0.0),
        )
        np.testing.assert_allclose(-slope_at_0 / curvature, unbiased, rtol=1e-9)


def test_log_ratio_and_its_gradient_are_taken_example_by_example(x64):
    x, t = normals((4, 3, 2), (4,), seed=3)
    log_ratio, grad = ox.losses.log_ratio_and_grad(lambda x, t: t * jnp.sum(x**3), x, t)
    np.testing.assert_allclose(log_ratio, t * np.sum(x**3, (1, 2)), rtol=1e-12)
    np.testing.assert_allclose(grad, 3 * t[:, None, None] * x**2, rtol=1e-12)


@pytest.mark.parametrize("f", GENERATORS)
def test_weight_is_the_curvature_of_the_divergence(x64, f):
    generator, factor = GENERATORS[f]
    ratio = jnp.array([0.2, 0.7, 1.0, 3.0, 15.0])
    weight = ox.losses.f_divergence_weight(jnp.log(ratio), f=f, normalize=False)
    curvature = jax.vmap(jax.grad(jax.grad(generator)))(ratio)
    np.testing.assert_allclose(curvature * ratio**2 / weight, factor, rtol=1e-9)


@pytest.mark.parametrize("f", GENERATORS)
def test_normalised_weights_have_mean_one(x64, f):
    (log_ratio,) = normals((64,), seed=4)
    weight = ox.losses.f_divergence_weight(log_ratio, f=f)
    plain = ox.losses.f_divergence_weight(log_ratio, f=f, normalize=False)
    assert float(weight.mean()) == pytest.approx(1.0, abs=2e-5)
    scaled = ox.losses.f_divergence_weight(log_ratio, f=f, eps=1.0)
    np.testing.assert_allclose(scaled, plain / (plain.mean() + 1), rtol=1e-12)


def test_ratios_are_clipped_and_detached():
    log_ratio = jnp.array([-1e4, -1.0, 1.0, 1e4])
    weight = ox.losses.f_divergence_weight(
        log_ratio, f="kl", ratio_min=0.5, ratio_max=2.0, normalize=False
    )
    np.testing.assert_allclose(weight, [0.5, 0.5, 2.0, 2.0])
    unbounded = ox.losses.f_divergence_weight(
        log_ratio, f="kl", ratio_min=1e-9, ratio_max=1e9, normalize=False
    )
    np.testing.assert_allclose(unbounded, np.exp([-10, -1, 1, 10]), rtol=1e-6)
    grad = jax.grad(lambda x: ox.losses.f_divergence_weight(x).max())(log_ratio)
    np.testing.assert_array_equal(grad, jnp.zeros(4))


def three_estimates(seed=5, dtype=jnp.float64):
    return [
        x.astype(dtype) for x in normals((4, 3, 2), (4, 3, 2), (4, 3, 2), seed=seed)
    ]


@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_distillation_gradient_is_the_weighted_difference_of_scores(x64, eps):
    samples, teacher, fake = three_estimates()
    weight = jnp.array([0.5, 1.0, 2.0, 0.0])

    def loss(samples, teacher, fake, weight):
        return ox.losses.f_distill_loss(samples, teacher, fake, weight=weight, eps=eps)

    distance = np.abs(np.asarray(samples - teacher)).mean((1, 2)) + eps
    g = np.asarray(fake - teacher) * (weight / distance)[:, None, None]
    got = loss(samples, teacher, fake, weight)
    np.testing.assert_allclose(got, (g**2).mean((1, 2)) / 2, rtol=1e-11)
    grads = jax.grad(lambda *a: loss(*a).mean(), (0, 1, 2, 3))(
        samples, teacher, fake, weight
    )
    np.testing.assert_allclose(grads[0], g / samples.size, rtol=1e-11, atol=1e-18)
    assert not any(grad.any() for grad in grads[1:])


def test_small_gradients_survive_large_samples_in_float32():
    samples = jnp.full((1, 2), 1e4)
    teacher, fake = samples - 1.0, samples - 1.0 + 2.0**-8
    grad = jax.grad(lambda x: ox.losses.f_distill_loss(x, teacher, fake).sum())(samples)
    # g = 2^-8; x - (x - g) would be a multiple of 2^-10 with an error of a quarter.
    step = np.asarray(fake - teacher) / 2
    np.testing.assert_allclose(grad, step, rtol=2e-6)


def test_weights_of_the_reverse_kl_change_nothing(x64):
    samples, teacher, fake = three_estimates(6)
    ones = ox.losses.f_divergence_weight(jnp.array([1.0, -2.0, 0.3, 4.0]), f="rkl")
    np.testing.assert_allclose(
        ox.losses.f_distill_loss(samples, teacher, fake, weight=ones),
        ox.losses.f_distill_loss(samples, teacher, fake),
        rtol=3e-6,
    )


def test_samples_that_equal_the_teacher_s_estimate_have_a_finite_gradient():
    x = jnp.ones((2, 3))
    value, grad = jax.value_and_grad(
        lambda x: ox.losses.f_distill_loss(x, jnp.ones((2, 3)), jnp.ones((2, 3))).sum()
    )(x)
    assert value == 0 and not grad.any()


X, V = jnp.ones((2, 3)), jnp.ones(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ox.losses.f_divergence_weight(V, f="tv"), "f must be one of 'rkl'"),
        (lambda: ox.losses.f_divergence_weight(V, ratio_min=0.0), "ratio_min must"),
        (lambda: ox.losses.f_divergence_weight(V, ratio_max=0.0), "ratio_max must"),
        (lambda: ox.losses.f_divergence_weight(V, eps=-1.0), "eps must lie"),
        (lambda: ox.losses.f_distill_loss(X, X, X, eps=-1.0), "eps must lie"),
    ],
)
def test_bad_hyperparameters_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ox.losses.tiw_dsm_loss(X, X[:1], V, X), "cond_score"),
        (lambda: ox.losses.tiw_dsm_loss(X, X, V, X[0]), "grad_log_ratio"),
        (lambda: ox.losses.tiw_dsm_loss(X, X, jnp.ones(3), X), "log_ratio must be"),
        (lambda: ox.losses.tiw_dsm_loss(X, X, V, X, weighting=X), "weighting must be"),
        (lambda: ox.losses.f_distill_loss(X, X[0], X), "teacher_x0"),
        (lambda: ox.losses.f_distill_loss(X, X, X[0]), "fake_x0"),
        (lambda: ox.losses.f_distill_loss(X, X, X, weight=X), "weight must be"),
        (
            lambda: ox.losses.log_ratio_and_grad(lambda x, t: x.sum(), X, jnp.ones(3)),
            "t must be a scalar or one value an example",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_named(call, message):
    with pytest.raises(AssertionError, match=message):
        call()

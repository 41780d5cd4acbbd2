"""The natural gradient of proper scores."""

# Arrays, trees and flax models, which the types of jax and optax leave open.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportReturnType=false, reportOptionalMemberAccess=false

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy import stats

import optax_ext as ox

LOSS = ox.losses.natural_gradient_loss
rng = np.random.default_rng(0)
LOC, LOG_SCALE = jnp.array([0.3, -1.0, 2.0]), jnp.array([0.1, -0.5, 1.2])
Y = jnp.array([0.7, 0.9, 1.5])
LOGITS = jnp.asarray(rng.normal(0, 1, (3, 4)), jnp.float32)
LABELS = jnp.array([2, 0, 3])


def naturals(*arrays, **kwargs):
    """Gradients with respect to all arrays but the targets."""
    argnums = tuple(range(len(arrays) - 1))
    return jax.grad(lambda *x: LOSS(*x, **kwargs).sum(), argnums)(*arrays)


def dense(metric, slope, damping):
    return np.linalg.pinv(metric + damping * np.eye(len(slope))) @ slope


def test_values_are_the_scores():
    scale = jnp.exp(LOG_SCALE)
    got = LOSS(LOC, LOG_SCALE, Y)
    np.testing.assert_allclose(got, -stats.norm.logpdf(Y, LOC, scale), rtol=1e-6)
    got = LOSS(LOC, LOG_SCALE, Y, dist="lognormal")
    want = -stats.norm.logpdf(jnp.log(Y), LOC, scale) + jnp.log(Y)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    got = LOSS(LOGITS, LABELS, dist="categorical")
    want = -jax.nn.log_softmax(LOGITS)[jnp.arange(3), LABELS]
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_the_crps_is_the_integral_of_the_squared_distance(x64):
    loc, log_scale, y = (jnp.asarray(a, float) for a in (LOC, LOG_SCALE, Y))
    got = LOSS(loc, log_scale, y, score="crps")
    x = np.linspace(-60, 60, 400_001)
    for i in range(3):
        cdf = stats.norm.cdf(jnp.asarray(x), loc[i], jnp.exp(log_scale[i]))
        distance = (np.asarray(cdf) - (x >= float(y[i]))) ** 2
        np.testing.assert_allclose(got[i], np.trapezoid(distance, x), atol=3e-4)


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_normal_log_score_times_the_inverse_fisher_matrix(x64, damping):
    loc, log_scale, y = (jnp.asarray(a, float) for a in (LOC, LOG_SCALE, Y))
    got = naturals(loc, log_scale, y, damping=damping)
    for i in range(3):
        s = np.exp(log_scale[i])
        slope = jax.grad(lambda q, i=i: -stats.norm.logpdf(y[i], q[0], jnp.exp(q[1])))(
            jnp.stack([loc[i], log_scale[i]])
        )
        want = dense(np.diag([1 / s**2, 2]), np.asarray(slope), damping)
        np.testing.assert_allclose([g[i] for g in got], want, rtol=1e-11)


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_normal_crps_times_its_inverse_metric(x64, damping):
    loc, log_scale, y = (jnp.asarray(a, float) for a in (LOC, LOG_SCALE, Y))
    got = naturals(loc, log_scale, y, score="crps", damping=damping)

    def crps(q, y):
        z = (y - q[0]) * jnp.exp(-q[1])
        spread = z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z)
        return jnp.exp(q[1]) * (spread - 1 / jnp.sqrt(jnp.pi))

    for i in range(3):
        s = float(np.exp(log_scale[i]))
        slope = jax.grad(crps)(jnp.stack([loc[i], log_scale[i]]), y[i])
        root = np.sqrt(np.pi)
        want = dense(np.diag([1 / (root * s), s / (2 * root)]), slope, damping)
        np.testing.assert_allclose([g[i] for g in got], want, rtol=1e-11)


def test_the_crps_metric_is_the_curvature_of_its_divergence(x64):
    # The divergence between forecasts is the integral of (F - G)^2, and near F it is
    # the metric's quadratic form over 2: the metric is twice the integral of dF dF'.
    s, x = 1.7, jnp.linspace(-40, 40, 200_001)
    slopes = jax.jacfwd(lambda q: stats.norm.cdf(x, q[0], jnp.exp(q[1])))(
        jnp.array([0.4, np.log(s)])
    )
    metric = 2 * np.trapezoid(slopes[:, :, None] * slopes[:, None], x, axis=0)
    root = np.sqrt(np.pi)
    want = np.diag([1 / (root * s), s / (2 * root)])
    np.testing.assert_allclose(metric, want, atol=1e-8)


@pytest.mark.parametrize("damping", [0.0, 1e-3, 0.3])
def test_categorical_times_the_pseudo_inverse_fisher_matrix(x64, damping):
    logits = jnp.asarray(LOGITS, float)
    (got,) = naturals(logits, LABELS, dist="categorical", damping=damping)
    for i in range(3):
        p = np.asarray(jax.nn.softmax(logits[i]))
        slope = p - np.eye(4)[LABELS[i]]
        want = dense(np.diag(p) - np.outer(p, p), slope, damping)
        np.testing.assert_allclose(got[i], want, rtol=1e-9)


def test_the_expected_natural_gradient_is_the_difference_of_the_distributions(x64):
    # KL(true, q) falls steepest, in the Fisher metric at q, towards the true mean.
    y = jnp.asarray(rng.normal(size=100))
    y = (y - y.mean()) / y.std()  # moments exactly 0 and 1
    loc, log_scale = jnp.full(100, 0.4), jnp.full(100, np.log(1.5))
    g = [float(x.mean()) for x in naturals(loc, log_scale, y)]

    def kl(q):  # from N(0, 1), up to a constant
        return q[1] + (1 + q[0] ** 2) / (2 * jnp.exp(2 * q[1]))

    slope = jax.grad(kl)(jnp.array([0.4, np.log(1.5)]))
    np.testing.assert_allclose(g, slope / np.array([1 / 1.5**2, 2]), rtol=1e-12)


def test_the_flow_does_not_depend_on_the_parametrisation(x64):
    # Of (mu, s) the metric is diag(1/s^2, 2/s^2); a step of it moves log s by ds / s.
    loc, log_scale, y = (jnp.asarray(a, float) for a in (LOC, LOG_SCALE, Y))
    s = jnp.exp(log_scale)
    in_loc, in_scale = jax.grad(
        lambda a, b: -stats.norm.logpdf(y, a, b).sum(), argnums=(0, 1)
    )(loc, s)
    got = naturals(loc, log_scale, y)
    np.testing.assert_allclose(got[0], in_loc * s**2, rtol=1e-12)
    np.testing.assert_allclose(got[1], in_scale * s**2 / 2 / s, rtol=1e-12)


def test_a_wide_distribution_still_moves_its_mean():
    (to_loc, _) = naturals(jnp.zeros(1), jnp.full(1, 3.0), jnp.full(1, 2.0))
    np.testing.assert_allclose(to_loc, [-2.0])


def test_the_cotangent_multiplies_the_natural_gradient():
    weights = jnp.array([2.0, 0.0, -1.0])
    for arrays, kwargs in (
        ((LOC, LOG_SCALE, Y), {}),
        ((LOGITS, LABELS), {"dist": "categorical"}),
    ):
        got = jax.grad(lambda *x: jnp.sum(weights * LOSS(*x, **kwargs)))(*arrays)
        want = naturals(*arrays, **kwargs)[0]
        want = want * weights.reshape((3,) + (1,) * (want.ndim - 1))
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_targets_and_damping_get_no_gradient():
    of_y, of_damping = jax.grad(
        lambda y, d: LOSS(LOC, LOG_SCALE, y, damping=d).sum(), argnums=(0, 1)
    )(Y, 0.1)
    np.testing.assert_array_equal(of_y, np.zeros(3))
    assert of_damping == 0


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_impossible_and_certain_labels_are_finite(damping):
    logits = jnp.array([[1e4, -1e4, 0.0], [1e4, 0.0, -1e4], [1e4] * 3])
    labels = jnp.array([1, 0, 2])
    value = LOSS(logits, labels, dist="categorical", damping=damping)
    (gradient,) = naturals(logits, labels, dist="categorical", damping=damping)
    assert jnp.isfinite(value).all()
    assert jnp.isfinite(gradient).all()
    if damping:
        assert jnp.abs(gradient).max() <= 1 / damping


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dist", ["normal", "lognormal", "categorical"])
def test_under_jit_and_vmap_in_short_floats(dist, dtype):
    arrays = (LOGITS, LABELS) if dist == "categorical" else (LOC, LOG_SCALE, Y)
    arrays = [
        x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in arrays
    ]
    value = LOSS(*arrays, dist=dist)
    rows = jax.jit(jax.vmap(lambda *x: LOSS(*x, dist=dist)))(*arrays)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(rows, value, rtol=2e-6)
    gradient = jax.jit(lambda *x: naturals(*x, dist=dist))(*arrays)
    assert {g.dtype for g in gradient} == {jnp.dtype(dtype)}


def test_what_does_not_fit_is_named():
    with pytest.raises(TypeError, match="'normal' takes loc, log_scale, targets"):
        LOSS(LOC, Y)
    with pytest.raises(TypeError, match="'categorical' takes logits, targets"):
        LOSS(LOGITS, LOGITS, LABELS, dist="categorical")
    with pytest.raises(AssertionError, match="loc, log_scale, targets"):
        LOSS(LOC, LOG_SCALE[:2], Y)
    with pytest.raises(AssertionError, match="labels must be integers"):
        LOSS(LOGITS, LOGITS[:, 0], dist="categorical")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dist": "poisson"}, "dist must be one of 'normal', 'lognormal', 'categor"),
        ({"dist": "lognormal", "score": "crps"}, "score .* must be one of 'log'"),
        ({"damping": -1.0}, "damping must lie in"),
    ],
)
def test_hyperparameters_outside_their_range_are_named(kwargs, message):
    with pytest.raises(ValueError, match=f"natural_gradient_loss: {message}"):
        LOSS(LOC, LOG_SCALE, Y, **kwargs)

"""Consistency training: distance, loss, noise levels."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ext as ox


def residuals(seed=0, shape=(5, 3, 2)):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=shape)) for _ in range(2))


@pytest.mark.parametrize("c", [None, 0.3])
@pytest.mark.parametrize("axis", [None, -1, (0, 2)])
def test_pseudo_huber_is_the_printed_formula(x64, c, axis):
    predictions, targets = residuals()
    axes = (1, 2) if axis is None else axis
    squares = np.sum((np.asarray(predictions) - np.asarray(targets)) ** 2, axes)
    count = predictions.size / squares.size
    width = 0.00054 * math.sqrt(count) if c is None else c
    got = ox.losses.pseudo_huber_loss(predictions, targets, c=c, axis=axis)
    np.testing.assert_allclose(got, np.sqrt(squares + width**2) - width, rtol=1e-11)


def test_pseudo_huber_without_targets_is_that_of_the_residual(x64):
    predictions, targets = residuals(1)
    np.testing.assert_array_equal(
        ox.losses.pseudo_huber_loss(predictions - targets, c=0.1),
        ox.losses.pseudo_huber_loss(predictions, targets, c=0.1),
    )


def test_pseudo_huber_is_quadratic_when_small_and_a_norm_when_large():
    small, large = jnp.full((1, 4), 1e-6), jnp.full((1, 4), 1e6)
    np.testing.assert_allclose(
        ox.losses.pseudo_huber_loss(small, c=1.0), [4e-12 / 2], rtol=1e-6
    )
    np.testing.assert_allclose(
        ox.losses.pseudo_huber_loss(large, c=1.0), [2e6 - 1], rtol=1e-6
    )


def test_gradient_of_pseudo_huber_is_zero_at_zero_and_shorter_than_one():
    rows = jnp.array([[0.0, 0.0], [1e-20, 0.0], [0.3, -0.1], [1e4, 1e4]])
    grad = jax.grad(lambda x: ox.losses.pseudo_huber_loss(x).sum())(rows)
    np.testing.assert_array_equal(grad[0], jnp.zeros(2))
    assert (jnp.linalg.norm(grad, axis=-1) <= 1).all()


def model_fn(params, x, sigma):
    skip, out = ox.losses.consistency_scalings(sigma)
    return skip[:, None] * x + out[:, None] * jnp.tanh(x @ params)


def two_levels(seed=2):
    rng = np.random.default_rng(seed)
    params, x, noise = (
        jnp.asarray(rng.normal(size=shape)) for shape in ((3, 3), (4, 3), (4, 3))
    )
    sigma = jnp.array([0.002, 0.1, 1.0, 5.0])
    return params, x, noise, sigma, 1.5 * sigma + 0.1


@pytest.mark.parametrize("c", [None, 0.2])
@pytest.mark.parametrize("weight", [None, 3.0, np.arange(4.0)])
def test_loss_compares_the_network_with_itself_at_the_lower_level(x64, c, weight):
    params, x, noise, low, high = two_levels()
    teacher = model_fn(params, x + low[:, None] * noise, low)

    def expected(params):
        student = model_fn(params, x + high[:, None] * noise, high)
        factor = 1 / (high - low) if weight is None else jnp.asarray(weight)
        factor = jnp.broadcast_to(factor, (4,))
        return factor * ox.losses.pseudo_huber_loss(student, teacher, c=c)

    def loss(params):
        given = None if weight is None else jnp.asarray(weight)
        return ox.losses.consistency_training_loss(
            model_fn, params, x, noise, low, high, c=c, weight=given
        )

    np.testing.assert_allclose(loss(params), expected(params), rtol=1e-12)
    # The teacher is a constant: only the branch at the higher level has a gradient.
    np.testing.assert_allclose(
        jax.jacobian(loss)(params), jax.jacobian(expected)(params), rtol=1e-10
    )


def test_levels_may_be_scalars_and_the_model_sees_float32_of_bfloat16():
    seen = []

    def recording(params, x, sigma):
        seen.append((x.dtype, sigma.shape))
        return params * x

    x = jnp.ones((4, 3), jnp.bfloat16)
    loss = ox.losses.consistency_training_loss(
        recording, jnp.float32(0.5), x, x, jnp.bfloat16(1.0), jnp.bfloat16(2.0)
    )
    assert loss.dtype == jnp.float32
    assert seen == [(jnp.float32, (4,))] * 2
    # The student is 0.5 (1 + 2), the teacher 0.5 (1 + 1): sqrt(3 / 4) apart.
    np.testing.assert_allclose(loss, np.full(4, 0.75**0.5), rtol=2e-3)


def test_a_consistent_network_has_loss_zero_and_a_finite_gradient():
    _, x, noise, low, high = (a.astype(jnp.float32) for a in two_levels())

    def loss(scale):
        return ox.losses.consistency_training_loss(
            lambda p, x, s: jnp.full_like(x, 2.0) * p, scale, x, noise, low, high
        ).sum()

    value, grad = jax.value_and_grad(loss)(jnp.float32(1.0))
    assert value == 0 and grad == 0


def counts(schedule, steps):
    return np.asarray([schedule(k) for k in steps]).tolist()


def test_number_of_levels_doubles_up_to_the_last():
    schedule = ox.losses.ict_discretization_schedule(800)
    got = counts(schedule, range(0, 900, 100))
    assert got == [11, 21, 41, 81, 161, 321, 641, 1281, 1281]
    assert counts(schedule, (99, 199, 10**9)) == [11, 21, 1281]


def test_stage_length_is_that_of_the_paper_for_counts_that_are_no_powers_of_two():
    schedule = ox.losses.ict_discretization_schedule(1000, s0=20, s1=500)
    assert counts(schedule, (0, 176, 177, 353, 354)) == [21, 21, 41, 41, 81]
    assert counts(schedule, (177 * 4, 177 * 5, 999)) == [321, 501, 501]


def test_number_of_levels_may_be_traced():
    schedule = ox.losses.ict_discretization_schedule(80)
    got = jax.jit(jax.vmap(schedule))(jnp.arange(0, 80, 10))
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, 10 * 2 ** np.arange(8) + 1)
    constant = ox.losses.ict_discretization_schedule(5, s0=7, s1=7)
    assert counts(constant, [4]) == [8]


def test_sigmas_are_evenly_spaced_after_the_root(x64):
    sigmas = ox.losses.karras_sigmas(6, sigma_min=0.1, sigma_max=20.0, rho=3.0)
    np.testing.assert_allclose(sigmas[jnp.array([0, -1])], [0.1, 20.0], rtol=1e-13)
    roots = np.cbrt(np.asarray(sigmas))
    np.testing.assert_allclose(np.diff(roots), np.diff(roots)[0], rtol=1e-12)
    default = ox.losses.karras_sigmas(2)
    np.testing.assert_allclose(default, [0.002, 80.0], rtol=1e-13)


def test_interval_probabilities_are_those_of_a_log_normal(x64):
    sigmas = ox.losses.karras_sigmas(21)
    at = (np.log(np.asarray(sigmas)) + 1.1) / (math.sqrt(2) * 2.0)
    mass = np.diff([math.erf(a) for a in at])
    assert mass.sum() / 2 == pytest.approx(0.99166, abs=5e-6)
    got = ox.losses.lognormal_timestep_probs(sigmas)
    np.testing.assert_allclose(got, mass / mass.sum(), rtol=1e-12)
    moved = ox.losses.lognormal_timestep_probs(sigmas, mean=0.5, std=0.7)
    centre = int(jnp.argmax(moved))
    assert sigmas[centre - 1] < math.exp(0.5) < sigmas[centre + 2]
    assert float(moved.sum()) == pytest.approx(1.0)


def test_interval_weights_are_one_over_the_steps():
    np.testing.assert_allclose(
        ox.losses.ict_weights(jnp.array([0.5, 1.0, 3.0])), [2.0, 0.5], rtol=1e-7
    )


def test_scalings_make_the_identity_at_the_least_level():
    skip, out = ox.losses.consistency_scalings(
        jnp.array([0.5, 2.5]), sigma_data=2.0, sigma_min=0.5
    )
    np.testing.assert_allclose(skip, [1.0, 0.5], rtol=1e-7)
    np.testing.assert_allclose(out, [0.0, 4 / math.sqrt(10.25)], rtol=1e-7)
    skip, out = ox.losses.consistency_scalings(jnp.array([0.002]))
    assert (skip[0], out[0]) == (1.0, 0.0)


X = jnp.ones((2, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ox.losses.pseudo_huber_loss(X, c=0.0), "c must lie"),
        (lambda: ox.losses.ict_discretization_schedule(0), "total_steps must be"),
        (lambda: ox.losses.ict_discretization_schedule(7), "steps a stage"),
        (lambda: ox.losses.ict_discretization_schedule(9, s1=5), "s1 must lie"),
        (lambda: ox.losses.karras_sigmas(1), "num must lie"),
        (lambda: ox.losses.karras_sigmas(5, sigma_min=0.0), "sigma_min must lie"),
        (lambda: ox.losses.karras_sigmas(5, rho=0.0), "rho must lie"),
        (lambda: ox.losses.lognormal_timestep_probs(X[0], std=0.0), "std must lie"),
        (lambda: ox.losses.consistency_scalings(X, sigma_data=0.0), "sigma_data must"),
    ],
)
def test_bad_hyperparameters_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ox.losses.pseudo_huber_loss(X, X[0]), "targets"),
        (lambda: ox.losses.pseudo_huber_loss(jnp.float32(1.0)), "batch axis"),
        (lambda: ox.losses.ict_weights(X), "sigmas must be a vector"),
        (lambda: ox.losses.ict_weights(X[0, :1]), "at least 2 levels"),
        (lambda: ox.losses.consistency_scalings(X.astype(int)), "sigma must be float"),
        (
            lambda: ox.losses.consistency_training_loss(
                lambda p, x, s: x, None, X, X, jnp.ones(3), jnp.ones(2)
            ),
            "sigma must be a scalar or one value an example",
        ),
        (
            lambda: ox.losses.consistency_training_loss(
                lambda p, x, s: x, None, X, X[:1], jnp.ones(2), jnp.ones(2)
            ),
            "x, noise",
        ),
    ],
)
def test_shapes_and_types_that_do_not_fit_are_named(call, message):
    with pytest.raises(AssertionError, match=message):
        call()

"""KL-DRO, its mirror image for unlearning, and ROAD's weights within groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ext as ox

rng = np.random.default_rng(0)
LOSSES = jnp.asarray(rng.gamma(2.0, 1.0, 9), jnp.float32)
WHERE = jnp.asarray([1, 1, 0, 1, 0, 1, 1, 0, 1], bool)
WEIGHTS = [ox.losses.kl_dro_weights, ox.losses.loreun_weights]


@pytest.mark.parametrize("temperature", [0.2, 1.0, 7.0])
def test_the_loss_is_the_maximum_of_its_variational_form(x64, temperature):
    losses = jnp.asarray(LOSSES, jnp.float64)
    value = ox.losses.kl_dro_loss(losses, temperature=temperature)

    def objective(p):
        return np.sum(p * losses) - temperature * np.sum(p * np.log(losses.size * p))

    best = jax.nn.softmax(losses / temperature)
    np.testing.assert_allclose(value, objective(best), rtol=1e-14)
    for other in rng.dirichlet(np.ones(losses.size), 50):
        assert objective(other) < value


@pytest.mark.parametrize("temperature", [0.2, 1.0, 50.0])
def test_the_gradient_is_a_softmax_and_the_weights_are_n_times_it(temperature):
    kwargs = {"temperature": temperature}
    want = jax.nn.softmax(LOSSES / temperature)
    gradient = jax.grad(lambda l: ox.losses.kl_dro_loss(l, **kwargs))(LOSSES)
    weights = ox.losses.kl_dro_weights(LOSSES, **kwargs)
    np.testing.assert_allclose(gradient, want, rtol=2e-6)
    np.testing.assert_allclose(weights, LOSSES.size * want, rtol=2e-6)


def test_high_temperatures_give_the_mean_plus_half_the_variance(x64):
    losses, t = jnp.asarray(LOSSES, jnp.float64), 1e4
    mean, var = losses.mean(), losses.var()
    value = ox.losses.kl_dro_loss(losses, temperature=t)
    # The next term of the expansion is a third cumulant over 6 T^2.
    np.testing.assert_allclose(value / mean - 1, var / (2 * t * mean), rtol=1e-3)


def test_float32_keeps_its_digits_at_high_temperatures():
    for t in (1e2, 1e4, 1e6):
        value = ox.losses.kl_dro_loss(LOSSES, temperature=t)
        with jax.enable_x64(True):
            want = ox.losses.kl_dro_loss(jnp.asarray(LOSSES, "float64"), temperature=t)
        np.testing.assert_allclose(value, want, rtol=5e-7)


def test_low_temperatures_give_the_maximum():
    value = ox.losses.kl_dro_loss(LOSSES, temperature=1e-3)
    # T log n is what is missing.
    assert LOSSES.max() - 1e-3 * np.log(9) - 1e-6 <= value <= LOSSES.max()


def test_equal_losses_weigh_one_and_cost_themselves():
    losses = jnp.full(5, 3.7)
    assert ox.losses.kl_dro_loss(losses) == jnp.float32(3.7)
    np.testing.assert_array_equal(ox.losses.kl_dro_weights(losses), np.ones(5))


@pytest.mark.parametrize("weights_of", WEIGHTS)
def test_a_mask_is_a_slice_and_its_other_weights_are_zero(weights_of):
    kwargs = {"temperature": 0.7}
    weights = weights_of(LOSSES, where=WHERE, **kwargs)
    np.testing.assert_allclose(weights[WHERE], weights_of(LOSSES[WHERE], **kwargs))
    np.testing.assert_array_equal(weights[~WHERE], 0)
    np.testing.assert_allclose(weights.sum(), WHERE.sum(), rtol=1e-6)
    loss_of = functools.partial(ox.losses.kl_dro_loss, **kwargs)
    masked, gradient = jax.value_and_grad(lambda l: loss_of(l, where=WHERE))(LOSSES)
    np.testing.assert_allclose(masked, loss_of(LOSSES[WHERE]), rtol=1e-6)
    np.testing.assert_array_equal(gradient[~WHERE], 0)


def test_a_masked_infinity_is_not_looked_at():
    losses = jnp.array([1.0, jnp.inf, 2.0])
    where = jnp.array([True, False, True])
    value, gradient = jax.value_and_grad(
        lambda l: ox.losses.kl_dro_loss(l, where=where)
    )(losses)
    assert jnp.isfinite(value)
    assert jnp.isfinite(gradient).all()


def test_nothing_that_counts_costs_nothing():
    where = jnp.zeros(9, bool)
    value, gradient = jax.value_and_grad(
        lambda l: ox.losses.kl_dro_loss(l, where=where)
    )(LOSSES)
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros(9))
    for weights_of in WEIGHTS:
        np.testing.assert_array_equal(weights_of(LOSSES, where=where), np.zeros(9))


@pytest.mark.parametrize("weights_of", WEIGHTS)
def test_huge_losses_do_not_overflow(weights_of):
    losses = jnp.array([1e4, -1e4, 0.0])
    weights = weights_of(losses)
    assert jnp.isfinite(weights).all()
    np.testing.assert_allclose(weights.sum(), 3, rtol=1e-6)
    assert jnp.isfinite(ox.losses.kl_dro_loss(losses))


@pytest.mark.parametrize("weights_of", WEIGHTS)
def test_weights_are_constants(weights_of):
    gradient = jax.grad(lambda l: jnp.sum(weights_of(l) * l))(LOSSES)
    np.testing.assert_array_equal(gradient, weights_of(LOSSES))


def test_unlearning_weighs_in_the_opposite_order():
    weights = ox.losses.loreun_weights(LOSSES, temperature=0.5)
    np.testing.assert_array_equal(jnp.argsort(weights), jnp.argsort(-LOSSES))
    want = ox.losses.kl_dro_weights(-LOSSES, temperature=0.5)
    np.testing.assert_array_equal(weights, want)
    flat = ox.losses.loreun_weights(LOSSES, temperature=1e9)
    np.testing.assert_allclose(flat, np.ones(9), rtol=1e-6)


ADVERSARY = jnp.asarray([0.1, 0.9, 0.4, 0.6, 1.5])
GROUPS = jnp.asarray([0, 2, 0, 2, 0])
ROAD = functools.partial(ox.losses.road_weights, num_groups=4)


def test_the_mean_weight_of_every_group_is_one():
    weights = ROAD(ADVERSARY, GROUPS, temperature=0.3)
    for group in (0, 2):
        np.testing.assert_allclose(weights[GROUPS == group].mean(), 1, rtol=1e-6)


def test_weights_by_hand():
    odds = jnp.log(jnp.array([1.0, 3.0, 2.0, 2.0]))
    weights = ROAD(-odds * 0.5, jnp.array([1, 1, 3, 3]), temperature=0.5)
    np.testing.assert_allclose(weights, [0.5, 1.5, 1, 1], rtol=1e-6)


def test_at_low_temperatures_the_groups_smallest_loss_takes_all():
    weights = ROAD(ADVERSARY, GROUPS, temperature=0.01)
    np.testing.assert_allclose(weights, [3, 0, 0, 2, 0], atol=1e-6)


def test_road_weights_minimise_their_objective_under_the_group_means(x64):
    a, t = np.asarray(ADVERSARY, np.float64), 0.4
    best = np.asarray(ROAD(jnp.asarray(a), GROUPS, temperature=t))

    def objective(r):
        return np.sum(r * a) + t * np.sum(r * np.log(r))

    for _ in range(50):
        other = best * np.exp(rng.normal(0, 0.1, 5))
        for group in (0, 2):
            here = np.asarray(GROUPS) == group
            other[here] /= other[here].mean()
        assert objective(other) > objective(best)


def test_the_road_loss_pays_for_what_the_adversary_sees():
    task = jnp.asarray(LOSSES[:5])
    kwargs = {"num_groups": 4, "temperature": 0.3}
    value = ox.losses.road_loss(task, ADVERSARY, GROUPS, fairness=2.5, **kwargs)
    weights = ox.losses.road_weights(ADVERSARY, GROUPS, **kwargs)
    np.testing.assert_allclose(value, task - 2.5 * weights * ADVERSARY, rtol=1e-6)
    plain = ox.losses.road_loss(task, ADVERSARY, GROUPS, fairness=0.0, **kwargs)
    np.testing.assert_array_equal(plain, task)


def test_gradient_flows_into_the_adversarys_loss_but_not_through_the_weights():
    def total(a):
        return ox.losses.road_loss(jnp.zeros(5), a, GROUPS, num_groups=4).sum()

    np.testing.assert_array_equal(jax.grad(total)(ADVERSARY), -ROAD(ADVERSARY, GROUPS))


def test_high_temperatures_are_ordinary_adversarial_debiasing():
    weights = ROAD(ADVERSARY, GROUPS, temperature=1e9)
    np.testing.assert_allclose(weights, np.ones(5), rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ox.losses.kl_dro_loss(LOSSES[None]), "losses must be a vector"),
        (lambda: ox.losses.kl_dro_weights(jnp.arange(3)), "losses must be floating"),
        (lambda: ox.losses.kl_dro_loss(LOSSES, where=WHERE[:3]), "where must have"),
        (lambda: ROAD(ADVERSARY, ADVERSARY), "groups must be integers"),
        (lambda: ROAD(ADVERSARY, GROUPS[:3]), "groups must be a vector"),
        (
            lambda: ox.losses.road_loss(LOSSES, ADVERSARY, GROUPS, num_groups=4),
            "task_losses, adversary_losses",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(AssertionError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ox.losses.kl_dro_loss(LOSSES, temperature=0.0),
            r"kl_dro_loss: temperature must lie in \(0.0, inf\)",
        ),
        (
            lambda: ox.losses.loreun_weights(LOSSES, temperature=np.inf),
            "loreun_weights: temperature",
        ),
        (
            lambda: ROAD(ADVERSARY, GROUPS, temperature=-1.0),
            "road_weights: temperature",
        ),
        (
            lambda: ox.losses.road_weights(ADVERSARY, GROUPS, num_groups=0),
            "num_groups must be an integer of 1 or more",
        ),
        (
            lambda: ox.losses.road_loss(
                ADVERSARY, ADVERSARY, GROUPS, num_groups=4, fairness=-1.0
            ),
            "road_loss: fairness",
        ),
    ],
)
def test_hyperparameters_outside_their_range_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

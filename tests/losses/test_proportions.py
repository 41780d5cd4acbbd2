"""Labels from the shares of bags."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ext as ox


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_the_expected_label_is_the_chance_of_a_positive(x64, k):
    chances = np.array([0.9, 0.2, 0.65, 0.4, 0.05])[:k]
    prior = 0.3  # of the others of the bag, which are random draws
    expected = 0.0
    for labels in itertools.product([0, 1], repeat=k):
        y = np.array(labels)
        # Example 0 is x; the others are draws of the population.
        p = np.where(y == 1, prior, 1 - prior)
        p[0] = chances[0] if y[0] else 1 - chances[0]
        soft = ox.losses.easy_llp_labels(jnp.array(y.mean()), bag_size=k, prior=prior)
        expected += np.prod(p) * float(soft)
    assert expected == pytest.approx(chances[0], abs=1e-15)


@pytest.mark.parametrize(("k", "p", "variance"), [(3, 0.3, 0.63), (5, 0.4, 1.2)])
def test_the_variance_is_that_of_the_bag(x64, k, p, variance):
    mean = square = 0.0
    for labels in itertools.product([0, 1], repeat=k):
        y = np.array(labels)
        weight = np.prod(np.where(y == 1, p, 1 - p))
        soft = float(
            ox.losses.easy_llp_labels(jnp.array(y.mean()), bag_size=k, prior=p)
        )
        mean, square = mean + weight * soft, square + weight * soft**2
    assert mean == pytest.approx(p, abs=1e-15)
    assert square - mean**2 == pytest.approx(variance, rel=1e-12)


def test_bags_of_one_are_supervised_learning():
    y = jnp.array([0.0, 1.0, 1.0])
    soft = ox.losses.easy_llp_labels(y, bag_size=1, prior=0.25)
    np.testing.assert_array_equal(soft, y)
    z = jnp.array([0.3, -1.0, 2.0])
    loss = ox.losses.easy_llp_loss(jax.nn.softplus(-z), jax.nn.softplus(z), soft)
    want = jnp.where(y == 1, jax.nn.softplus(-z), jax.nn.softplus(z))
    np.testing.assert_array_equal(loss, want)


def test_every_class_may_have_its_prior():
    shares = jnp.array([[0.5, 0.25, 0.25], [0.0, 0.5, 0.5]])
    prior = jnp.array([0.2, 0.3, 0.5])
    got = ox.losses.easy_llp_labels(shares, bag_size=4, prior=prior)
    np.testing.assert_allclose(got, 4 * (shares - prior[None]) + prior[None], rtol=1e-6)
    np.testing.assert_allclose(got.sum(-1), 1, rtol=1e-6)


def test_losses_of_a_bag_share_its_label_and_may_be_negative():
    positive, negative = jnp.array([[1.0, 2.0]] * 2), jnp.array([[3.0, 1.0]] * 2)
    soft = jnp.array([[1.5], [0.0]])
    got = ox.losses.easy_llp_loss(positive, negative, soft)
    np.testing.assert_array_equal(got, [[0.0, 2.5], [3.0, 1.0]])
    assert ox.losses.easy_llp_loss(*jnp.array([1.0, 3.0, 2.0])) == -1


def test_the_gradient_of_a_loss_is_its_soft_label():
    args = jnp.array([0.4]), jnp.array([0.9]), jnp.array([1.5])
    grads = jax.grad(lambda *x: ox.losses.easy_llp_loss(*x).sum(), (0, 1))(*args)
    np.testing.assert_array_equal(jnp.concatenate(grads), [1.5, -0.5])


def test_mistakes_are_named():
    shares = jnp.array([0.5, 0.5])
    with pytest.raises(ValueError, match="bag_size must be an integer of 1 or more"):
        ox.losses.easy_llp_labels(shares, bag_size=0, prior=0.5)
    with pytest.raises(AssertionError, match="prior must broadcast"):
        ox.losses.easy_llp_labels(shares, bag_size=2, prior=jnp.full(3, 0.5))
    with pytest.raises(AssertionError, match="of the same examples"):
        ox.losses.easy_llp_loss(jnp.ones(2), jnp.ones(3), jnp.ones(3))
    with pytest.raises(AssertionError, match="soft_labels must broadcast"):
        ox.losses.easy_llp_loss(jnp.ones(2), jnp.ones(2), jnp.ones(3))
    with pytest.raises(AssertionError, match="proportions must be floating"):
        ox.losses.easy_llp_labels(jnp.array([1]), bag_size=2, prior=0.5)

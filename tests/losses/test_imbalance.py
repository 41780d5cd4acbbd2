"""Losses and weights for rare classes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox

cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
LOSSES = pytest.mark.parametrize(
    "loss", [ox.losses.ldam_loss, ox.losses.vector_scaling_loss]
)


def batch(seed=0, rows=6, classes=4):
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(rng.uniform(-1, 1, (rows, classes)))
    return logits, jnp.asarray(rng.integers(0, classes, rows))


COUNTS = np.array([500, 40, 7, 1])


def test_margins_fall_with_the_fourth_root_of_the_class_size(x64):
    # Margins 1 and 2 for counts 16 and 1, in a loss without competition to speak of.
    logits, counts = jnp.zeros((2, 2)), jnp.array([16, 1])
    losses = ox.losses.ldam_loss(
        logits, jnp.array([0, 1]), counts, max_margin=2.0, scale=1.0
    )
    np.testing.assert_allclose(losses, np.log1p(np.exp([1.0, 2.0])), rtol=1e-14)


def test_ldam_is_the_printed_formula(x64):
    logits, labels = batch()
    got = ox.losses.ldam_loss(logits, labels, COUNTS, max_margin=0.3, scale=7.0)
    margins = COUNTS**-0.25 * 0.3 / np.max(COUNTS**-0.25)
    z = np.array(logits)
    rows = np.arange(len(z))
    own = np.exp(7 * (z[rows, labels] - margins[labels]))
    others = np.exp(7 * z).sum(1) - np.exp(7 * z[rows, labels])
    np.testing.assert_allclose(got, -np.log(own / (own + others)), rtol=1e-12)


def test_equal_counts_give_all_classes_the_largest_margin(x64):
    logits, labels = batch(1)
    got = ox.losses.ldam_loss(logits, labels, jnp.full(4, 30), max_margin=0.2)
    moved = logits - 0.2 * jax.nn.one_hot(labels, 4)
    np.testing.assert_allclose(got, cross_entropy(30 * moved, labels), rtol=1e-13)


def test_without_a_margin_ldam_is_cross_entropy_of_scaled_logits(x64):
    logits, labels = batch(2)
    got = ox.losses.ldam_loss(logits, labels, COUNTS, max_margin=0.0, scale=2.0)
    np.testing.assert_array_equal(got, cross_entropy(2 * logits, labels))


def test_vector_scaling_without_strength_is_cross_entropy_to_the_bit():
    logits, labels = jax.tree.map(jnp.asarray, batch(3))
    logits = logits.astype(jnp.float32)
    got = ox.losses.vector_scaling_loss(logits, labels, COUNTS, gamma=0.0, tau=0.0)
    np.testing.assert_array_equal(got, cross_entropy(logits, labels))


def test_vector_scaling_of_equal_counts_is_cross_entropy(x64):
    logits, labels = batch(4)
    got = ox.losses.vector_scaling_loss(logits, labels, jnp.full(4, 9))
    np.testing.assert_allclose(got, cross_entropy(logits, labels), rtol=1e-14)


@pytest.mark.parametrize("tau", [0.5, 2.0])
def test_gradient_of_logit_adjustment_is_that_of_the_prior_shifted_softmax(x64, tau):
    logits, labels = batch(5)
    grads = jax.grad(
        lambda z: ox.losses.vector_scaling_loss(
            z, labels, COUNTS, gamma=0.0, tau=tau
        ).sum()
    )(logits)
    shifted = np.array(logits) + tau * np.log(COUNTS / COUNTS.sum())
    want = jax.nn.softmax(jnp.asarray(shifted)) - jax.nn.one_hot(labels, 4)
    np.testing.assert_allclose(grads, want, rtol=1e-12, atol=1e-15)


def test_scaling_shrinks_the_logits_of_rare_classes(x64):
    logits, labels = batch(6)
    got = ox.losses.vector_scaling_loss(logits, labels, COUNTS, gamma=0.7, tau=0.0)
    scaled = np.array(logits) * (COUNTS / COUNTS.max()) ** 0.7
    np.testing.assert_allclose(
        got, cross_entropy(jnp.asarray(scaled), labels), rtol=1e-13
    )


@LOSSES
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits_have_finite_losses_and_gradients(loss, size):
    logits = jnp.array([[size, 0.0, -size, 1.0]] * 4, jnp.float32)
    labels = jnp.arange(4)
    value, grads = jax.value_and_grad(lambda z: loss(z, labels, COUNTS).sum())(logits)
    assert jnp.isfinite(value)
    assert jnp.isfinite(grads).all()


@LOSSES
def test_rows_may_have_any_batch_shape(loss):
    logits, labels = batch(7)
    flat = loss(logits, labels, COUNTS)
    got = loss(logits.reshape(2, 3, 4), labels.reshape(2, 3), COUNTS)
    np.testing.assert_array_equal(got, flat.reshape(2, 3))
    np.testing.assert_array_equal(loss(logits[0], labels[0], COUNTS), flat[0])


@LOSSES
def test_counts_may_be_integers_floats_or_traced(loss):
    logits, labels = batch(8)
    want = loss(logits, labels, COUNTS)
    for counts in (list(map(int, COUNTS)), COUNTS.astype(np.float32)):
        np.testing.assert_array_equal(loss(logits, labels, counts), want)
    traced = jax.jit(loss)(logits, labels, jnp.asarray(COUNTS))
    # Scaled logits of 16 to 32 have an ulp of 2e-6, which no order of sums preserves.
    np.testing.assert_allclose(traced, want, rtol=1e-5, atol=4e-6)


@LOSSES
def test_mistakes_are_named(loss):
    logits, labels = batch()
    with pytest.raises(ValueError, match=r"none for the classes \[1, 3\]"):
        loss(logits, labels, [5, 0, 3, 0])
    with pytest.raises(AssertionError, match="one count a class"):
        loss(logits, labels, [5, 1])
    with pytest.raises(AssertionError, match="class_counts must be a vector"):
        loss(logits, labels, 5)
    with pytest.raises(AssertionError, match="labels must be integers"):
        loss(logits, labels.astype(jnp.float32), COUNTS)
    with pytest.raises(AssertionError, match="labels must have one class a row"):
        loss(logits, labels[:3], COUNTS)
    with pytest.raises(AssertionError, match="logits must be floating"):
        loss(labels[:, None], labels, [1])


def test_hyper_parameters_out_of_range_are_named():
    logits, labels = batch()
    with pytest.raises(ValueError, match="scale must lie"):
        ox.losses.ldam_loss(logits, labels, COUNTS, scale=0.0)
    with pytest.raises(ValueError, match="max_margin must lie"):
        ox.losses.ldam_loss(logits, labels, COUNTS, max_margin=-1.0)
    with pytest.raises(ValueError, match="tau must lie"):
        ox.losses.vector_scaling_loss(logits, labels, COUNTS, tau=-1.0)
    with pytest.raises(ValueError, match="beta must lie"):
        ox.losses.effective_number_weights(COUNTS, beta=1.0)
    with pytest.raises(ValueError, match="start_step must lie"):
        ox.losses.deferred_reweighting(COUNTS, start_step=-1)


@pytest.mark.parametrize("beta", [0.5, 0.9, 0.9999])
def test_weights_follow_the_effective_number_and_sum_to_the_classes(x64, beta):
    want = (1 - beta) / (1 - beta ** COUNTS.astype(float))
    got = ox.losses.effective_number_weights(COUNTS, beta=beta)
    np.testing.assert_allclose(got, want * 4 / want.sum(), rtol=1e-11)


def test_weights_are_one_at_beta_0_and_for_equal_counts(x64):
    weights = ox.losses.effective_number_weights
    np.testing.assert_array_equal(weights(COUNTS, beta=0.0), np.ones(4))
    near = weights(jnp.array([77, 77]), beta=1 - 1e-12)
    np.testing.assert_allclose(near, [1, 1], rtol=1e-15)


def test_weights_tend_to_the_inverse_frequency_as_beta_tends_to_one(x64):
    # Of the first order, the relative distance is n (1 - beta) / 2 = 5e-7.
    got = ox.losses.effective_number_weights(jnp.array([1e4, 1.0]), beta=1 - 1e-10)
    inverse = np.array([1e-4, 1.0])
    np.testing.assert_allclose(got, 2 * inverse / inverse.sum(), rtol=1e-6)


def test_small_counts_keep_their_digits_in_float32():
    got = ox.losses.effective_number_weights(jnp.array([2, 1, 3]))
    with jax.enable_x64(True):
        want = ox.losses.effective_number_weights(jnp.array([2, 1, 3]))
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_bfloat16_counts_are_weighed_in_float32():
    weights = ox.losses.effective_number_weights(jnp.array([4, 1], jnp.bfloat16))
    assert weights.dtype == jnp.float32


def test_reweighting_sets_in_at_the_step_that_was_said():
    weights = ox.losses.deferred_reweighting(COUNTS, start_step=3, beta=0.99)
    late = ox.losses.effective_number_weights(COUNTS, beta=0.99)
    every = jax.jit(jax.vmap(weights))(jnp.arange(5))
    np.testing.assert_array_equal(every[:3], np.ones((3, 4)))
    np.testing.assert_allclose(every[3:], np.stack([late, late]), rtol=1e-6)
    np.testing.assert_array_equal(weights(2), np.ones(4))
    np.testing.assert_array_equal(weights(3), late)

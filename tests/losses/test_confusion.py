"""Soft confusion matrices and the metrics made losses of them."""

# Arrays, trees and flax models, which the types of jax and optax leave open.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportReturnType=false, reportOptionalMemberAccess=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox

METRICS = ["fbeta", "accuracy", "gmean", "balanced_accuracy"]


def batch(seed=0, n=40):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(0, 1, n)), jnp.asarray(rng.integers(0, 2, n))


def hard(metric, logits, labels, beta=1.0):
    """The metric itself, from counts of decisions."""
    yes, y = np.array(logits) > 0, np.array(labels) == 1
    tp, fp = (yes & y).sum(), (yes & ~y).sum()
    fn, tn = (~yes & y).sum(), (~yes & ~y).sum()
    tpr, tnr = tp / (tp + fn), tn / (tn + fp)
    b = beta**2
    return {
        "fbeta": (1 + b) * tp / ((1 + b) * tp + b * fn + fp),
        "accuracy": (tp + tn) / len(y),
        "gmean": np.sqrt(tpr * tnr),
        "balanced_accuracy": (tpr + tnr) / 2,
    }[metric]


@pytest.mark.parametrize("slope", [1.0, 73.0, 1e6])
def test_positives_are_found_or_missed_whatever_the_slope(x64, slope):
    logits, labels = batch()
    tp, fp, fn, tn = ox.losses.soft_confusion_matrix(logits, labels, slope=slope)
    np.testing.assert_allclose(tp + fn, labels.sum(), rtol=1e-14)
    np.testing.assert_allclose(fp + tn, (1 - labels).sum(), rtol=1e-14)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_a_steep_slope_gives_the_hard_metric(x64, metric, beta):
    logits, labels = batch(1)
    got = ox.losses.anyloss(logits, labels, metric=metric, beta=beta, slope=1e6)
    # The smallest |p - 1/2| of the batch is above 1e-3: sigmoid(1000) is 1.
    assert np.abs(jax.nn.sigmoid(logits) - 0.5).min() > 1e-3
    np.testing.assert_allclose(got, 1 - hard(metric, logits, labels, beta), rtol=1e-12)


def test_a_function_of_the_counts_is_a_metric(x64):
    logits, labels = batch(2)
    got = ox.losses.anyloss(
        logits, labels, metric=lambda tp, fp, fn, tn: tp / (tp + fp)
    )
    tp, fp, _, _ = ox.losses.soft_confusion_matrix(logits, labels)
    np.testing.assert_allclose(got, 1 - tp / (tp + fp), rtol=1e-15)


@pytest.mark.parametrize("metric", METRICS)
def test_a_mask_is_a_slice(x64, metric):
    logits, labels = batch(3)
    where = jnp.arange(40) % 3 != 0
    got, grads = jax.value_and_grad(ox.losses.anyloss)(
        logits, labels, metric=metric, where=where
    )
    want = ox.losses.anyloss(logits[where], labels[where], metric=metric)
    np.testing.assert_allclose(got, want, rtol=1e-14)
    np.testing.assert_array_equal(grads[~where], 0)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("label", [0, 1])
def test_without_one_of_the_classes_its_rate_is_0_and_all_is_finite(metric, label):
    logits, labels = jnp.array([0.1, -0.2, 3.0]), jnp.full(3, label)
    value, grads = jax.value_and_grad(ox.losses.anyloss)(logits, labels, metric=metric)
    assert jnp.isfinite(value) and jnp.isfinite(grads).all()
    if metric == "gmean":
        assert value == 1
    if metric == "balanced_accuracy":
        assert value >= 0.5


@pytest.mark.parametrize("metric", METRICS)
def test_without_examples_the_loss_is_1_with_gradient_0(metric):
    logits, labels = jnp.array([0.1, -0.2]), jnp.array([0, 1])
    value, grads = jax.value_and_grad(ox.losses.anyloss)(
        logits, labels, metric=metric, where=jnp.zeros(2, bool)
    )
    assert value == 1
    np.testing.assert_array_equal(grads, 0)


@pytest.mark.parametrize("metric", METRICS)
def test_huge_logits_and_slopes_are_finite(metric):
    logits, labels = jnp.array([1e4, -1e4, 1e4, -1e4]), jnp.array([0, 1, 0, 1])
    for slope in (73.0, 1e4):
        value, grads = jax.value_and_grad(ox.losses.anyloss)(
            logits, labels, metric=metric, slope=slope
        )
        assert jnp.isfinite(value) and jnp.isfinite(grads).all()


def test_labels_may_be_booleans_integers_or_floats():
    logits, labels = batch(4)
    want = ox.losses.anyloss(logits, labels)
    for dtype in (bool, jnp.float32):
        np.testing.assert_array_equal(
            ox.losses.anyloss(logits, labels.astype(dtype)), want
        )


def test_f1_of_rare_positives_beats_that_of_cross_entropy():
    """The specification's experiment: 5% positives, logistic regression."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(0, 1, (2, 4000, 5)), jnp.float32)
    direction = jnp.array([1.0, -1.0, 0.5, 0.0, 0.0])
    chance = jax.nn.sigmoid(x @ direction - 3.9)
    y = (jnp.asarray(rng.uniform(0, 1, (2, 4000)), jnp.float32) < chance).astype(
        jnp.float32
    )

    def train(loss, params, steps):
        tx = optax.adam(0.02)

        def step(carry, _):
            params, state = carry
            grads = jax.grad(lambda p: loss(x[0] @ p["w"] + p["b"], y[0]))(params)
            updates, state = tx.update(grads, state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), None, steps)[0][0]

    def entropy(z, y):
        return optax.losses.sigmoid_binary_cross_entropy(z, y).mean()

    start = {"w": jnp.zeros(5), "b": jnp.zeros(())}
    with jax.numpy_dtype_promotion("standard"):  # optax.adam promotes its count
        warm = train(entropy, start, 300)
        each = [train(loss, warm, 1200) for loss in (entropy, ox.losses.anyloss)]
    scores = [hard("fbeta", x[1] @ p["w"] + p["b"], y[1]) for p in each]
    assert scores[1] > scores[0] + 0.05


def test_mistakes_are_named():
    logits, labels = batch()
    with pytest.raises(ValueError, match="metric must be one of 'fbeta', 'accuracy'"):
        ox.losses.anyloss(logits, labels, metric="auc")
    with pytest.raises(ValueError, match="beta must lie"):
        ox.losses.anyloss(logits, labels, beta=0.0)
    with pytest.raises(ValueError, match="slope must lie"):
        ox.losses.anyloss(logits, labels, slope=-1.0)
    with pytest.raises(AssertionError, match="labels must have the shape"):
        ox.losses.anyloss(logits, labels[:3])
    with pytest.raises(AssertionError, match="where must have a flag"):
        ox.losses.anyloss(logits, labels, where=jnp.ones(3, bool))
    with pytest.raises(AssertionError, match="logits must be floating"):
        ox.losses.soft_confusion_matrix(labels, labels)

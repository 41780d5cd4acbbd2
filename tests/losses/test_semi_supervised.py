"""ShrinkMatch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ext as ox


def batch(seed=0, rows=40, classes=6, sharpness=5.0):
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(rng.normal(0, 1, (3, rows, classes)))
    # From rows without a favourite to rows with a clear one.
    ramp = jnp.linspace(0, sharpness, rows)[:, None]
    return jax.nn.softmax(ramp * logits[0]), logits[1], logits[2]


def by_loop(weak, strong, aux, threshold, soft_labels):
    """One example, as the paper words it."""
    weak, strong, aux = (np.asarray(x) for x in (weak, strong, aux))
    order = np.argsort(-weak, kind="stable")
    p = weak[order]
    if p[0] >= threshold:
        log_p = strong - np.log(np.exp(strong).sum())
        q = weak if soft_labels else np.eye(len(p))[order[0]]
        return -(q * log_p).sum(), 0.0, 1.0, 0.0
    for c in range(2, len(p)):
        if p[0] / (p[0] + p[c:].sum()) >= threshold:
            kept = np.concatenate([order[:1], order[c:]])
            log_p = aux[kept] - np.log(np.exp(aux[kept]).sum())
            return 0.0, -p[0] * log_p[0], 0.0, c - 1.0
    return 0.0, 0.0, 0.0, max(len(p) - 2.0, 0.0)


@pytest.mark.parametrize("threshold", [0.6, 0.95])
@pytest.mark.parametrize("soft_labels", [True, False])
@pytest.mark.parametrize("classes", [2, 3, 6])
def test_sorting_is_the_loop_over_classes(x64, threshold, soft_labels, classes):
    weak, strong, aux = batch(classes=classes)
    got = ox.losses.shrinkmatch_loss(
        weak, strong, aux_logits=aux, threshold=threshold, soft_labels=soft_labels
    )
    rows = zip(weak, strong, aux, strict=True)
    want = [by_loop(*row, threshold, soft_labels) for row in rows]
    np.testing.assert_allclose(jnp.stack(got, 1), want, rtol=1e-12)
    if classes == 6:  # every kind of example is there
        certain, shrunk = (int((x > 0).sum()) for x in (got.mask, got.shrink))
        assert certain and shrunk and certain + shrunk < 40


def test_two_classes_or_one_cannot_shrink():
    for classes in (1, 2):
        weak = jnp.full((3, classes), 1 / classes)
        got = ox.losses.shrinkmatch_loss(weak, jnp.zeros((3, classes)), threshold=0.9)
        np.testing.assert_array_equal(got.shrink, 0)
        np.testing.assert_array_equal(got.removed, 0)


def test_certain_examples_are_those_of_fixmatch(x64):
    weak, strong, aux = batch(1, sharpness=9.0)
    got = ox.losses.shrinkmatch_loss(weak, strong, aux_logits=aux, soft_labels=False)
    certain = weak.max(-1) >= 0.95
    log_p = jax.nn.log_softmax(strong)
    chosen = jnp.take_along_axis(log_p, weak.argmax(-1, keepdims=True), -1)[:, 0]
    np.testing.assert_allclose(got.certain, jnp.where(certain, -chosen, 0), 1e-13)
    np.testing.assert_array_equal(got.mask, certain)


def test_uniform_probabilities_reach_nothing():
    got = ox.losses.shrinkmatch_loss(jnp.full((1, 6), 1 / 6), jnp.zeros((1, 6)))
    assert got.shrink[0] == got.certain[0] == got.mask[0] == 0
    assert got.removed[0] == 4


def test_dropped_classes_and_weak_probabilities_have_no_gradient():
    weak = jnp.array([[0.5, 0.4, 0.08, 0.01, 0.01]])
    z, a = jnp.zeros((2, 1, 5))

    def total(weak, z, a):
        out = ox.losses.shrinkmatch_loss(weak, z, aux_logits=a)
        return out.shrink.sum() + out.certain.sum()

    of_weak, of_strong, of_aux = jax.grad(total, (0, 1, 2))(weak, z, a)
    np.testing.assert_array_equal(of_weak, 0)
    np.testing.assert_array_equal(of_strong, 0)
    # Classes 0, 3 and 4 are left: 0.5 (1/3 - 1), then 0.5 / 3.
    want = [[-1 / 3, 0, 0, 1 / 6, 1 / 6]]
    np.testing.assert_allclose(of_aux, want, rtol=1e-6)


def test_without_a_second_head_the_strong_logits_serve_both():
    weak, strong, _ = (x.astype(jnp.float32) for x in batch(2))
    got = ox.losses.shrinkmatch_loss(weak, strong)
    want = ox.losses.shrinkmatch_loss(weak, strong, aux_logits=strong)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits_and_degenerate_probabilities_are_finite(size):
    weak = jnp.array([[1.0, 0, 0, 0], [0, 0, 0, 0], [0.5, 0.5, 0, 0]])
    logits = jnp.array([[size, 0.0, -size, 1.0]] * 3)

    def total(strong, aux):
        out = ox.losses.shrinkmatch_loss(weak, strong, aux_logits=aux)
        return out.certain.sum() + out.shrink.sum()

    value, grads = jax.value_and_grad(total, (0, 1))(logits, logits)
    assert jnp.isfinite(value) and jnp.isfinite(jnp.stack(grads)).all()


def test_mistakes_are_named():
    weak, strong, aux = batch()
    with pytest.raises(ValueError, match="threshold must lie"):
        ox.losses.shrinkmatch_loss(weak, strong, threshold=0.0)
    with pytest.raises(AssertionError, match="strong_logits must have the shape"):
        ox.losses.shrinkmatch_loss(weak, strong[:3])
    with pytest.raises(AssertionError, match="aux_logits must have the shape"):
        ox.losses.shrinkmatch_loss(weak, strong, aux_logits=aux[:3])
    with pytest.raises(AssertionError, match="weak_probs must be floating"):
        ox.losses.shrinkmatch_loss(jnp.ones((2, 3), int), jnp.ones((2, 3)))

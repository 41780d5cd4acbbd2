"""Log-probabilities of tokens and sequences, and the KL of a token."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox


def answers(seed=0, batch=4, length=6, vocabulary=5, dtype=float):
    """Logits, labels and a mask of prefixes, one of them empty."""
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(rng.normal(0, 2, (batch, length, vocabulary)), dtype)
    labels = jnp.asarray(rng.integers(0, vocabulary, (batch, length)))
    where = jnp.arange(length)[None] < jnp.array([length, 3, 1, 0])[:, None]
    return logits, labels, where


def test_log_probabilities_are_the_negative_cross_entropy(x64):
    logits, labels, _ = answers()
    want = -optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    np.testing.assert_allclose(
        ox.losses.token_log_probs(logits, labels), want, rtol=1e-13
    )


def test_probabilities_of_all_labels_add_up_to_one(x64):
    logits, _, _ = answers(1)
    each = [
        ox.losses.token_log_probs(logits, jnp.full(logits.shape[:-1], v))
        for v in range(5)
    ]
    np.testing.assert_allclose(sum(map(jnp.exp, each)), jnp.ones((4, 6)), rtol=1e-14)


@pytest.mark.parametrize("average", [False, True])
def test_sequences_are_masked_sums_or_means_of_tokens(x64, average):
    logits, labels, where = answers(2)
    got = ox.losses.sequence_log_probs(logits, labels, where=where, average=average)
    tokens = np.asarray(ox.losses.token_log_probs(logits, labels))
    counts = np.array([6, 3, 1, 0])
    want = (tokens * np.asarray(where)).sum(1)
    want = want / np.maximum(counts, 1) if average else want
    np.testing.assert_allclose(got, want, rtol=1e-14)
    assert got[3] == 0


def test_masked_labels_may_be_anything_and_masked_logits_get_no_gradient():
    logits, labels, where = answers(3, dtype=jnp.float32)
    padded = jnp.where(where, labels, -100)

    def total(logits, labels):
        return ox.losses.sequence_log_probs(logits, labels, where=where).sum()

    assert total(logits, padded) == total(logits, labels)
    grad = jax.grad(total)(logits, padded)
    np.testing.assert_array_equal(grad[~where], jnp.zeros_like(grad[~where]))
    assert jnp.all(jnp.abs(grad[where]).sum(-1) > 0)


def test_micro_batches_of_any_size_add_up_to_the_mean_over_all_tokens(x64):
    logits, labels, where = answers(4)
    parts = [
        ox.losses.sequence_log_probs(
            logits[i], labels[i], where=where[i], return_parts=True
        )
        for i in (slice(0, 1), slice(1, 4))
    ]
    total, count = (sum(x.sum() for x in each) for each in zip(*parts, strict=True))
    tokens = ox.losses.token_log_probs(logits, labels)
    assert total / count == pytest.approx(float(tokens[where].mean()), rel=1e-14)
    assert count == 10


@pytest.mark.parametrize("label", [0, 1])
def test_logits_of_ten_thousand_are_harmless(label):
    logits = jnp.array([1e4, -1e4], jnp.float32)
    value, grad = jax.value_and_grad(ox.losses.token_log_probs)(
        logits, jnp.array(label)
    )
    assert value == (-2e4 if label else 0)
    np.testing.assert_array_equal(grad, [-1.0, 1.0] if label else [0.0, 0.0])


def test_kl_of_a_token_is_that_of_optax_and_its_gradient_the_difference(x64):
    logits, _, _ = answers(5)
    reference, _, _ = answers(6)
    log_p, ref_log_p = jax.nn.log_softmax(logits), jax.nn.log_softmax(reference)
    want = optax.losses.kl_divergence_with_log_targets(log_p, ref_log_p)
    np.testing.assert_allclose(ox.losses.token_kl(reference, logits), want, rtol=1e-12)
    grads = jax.grad(lambda r, x: ox.losses.token_kl(r, x).sum(), (0, 1))(
        reference, logits
    )
    np.testing.assert_array_equal(grads[0], jnp.zeros_like(reference))
    difference = jnp.exp(log_p) - jnp.exp(ref_log_p)
    np.testing.assert_allclose(grads[1], difference, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("impossible", [-1e4, -jnp.inf])
def test_tokens_that_the_reference_never_says_add_nothing_to_the_kl(impossible):
    reference = jnp.array([0.0, 0.0, impossible], jnp.float32)
    logits = jnp.array([0.0, 0.0, impossible], jnp.float32)
    value, grad = jax.value_and_grad(lambda x: ox.losses.token_kl(reference, x))(logits)
    assert value == 0
    np.testing.assert_allclose(grad, jnp.zeros(3), atol=1e-7)


def test_bad_arguments_are_named():
    logits, labels = jnp.zeros((2, 3, 4)), jnp.zeros((2, 3), jnp.int32)
    with pytest.raises(AssertionError, match="labels must have the shape"):
        ox.losses.token_log_probs(logits, labels[:, :2])
    with pytest.raises(AssertionError, match="labels must be integers"):
        ox.losses.token_log_probs(logits, jnp.zeros((2, 3)))
    with pytest.raises(AssertionError, match="logits must be floating point"):
        ox.losses.token_log_probs(jnp.zeros((2, 3, 4), jnp.int32), labels)
    with pytest.raises(AssertionError, match="where"):
        ox.losses.sequence_log_probs(logits, labels, where=jnp.ones((2, 4), bool))
    with pytest.raises(AssertionError, match="axis of tokens"):
        ox.losses.sequence_log_probs(jnp.zeros(4), jnp.array(1))
    with pytest.raises(AssertionError, match="ref_logits, logits"):
        ox.losses.token_kl(logits, logits[:1])

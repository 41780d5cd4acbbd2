"""Token weights from the token's own probability: TALR and TLDR."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox

rng = np.random.default_rng(0)
LOGITS = jnp.asarray(rng.normal(0, 2, (4, 5, 6)), jnp.float32)
LABELS = jnp.asarray(rng.integers(0, 6, (4, 5)))
WHERE = jnp.asarray(rng.random((4, 5)) < 0.6).at[2].set(False)
TALR, TLDR = ox.losses.talr_cross_entropy, ox.losses.tldr_cross_entropy
BOTH = pytest.mark.parametrize(
    "loss",
    [
        functools.partial(TALR, tau=1.5, min_weight=0.1),
        TLDR,
        functools.partial(TLDR, weight="focal", gamma=1.5),
    ],
    ids=["talr", "tldr-cosine", "tldr-focal"],
)


def cross_entropy(logits=LOGITS, labels=LABELS):
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)


def of_probability(p, **kwargs):
    """TLDR of a label with probability p, of two classes."""
    logits = jnp.stack([jnp.log(p), jnp.log1p(-p)], axis=-1)
    return TLDR(logits, jnp.zeros(p.shape, int), **kwargs)


@pytest.mark.parametrize(("tau", "floor"), [(0.5, 0.2), (2.0, 0.0), (1.0, 0.01)])
def test_talr_weighs_by_the_tokens_probability_above_a_floor(tau, floor):
    plain = cross_entropy()
    got = TALR(LOGITS, LABELS, tau=tau, min_weight=floor)
    want = np.maximum(np.exp(-plain / tau), floor) * plain
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("kwargs", [{"tau": 1e9}, {"min_weight": 1.0}])
def test_talr_is_the_cross_entropy_where_nothing_is_weighed(kwargs):
    np.testing.assert_allclose(TALR(LOGITS, LABELS, **kwargs), cross_entropy())


def test_talrs_gradient_is_the_weight_times_that_of_the_cross_entropy():
    got = jax.grad(lambda z: TALR(z, LABELS, tau=1.0).sum())(LOGITS)
    weights = jnp.maximum(jnp.exp(-cross_entropy()), 0.01)
    plain = jax.grad(lambda z: cross_entropy(z).sum())(LOGITS)
    np.testing.assert_allclose(got, weights[..., None] * plain, rtol=1e-4, atol=1e-7)


def test_a_token_that_the_model_rules_out_counts_for_the_floor():
    logits = jnp.log(jnp.array([[1e-6, 1 - 1e-6]]))
    got = TALR(logits, jnp.array([0]), tau=1.0)
    np.testing.assert_allclose(got, [-0.01 * np.log(1e-6)], rtol=1e-5)


def test_tau_is_the_median_over_sequences_of_their_means():
    plain = np.asarray(cross_entropy())
    means = [plain[i][np.asarray(WHERE[i])].mean() for i in (0, 1, 3)]  # 2 is empty
    got = TALR(LOGITS, LABELS, where=WHERE)
    want = TALR(LOGITS, LABELS, where=WHERE, tau=np.median(means).item())
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_of_an_even_number_of_sequences_the_two_in_the_middle_are_averaged():
    means = np.sort(np.asarray(cross_entropy()).mean(-1))
    want = TALR(LOGITS, LABELS, tau=float(means[1] + means[2]) / 2)
    np.testing.assert_allclose(TALR(LOGITS, LABELS), want, rtol=1e-5)


def test_a_batch_that_is_learnt_has_a_smallest_tau():
    logits = 1e4 * jax.nn.one_hot(LABELS, 6)
    value, gradient = jax.value_and_grad(lambda z: TALR(z, LABELS).sum())(logits)
    assert value == 0
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("p", "weight"), [(1e-12, 2.0), (0.5, 1.0), (1.0, 0.0), (0.25, 1 + 0.5**0.5)]
)
def test_tldrs_cosine_falls_from_two_to_zero(x64, p, weight):
    got = of_probability(jnp.array([p]))
    np.testing.assert_allclose(got, [-weight * np.log(p)], rtol=1e-12, atol=1e-12)


def test_tldrs_gradient_goes_through_the_weight(x64):
    p = jnp.linspace(0.05, 0.95, 7)
    got = jax.grad(lambda p: of_probability(p).sum())(p)
    w = jnp.cos(jnp.pi * p) + 1
    want = -w / p + jnp.pi * jnp.sin(jnp.pi * p) * jnp.log(p)
    np.testing.assert_allclose(got, want, rtol=1e-11)
    alone = jax.grad(lambda p: of_probability(p, stop_gradient=True).sum())(p)
    np.testing.assert_allclose(alone, -w / p, rtol=1e-11)


def test_tldr_of_a_learnt_token_is_of_third_order(x64):
    miss = jnp.array([1e-3, 1e-4])
    got = of_probability(1 - miss)
    # (pi^2/2) miss^2 (1 - O(miss^2)) times miss (1 + miss/2 + ...).
    np.testing.assert_allclose(got, np.pi**2 / 2 * miss**3 * (1 + miss / 2), rtol=2e-6)


@pytest.mark.parametrize("gap", [4.0, 9.0, 14.0])
def test_the_weight_of_a_learnt_token_adds_no_rounding_error_of_its_own(gap):
    logits, labels = jnp.array([[gap, 0.0]]), jnp.array([0])
    plain = np.asarray(cross_entropy(logits, labels), np.float64)
    want = (1 + np.cos(np.pi * np.exp(-plain))) * plain
    np.testing.assert_allclose(TLDR(logits, labels), want, rtol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.7])
def test_tldrs_focal_weight(gamma):
    plain = cross_entropy()
    got = TLDR(LOGITS, LABELS, weight="focal", gamma=gamma)
    np.testing.assert_allclose(got, (1 - np.exp(-plain)) ** gamma * plain, rtol=2e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("weight", ["cosine", "focal"])
def test_probabilities_of_zero_and_one_are_finite(weight, gamma):
    logits = jnp.array([[1e4, -1e4], [-1e4, 1e4], [1e4, 1e4]])
    value, gradient = jax.value_and_grad(
        lambda z: TLDR(z, jnp.zeros(3, int), weight=weight, gamma=gamma).sum()
    )(logits)
    assert jnp.isfinite(value)
    assert jnp.isfinite(gradient).all()


@BOTH
def test_a_mask_removes_tokens_and_their_gradients(loss):
    got = loss(LOGITS, LABELS, where=WHERE)
    np.testing.assert_allclose(got, jnp.where(WHERE, loss(LOGITS, LABELS), 0))
    gradient = jax.grad(lambda z: loss(z, LABELS, where=WHERE).sum())(LOGITS)
    np.testing.assert_array_equal(gradient[~WHERE], 0)


@BOTH
def test_labels_of_padding_may_be_anything(loss):
    labels = jnp.where(WHERE, LABELS, -100)
    want = loss(LOGITS, LABELS, where=WHERE)
    np.testing.assert_array_equal(loss(LOGITS, labels, where=WHERE), want)


@BOTH
def test_parts_of_micro_batches_add_up_to_the_mean_over_all_tokens(loss):
    want = loss(LOGITS, LABELS, where=WHERE).sum() / float(WHERE.sum())
    parts = [
        loss(LOGITS[i], LABELS[i], where=WHERE[i], return_parts=True)
        for i in (slice(0, 1), slice(1, 4))  # the empty sequence is in the second
    ]
    numerator, denominator = (sum(part[k].sum() for part in parts) for k in (0, 1))
    np.testing.assert_allclose(numerator / denominator, want, rtol=1e-6)
    assert denominator == float(WHERE.sum())
    assert [part[0].shape for part in parts] == [(1,), (3,)]


@BOTH
def test_no_token_at_all_costs_nothing(loss):
    where = jnp.zeros((4, 5), bool)
    gradient = jax.grad(lambda z: loss(z, LABELS, where=where).sum())(LOGITS)
    np.testing.assert_array_equal(gradient, np.zeros(LOGITS.shape))
    numerator, denominator = loss(LOGITS, LABELS, where=where, return_parts=True)
    np.testing.assert_array_equal(numerator, np.zeros(4))
    np.testing.assert_array_equal(denominator, np.zeros(4))
    np.testing.assert_array_equal(TALR(LOGITS, LABELS, where=where), np.zeros((4, 5)))


@pytest.mark.parametrize("loss", [TALR, TLDR])
def test_what_does_not_fit_is_named(loss):
    with pytest.raises(AssertionError, match="labels must be"):
        loss(LOGITS, LABELS[:, :3])
    with pytest.raises(AssertionError, match="labels must be integers"):
        loss(LOGITS, jnp.zeros((4, 5)))
    with pytest.raises(AssertionError, match="where must have"):
        loss(LOGITS, LABELS, where=WHERE[0])
    with pytest.raises(AssertionError, match="logits must be floating"):
        loss(LABELS[..., None], LABELS)


@pytest.mark.parametrize(
    ("loss", "kwargs", "message"),
    [
        (TALR, {"tau": "mean"}, "talr_cross_entropy: tau must be one of 'median'"),
        (TALR, {"tau": 0.0}, "talr_cross_entropy: tau must lie in"),
        (TALR, {"min_weight": 1.5}, "talr_cross_entropy: min_weight"),
        (TLDR, {"weight": "linear"}, "tldr_cross_entropy: weight must be one of"),
        (TLDR, {"gamma": -1.0}, "tldr_cross_entropy: gamma"),
    ],
)
def test_hyperparameters_outside_their_range_are_named(loss, kwargs, message):
    with pytest.raises(ValueError, match=message):
        loss(LOGITS, LABELS, **kwargs)

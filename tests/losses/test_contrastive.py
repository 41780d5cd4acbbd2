"""MACL and the multi-similarity loss."""

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

FROM_SIMILARITIES = ox.losses.macl_loss_from_similarities


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def units(seed, *shape, dtype=jnp.float32):
    x = normal(seed, *shape, dtype=dtype)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def similarities(seed, n=5, k=7):
    """Positives and negatives between -1 and 1, in float64."""
    rng = np.random.default_rng(seed)
    return (
        jnp.asarray(rng.uniform(-0.2, 1, n)),
        jnp.asarray(rng.uniform(-1, 0.6, (n, k))),
    )


def printed(positive, negatives, temperature, alpha, a0, reweight):
    """The rule as the paper prints it, in NumPy."""
    positive, negatives = np.asarray(positive), np.asarray(negatives)
    tau = temperature * (1 + alpha * (positive.mean() - a0))
    top = np.exp(positive / tau)
    p = top / (top + np.exp(negatives / tau).sum(-1))
    return -np.log(p) / (1 - p if reweight else 1), tau


@pytest.mark.parametrize("reweight", [True, False])
@pytest.mark.parametrize(
    ("temperature", "alpha", "a0"), [(0.1, 0.5, 0.0), (0.3, 1.0, 0.4), (0.2, 0.0, 0.5)]
)
def test_macl_is_the_printed_formula(x64, temperature, alpha, a0, reweight):
    positive, negatives = similarities(0)
    got = FROM_SIMILARITIES(
        positive,
        negatives,
        temperature=temperature,
        alpha=alpha,
        a0=a0,
        reweight=reweight,
    )
    want, _ = printed(positive, negatives, temperature, alpha, a0, reweight)
    # 1 - p loses up to 1e-4 of its digits where p is nearly 1.
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_macl_without_model_awareness_is_ntxent(x64):
    a, b = normal(1, 6, 5, dtype=jnp.float64), normal(2, 6, 5, dtype=jnp.float64)
    got = ox.losses.macl_loss(a, b, temperature=0.07, alpha=0.0, reweight=False)
    both, labels = jnp.concatenate([a, b]), jnp.tile(jnp.arange(6), 2)
    with jax.numpy_dtype_promotion("standard"):
        want = optax.losses.ntxent(both, labels, temperature=0.07)
    np.testing.assert_allclose(got.mean(), want, rtol=1e-12)


def test_macl_of_two_views_takes_all_other_rows_as_negatives(x64):
    a, b = units(3, 4, 3, dtype=jnp.float64), units(4, 4, 3, dtype=jnp.float64)
    rows = jnp.concatenate([a, b])
    s = rows @ rows.T
    others = [[j for j in range(8) if j % 4 != i % 4] for i in range(8)]
    want = FROM_SIMILARITIES(
        jnp.stack([s[i, (i + 4) % 8] for i in range(8)]),
        jnp.stack([s[i, jnp.array(js)] for i, js in enumerate(others)]),
        temperature=0.2,
        alpha=0.3,
        a0=0.1,
    )
    options = {"temperature": 0.2, "alpha": 0.3, "a0": 0.1}
    got = ox.losses.macl_loss(3 * a, 0.1 * b, **options)
    np.testing.assert_allclose(got, want, rtol=1e-12)
    plain = ox.losses.macl_loss(a, b, reweight=False, **options)
    assert (plain < got).all()


def test_reweighted_macl_pulls_every_positive_equally(x64):
    positive, negatives = similarities(5)
    grad = jax.grad(lambda s: FROM_SIMILARITIES(s, negatives).mean())(positive)
    _, tau = printed(positive, negatives, 0.1, 0.5, 0.0, True)
    np.testing.assert_allclose(grad, np.full(5, -1 / (5 * tau)), rtol=1e-13)


def test_temperature_and_weights_of_macl_carry_no_gradient(x64):
    positive, negatives = similarities(6)
    loss, tau = printed(positive, negatives, 0.1, 0.5, 0.0, False)
    weights = jnp.asarray(1 / -np.expm1(-loss))

    def given(positive, negatives):
        """The same loss with tau and weights as numbers."""
        plain = FROM_SIMILARITIES(
            positive, negatives, temperature=tau, alpha=0.0, reweight=False
        )
        return jnp.mean(weights * plain)

    def ours(positive, negatives):
        return FROM_SIMILARITIES(positive, negatives).mean()

    want = jax.grad(given, (0, 1))(positive, negatives)
    got = jax.grad(ours, (0, 1))(positive, negatives)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11)
    doubled = FROM_SIMILARITIES(positive, negatives, alpha=1.0)
    assert (doubled != FROM_SIMILARITIES(positive, negatives)).all()


@pytest.mark.parametrize("gap", [2.0, 20.0, 200.0])
def test_macl_of_a_perfect_anchor_goes_to_one(gap):
    positive, negatives = jnp.array([gap]), jnp.array([[0.0]])
    value, grad = jax.value_and_grad(
        lambda s: FROM_SIMILARITIES(s, negatives, alpha=0.0, temperature=0.1).sum()
    )(positive)
    # 1 + e^d / 2 with d = -10 gap, and 1 ulp.
    assert abs(value - 1) < np.exp(-10 * gap) + 2e-7
    np.testing.assert_allclose(grad, [-10.0], rtol=1e-6)


@pytest.mark.parametrize(("reweight", "value"), [(True, 1.0), (False, 0.0)])
def test_masked_negatives_count_for_nothing(reweight, value):
    positive = jnp.array([0.5, 0.2, 0.1])
    negatives = jnp.array([[0.3, 1e4], [0.1, -0.1], [1e4, -1e4]])
    where = jnp.array([[True, False], [True, True], [False, False]])

    def losses(s, n):
        return FROM_SIMILARITIES(s, n, where=where, reweight=reweight)

    got = losses(positive, negatives)
    assert got[2] == value
    changed = negatives.at[0, 1].set(0.0)
    np.testing.assert_array_equal(got, losses(positive, changed))
    for grad in jax.grad(lambda *x: losses(*x).sum(), (0, 1))(positive, negatives):
        assert jnp.isfinite(grad).all()
        np.testing.assert_array_equal(grad[2], jnp.zeros_like(grad[2]))


def test_identical_and_zero_embeddings_have_finite_gradients():
    for rows in (jnp.ones((3, 4)), jnp.zeros((3, 4))):
        for loss in (
            lambda x: ox.losses.macl_loss(x, x),
            lambda x: ox.losses.multi_similarity_loss(x, jnp.array([0, 0, 1])),
        ):
            value, grad = jax.value_and_grad(lambda x, f=loss: f(x).sum())(rows)
            assert jnp.isfinite(value)
            assert jnp.isfinite(grad).all()


@pytest.mark.parametrize(
    ("hyperparams", "message"),
    [
        ({"temperature": 0.0}, "temperature must lie in"),
        ({"alpha": 1.5}, "alpha must lie in"),
        ({"alpha": -0.1}, "alpha must lie in"),
        ({"a0": float("nan")}, "a0 must lie in"),
    ],
)
def test_bad_hyperparameters_of_macl_are_named(hyperparams, message):
    with pytest.raises(ValueError, match=message):
        FROM_SIMILARITIES(jnp.zeros(2), jnp.zeros((2, 3)), **hyperparams)
    with pytest.raises(ValueError, match=message):
        ox.losses.macl_loss(jnp.zeros((2, 3)), jnp.zeros((2, 3)), **hyperparams)


def test_shapes_of_macl_that_do_not_fit_are_named():
    with pytest.raises(AssertionError, match="negatives"):
        FROM_SIMILARITIES(jnp.zeros(2), jnp.zeros((3, 4)))
    with pytest.raises(AssertionError, match="negatives"):
        FROM_SIMILARITIES(jnp.zeros(2), jnp.zeros((2, 0)))
    with pytest.raises(AssertionError, match="where"):
        FROM_SIMILARITIES(jnp.zeros(2), jnp.zeros((2, 3)), where=jnp.ones(2, bool))
    with pytest.raises(AssertionError, match="embeddings_b"):
        ox.losses.macl_loss(jnp.zeros((2, 3)), jnp.zeros((2, 4)))


def multi_similarity_loop(e, labels, a, b, t, margin, eps):
    """The rule for one anchor at a time, in NumPy."""
    s, losses = e @ e.T, []
    for i in range(len(e)):
        pos = s[i][(labels == labels[i]) & (s[i] < 1 - eps)]
        neg = s[i][labels != labels[i]]
        kept_neg = neg[neg + margin > pos.min()] if pos.size else neg[:0]
        kept_pos = pos[pos - margin < neg.max()] if neg.size else pos[:0]
        if not (kept_pos.size and kept_neg.size):
            losses.append(0.0)
            continue
        pull = np.log(1 + np.exp(-a * (kept_pos - t)).sum()) / a
        losses.append(pull + np.log(1 + np.exp(b * (kept_neg - t)).sum()) / b)
    return np.array(losses)


LABELS = jnp.array([0, 1, 2, 0, 1, 2, 0, 1, 0, 3])


@pytest.mark.parametrize(
    ("a", "b", "t", "margin", "eps"),
    [(2.0, 40.0, 0.5, 0.1, 1e-5), (5.0, 10.0, 0.2, 0.3, 1e-5), (1, 50, 1, -0.2, 0.3)],
)
def test_multi_similarity_is_a_loop_over_anchors(x64, a, b, t, margin, eps):
    e = units(7, 10, 3, dtype=jnp.float64)
    got = ox.losses.multi_similarity_loss(
        e, LABELS, scale_pos=a, scale_neg=b, threshold=t, margin=margin, eps=eps
    )
    want = multi_similarity_loop(
        np.asarray(e), np.asarray(LABELS), a, b, t, margin, eps
    )
    assert 0 < (want == 0).sum() < 10
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-15)


def test_pair_weights_are_those_of_the_paper(x64):
    e, a, b, t = units(8, 10, 3, dtype=jnp.float64), 2.0, 40.0, 0.5
    wide = {"margin": 3.0}  # keeps all pairs
    s = e @ e.T
    # Anchor 0 alone: moving e_j by h along e_0 changes S_0j by h, and other anchors'
    # losses are left out.
    grad = jax.grad(
        lambda rows: ox.losses.multi_similarity_loss(rows, LABELS, **wide)[0]
    )(e)
    positives, negatives = jnp.array([3, 6, 8]), jnp.array([1, 2, 4, 5, 7, 9])
    pull, push = jnp.exp(-a * (s[0, positives] - t)), jnp.exp(b * (s[0, negatives] - t))
    by_pair = grad @ e[0]
    np.testing.assert_allclose(by_pair[positives], -pull / (1 + pull.sum()), rtol=1e-12)
    np.testing.assert_allclose(by_pair[negatives], push / (1 + push.sum()), rtol=1e-12)


def test_large_negative_scale_leaves_the_hardest_negative(x64):
    e = units(9, 10, 3, dtype=jnp.float64)
    scale = 1e5
    both = {"margin": 3.0, "threshold": 0.1}
    got = ox.losses.multi_similarity_loss(e, LABELS, scale_neg=scale, **both)
    none = ox.losses.multi_similarity_loss(e, LABELS, scale_neg=1e12, **both)
    s = jnp.where(LABELS[:, None] == LABELS[None], -1.0, e @ e.T)
    hardest = jnp.maximum(s.max(1) - 0.1, 0)
    pull = multi_similarity_loop(
        np.asarray(e), np.asarray(LABELS), 2.0, 10.0, 0.1, 3.0, 1e-5
    )
    np.testing.assert_allclose(got, none, atol=np.log(10) / scale)
    alone = jnp.asarray(pull) > 0
    want = jnp.where(alone, hardest, 0)
    e_pull = jnp.array(
        [
            np.log1p(
                sum(
                    np.exp(-2.0 * (float(e[i] @ e[j]) - 0.1))
                    for j in range(10)
                    if j != i and LABELS[i] == LABELS[j]
                )
            )
            / 2
            for i in range(10)
        ]
    )
    np.testing.assert_allclose(
        got, want + jnp.where(alone, e_pull, 0), atol=np.log(10) / scale
    )


@pytest.mark.parametrize("labels", [jnp.zeros(4, int), jnp.arange(4)])
def test_one_class_or_all_different_ones_have_loss_and_gradient_zero(labels):
    value, grad = jax.value_and_grad(
        lambda e: ox.losses.multi_similarity_loss(e, labels).sum()
    )(units(10, 4, 3))
    assert value == 0
    np.testing.assert_array_equal(grad, jnp.zeros((4, 3)))


def test_rows_that_do_not_count_are_in_no_pair():
    e = units(11, 10, 3)
    where = jnp.arange(10) < 7
    got = ox.losses.multi_similarity_loss(e, LABELS, where=where)
    alone = ox.losses.multi_similarity_loss(e[:7], LABELS[:7])
    np.testing.assert_allclose(got[:7], alone, rtol=1e-6)
    np.testing.assert_array_equal(got[7:], jnp.zeros(3))
    grad = jax.grad(
        lambda x: ox.losses.multi_similarity_loss(x, LABELS, where=where).sum()
    )(e)
    np.testing.assert_array_equal(grad[7:], jnp.zeros((3, 3)))


@pytest.mark.parametrize("name", ["scale_pos", "scale_neg"])
def test_bad_scales_are_named(name):
    with pytest.raises(ValueError, match=f"{name} must lie in"):
        ox.losses.multi_similarity_loss(jnp.eye(3), jnp.arange(3), **{name: 0.0})


def test_bad_labels_are_named():
    with pytest.raises(AssertionError, match="labels must be integers"):
        ox.losses.multi_similarity_loss(jnp.eye(3), jnp.ones(3))
    with pytest.raises(AssertionError, match="labels"):
        ox.losses.multi_similarity_loss(jnp.eye(3), jnp.arange(2))
    with pytest.raises(AssertionError, match="embeddings"):
        ox.losses.multi_similarity_loss(jnp.ones(3), jnp.arange(3))

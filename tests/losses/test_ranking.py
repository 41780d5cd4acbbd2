"""NeuralNDCG, its relaxed sort, and Sinkhorn scaling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ext as ox

NDCG = ox.losses.neural_ndcg_loss


def lists(seed, n=4, length=7):
    """Scores, labels and a mask with holes anywhere, in float64."""
    rng = np.random.default_rng(seed)
    where = rng.random((n, length)) < 0.7
    where[:, 0] = True
    labels = rng.integers(0, 4, (n, length)).astype(float)
    labels[:, 0] = 2
    return tuple(map(jnp.asarray, (rng.normal(size=(n, length)), labels, where)))


def exact_ndcg(scores, labels, k=None, powered=True):
    """NDCG of one list, by sorting."""
    gains = 2.0 ** np.asarray(labels) - 1 if powered else np.asarray(labels)
    k = len(gains) if k is None else min(k, len(gains))
    discounts = 1 / np.log2(np.arange(2, k + 2))
    ranked = gains[np.argsort(-np.asarray(scores), kind="stable")]
    return (ranked[:k] @ discounts) / (np.sort(gains)[::-1][:k] @ discounts)


@pytest.mark.parametrize("k", [None, 1, 3, 20])
@pytest.mark.parametrize("powered", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_low_temperature_gives_minus_the_exact_ndcg(x64, k, powered, transposed):
    scores, labels, where = lists(0)
    got = NDCG(
        scores,
        labels,
        temperature=1e-3,
        k=k,
        powered_relevancies=powered,
        transposed=transposed,
        where=where,
    )
    want = [
        -exact_ndcg(s[w], y[w], k, powered)
        for s, y, w in zip(scores, labels, where, strict=True)
    ]
    np.testing.assert_allclose(got, want, atol=1e-8)


def test_both_forms_are_one_sum_in_two_orders(x64):
    scores, labels, where = lists(1)
    options = {"where": where, "k": 3, "temperature": 0.7}
    np.testing.assert_allclose(
        NDCG(scores, labels, transposed=True, **options),
        NDCG(scores, labels, transposed=False, **options),
        rtol=1e-13,
    )


def test_relaxed_sort_at_low_temperature_is_the_permutation(x64):
    rng = np.random.default_rng(2)
    # Neighbours in rank differ by 0.2, so that what is off is exp(-0.2 / 1e-3).
    scores = jnp.asarray(rng.permuted(np.tile(np.arange(6) / 5, (3, 1)), axis=1))
    p = ox.losses.neural_sort(scores, temperature=1e-3)
    order = jnp.argsort(scores, descending=True)
    np.testing.assert_allclose(p, jax.nn.one_hot(order, 6), atol=1e-12)


def test_relaxed_sort_is_the_printed_formula(x64):
    s, tau = np.array([0.3, -1.0, 2.0]), 0.8
    b = np.abs(s[:, None] - s[None]).sum(1)
    rows = [np.exp(((4 - 2 * i) * s - b) / tau) for i in (1, 2, 3)]
    want = np.stack([row / row.sum() for row in rows])
    got = ox.losses.neural_sort(jnp.asarray(s), temperature=tau)
    np.testing.assert_allclose(got, want, rtol=1e-14)


def test_masked_items_have_no_column_and_ranks_come_first(x64):
    scores, _, where = lists(3)
    p = ox.losses.neural_sort(scores, where=where)
    for each, s, w in zip(p, scores, where, strict=True):
        n = int(w.sum())
        np.testing.assert_array_equal(each[n:], jnp.zeros((7 - n, 7)))
        np.testing.assert_array_equal(each[:, ~w], jnp.zeros((7, 7 - n)))
        np.testing.assert_allclose(
            each[:n][:, w], ox.losses.neural_sort(s[w]), rtol=1e-12
        )


def test_sinkhorn_makes_rows_exact_and_columns_nearly_so(x64):
    scores = jnp.asarray(np.random.default_rng(4).normal(size=(5, 6)))
    p = ox.losses.sinkhorn_normalize(ox.losses.neural_sort(scores))
    np.testing.assert_allclose(p.sum(-1), 1.0, rtol=1e-14)
    # How fast depends on the matrix: the specification's lists came to 5e-8.
    errors = [
        abs(
            ox.losses.sinkhorn_normalize(
                ox.losses.neural_sort(scores), num_iters=n
            ).sum(-2)
            - 1
        ).max()
        for n in (1, 50, 500)
    ]
    assert errors[0] > 1e-3
    assert errors[1] < 1e-5
    assert errors[2] < 1e-12


def test_sinkhorn_leaves_lines_of_zeros_alone_and_bounds_small_sums(x64):
    m = jnp.array([[1.0, 2.0, 0.0], [3.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
    got, grad = jax.value_and_grad(lambda m: ox.losses.sinkhorn_normalize(m).sum())(m)
    assert got == pytest.approx(2.0)
    assert jnp.isfinite(grad).all()
    small = ox.losses.sinkhorn_normalize(jnp.full((1, 1), 0.01), num_iters=1, eps=0.1)
    np.testing.assert_allclose(small, 1.0)  # 0.01 / 0.1 / 0.1


def test_order_of_items_and_a_constant_do_not_matter(x64):
    scores, labels, where = lists(5)
    want = NDCG(scores, labels, where=where)
    order = jnp.asarray(np.random.default_rng(6).permutation(7))
    moved = NDCG(scores[:, order], labels[:, order], where=where[:, order])
    np.testing.assert_allclose(moved, want, rtol=1e-13)
    np.testing.assert_allclose(NDCG(scores + 3, labels, where=where), want, rtol=1e-12)


def test_what_is_masked_may_hold_anything(x64):
    scores, labels, where = lists(7)
    hidden_scores = jnp.where(where, scores, jnp.nan)
    hidden_labels = jnp.where(where, labels, -1.0)
    np.testing.assert_array_equal(
        NDCG(hidden_scores, hidden_labels, where=where),
        NDCG(scores, labels, where=where),
    )
    grad = jax.grad(lambda s: NDCG(s, hidden_labels, where=where).sum())(hidden_scores)
    assert jnp.isfinite(grad).all()
    np.testing.assert_array_equal(grad[~where], jnp.zeros(int((~where).sum())))


def test_lists_without_items_or_relevant_ones_have_loss_and_gradient_zero():
    scores = jnp.array([[1.0, 2.0, 3.0]] * 3)
    labels = jnp.array([[0, 0, 0], [1, 1, 1], [0, 2, 0]])
    where = jnp.array([[True] * 3, [False] * 3, [True] * 3])
    losses = NDCG(scores, labels, where=where)
    grad = jax.grad(lambda s: NDCG(s, labels, where=where).sum())(scores)
    np.testing.assert_array_equal(losses[:2], jnp.zeros(2))
    np.testing.assert_array_equal(grad[:2], jnp.zeros((2, 3)))
    assert losses[2] < 0
    assert jnp.any(grad[2] != 0)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("temperature", [1e-3, 1.0])
def test_gradients_are_finite_for_ties_and_extreme_scores(scale, temperature):
    scores = scale * jnp.array([[1.0, -1.0, 1.0, 0.5], [0.0, 0.0, -1.0, 1.0]])
    labels = jnp.array([[0, 1, 2, 0], [3, 0, 0, 1]])
    value, grad = jax.value_and_grad(
        lambda s: NDCG(s, labels, temperature=temperature).sum()
    )(scores)
    assert jnp.isfinite(value)
    assert jnp.isfinite(grad).all()


def test_gradient_descent_sorts_a_random_list():
    rng = np.random.default_rng(8)
    scores = jnp.asarray(rng.normal(size=6), jnp.float32)
    labels = jnp.asarray([0, 3, 1, 2, 0, 1])
    step = jax.jit(lambda s: s - jax.grad(lambda s: NDCG(s, labels))(s))
    assert exact_ndcg(scores, labels) < 0.99
    for _ in range(300):
        scores = step(scores)
    assert exact_ndcg(scores, labels) == 1


def test_labels_may_be_integers_and_carry_no_gradient():
    scores, labels, where = (
        x.astype(d)
        for x, d in zip(lists(9), (jnp.float32, jnp.float32, bool), strict=True)
    )
    np.testing.assert_array_equal(
        NDCG(scores, labels, where=where),
        NDCG(scores, labels.astype(int), where=where),
    )
    grad = jax.grad(lambda y: NDCG(scores, y, where=where).sum())(labels)
    np.testing.assert_array_equal(grad, jnp.zeros_like(labels))


def test_eps_and_iterations_reach_the_result(x64):
    scores, labels, where = lists(10)
    want = NDCG(scores, labels, where=where)
    rough = NDCG(scores, labels, where=where, sinkhorn_iters=1)
    assert (abs(rough - want) > 1e-5).any()
    assert (NDCG(scores, labels, where=where, eps=0.5) > want).all()


@pytest.mark.parametrize(
    ("hyperparams", "message"),
    [
        ({"temperature": 0.0}, "temperature must lie in"),
        ({"k": 0}, "k must be an integer"),
        ({"sinkhorn_iters": 0}, "num_iters must be an integer"),
        ({"eps": 0.0}, "eps must lie in"),
    ],
)
def test_bad_hyperparameters_are_named(hyperparams, message):
    with pytest.raises(ValueError, match=message):
        NDCG(jnp.zeros((2, 3)), jnp.ones((2, 3)), **hyperparams)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(AssertionError, match="labels"):
        NDCG(jnp.zeros((2, 3)), jnp.ones((2, 4)))
    with pytest.raises(AssertionError, match="where"):
        NDCG(jnp.zeros((2, 3)), jnp.ones((2, 3)), where=jnp.ones(3, bool))
    with pytest.raises(AssertionError, match="matrix"):
        ox.losses.sinkhorn_normalize(jnp.ones(3))
    with pytest.raises(AssertionError, match="scores"):
        ox.losses.neural_sort(jnp.ones(3, int))

"""Expected gradients, and penalties on them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ext as ox

EG, SAMPLED = ox.losses.expected_gradients, ox.losses.sample_expected_gradients
GINI = ox.losses.attribution_gini
rng = np.random.default_rng(0)
X = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
REFERENCES = jnp.asarray(rng.normal(size=(3, 5, 4)), jnp.float32)
POINTS = jnp.asarray(rng.random((3, 5)), jnp.float32)
W = jnp.asarray(rng.normal(size=4), jnp.float32)


def linear(x):
    return x @ W


def curved(x):
    return jnp.sum(jnp.sin(x) * x, axis=tuple(range(1, x.ndim)))


def test_a_linear_function_is_attributed_exactly():
    want = W[None] * (X - REFERENCES.mean(1))
    np.testing.assert_allclose(EG(linear, X, REFERENCES, POINTS), want, rtol=2e-5)


def test_the_mean_over_draws_by_hand():
    slope = jax.grad(lambda x: curved(x[None])[0])
    got = EG(curved, X, REFERENCES, POINTS)
    for b in range(3):
        draws = [
            (X[b] - r) * slope(a * X[b] + (1 - a) * r)
            for r, a in zip(REFERENCES[b], POINTS[b], strict=True)
        ]
        np.testing.assert_allclose(got[b], jnp.mean(jnp.stack(draws), 0), rtol=1e-5)


def test_labels_inside_the_function_stay_with_their_examples():
    labels = jnp.array([2, 0, 3])

    def logit(x):
        return jnp.take_along_axis(x, labels[:, None], 1)[:, 0]

    got = EG(logit, X, REFERENCES, POINTS)
    want = jax.nn.one_hot(labels, 4) * (X - REFERENCES.mean(1))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_images_keep_their_shape():
    x = X.reshape(3, 2, 2, 1)
    got = EG(curved, x, REFERENCES.reshape(3, 5, 2, 2, 1), POINTS)
    want = EG(curved, X, REFERENCES, POINTS).reshape(x.shape)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_contributions_add_up_to_the_difference_of_the_outputs(x64):
    x = jnp.asarray(X[:1], float)
    background = jnp.asarray(rng.normal(size=(4000, 4)))
    phi = SAMPLED(curved, x, background, jax.random.key(0), k=4000)
    want = curved(x)[0] - curved(background).mean()
    # The standard deviation of one draw is about 3, of the mean of 4000 about 0.05.
    np.testing.assert_allclose(phi.sum(), want, atol=0.2)


def test_no_two_draws_of_a_batch_share_a_reference():
    background = jnp.eye(6)

    def total(x):
        return jnp.sum(x, axis=1)

    phi = SAMPLED(total, jnp.zeros((3, 6)), background, jax.random.key(3), k=2)
    np.testing.assert_allclose(phi.sum(0), -np.ones(6) / 2)


def test_another_key_draws_other_references_and_points():
    def drawn(seed):
        background = jnp.asarray(REFERENCES.reshape(15, 4))
        return SAMPLED(curved, X, background, jax.random.key(seed), k=2)

    np.testing.assert_array_equal(drawn(0), drawn(0))
    assert not np.allclose(drawn(0), drawn(1))


def test_a_penalty_trains_what_the_function_closes_over(x64):
    x, references, points = (
        jnp.asarray(a, float) for a in (X, REFERENCES[:, :1], POINTS[:, :1])
    )
    laplacian = jnp.eye(4) - 0.25

    def loss(w):
        phi = EG(lambda x: jnp.tanh(x @ w), x, references, points)
        roughness = ox.losses.attribution_graph_penalty(phi, laplacian)
        return roughness - GINI(phi)

    w, h = jnp.asarray(W, float), 1e-6
    gradient = jax.jit(jax.grad(loss))(w)
    want = [(loss(w + h * e) - loss(w - h * e)) / (2 * h) for e in jnp.eye(4)]
    np.testing.assert_allclose(gradient, want, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_one_input_alone_is_as_unequal_as_can_be(n):
    one_hot = jnp.zeros((3, n)).at[:, 0].set(jnp.array([1.0, -2.0, 5.0]))
    np.testing.assert_allclose(GINI(one_hot), 1 - 1 / n, rtol=1e-6)


def test_equal_inputs_are_not_unequal_at_all():
    signs = jnp.asarray(rng.choice([-0.3, 0.3], (4, 7)), jnp.float32)
    assert GINI(signs) == 0


def test_the_gini_coefficient_over_all_pairs(x64):
    phi = rng.normal(size=(3, 2, 4))
    m = np.abs(phi).mean(0).ravel()
    want = np.abs(m[:, None] - m).sum() / (2 * m.size * m.sum())
    np.testing.assert_allclose(GINI(jnp.asarray(phi)), want, rtol=1e-13)
    np.testing.assert_allclose(GINI(jnp.asarray(1e6 * phi)), want, rtol=1e-13)


def test_nothing_attributed_is_zero_with_gradient_zero():
    value, gradient = jax.value_and_grad(GINI)(jnp.zeros((2, 3)))
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros((2, 3)))


def test_total_variation_sums_the_steps_along_both_axes(x64):
    phi = rng.normal(size=(2, 3, 4, 2))
    want = np.zeros(2)
    for b, i, j, c in itertools.product(range(2), range(3), range(4), range(2)):
        want[b] += abs(phi[b, i, j, c] - phi[b, i - 1, j, c]) if i else 0
        want[b] += abs(phi[b, i, j, c] - phi[b, i, j - 1, c]) if j else 0
    got = ox.losses.attribution_total_variation(jnp.asarray(phi))
    np.testing.assert_allclose(got, want, rtol=1e-13)


def test_a_constant_map_is_smooth():
    value, gradient = jax.value_and_grad(
        lambda phi: ox.losses.attribution_total_variation(phi).sum()
    )(jnp.ones((2, 3, 3, 1)))
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros((2, 3, 3, 1)))


def test_the_graph_penalty_is_the_sum_over_edges(x64):
    phi, weights = rng.normal(size=(3, 2, 2)), rng.random((4, 4))
    weights = np.triu(weights, 1) + np.triu(weights, 1).T
    laplacian = jnp.asarray(np.diag(weights.sum(1)) - weights)
    m = np.abs(phi).mean(0).ravel()
    want = np.sum(np.triu(weights, 1) * (m[:, None] - m) ** 2)
    got = ox.losses.attribution_graph_penalty(jnp.asarray(phi), laplacian)
    np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EG(linear, X, REFERENCES, POINTS[0]), "interpolation must be"),
        (lambda: EG(linear, X, REFERENCES[:, :2], POINTS), "references must be"),
        (
            lambda: EG(linear, X, REFERENCES[:, :0], POINTS[:, :0]),
            "k must be 1 or more",
        ),
        (lambda: EG(lambda x: x, X, REFERENCES, POINTS), "fn must return one number"),
        (
            lambda: SAMPLED(linear, X, REFERENCES[0], jax.random.key(0), k=2),
            "references: fewer than batch",
        ),
        (
            lambda: SAMPLED(linear, X, REFERENCES[0, :, :2], jax.random.key(0)),
            "references must be",
        ),
        (lambda: GINI(jnp.zeros((0, 3))), "attributions must be"),
        (lambda: ox.losses.attribution_total_variation(X), "attributions must be"),
        (
            lambda: ox.losses.attribution_graph_penalty(X, jnp.eye(3)),
            "laplacian must be",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(AssertionError, match=message):
        call()


def test_a_number_of_draws_that_is_none_is_named():
    with pytest.raises(ValueError, match="sample_expected_gradients: k must be"):
        SAMPLED(linear, X, REFERENCES[0], jax.random.key(0), k=0)

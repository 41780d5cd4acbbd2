"""The focal contrastive loss, and mixtures of hard negatives."""

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

FOCAL = ox.losses.focal_info_nce


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def batch(dtype=jnp.float64):
    return tuple(
        normal(i, *shape, dtype=dtype)
        for i, shape in enumerate([(5, 6), (5, 6), (5, 2, 6)])
    )


def reference(q, p, n, temperature):
    """Logits of all documents, and InfoNCE."""
    documents = unit(p) if n is None else jnp.concatenate([unit(p), *unit(n)])
    logits = unit(q) @ documents.T / temperature
    return optax.losses.softmax_cross_entropy_with_integer_labels(
        logits, jnp.arange(len(q))
    )


@pytest.mark.parametrize("hard", [True, False])
def test_gamma_zero_is_the_cross_entropy_of_all_documents(x64, hard):
    q, p, n = batch()
    n = n if hard else None
    want = reference(q, p, n, 0.2)
    np.testing.assert_allclose(
        FOCAL(q, p, n, temperature=0.2, gamma=0.0), want, rtol=1e-12
    )


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_weights_fall_with_the_probability_of_the_positive(x64, gamma):
    q, p, n = batch()
    plain = FOCAL(q, p, n, temperature=0.2, gamma=0.0)
    weights = FOCAL(q, p, n, temperature=0.2, gamma=gamma) / plain
    chance = jnp.exp(-plain)
    np.testing.assert_allclose(weights, (1 - chance) ** gamma, rtol=1e-9)
    assert ((weights >= 0) & (weights <= 1)).all()
    assert (jnp.diff(weights[jnp.argsort(chance)]) <= 0).all()


def test_the_weight_is_detached_unless_asked_otherwise(x64):
    q, p, n = batch()
    options = {"temperature": 0.3, "gamma": 1.0}
    plain = FOCAL(q, p, n, temperature=0.3, gamma=0.0)
    weights = 1 - jnp.exp(-plain)

    def detached(q):
        return (weights * reference(q, p, n, 0.3)).sum()

    def attached(q):
        plain = reference(q, p, n, 0.3)
        return (-jnp.expm1(-plain) * plain).sum()

    for stop, want in ((True, detached), (False, attached)):
        got = jax.grad(
            lambda q, stop=stop: FOCAL(
                q, p, n, stop_gradient_weight=stop, **options
            ).sum()
        )(q)
        np.testing.assert_allclose(got, jax.grad(want)(q), rtol=1e-9, atol=1e-12)


def test_queries_that_do_not_count_leave_with_their_documents():
    q, p, n = batch(jnp.float32)
    where = jnp.array([True, False, True, True, False])
    kept = jnp.array([0, 2, 3])
    got = FOCAL(q, p, n, temperature=0.2, where=where)
    alone = FOCAL(q[kept], p[kept], n[kept], temperature=0.2)
    np.testing.assert_allclose(got[kept], alone, rtol=1e-5)
    np.testing.assert_array_equal(got[~where], jnp.zeros(2))


@pytest.mark.parametrize(("gamma", "stop"), [(0.0, True), (0.5, False), (1.5, False)])
def test_sure_and_lone_queries_have_finite_gradients(gamma, stop):
    sure = jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    nothing = jnp.array([False, True, False])  # no negative is left
    for q, p, where in (
        (sure, sure, None),
        (sure, -sure, None),
        (sure, sure, nothing),
        (sure[:1], sure[:1], None),
        (0 * sure, 0 * sure, None),
    ):
        value, grad = jax.value_and_grad(
            lambda q, p=p, where=where: FOCAL(
                q, p, gamma=gamma, stop_gradient_weight=stop, where=where
            ).sum()
        )(q)
        assert jnp.isfinite(value)
        assert jnp.isfinite(grad).all()


@pytest.mark.parametrize(
    ("hyperparams", "message"),
    [({"temperature": 0.0}, "temperature"), ({"gamma": -1.0}, "gamma")],
)
def test_bad_hyperparameters_are_named(hyperparams, message):
    with pytest.raises(ValueError, match=f"{message} must lie in"):
        FOCAL(jnp.eye(3), jnp.eye(3), **hyperparams)


@pytest.mark.parametrize("shape", [(3, 3), (2, 4, 3), (3, 4, 2)])
def test_negatives_that_do_not_fit_are_named(shape):
    with pytest.raises(AssertionError, match="negatives"):
        FOCAL(jnp.eye(3), jnp.eye(3), jnp.ones(shape))


def test_positives_that_do_not_fit_are_named():
    with pytest.raises(AssertionError, match="positives"):
        FOCAL(jnp.eye(3), jnp.ones((2, 3)))
    with pytest.raises(AssertionError, match="where"):
        FOCAL(jnp.eye(3), jnp.eye(3), where=jnp.ones(2, bool))


def test_mixtures_have_length_one_and_follow_the_given_negatives():
    negatives = normal(3, 4, 3, 5)
    mixed = ox.losses.mix_hard_negatives(jax.random.key(0), negatives, 6)
    assert mixed.shape == (4, 9, 5)
    np.testing.assert_allclose(mixed[:, :3], unit(negatives), rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(mixed, axis=-1), 1.0, rtol=1e-6)


def test_a_mixture_lies_between_two_different_negatives_of_its_query():
    # One-hot negatives: a mixture shows what it is made of, and nothing else.
    negatives = jnp.eye(12).reshape(3, 4, 12)
    mixed = ox.losses.mix_hard_negatives(jax.random.key(1), negatives, 50)[:, 4:]
    assert (jnp.sum(mixed > 0, axis=-1) == 2).all()
    of_query = jnp.arange(12)[None, None] // 4 == jnp.arange(3)[:, None, None]
    assert not jnp.any((mixed > 0) & ~of_query)
    assert jnp.unique(jnp.argmax(mixed, -1)).size == 12


def test_mixtures_of_equally_similar_negatives_are_harder(x64):
    q = unit(normal(4, 5, dtype=jnp.float64))
    side = normal(5, 6, 5, dtype=jnp.float64)
    side = unit(side - (side @ q)[:, None] * q[None])
    negatives = 0.4 * q[None] + np.sqrt(1 - 0.16) * side
    mixed = ox.losses.mix_hard_negatives(jax.random.key(2), 7 * negatives[None], 40)
    assert (mixed[0] @ q >= 0.4 - 1e-12).all()


def test_concentration_decides_how_even_mixtures_are():
    negatives = jnp.tile(jnp.eye(2)[None], (500, 1, 1))

    def spread(concentration):
        mixed = ox.losses.mix_hard_negatives(
            jax.random.key(3), negatives, 4, concentration=concentration
        )[:, 2:]
        share = mixed[..., 0] / mixed.sum(-1)
        return float(jnp.var(share))

    # Beta(c, c) has the variance 1 / (4 (2 c + 1)); 2000 draws know it to 5 %.
    for concentration in (0.5, 2.0, 20.0):
        want = 1 / (4 * (2 * concentration + 1))
        assert spread(concentration) == pytest.approx(want, rel=0.15)


def test_bad_arguments_of_mixing_are_named():
    key, negatives = jax.random.key(0), jnp.ones((2, 3, 4))
    with pytest.raises(ValueError, match="num_mixed must be an integer"):
        ox.losses.mix_hard_negatives(key, negatives, 0)
    with pytest.raises(ValueError, match="concentration must lie in"):
        ox.losses.mix_hard_negatives(key, negatives, 1, concentration=0.0)
    with pytest.raises(AssertionError, match="a pair takes two"):
        ox.losses.mix_hard_negatives(key, negatives[:, :1], 1)
    with pytest.raises(AssertionError, match="negatives"):
        ox.losses.mix_hard_negatives(key, negatives[0], 1)

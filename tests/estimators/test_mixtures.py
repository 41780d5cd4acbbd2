"""Averages of models before and after fine-tuning, mixtures of examples."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox


def trees(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {
        "w": jnp.asarray(rng.normal(size=(3, 2)), dtype),
        "b": jnp.asarray(rng.normal(size=2), dtype),
    }


def fishers(seed, dtype=jnp.float32):
    return jax.tree.map(jnp.square, trees(seed, dtype))


def equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def close(got, want, rtol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, rtol), got, want)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("weighted", [True, False])
def test_the_ends_are_the_two_halves_bit_by_bit(dtype, weighted):
    x, y = trees(0, dtype), trees(1, dtype)
    f0, f1 = (fishers(2), fishers(3)) if weighted else (None, None)
    for alpha, want in ((0.0, x), (1.0, y), (0, x), (1, y)):
        equal(ox.wise_ft(x, y, alpha, f0, f1), want)
        traced = jax.jit(lambda a: ox.wise_ft(x, y, a, f0, f1))(jnp.float32(alpha))
        equal(traced, want)


@pytest.mark.parametrize("alpha", [0.25, 0.5])
def test_without_fisher_it_is_incremental_update(alpha):
    x, y = trees(4), trees(5)
    close(ox.wise_ft(x, y, alpha), optax.incremental_update(y, x, alpha))
    close(ox.wise_ft(x, y), ox.wise_ft(x, y, 0.5))


def test_outputs_of_a_linear_model_interpolate(x64):
    x, y = trees(6, jnp.float64), trees(7, jnp.float64)
    inputs = jnp.asarray(np.random.default_rng(8).normal(size=(5, 3)))

    def model(p):
        return inputs @ p["w"] + p["b"][None]

    got = model(ox.wise_ft(x, y, 0.3))
    np.testing.assert_allclose(got, 0.7 * model(x) + 0.3 * model(y), rtol=1e-12)


def test_fisher_weights_are_the_official_formula(x64):
    x, y, f0, f1 = (trees(i, jnp.float64) for i in range(9, 13))
    got = ox.wise_ft(x, y, 0.3, f0, f1, fisher_floor=0.1)

    def official(x, y, f0, f1):
        c0, c1 = 0.7 * jnp.maximum(f0, 0.1), 0.3 * jnp.maximum(f1, 0.1)
        return (c0 * x + c1 * y) / (c0 + c1)

    close(got, jax.tree.map(official, x, y, f0, f1), 1e-13)


def test_equal_fishers_give_the_plain_form_and_zeros_keep_the_other_half():
    x, y = trees(13), trees(14)
    f = jax.tree.map(lambda p: jnp.ones_like(p) * 3, x)
    zero = jax.tree.map(jnp.zeros_like, x)
    close(ox.wise_ft(x, y, 0.3, f, f), ox.wise_ft(x, y, 0.3))
    close(ox.wise_ft(x, y, 0.3, f, zero), x)
    close(ox.wise_ft(x, y, 0.3, zero, f), y)
    huge = jax.tree.map(lambda p: jnp.ones_like(p) * 1e30, x)
    close(ox.wise_ft(x, y, 0.3, huge, huge), ox.wise_ft(x, y, 0.3))


def test_integers_and_holes_come_from_the_finetuned_half():
    x = {"n": jnp.array(1), "w": jnp.ones(2), "hole": None}
    y = {"n": jnp.array(7), "w": jnp.zeros(2), "hole": None}
    got = ox.wise_ft(x, y, 0.0)
    assert got["n"] == 7
    assert got["hole"] is None
    np.testing.assert_array_equal(got["w"], x["w"])


def test_what_is_wrong_with_a_merge_is_named():
    x = trees(15)
    with pytest.raises(ValueError, match="alpha must lie in"):
        ox.wise_ft(x, x, 1.5)
    with pytest.raises(ValueError, match="fisher_floor must lie in"):
        ox.wise_ft(x, x, fisher_floor=0.0)
    with pytest.raises(ValueError, match="pass both fisher_pretrained and"):
        ox.wise_ft(x, x, fisher_pretrained=x)
    with pytest.raises(ValueError, match="wise_ft: leaf"):
        ox.wise_ft({"w": x["w"]}, x)


def test_mixup_mixes_inputs_and_targets_alike():
    # One-hot inputs show which examples were mixed, and with what share.
    eye = jnp.eye(8)
    inputs, targets = ox.mixup(jax.random.key(0), eye, 2 * eye, concentration=2.0)
    np.testing.assert_array_equal(targets, 2 * inputs)
    np.testing.assert_allclose(inputs.sum(0), 1.0, rtol=1e-6)
    np.testing.assert_allclose(inputs.sum(1), 1.0, rtol=1e-6)
    shares = jnp.diagonal(inputs)
    mixed = shares < 0.9999
    assert mixed.any()
    assert jnp.unique(shares[mixed]).size == 1


def test_shares_of_mixup_are_beta_and_orders_differ():
    eye = jnp.eye(4)
    keys = jax.random.split(jax.random.key(1), 2000)

    def share(key, concentration):
        inputs, _ = ox.mixup(key, jnp.eye(64), jnp.eye(64), concentration)
        # 64 examples: at least one has another partner, for nearly every order.
        return jnp.min(jnp.diagonal(inputs))

    for concentration in (0.2, 4.0):
        shares = jax.vmap(lambda k, c=concentration: share(k, c))(keys)
        # Beta(c, c): mean 1/2 and variance 1 / (4 (2 c + 1)).
        variance = 1 / (4 * (2 * concentration + 1))
        assert jnp.mean(shares) == pytest.approx(0.5, abs=0.04)
        assert jnp.var(shares) == pytest.approx(variance, rel=0.1)
    firsts = jax.vmap(lambda k: ox.mixup(k, eye, eye)[0][0])(keys)
    partners = jnp.argmax(firsts.at[:, 0].set(-1.0), axis=1)
    assert jnp.unique(partners).size == 3


def test_mixup_keeps_dtypes_and_shapes():
    x, y = jnp.ones((4, 2, 3), jnp.bfloat16), jnp.eye(4)
    inputs, targets = ox.mixup(jax.random.key(2), x, y)
    np.testing.assert_array_equal(inputs, x)
    assert inputs.dtype == jnp.bfloat16
    assert targets.dtype == jnp.float32


def test_what_is_wrong_with_mixup_is_named():
    key, x = jax.random.key(0), jnp.eye(3)
    with pytest.raises(ValueError, match="concentration must lie in"):
        ox.mixup(key, x, x, concentration=0.0)
    with pytest.raises(ValueError, match="targets must be floats, got int32"):
        ox.mixup(key, x, jnp.arange(3))
    with pytest.raises(ValueError, match="the first axis is the batch"):
        ox.mixup(key, x, x[:2])

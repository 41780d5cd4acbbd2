"""Aggregators: from gradients of examples to one gradient."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox

KEY = jax.random.key(0)


def examples(batch=5, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = {"w": (2, 3), "b": (3,), "s": ()}
    return {
        k: jnp.asarray(rng.normal(size=(batch, *s)), dtype) for k, s in shapes.items()
    }


def once(tx, each):
    update = jax.jit(tx.update)
    return update(each, tx.init(jax.tree.map(lambda g: g[0], each)))[0]


def many(make, each, draws):
    """Results for as many keys."""
    run = jax.jit(jax.vmap(lambda key: once(make(key), each)))
    return np.asarray(run(jax.random.split(KEY, draws)))


# normalized_dp_aggregate --------------------------------------------------------------


def normalized(each, floor):
    """The printed formula in float64 and without noise, and the norms."""
    each = {k: np.asarray(g, np.float64) for k, g in each.items()}
    squares = [np.sum(g**2, axis=tuple(range(1, g.ndim))) for g in each.values()]
    norms = np.sqrt(sum(squares))
    weights = 1 / np.maximum(norms, floor)
    return {k: np.tensordot(weights, g, 1) / len(g) for k, g in each.items()}, norms


@pytest.mark.parametrize("floor", [0.1, 1.0, 2.5, 100.0])
def test_without_noise_it_is_the_formula(x64, floor):
    each = examples(dtype=jnp.float64)
    out = once(ox.normalized_dp_aggregate(0.0, KEY, floor), each)
    for k, want in normalized(each, floor)[0].items():
        np.testing.assert_allclose(out[k], want, rtol=1e-14, atol=1e-16)


def test_no_example_contributes_more_than_length_one():
    tx = ox.normalized_dp_aggregate(0.0, KEY)
    update, state = jax.jit(tx.update), tx.init({})
    for scale in (1e-30, 1e-3, 1.0, 1e3, 1e30):
        each = {k: scale * g for k, g in examples(1).items()}
        out, _ = update(each, state)
        length = np.sqrt(sum(np.sum(np.float64(x) ** 2) for x in out.values()))
        np.testing.assert_allclose(length, min(1, normalized(each, 1)[1][0]), rtol=1e-6)


def test_where_all_norms_are_below_one_it_is_the_mean():
    each = {k: 0.1 * g for k, g in examples().items()}
    out = once(ox.normalized_dp_aggregate(0.0, KEY), each)
    for k, g in each.items():
        np.testing.assert_allclose(out[k], g.mean(axis=0), rtol=1e-5, atol=1e-8)


def test_an_example_of_zeros_contributes_nothing():
    each = examples()
    more = {k: jnp.concatenate([g, jnp.zeros_like(g[:1])]) for k, g in each.items()}
    tx = ox.normalized_dp_aggregate(0.0, KEY)
    for k, x in once(tx, more).items():
        np.testing.assert_allclose(x, once(tx, each)[k] * 5 / 6, rtol=1e-6)


@pytest.mark.parametrize("floor", [0.5, 3.0])
def test_it_is_optaxs_aggregate_over_its_norm(floor):
    each = examples()
    theirs = optax.chain(
        optax.contrib.differentially_private_aggregate(floor, 0.0, KEY),
        optax.scale(1 / floor),
    )
    got = once(ox.normalized_dp_aggregate(0.0, KEY, floor), each)
    for k, want in once(theirs, each).items():
        np.testing.assert_allclose(got[k], want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("floor", [1.0, 4.0])
def test_the_noise_on_the_sum_has_the_multiplier_as_deviation(floor):
    batch, sigma = 3, 0.5
    each = jnp.zeros((batch, 50))
    draws = many(lambda k: ox.normalized_dp_aggregate(sigma, k, floor), each, 400)
    # 20000 numbers: the deviation is known to 0.5%, the mean to 0.7% of it.
    np.testing.assert_allclose(draws.std(), sigma / batch, rtol=0.02)
    assert abs(draws.mean()) < 0.03 * sigma / batch


def test_noise_of_leaves_is_independent():
    each = {"a": jnp.zeros((2, 300)), "b": jnp.zeros((2, 300))}
    out = once(ox.normalized_dp_aggregate(1.0, KEY), each)
    # Correlation of 300 pairs: 1 / sqrt(300) = 0.06.
    assert abs(np.corrcoef(out["a"], out["b"])[0, 1]) < 0.2


# multiplicative_example_noise ---------------------------------------------------------


def test_without_noise_it_is_the_mean():
    each = examples()
    out = once(ox.multiplicative_example_noise(0.0, KEY), each)
    for k, g in each.items():
        np.testing.assert_allclose(out[k], g.mean(axis=0), rtol=1e-5, atol=1e-7)


def test_one_factor_an_example_is_shared_by_all_leaves():
    one = jnp.ones((4, 2))
    out = once(ox.multiplicative_example_noise(1.0, KEY), {"a": one, "b": 3 * one})
    np.testing.assert_allclose(out["b"], 3 * out["a"], rtol=1e-6)
    assert out["a"][0] == out["a"][1] != 1


def test_its_mean_and_covariance_are_those_of_the_formula():
    sigma, batch, n = 0.7, 6, 4000
    each = jnp.asarray(np.random.default_rng(0).normal(size=(batch, 2)), jnp.float32)
    draws = many(lambda k: ox.multiplicative_example_noise(sigma, k), each, n)
    want = sigma**2 / batch**2 * np.asarray(each.T @ each)
    # A variance of n draws is known to sqrt(2 / n) = 2.2%, the mean to 1.6% of std.
    np.testing.assert_allclose(np.cov(draws.T), want, atol=0.1 * want.max())
    deviation = np.sqrt(want.diagonal() / n)
    assert (np.abs(draws.mean(axis=0) - each.mean(axis=0)) < 4 * deviation).all()


def test_a_large_batch_becomes_as_noisy_as_a_small_one():
    # The specification's M = 64, B = 8, sigma^2 = M / B - 1 = 7, 3000 draws.
    population, small, n = 64, 8, 3000
    rng = np.random.default_rng(0)
    each = rng.normal(size=(population, 2)) * [1.0, 3.0]
    each -= each.mean(axis=0)
    noisy = many(
        lambda k: ox.multiplicative_example_noise(7**0.5, k),
        jnp.asarray(each, jnp.float32),
        n,
    )
    rows = rng.integers(population, size=(n, small))
    true = each[rows].mean(axis=1)
    # Each variance is known to 2.6%; the exact one of both is (7/8) and 1 of 1/8.
    ratio = noisy.var(axis=0) / true.var(axis=0)
    np.testing.assert_allclose(ratio, 7 / 8, rtol=0.15)


# Both ---------------------------------------------------------------------------------

MAKES = {
    "normalized_dp_aggregate": lambda key=KEY: ox.normalized_dp_aggregate(0.3, key),
    "multiplicative_example_noise": lambda key=KEY: ox.multiplicative_example_noise(
        0.3, key
    ),
}
both = pytest.mark.parametrize("name", MAKES)


@both
def test_every_step_draws_anew_and_the_same_key_draws_the_same(name):
    tx, each = MAKES[name](), examples()["w"]
    update, state = jax.jit(tx.update), tx.init(each)
    first, after = update(each, state)
    np.testing.assert_array_equal(update(each, MAKES[name]().init(each))[0], first)
    other_key = MAKES[name](jax.random.key(1)).init(each)
    for other in (after, other_key):
        assert (update(each, other)[0] != first).all()


@both
def test_raw_and_typed_keys_and_other_generators_are_accepted(name):
    each, data = examples()["w"], jax.random.key_data(KEY)
    want = MAKES[name]().init(each).key
    for key in (data, np.asarray(data)):
        np.testing.assert_array_equal(MAKES[name](key).init(each).key, want)
    out = once(MAKES[name](jax.random.key(0, impl="rbg")), each)
    assert jnp.isfinite(out).all()


@both
def test_holes_pass(name):
    each = {"w": jnp.ones((2, 3)), "none": None, "masked": optax.MaskedNode()}
    out = once(MAKES[name](), each)
    assert out["w"].shape == (3,)
    assert (out["none"], out["masked"]) == (None, optax.MaskedNode())


@both
def test_leaves_without_a_common_example_axis_are_refused(name):
    tx = MAKES[name]()
    with pytest.raises(ValueError, match=rf"{name}: leaf \['s'\]: a scalar has no exa"):
        tx.update({"s": jnp.ones(())}, tx.init({}))
    with pytest.raises(ValueError, match=rf"{name}: leaves have \[2, 3\] examples"):
        tx.update({"a": jnp.ones((2, 1)), "b": jnp.ones((3, 1))}, tx.init({}))


@both
def test_inside_buckets_they_are_refused(name):
    each, tx = (
        {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 3))},
        ox.bucketed(MAKES[name]()),
    )
    with pytest.raises(ValueError, match=f"{name}: .*outside bucketed"):
        tx.update(each, tx.init(each))


def test_arguments_outside_their_range_are_named():
    with pytest.raises(ValueError, match="multiplicative_example_noise: sigma must"):
        ox.multiplicative_example_noise(-1.0, KEY)
    with pytest.raises(ValueError, match="normalized_dp_aggregate: noise_multiplier"):
        ox.normalized_dp_aggregate(-1.0, KEY)
    with pytest.raises(ValueError, match="normalized_dp_aggregate: floor must lie in"):
        ox.normalized_dp_aggregate(1.0, KEY, floor=0.0)

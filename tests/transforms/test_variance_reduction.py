"""MARS: the correction, and its optimizer."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox
from optax_ext._core.newton_schulz import newton_schulz

INF = float("inf")


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def tree(seed=0):
    shapes = {"bias": (3,), "conv": (2, 2, 1, 3), "dense": (4, 3), "scale": ()}
    return {k: normal(*s, seed=seed) for k, s in shapes.items()}


def run(tx, p, steps=6, **extra):
    tx = ox.full_precision(tx)  # optax's own are not strict
    state, update = tx.init(p), jax.jit(tx.update)
    path = [p]
    for t in range(steps):
        u, state = update(tree(t + 1), state, p, **extra)
        p = optax.apply_updates(p, u)
        path.append(p)
    return path


def assert_close(got, want, rtol=1e-5):
    def check(a, b):
        np.testing.assert_allclose(a, b, rtol, atol=rtol * 1e-1)

    jax.tree.map(check, got, want)


# The correction -----------------------------------------------------------------------


def feed(tx, gradients, **extra):
    state, update, out = tx.init(gradients[0]), jax.jit(tx.update), []
    for t, g in enumerate(gradients):
        given = {name: values[t] for name, values in extra.items()}
        u, state = update(g, state, **given)
        out.append(u)
    return out


def test_the_first_gradient_is_corrected_by_itself():
    g = normal(4, 3)
    (out,) = feed(ox.scale_by_mars_correction(max_norm=INF), [g])
    np.testing.assert_allclose(out, 1.475 * g, rtol=1e-6)


def test_the_correction_is_gamma_b1_over_1_minus_b1_times_the_change():
    g, h = normal(4, 3), normal(4, 3, seed=1)
    tx = ox.scale_by_mars_correction(b1=0.8, gamma=0.5, max_norm=INF)
    out = feed(tx, [g, h])[1]
    np.testing.assert_allclose(out, h + 2 * (h - g), rtol=1e-5, atol=1e-6)


def test_a_constant_gradient_is_corrected_at_the_first_step_only():
    g = normal(4, 3)
    out = feed(ox.scale_by_mars_correction(max_norm=INF), [g] * 3)
    np.testing.assert_array_equal(out[1:], [g, g])


def test_each_leaf_is_clipped_alone_and_after_the_correction():
    g = {"long": jnp.array([3.0, 4.0]), "short": jnp.array([0.3, 0.4])}
    tx = ox.scale_by_mars_correction(b1=0.5, gamma=1.0, max_norm=2.0)
    out = feed(tx, [g])[0]  # corrected lengths 10 and 1
    np.testing.assert_allclose(out["long"], [1.2, 1.6], rtol=1e-6)
    np.testing.assert_allclose(out["short"], [0.6, 0.8], rtol=1e-6)


def test_the_state_keeps_the_raw_gradient():
    tx, g = ox.scale_by_mars_correction(max_norm=0.1), normal(4, 3)
    _, state = tx.update(g, tx.init(g))
    assert isinstance(state, ox.MarsState)
    np.testing.assert_array_equal(state.previous, g)


def test_exactly_it_takes_the_reference_from_aux_grads_and_stores_nothing():
    g, r = normal(4, 3), normal(4, 3, seed=1)
    tx = ox.scale_by_mars_correction(b1=0.8, gamma=0.5, max_norm=INF, exact=True)
    assert not jax.tree.leaves(tx.init(g))
    (out,) = feed(tx, [g], aux_grads=[r])
    np.testing.assert_allclose(out, g + 2 * (g - r), rtol=1e-5, atol=1e-6)
    (out,) = feed(tx, [g], aux_grads=[g])
    np.testing.assert_array_equal(out, g)


@pytest.mark.usefixtures("x64")
def test_with_gamma_1_and_exact_gradients_the_momentum_is_storm():
    rng, b1 = np.random.default_rng(0), 0.7
    g, r = jnp.asarray(rng.normal(size=(2, 8, 5)))
    mars = ox.scale_by_mars_correction(b1, gamma=1.0, max_norm=INF, exact=True)
    tx, m = optax.chain(mars, optax.ema(b1, debias=False)), 0.0
    for t, out in enumerate(feed(ox.full_precision(tx), g, aux_grads=r)):
        m = b1 * (m + g[t] - r[t]) + (1 - b1) * g[t]
        np.testing.assert_allclose(out, m, rtol=1e-12, atol=1e-14)


def test_masked_leaves_are_skipped_in_the_auxiliary_gradients_too():
    g = {"a": normal(2), "b": normal(2), "c": None}
    aux = {"a": normal(2, seed=1), "b": normal(2, seed=1), "c": normal(2)}
    tx = ox.scale_by_mars_correction(b1=0.5, gamma=1.0, max_norm=INF, exact=True)
    masked = optax.masked(tx, {"a": True, "b": False, "c": None})
    out = masked.update(g, masked.init(g), aux_grads=aux)[0]
    np.testing.assert_allclose(out["a"], 2 * g["a"] - aux["a"], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(out["b"], g["b"])


def test_it_works_in_front_of_any_link():
    g = [normal(4, 3, seed=t) for t in range(3)]
    corrected = feed(ox.scale_by_mars_correction(), g)
    for link in (
        optax.scale_by_adam(),
        optax.scale_by_rms(),
        optax.trace(0.9),
        optax.contrib.scale_by_muon(),
        ox.scale_by_lion_k(),
        ox.cautious(optax.scale_by_adam()),
    ):
        link = ox.full_precision(link)
        tx = optax.chain(ox.scale_by_mars_correction(), link)
        assert_close(feed(tx, g), feed(link, corrected))


@pytest.mark.parametrize("size", [0.0, 1e30, 1e-30])
def test_extreme_gradients_stay_finite(size):
    g = jnp.full((4, 3), size)
    for out in feed(ox.scale_by_mars_correction(), [g, -g, g]):
        assert jnp.isfinite(out).all()
        assert jnp.linalg.norm(out) <= 1 + 1e-6


def test_without_aux_grads_the_exact_form_says_so():
    tx, g = ox.scale_by_mars_correction(exact=True), normal(2)
    with pytest.raises(
        ValueError, match=r"scale_by_mars_correction needs.*'aux_grads'"
    ):
        tx.update(g, tx.init(g))


@pytest.mark.parametrize("options", [{"b1": 1.0}, {"max_norm": 0.0}], ids=str)
def test_arguments_outside_their_range_are_named(options):
    name = next(iter(options))
    with pytest.raises(ValueError, match=f"scale_by_mars_correction: {name} must"):
        ox.scale_by_mars_correction(**options)


# The optimizer ------------------------------------------------------------------------

NO_CORRECTION = {"gamma": 0.0, "max_norm": INF, "optimize_1d": True}


def test_without_correction_it_is_adamw():
    ours = ox.mars(0.01, b1=0.95, b2=0.99, weight_decay=0.1, **NO_CORRECTION)
    theirs = optax.adamw(0.01, b1=0.95, b2=0.99, weight_decay=0.1)
    assert_close(run(ours, tree()), run(theirs, tree()))


def test_without_correction_lion_is_lion_with_equal_rates():
    ours = ox.mars(0.01, "lion", b1=0.9, weight_decay=0.1, **NO_CORRECTION)
    theirs = optax.lion(0.01, b1=0.9, b2=0.9, weight_decay=0.1)
    assert_close(run(ours, tree()), run(theirs, tree()))


def test_lion_is_mars_lion_with_a_gamma_of_its_two_rates():
    b1, b2 = 0.9, 0.99
    options = {"gamma": (b2 - b1) / b2, "max_norm": INF, "optimize_1d": True}
    ours = ox.mars(0.01, "lion", b1=b2, **options)
    theirs = optax.lion(0.01, b1=b1, b2=b2, weight_decay=0.0)
    assert_close(run(ours, tree()), run(theirs, tree()))


@pytest.mark.parametrize("variant", ["adamw", "lion", "shampoo"])
def test_leaves_that_are_no_matrices_get_adamw(variant):
    options = {"b1": 0.7, "b2": 0.8, "weight_decay": 0.3}
    ours = ox.mars(
        1.0,
        variant,
        eps=1e-3,
        learning_rate_1d=0.01,
        b1_1d=0.7,
        b2_1d=0.8,
        weight_decay_1d=0.3,
    )
    path = run(ours, tree(), steps=4)
    theirs = run(optax.adamw(0.01, eps=1e-3, **options), tree(), steps=4)
    for name in ("bias", "conv", "scale"):
        assert_close([p[name] for p in path], [p[name] for p in theirs])


def test_without_a_rate_of_their_own_the_others_follow_the_learning_rate():
    schedule = optax.linear_schedule(0.1, 0.01, 4)
    with jax.numpy_dtype_promotion("standard"):
        ours = run(
            ox.mars(schedule, b1_1d=0.9, b2_1d=0.999, weight_decay_1d=0.0), tree()
        )
        theirs = run(optax.adamw(schedule, weight_decay=0.0), tree())
    assert_close([p["bias"] for p in ours], [p["bias"] for p in theirs])


@pytest.mark.parametrize("variant", ["adamw", "lion"])
def test_optimize_1d_gives_every_leaf_the_rule_of_matrices(variant):
    options = {"weight_decay": 0.2, "learning_rate_1d": 5.0, "weight_decay_1d": 5.0}
    one = {"w": normal(3), "m": normal(3, 1)}
    tx = ox.mars(0.1, variant, optimize_1d=True, **options)
    u, _ = tx.update(one, tx.init(one), one)
    np.testing.assert_allclose(
        u["w"], -0.1 * (jnp.sign(one["w"]) + 0.2 * one["w"]), 1e-4
    )
    state = tx.init(one)
    g = {"w": one["w"], "m": one["w"][:, None]}
    update = jax.jit(tx.update)
    for _ in range(3):
        u, state = update(g, state, g)
        np.testing.assert_allclose(u["w"][:, None], u["m"], rtol=1e-6)


def test_optimize_1d_gives_vectors_the_adamw_form_of_shampoo():
    ours = ox.mars(0.1, "shampoo", optimize_1d=True)
    adamw = ox.mars(0.1, "adamw", optimize_1d=True)
    a, b = run(ours, tree()), run(adamw, tree())
    for name in ("bias", "conv", "scale"):
        assert_close([p[name] for p in a], [p[name] for p in b])


@pytest.mark.parametrize("shape", [(6, 6), (3, 7), (7, 3)])
def test_a_shampoo_step_has_singular_values_near_the_root_of_out_over_in(shape):
    g = {"w": normal(*shape)}
    tx = ox.mars(1.0, "shampoo")
    u, _ = jax.jit(tx.update)(g, tx.init(g), g)
    singular = np.linalg.svd(u["w"], compute_uv=False)
    scale = max(1, shape[1] / shape[0]) ** 0.5
    # Five steps of these coefficients leave what is above 0.01 |X| within 0.65 to 1.25.
    assert 0.65 * scale < singular.min() <= singular.max() < 1.25 * scale


def test_decay_is_multiplied_by_the_learning_rate_and_obeys_the_mask():
    p = {"bias": jnp.ones(2), "w": jnp.ones((2, 2)), "v": jnp.ones((2, 2))}
    zero = jax.tree.map(jnp.zeros_like, p)
    mask = {"bias": False, "w": True, "v": False}
    tx = ox.mars(0.5, weight_decay=0.1, weight_decay_1d=0.2, mask=mask)
    u, _ = tx.update(zero, tx.init(p), p)
    np.testing.assert_allclose(u["w"], jnp.full((2, 2), -0.05), rtol=1e-6)
    assert not u["v"].any()
    assert not u["bias"].any()
    tx = ox.mars(0.5, weight_decay=0.1, weight_decay_1d=0.2)
    u, _ = tx.update(zero, tx.init(p), p)
    np.testing.assert_allclose(u["bias"], [-0.1, -0.1], rtol=1e-6)


def test_the_exact_form_needs_aux_grads_for_its_matrices():
    tx, p = ox.mars(exact=True), tree()
    with pytest.raises(ValueError, match="aux_grads"):
        tx.update(p, tx.init(p), p)
    run(tx, p, aux_grads=p)


def test_buckets_are_told_apart_by_the_rank_of_their_rows():
    p, options = tree(), {"variant": "shampoo", "learning_rate_1d": 0.1}
    p["twin"] = p["dense"] + 1
    plain, stacked = ox.mars(0.1, **options), ox.bucketed(ox.mars(0.1, **options))
    a = jax.jit(plain.update)(p, plain.init(p), p)[0]
    b = jax.jit(stacked.update)(p, stacked.init(p), p)[0]
    assert_close(a, b)


def test_an_unknown_variant_is_named_with_the_choices():
    with pytest.raises(ValueError, match="variant must be one of 'adamw', 'lion', 'sh"):
        ox.mars(0.1, "adam")


# Newton-Schulz ------------------------------------------------------------------------


def test_newton_schulz_applies_the_polynomial_to_the_singular_values():
    x, (a, b, c) = normal(3, 5), (1.5, -0.5, 0.1)
    u, s, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    s = s / (np.linalg.norm(s) + 0.3)
    for _ in range(2):
        s = a * s + b * s**3 + c * s**5
    out = newton_schulz(x, (a, b, c), steps=2, eps=0.3)
    np.testing.assert_allclose(out, u * s @ vt, rtol=1e-5, atol=1e-6)


def test_newton_schulz_takes_stacks_tall_matrices_and_zeros():
    x = normal(2, 5, 3)
    out = newton_schulz(x)
    np.testing.assert_allclose(out[1], newton_schulz(x[1].T).T, rtol=1e-5, atol=1e-6)
    assert not newton_schulz(jnp.zeros((3, 3)), eps=0.0).any()

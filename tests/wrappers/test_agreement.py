"""`cautious` and `grams`: updates judged by the raw gradient."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox


def emits(direction):
    """A link that emits `direction`, whatever the gradient."""
    return optax.stateless(lambda updates, params: direction)


def once(tx, grads, params=None):
    return tx.update(grads, tx.init(grads), params)[0]


def stream(shape=(4, 5), steps=12, seed=0, zeros=True):
    """Gradients whose signs change, some entries exactly zero."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        g = rng.normal(size=shape)
        yield jnp.asarray(g * (rng.random(shape) < 0.8) if zeros else g, jnp.float32)


ADAM = ox.full_precision(optax.scale_by_adam())
INNER = {
    "momentum": optax.trace(0.9),
    "adam": ADAM,
    "lion": ox.scale_by_lion_k(),
    "huber": ox.scale_by_lion_k(kappa=ox.lion_kernel("huber", e=0.1)),
}
every_inner = pytest.mark.parametrize("inner", INNER.values(), ids=INNER.keys())
every_scale = pytest.mark.parametrize("normalize", ["mean", "count", "none"])

# cautious -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("normalize", "expected"),
    [("mean", [2, 0, 6, 0]), ("count", [4 / 3, 0, 4, 0]), ("none", [1, 0, 3, 0])],
)
def test_the_specifications_example(normalize, expected):
    u, g = jnp.array([1.0, -2.0, 3.0, 4.0]), jnp.array([1.0, 1.0, 1.0, -1.0])
    out = once(ox.cautious(emits(u), normalize), g)
    np.testing.assert_allclose(out, np.float32(expected), rtol=1.2e-7)


def test_the_first_step_around_adam_is_adams():
    g = next(stream(zeros=False))
    np.testing.assert_array_equal(once(ox.cautious(ADAM), g), once(ADAM, g))


def test_the_first_step_around_adam_is_d_over_d_plus_1_of_adams_with_count():
    g = next(stream(zeros=False))
    np.testing.assert_allclose(
        once(ox.cautious(ADAM, "count"), g), once(ADAM, g) * (20 / 21), rtol=2.4e-7
    )


@every_scale
@every_inner
def test_no_entry_ever_points_against_the_gradient(inner, normalize):
    tx = ox.cautious(inner, normalize)
    state = tx.init(jnp.zeros((4, 5)))
    masked = 0
    for g in stream():
        out, state = tx.update(g, state)
        assert (out * g >= 0).all()
        masked += int(((out == 0) & (g != 0)).sum())
    assert masked > 0  # the stream does make momentum and gradient disagree


@every_inner
def test_the_state_is_the_inner_links_as_if_nothing_happened(inner):
    tx = ox.cautious(inner)
    a, b = tx.init(jnp.zeros((4, 5))), inner.init(jnp.zeros((4, 5)))
    for g in stream():
        _, a = tx.update(g, a)
        _, b = inner.update(g, b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    ("normalize", "factor"),
    [("mean", 1000.0), ("count", 2500.0), ("none", 1.0)],
)
def test_one_live_entry_among_5000_is_enlarged_as_documented(normalize, factor):
    g = jnp.zeros(5000).at[7].set(1.0)
    out = once(ox.cautious(optax.identity(), normalize), g)
    expected = np.zeros(5000)
    expected[7] = factor
    np.testing.assert_allclose(out, expected, rtol=1.2e-7)


@every_scale
def test_all_signs_opposite_give_zeros_and_no_nan(normalize):
    out = once(ox.cautious(optax.scale(-1.0), normalize), next(stream()))
    np.testing.assert_array_equal(out, jnp.zeros((4, 5)))


def test_around_a_finished_optimizer_every_test_is_inverted():
    g = next(stream(zeros=False))
    np.testing.assert_array_equal(once(ox.cautious(optax.sgd(0.1)), g), 0 * g)


def test_entries_without_gradient_do_not_move_and_do_count():
    u = jnp.array([1.0, 1.0, 1.0, 1.0])
    out = once(ox.cautious(emits(u)), jnp.array([1.0, 0.0, 0.0, 0.0]))
    np.testing.assert_array_equal(out, [4.0, 0.0, 0.0, 0.0])


def test_means_are_over_one_leaf_and_never_over_the_tree():
    u = {"a": jnp.ones(2), "b": jnp.ones(4)}
    g = {"a": jnp.array([1.0, -1.0]), "b": jnp.array([1.0, -1.0, -1.0, -1.0])}
    out = once(ox.cautious(emits(u)), g)
    np.testing.assert_array_equal(out["a"], [2.0, 0.0])
    np.testing.assert_array_equal(out["b"], [4.0, 0.0, 0.0, 0.0])


def test_tiny_updates_agree_although_their_product_underflows():
    tiny = jnp.full((3,), 1e-30)
    out = once(ox.cautious(optax.identity()), tiny)
    np.testing.assert_array_equal(out, tiny)


def test_the_mean_of_a_bfloat16_leaf_is_taken_in_float32():
    # 1001 agreeing entries of 2002; bfloat16 cannot count beyond 256.
    g = jnp.where(jnp.arange(2002) % 2 == 0, 1.0, -1.0).astype(jnp.bfloat16)
    out = once(ox.cautious(emits(jnp.ones(2002, jnp.bfloat16))), g)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        out.astype(jnp.float32), jnp.where(g > 0, 2.0, 0.0).astype(jnp.float32)
    )


def test_min_mean_bounds_the_enlargement():
    g = jnp.array([1.0, -1.0, -1.0, -1.0])
    out = once(ox.cautious(emits(jnp.ones(4)), min_mean=0.5), g)
    np.testing.assert_array_equal(out, [2.0, 0.0, 0.0, 0.0])
    out = once(ox.cautious(emits(jnp.ones(4)), min_mean=1.0), g)
    np.testing.assert_array_equal(out, [1.0, 0.0, 0.0, 0.0])


def test_decay_behind_the_wrapper_is_not_judged():
    tx = optax.chain(
        ox.cautious(optax.scale(-1.0)), optax.add_decayed_weights(jnp.float32(0.5))
    )
    params = jnp.array([2.0, -4.0])
    np.testing.assert_array_equal(once(tx, jnp.ones(2), params), [1.0, -2.0])


def test_extra_arguments_reach_the_inner_link():
    inner = ox.scale_by_sophia(
        b1=0.0, b2=0.0, gamma=1.0, estimator=ox.external_hessian_diag()
    )
    tx = ox.cautious(inner)
    g, h = jnp.array([1.0, -3.0]), jnp.array([2.0, 4.0])
    out, _ = tx.update(g, tx.init(g), g, hessian_diag=h, unknown=1)
    np.testing.assert_array_equal(out, [0.5, -0.75])


def test_the_gradient_that_is_compared_is_the_one_that_entered_the_wrapper():
    # The link before has turned the gradient around: that is what counts.
    tx = optax.chain(optax.scale(-1.0), ox.cautious(optax.identity()))
    np.testing.assert_array_equal(once(tx, jnp.array([1.0, -2.0])), [-1.0, 2.0])


def test_holes_pass():
    tx = ox.cautious(ox.scale_by_lion_k())
    grads = {"a": jnp.ones(2), "b": None, "c": optax.MaskedNode()}
    out = once(tx, grads)
    assert out["b"] is None and out["c"] == optax.MaskedNode()


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="cautious: normalize must be one of 'mean', "):
        ox.cautious(optax.identity(), "sum")
    for min_mean in (0.0, 1.1):
        with pytest.raises(ValueError, match=r"cautious: min_mean must lie in \(0.0, "):
            ox.cautious(optax.identity(), min_mean=min_mean)


# grams --------------------------------------------------------------------------------


@every_inner
def test_grams_has_the_size_of_the_update_and_the_sign_of_the_gradient(inner):
    tx = ox.grams(inner)
    a, b = tx.init(jnp.zeros((4, 5))), inner.init(jnp.zeros((4, 5)))
    turned = 0
    for g in stream():
        out, a = tx.update(g, a)
        u, b = inner.update(g, b)
        np.testing.assert_array_equal(jnp.abs(out), jnp.where(g == 0, 0, jnp.abs(u)))
        np.testing.assert_array_equal(jnp.sign(out), jnp.where(u != 0, jnp.sign(g), 0))
        np.testing.assert_array_equal(out * g, jnp.abs(u * g))
        turned += int((u * g < 0).sum())
    assert turned > 0
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_first_step_of_grams_is_adams():
    g = next(stream(zeros=False))
    np.testing.assert_array_equal(once(ox.scale_by_grams(), g), once(ADAM, g))


def test_scale_by_grams_is_grams_around_adam():
    options = {"b1": 0.8, "b2": 0.95, "eps": 1e-3, "eps_root": 1e-4}
    tx = ox.scale_by_grams(**options)
    by_hand = ox.grams(ox.full_precision(optax.scale_by_adam(**options)))
    a, b = tx.init(jnp.zeros((4, 5))), by_hand.init(jnp.zeros((4, 5)))
    for g in stream():
        u, a = tx.update(g, a)
        v, b = by_hand.update(g, b)
        np.testing.assert_array_equal(u, v)


def test_grams_adamw_is_adamw_while_no_sign_changes():
    params = jnp.linspace(-1.0, 1.0, 20).reshape(4, 5)
    rng = np.random.default_rng(0)
    signs = rng.choice([-1.0, 1.0], size=(4, 5))
    ours = ox.grams_adamw(1e-2, weight_decay=0.1)
    theirs = ox.full_precision(optax.adamw(1e-2, weight_decay=0.1))
    a, b = ours.init(params), theirs.init(params)
    for _ in range(10):
        g = jnp.asarray(signs * rng.random((4, 5)), jnp.float32)
        u, a = ours.update(g, a, params)
        v, b = theirs.update(g, b, params)
        np.testing.assert_array_equal(u, v)
        params = optax.apply_updates(params, u)


def test_the_decay_of_grams_adamw_is_not_judged_and_can_be_masked():
    tx = ox.grams_adamw(1.0, weight_decay=0.5, mask={"a": True, "b": False})
    params = {"a": jnp.full(1, 4.0), "b": jnp.full(1, 4.0)}
    zero = jax.tree.map(jnp.zeros_like, params)
    out = once(tx, zero, params)
    assert (float(out["a"][0]), float(out["b"][0])) == (-2.0, 0.0)

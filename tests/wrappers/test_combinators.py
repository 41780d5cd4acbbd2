"""`graft` and `branch`: links side by side."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox

PARAMS = {"w": jnp.ones((3, 4)), "b": jnp.ones(4), "s": jnp.ones(())}


def random_tree(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), dtype), PARAMS)


def once(tx, grads, **extra):
    return tx.update(grads, tx.init(PARAMS), PARAMS, **extra)[0]


def assert_close(got, want, rtol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol), got, want)


# graft --------------------------------------------------------------------------------


def test_each_leaf_has_the_direction_of_one_and_the_norm_of_the_other():
    grads = random_tree(0)
    out = once(ox.graft(optax.scale_by_sign(), optax.sgd(0.1)), grads)
    for key, g in grads.items():
        size = 0.1 * np.linalg.norm(g)
        np.testing.assert_allclose(np.linalg.norm(out[key]), size, rtol=1e-6)
        unit = np.sign(g) / np.sqrt(np.size(g))
        np.testing.assert_allclose(out[key], size * unit, rtol=1e-6)


def test_a_link_grafted_on_itself_is_itself():
    tx, grads = ox.graft(optax.trace(0.9), optax.trace(0.9)), random_tree(0)
    assert_close(once(tx, grads), grads)


def test_a_learning_rate_counts_in_the_magnitude_and_cancels_in_the_direction():
    grads = random_tree(0)
    base = once(ox.graft(optax.trace(0.9), optax.scale_by_sign()), grads)
    for lr in (0.1, 7.0):
        direction = optax.chain(optax.trace(0.9), optax.scale(lr))
        size = optax.chain(optax.scale_by_sign(), optax.scale(lr))
        assert_close(once(ox.graft(direction, optax.scale_by_sign()), grads), base)
        scaled = jax.tree.map(lambda x: lr * x, base)
        assert_close(once(ox.graft(optax.trace(0.9), size), grads), scaled)


def test_where_the_direction_is_zero_nothing_moves():
    out = once(ox.graft(optax.set_to_zero(), optax.sgd(1.0)), random_tree(0))
    assert not any(x.any() for x in jax.tree.leaves(out))


def test_lengths_neither_overflow_nor_vanish():
    for size in (1e30, 1e-30):
        grads = jax.tree.map(lambda g: jnp.sign(g) * jnp.float32(size), random_tree(0))
        assert_close(once(ox.graft(optax.scale(0.5), optax.identity()), grads), grads)


def test_both_links_keep_their_state():
    tx, state = ox.graft(optax.trace(0.9), optax.trace(0.5)), None
    state = tx.init(PARAMS)
    first, second = random_tree(0), random_tree(1)
    _, state = tx.update(first, state)
    _, state = tx.update(second, state)
    for trace, decay in ((state.direction, 0.9), (state.magnitude, 0.5)):
        want = jax.tree.map(lambda a, b: decay * a + b, first, second)
        assert_close(trace.trace, want)


def test_stacked_leaves_have_lengths_of_their_own():
    tx = ox.graft(optax.trace(0.9), optax.scale_by_sign())
    params = {f"w{i}": jnp.ones((2, 3)) for i in range(3)}
    grads = {k: jnp.full((2, 3), 10.0**i) for i, k in enumerate(params)}
    for link in (tx, ox.bucketed(tx)):
        out = link.update(grads, link.init(params), params)[0]
        assert_close(out, jax.tree.map(jnp.ones_like, grads))


# branch -------------------------------------------------------------------------------

LINKS = {
    "plain": optax.identity(),
    "double": optax.scale(2.0),
    "minus": optax.scale(-1),
}


@pytest.mark.parametrize(
    ("merge", "factor"),
    [
        ("sum", 2.0),
        ("mean", 2 / 3),
        ({"plain": 1.0, "double": 0.5, "minus": 0.25}, 1.75),
        (lambda u: u["double"], 2.0),
    ],
)
def test_updates_are_merged(merge, factor):
    grads = random_tree(0)
    want = jax.tree.map(lambda g: factor * g, grads)
    assert_close(once(ox.branch(LINKS, merge), grads), want)


def test_a_branch_of_one_is_the_link():
    grads = random_tree(0)
    for merge in ("sum", "mean", {"a": 1.0}):
        assert_close(once(ox.branch({"a": optax.trace(0.9)}, merge), grads), grads)


def test_states_are_found_by_name():
    tx = ox.branch({"fast": optax.trace(0.5), "slow": optax.trace(0.99)})
    state = tx.update(PARAMS, tx.init(PARAMS))[1]
    assert set(state.inner_states) == {"fast", "slow"}
    assert_close(state.inner_states["slow"].trace, PARAMS)


def test_16_bit_updates_are_summed_in_float32():
    grads = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    links = {str(i): optax.scale(1 / 128) for i in range(3)} | {"a": optax.identity()}
    out = once(ox.branch(links), grads)
    assert out["w"].dtype == jnp.bfloat16
    # 1 + 3/128 rounds once; one by one each 1/128 is exact, too, from 1 on.
    np.testing.assert_array_equal(out["w"].astype(jnp.float32), 1 + 3 / 128)
    thin = {str(i): optax.scale(1 / 512) for i in range(4)} | {"a": optax.identity()}
    out = once(ox.branch(thin), grads)
    np.testing.assert_array_equal(out["w"].astype(jnp.float32), 1 + 1 / 128)


def test_every_branch_sees_params_and_extra_arguments():
    seen = []

    def update(updates, state, params=None, **extra):
        seen.append((params, extra))
        return updates, state

    spy = optax.GradientTransformationExtraArgs(lambda p: (), update)
    once(ox.branch({"a": spy, "b": optax.identity()}), PARAMS, value=1.0)
    once(ox.graft(spy, spy), PARAMS, value=1.0)
    assert len(seen) == 3
    for params, extra in seen:
        assert params is PARAMS
        assert extra == {"value": 1.0}


def test_weights_may_be_traced():
    grads = random_tree(0)
    run = jax.vmap(
        lambda w: once(ox.branch(LINKS, dict.fromkeys(LINKS, w)), grads)["b"]
    )
    out = run(jnp.asarray([0.5, 1.0]))
    np.testing.assert_allclose(out[1], 2 * grads["b"], rtol=1e-6)
    np.testing.assert_allclose(out[0], grads["b"], rtol=1e-6)


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="at least one"):
        ox.branch({})
    with pytest.raises(ValueError, match="branch: merge must be one of 'sum', 'mean'"):
        ox.branch(LINKS, "max")
    with pytest.raises(ValueError, match="one weight a link"):
        ox.branch(LINKS, {"plain": 1.0})
    with pytest.raises(TypeError, match="branch plain: weight must be a number"):
        ox.branch({"plain": optax.identity()}, {"plain": "much"})

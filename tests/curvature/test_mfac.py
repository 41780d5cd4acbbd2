"""M-FAC: the inverse empirical Fisher matrix of the last gradients."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ext as ox

SHAPES = {"a": (5, 6), "b": (4,), "c": (2, 2, 4), "s": ()}


def tree(seed, size=1.0):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(size * rng.normal(size=s), float) for k, s in SHAPES.items()}


def flat(tree):
    return np.concatenate([np.ravel(tree[k]) for k in sorted(tree)])


def run(tx, gradients):
    state, out = tx.init(gradients[0]), []
    update = jax.jit(tx.update)
    for g in gradients:
        updates, state = update(g, state)
        out.append(updates)
    return out, state


def dense(rows, g, damping, window):
    fisher = damping * np.eye(g.size) + rows.T @ rows / window
    return np.linalg.solve(fisher, g)


# The link -----------------------------------------------------------------------------


def test_it_is_a_dense_solve_with_the_last_gradients_of_all_leaves(x64):
    window, gs = 8, [tree(t) for t in range(11)]
    out, _ = run(ox.scale_by_mfac(window, damping=1e-2), gs)
    rows = np.zeros((window, 51))
    for t, (u, g) in enumerate(zip(out, gs, strict=True)):
        rows[t % window] = flat(g)  # a gradient that has left counts no more
        want = dense(rows, flat(g), 1e-2, window)
        np.testing.assert_allclose(flat(u), want, rtol=1e-10, atol=1e-12)


def test_blockwise_every_leaf_has_its_own_matrix(x64):
    window, gs = 3, [tree(t) for t in range(5)]
    out, _ = run(ox.scale_by_mfac(window, 1e-2, blockwise=True), gs)
    for name in SHAPES:
        rows = np.stack([np.ravel(g[name]) for g in gs[-window:]])
        want = dense(rows, np.ravel(gs[-1][name]), 1e-2, window)
        np.testing.assert_allclose(np.ravel(out[-1][name]), want, rtol=1e-9)


def test_constant_gradients_are_divided_by_damping_and_their_share(x64):
    g, window, damping = tree(0), 4, 0.01
    out, _ = run(ox.scale_by_mfac(window, damping), [g] * 6)
    for k, u in enumerate(out, start=1):
        share = min(k, window) / window
        want = flat(g) / (damping + flat(g) @ flat(g) * share)
        # The condition of the system, |g|^2 / damping, is about 5e3.
        np.testing.assert_allclose(flat(u), want, rtol=1e-11)


def test_momentum_comes_after_it_and_is_not_corrected(x64):
    gs = [tree(t) for t in range(3)]
    plain, _ = run(ox.scale_by_mfac(2, 0.1), gs)
    out, state = run(ox.scale_by_mfac(2, 0.1, momentum=0.75), gs)
    w = 0.0
    for got, u in zip(out, plain, strict=True):
        w = 0.75 * w + 0.25 * flat(u)
        np.testing.assert_allclose(flat(got), w, rtol=1e-12)
    np.testing.assert_allclose(flat(state.mu), w, rtol=1e-12)


@pytest.mark.parametrize("blockwise", [False, True])
def test_buckets_change_nothing(blockwise):
    gs = [{k: jnp.sin(jnp.arange(6.0) * (t + i)) for i, k in enumerate("abc")}
          for t in range(3)]  # fmt: skip
    tx = ox.scale_by_mfac(2, 0.1, blockwise=blockwise)
    for got, want in zip(run(ox.bucketed(tx), gs)[0], run(tx, gs)[0], strict=True):
        np.testing.assert_allclose(flat(got), flat(want), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("blockwise", [False, True])
@pytest.mark.parametrize("size", [0.0, 1e30, 1e-30])
def test_extreme_gradients_are_finite(blockwise, size):
    tx = ox.scale_by_mfac(3, blockwise=blockwise)
    out, state = run(tx, [tree(0, size), tree(0, size), tree(1, size)])
    for x in jax.tree.leaves((out, state)):
        assert jnp.isfinite(x).all()
    if size == 1e-30:  # far below damping: a division by it
        np.testing.assert_allclose(flat(out[0]), flat(tree(0, size)) / 1e-5, rtol=1e-4)


def test_in_float32_it_loses_the_condition_in_roundings():
    # |g|^2 / damping is 5e3, and a rounding 6e-8.
    g = tree(0)
    out, _ = run(ox.scale_by_mfac(8, 0.01), [g] * 8)
    want = flat(g) / (0.01 + flat(g) @ flat(g))
    np.testing.assert_allclose(flat(out[-1]), want, rtol=5e-3)


def test_a_narrower_history_rounds_the_gradients():
    g = tree(0)
    out, state = run(ox.scale_by_mfac(2, 1.0, history_dtype=jnp.bfloat16), [g])
    want, _ = run(ox.scale_by_mfac(2, 1.0), [g])
    assert {x.dtype for x in jax.tree.leaves(state.history)} == {
        jnp.dtype(jnp.bfloat16)
    }
    np.testing.assert_allclose(flat(out[0]), flat(want[0]), rtol=2.0**-8)


def test_the_state_is_the_window_and_momentum():
    n = sum(int(np.prod(s)) for s in SHAPES.values())
    for momentum, slots in ((0.0, 5), (0.9, 6)):
        state = ox.scale_by_mfac(5, momentum=momentum).init(tree(0))
        trees = state.history, state.mu
        assert sum(x.size for x in jax.tree.leaves(trees)) == slots * n


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"window": 0}, "scale_by_mfac: window must be an integer"),
        ({"damping": 0.0}, "scale_by_mfac: damping must lie in"),
        ({"momentum": 1.0}, "scale_by_mfac: momentum must lie in"),
    ],
)
def test_bad_arguments_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        ox.scale_by_mfac(**options)


# The functions ------------------------------------------------------------------------


def test_products_and_scores_are_those_of_a_dense_inverse(x64):
    rng = np.random.default_rng(0)
    g, x = rng.normal(size=(8, 50)), rng.normal(size=50)
    inverse = np.linalg.inv(1e-3 * np.eye(50) + g.T @ g / 8)
    got = ox.ihvp_empirical_fisher(jnp.asarray(g), jnp.asarray(x), 1e-3)
    np.testing.assert_allclose(got, inverse @ x, rtol=1e-10, atol=1e-9)
    scores = ox.mfac_prune_scores(jnp.asarray(g), jnp.asarray(x), 1e-3)
    np.testing.assert_allclose(scores, x**2 / (2 * np.diag(inverse)), rtol=1e-10)


def test_the_link_and_the_function_agree(x64):
    gs = [tree(t) for t in range(3)]
    out, _ = run(ox.scale_by_mfac(3, 0.1), gs)
    rows = jnp.stack([jnp.asarray(flat(g)) for g in gs])
    want = ox.ihvp_empirical_fisher(rows, rows[-1], 0.1)
    np.testing.assert_allclose(flat(out[-1]), want, rtol=1e-10)


@pytest.mark.parametrize("function", [ox.ihvp_empirical_fisher, ox.mfac_prune_scores])
def test_functions_name_what_is_wrong(function):
    with pytest.raises(ValueError, match=r"\[gradients, parameters\], got .*\(3,\)"):
        function(jnp.ones(3), jnp.ones(3), 0.1)
    with pytest.raises(ValueError, match="damping must lie in"):
        function(jnp.ones((2, 3)), jnp.ones(3), 0.0)

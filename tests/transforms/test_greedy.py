"""Greedy block updates: the best block moves, the others do not."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox

TREE = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[2.0, 2.0]]), "c": jnp.array(1.0)}


def once(tx, g=TREE, **extra):
    return jax.jit(tx.update)(g, tx.init(g), **extra)[0]


def kept(updates):
    """Names of the leaves that move; the others must be exactly 0."""
    return {k for k, u in updates.items() if (u != 0).any()}


def test_the_block_with_the_longest_gradient_moves_and_the_others_do_not():
    out = once(ox.greedy_block_update())
    np.testing.assert_array_equal(out["a"], TREE["a"])
    assert kept(out) == {"a"}


def test_scores_are_squares_not_absolute_values():
    # Absolute values would choose b: 4 against 3.
    assert kept(once(ox.greedy_block_update())) == {"a"}


@pytest.mark.parametrize(("k", "names"), [(1, "a"), (2, "ab"), (3, "abc"), (9, "abc")])
def test_the_best_blocks_move(k, names):
    assert kept(once(ox.greedy_block_update(num_blocks=k))) == set(names)


@pytest.mark.parametrize(("blocks", "k"), [("leaf", 3), ("coordinate", 5)])
def test_all_blocks_of_the_plain_rule_are_the_identity(blocks, k):
    out = once(ox.greedy_block_update(blocks, num_blocks=k))
    jax.tree.map(np.testing.assert_array_equal, out, TREE)


def test_coordinates_compete_over_the_whole_tree():
    out = once(ox.greedy_block_update("coordinate", num_blocks=2))
    np.testing.assert_array_equal(out["a"], [3.0, 0.0])
    np.testing.assert_array_equal(out["b"], [[2.0, 0.0]])  # a tie: the first
    assert out["c"] == 0


def test_ties_go_to_the_first_block():
    g = {"b": jnp.ones(2), "a": jnp.ones(2)}
    assert kept(once(ox.greedy_block_update(), g)) == {"a"}


def test_lipschitz_constants_choose_the_largest_guaranteed_decrease():
    for seed in range(5):
        rng = np.random.default_rng(seed)
        shapes = {"a": (3,), "b": (2, 2), "c": ()}
        g = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
        bounds = {k: float(np.exp(rng.normal())) for k in g}
        # A block-diagonal quadratic with these curvatures and this gradient.
        decrease = {k: float(jnp.sum(g[k] ** 2)) / (2 * bounds[k]) for k in g}
        best = max(decrease, key=decrease.__getitem__)
        out = once(ox.greedy_block_update(rule="gsl", lipschitz=bounds), g)
        assert kept(out) == {best}
        np.testing.assert_allclose(out[best], g[best] / bounds[best], rtol=3e-7)


def test_a_diagonal_chooses_by_its_entries():
    d = {"a": jnp.array([9.0, 1.0]), "b": jnp.array([[1.0, 2.0]]), "c": jnp.array(0.1)}
    # Scores 1, 4 + 2, 10.
    out = once(ox.greedy_block_update(rule="gsd"), hessian_diag=d)
    np.testing.assert_allclose(out["c"], 10.0, rtol=3e-7)
    assert kept(out) == {"c"}
    out = once(ox.greedy_block_update(rule="gsd", num_blocks=2), hessian_diag=d)
    np.testing.assert_allclose(out["b"], [[2.0, 1.0]], rtol=3e-7)
    assert kept(out) == {"b", "c"}


def test_a_diagonal_that_dominates_its_blocks_guarantees_half_the_score():
    rng = np.random.default_rng(0)
    blocks = {k: rng.normal(size=(3, 3)) for k in "ab"}
    hessians = {k: jnp.asarray(m @ m.T, jnp.float32) for k, m in blocks.items()}
    x = {k: jnp.asarray(rng.normal(size=3), jnp.float32) for k in "ab"}
    # Size times the largest curvature dominates any block.
    d = {k: jnp.full(3, 3 * jnp.linalg.norm(h, 2)) for k, h in hessians.items()}
    tx = ox.greedy_block_update(rule="gsd")

    def value(x):
        return sum(x[k] @ hessians[k] @ x[k] / 2 for k in x)

    for _ in range(20):
        g = jax.grad(value)(x)
        score = max(float(jnp.sum(g[k] ** 2 / d[k])) for k in x)
        step = jax.tree.map(jnp.negative, once(tx, g, hessian_diag=d))
        after = optax.apply_updates(x, step)
        assert value(after) <= value(x) - score / 2 + 1e-6 * value(x)
        x = after


@pytest.mark.parametrize("bad", [0.0, -1.0])
def test_constants_that_are_not_positive_are_unusable(bad):
    tx = ox.greedy_block_update(rule="gsl", lipschitz={"a": bad, "b": 4.0, "c": 2.0})
    assert kept(once(tx)) == {"b"}
    d = {"a": jnp.array([bad, 1.0]), "b": jnp.array([[bad, 8.0]]), "c": jnp.array(9.0)}
    out = once(ox.greedy_block_update(rule="gsd"), hessian_diag=d)
    np.testing.assert_array_equal(out["b"], [[0.0, 0.25]])
    assert kept(out) == {"b"}


def test_where_all_scores_are_zero_nothing_moves():
    zero = jax.tree.map(jnp.zeros_like, TREE)
    assert kept(once(ox.greedy_block_update(), zero)) == set()


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_the_choice_neither_overflows_nor_underflows(size):
    g = {"a": jnp.array([size]), "b": jnp.array([2 * size])}
    assert kept(once(ox.greedy_block_update(), g)) == {"b"}


def test_holes_are_no_blocks():
    g = {"a": optax.MaskedNode(), "b": TREE["b"], "c": None}
    d = jax.tree.map(jnp.ones_like, TREE)
    out = once(ox.greedy_block_update(rule="gsd"), g, hessian_diag=d)
    np.testing.assert_array_equal(out["b"], TREE["b"])
    assert (out["a"], out["c"]) == (optax.MaskedNode(), None)
    bounds = {"a": 1.0, "b": 2.0, "c": 1.0}
    out = once(ox.greedy_block_update(rule="gsl", lipschitz=bounds), g)
    np.testing.assert_array_equal(out["b"], TREE["b"] / 2)


@pytest.mark.parametrize("blocks", ["leaf", "coordinate"])
def test_empty_trees_and_leaves_pass(blocks):
    tx = ox.greedy_block_update(blocks)
    assert once(tx, {}) == {}
    out = once(tx, {"none": jnp.zeros((0, 2))})
    assert out["none"].shape == (0, 2)
    assert kept(once(tx, {"none": jnp.zeros((0, 2)), "b": jnp.ones(1)})) == {"b"}


@pytest.mark.parametrize("blocks", ["leaf", "coordinate"])
def test_leaves_in_a_bucket_are_blocks_of_their_own(blocks):
    rng = np.random.default_rng(0)
    g = {k: jnp.asarray(rng.normal(size=(2, 3)), jnp.float32) for k in "abc"}
    d = jax.tree.map(lambda x: jnp.abs(x) + 0.5, g)
    for rule, extra in (("gs", {}), ("gsd", {"hessian_diag": d})):
        tx = ox.greedy_block_update(blocks, rule, num_blocks=2)
        got, want = once(ox.bucketed(tx), g, **extra), once(tx, g, **extra)
        jax.tree.map(np.testing.assert_array_equal, got, want)


def test_float32_and_float64_leaves_compete(x64):
    g = {"a": jnp.ones(2, jnp.float32), "b": jnp.full(2, 1.5, jnp.float64)}
    out = once(ox.greedy_block_update(), g)
    assert kept(out) == {"b"}
    assert out["a"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": "row"}, "blocks must be one of 'leaf', 'coordinate'"),
        ({"rule": "gsq"}, "rule must be one of"),
        ({"num_blocks": 0}, "num_blocks must be an integer of 1 or more"),
        ({"rule": "gsl"}, "lipschitz is for rule 'gsl' and needed there"),
        ({"lipschitz": {"a": 1.0}}, "lipschitz is for rule 'gsl' and needed there"),
    ],
)
def test_errors_name_the_argument(options, message):
    with pytest.raises(ValueError, match=f"greedy_block_update: {message}"):
        ox.greedy_block_update(**options)


def test_a_missing_diagonal_is_named():
    with pytest.raises(ValueError, match=r"greedy_block_update needs .*hessian_diag"):
        once(ox.greedy_block_update(rule="gsd"))


def test_constants_for_other_leaves_are_named():
    tx = ox.greedy_block_update(rule="gsl", lipschitz={"a": 1.0})
    with pytest.raises(ValueError, match=r"greedy_block_update: leaf \['b'\]"):
        once(tx)

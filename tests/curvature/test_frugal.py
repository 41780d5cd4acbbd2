"""FRUGAL: Adam on a part of each gradient, a stateless rule on the rest."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox

SHAPES = {"conv": (2, 2, 3, 5), "dense": (8, 6), "tall": (9, 4), "bias": (5,)}
SELECTIONS = ("in_features", "out_features", "randk", "svd", "random_projection")


def tree(seed, shapes=None):
    rng = np.random.default_rng(seed)
    shapes = SHAPES if shapes is None else shapes
    return {k: jnp.asarray(rng.normal(size=s), float) for k, s in shapes.items()}


def run(tx, steps=5, shapes=None):
    """Updates of a few steps with random gradients, and the last state."""
    state, out = tx.init(tree(0, shapes)), []
    update = jax.jit(tx.update)
    for t in range(steps):
        updates, state = update(tree(t + 1, shapes), state)
        out.append(updates)
    return out, state


def assert_same(got, want, rtol):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol, atol=rtol), got, want
    )


@pytest.mark.parametrize("selection", ["in_features", "out_features", "blockwise"])
def test_with_density_1_and_no_reset_it_is_adam(x64, selection):
    tx = ox.scale_by_frugal(
        0.8, 0.95, 1e-3, 1.0, selection=selection, reset_state=False, update_interval=2
    )
    adam = ox.full_precision(optax.scale_by_adam(0.8, 0.95, 1e-3))
    assert_same(run(tx)[0], run(adam)[0], 1e-12)


def test_blocks_of_density_0_are_signs_and_other_leaves_adam():
    tx = ox.scale_by_frugal(density=0.0, selection="blockwise", state_free_scale=0.5)
    (out,), _ = run(tx, steps=1)
    g = tree(1)
    for name in ("conv", "dense", "tall"):
        np.testing.assert_array_equal(out[name], 0.5 * np.sign(g[name]))
    # 1 - b2 in float32 is off by 2e-5.
    np.testing.assert_allclose(out["bias"], np.sign(g["bias"]), rtol=1e-4)


def test_leading_vectors_without_a_rest_are_galore_with_reset(x64):
    tx = ox.scale_by_frugal(
        density=0.5, selection="svd", state_free="none", update_interval=2
    )
    shapes = {"tall": SHAPES["tall"], "wide": (4, 7)}
    out, _ = run(tx, steps=4, shapes=shapes)
    for name in shapes:
        for t in range(4):
            g = np.asarray(tree(t + 1, shapes)[name])
            x = g.T if name == "tall" else g
            if t % 2 == 0:
                b = np.linalg.svd(x)[0][:, :2]
                m, v = 0.0, 0.0
            low = b.T @ x
            m, v = 0.9 * m + 0.1 * low, 0.999 * v + 0.001 * low**2
            k = t % 2 + 1
            u = m / (1 - 0.9**k) / (np.sqrt(v / (1 - 0.999**k)) + 1e-8)
            want = b @ u
            want = want.T if name == "tall" else want
            np.testing.assert_allclose(out[t][name], want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_part_and_rest_add_up_to_the_gradient_and_are_orthogonal(x64, selection):
    # With b1 = b2 = 0 and a huge eps Adam is g / eps: the part itself, rescaled.
    shapes = {"w": (6, 9)}
    common = {"b1": 0.0, "b2": 0.0, "eps": 1e12, "selection": selection}
    rest = ox.scale_by_frugal(**common, state_free="sgd")
    part = ox.scale_by_frugal(**common, state_free="none")
    r, p = (run(tx, 1, shapes)[0][0]["w"] for tx in (rest, part))
    p = 1e12 * p
    np.testing.assert_allclose(r + p, tree(1, shapes)["w"], rtol=1e-9)
    assert abs(jnp.vdot(r, p)) < 1e-9
    assert jnp.linalg.norm(p) > 0.1


def chosen(**options):
    """The parts of six turns of one leaf [5, 3]."""
    tx = ox.scale_by_frugal(update_interval=1, density=0.4, **options)
    g, parts = {"w": jnp.ones((5, 3))}, []
    state = tx.init(g)
    for _ in range(6):
        _, state = tx.update(g, state)
        parts.append(state.part["w"].tolist())
    return parts


def test_in_ascending_order_a_window_walks_through_the_inputs():
    want = [[0, 1], [2, 3], [0, 4], [1, 2], [3, 4], [0, 1]]
    assert chosen(order="ascending") == want
    mirrored = [sorted(4 - i for i in part) for part in want]
    assert chosen(order="descending") == mirrored


def test_in_random_order_the_key_decides():
    first = chosen(key=jax.random.key(1))
    assert first == chosen(key=jax.random.key(1))
    assert first != chosen(key=jax.random.key(2))
    assert len({tuple(part) for part in first}) > 2
    assert all(part == sorted(set(part)) and len(part) == 2 for part in first)


def test_leaves_of_one_shape_draw_different_parts():
    tx = ox.scale_by_frugal(density=0.1)
    params = {"a": jnp.ones((40, 1)), "b": jnp.ones((40, 1))}
    for link, where in ((tx, lambda s: s), (ox.bucketed(tx), None)):
        _, state = link.update(params, link.init(params))
        parts = jax.tree.leaves(state.part)
        rows = parts if where else parts[0]
        assert (rows[0] != rows[1]).any()


def active(order, steps=5, **options):
    """Names of the leaves that Adam sees, by step."""
    tx = ox.scale_by_frugal(
        density=0.4, update_interval=1, selection="blockwise", order=order, **options
    )
    g = {name: jnp.full((1, 2), 0.5) for name in "abcde"}
    state, names = tx.init(g), []
    for _ in range(steps):
        _, state = tx.update(g, state)
        names.append("".join(n for n in g if state.mu[n].any()))
    return names


def test_blocks_take_turns_from_the_first_leaf_or_from_the_last():
    assert active("ascending") == ["ab", "cd", "ae", "bc", "de"]
    assert active("descending") == ["de", "bc", "ae", "cd", "ab"]
    drawn = active("random", key=jax.random.key(3))
    assert all(len(names) == 2 for names in drawn)
    assert len(set(drawn)) > 1


def test_without_reset_the_moments_of_a_waiting_block_stay():
    tx = ox.scale_by_frugal(
        density=0.5, update_interval=1, selection="blockwise", order="ascending",
        reset_state=False,
    )  # fmt: skip
    g = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
    state = tx.init(g)
    for steps in ((1, 0), (1, 1), (2, 1)):
        _, state = tx.update(g, state)
        assert (state.steps["a"], state.steps["b"]) == steps
    np.testing.assert_allclose(state.mu["a"], np.full((2, 2), 0.19), rtol=1e-6)
    np.testing.assert_allclose(state.mu["b"], np.full((2, 2), 0.1), rtol=1e-6)


def test_a_new_part_starts_anew_at_every_interval():
    tx = ox.scale_by_frugal(update_interval=3, density=0.5)
    g, state = {"w": jnp.ones((4, 2)), "b": jnp.ones(3)}, None
    state, steps = tx.init(g), []
    for _ in range(4):
        _, state = tx.update(g, state)
        steps.append((int(state.steps["w"]), int(state.steps["b"])))
    assert steps == [(1, 1), (2, 2), (3, 3), (1, 4)]


def test_the_mask_decides_what_is_split():
    shapes = {"bias": (8,), "embed": (8, 4)}
    tx = ox.scale_by_frugal(project_mask={"bias": True, "embed": False})
    state = tx.init(tree(0, shapes))
    assert state.part["embed"] is None
    assert state.mu["embed"].shape == (8, 4)
    # A vector is a matrix of one input.
    assert state.part["bias"].tolist() == [0]
    assert state.mu["bias"].shape == (1, 8)
    with pytest.raises(ValueError, match=r"scale_by_frugal: leaf .*a scalar cannot"):
        ox.scale_by_frugal(project_mask=True).init(jnp.ones(()))


def test_the_state_has_exactly_the_bytes_of_the_specification():
    params = {"w": jnp.zeros((64, 48)), "conv": jnp.zeros((3, 3, 8, 16))}
    state = jax.eval_shape(ox.scale_by_frugal(density=0.25).init, params)
    n = sum(p.size for p in params.values())
    floats = 2 * 0.25 * n * 4
    indices = 4 * (64 // 4 + 72 // 4)
    steps, count, key = 4 * 2, 4, 8
    got = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert got == floats + indices + steps + count + key


def test_decay_and_rate_of_the_optimizer(x64):
    x, g = tree(0), tree(1)
    tx = ox.frugal(0.1, weight_decay=0.5, mask={**dict.fromkeys(SHAPES, True)})
    link = ox.scale_by_frugal()
    got, _ = tx.update(g, tx.init(x), x)
    u, _ = link.update(g, link.init(x))
    want = jax.tree.map(lambda u, x: -0.1 * (u + 0.5 * x), u, x)
    assert_same(got, want, 1e-12)


@pytest.mark.parametrize("selection", ["svd", "random_projection"])
def test_projections_of_edge_case_gradients_are_finite(selection):
    tx = ox.scale_by_frugal(selection=selection, update_interval=2)
    g = tree(1)
    for size in (0.0, 1e30, 1e-30):
        state = tx.init(g)
        for _ in range(3):
            out, state = tx.update(jax.tree.map(lambda x: x * size, g), state)
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(out))


def test_16_bit_parameters_have_float32_bases_and_moments():
    g = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree(1))
    tx = ox.scale_by_frugal(selection="svd")
    out, state = tx.update(g, tx.init(g))
    assert {x.dtype for x in jax.tree.leaves(out)} == {jnp.dtype(jnp.bfloat16)}
    assert state.part["dense"].dtype == state.mu["dense"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"density": 1.5}, "scale_by_frugal: density must lie"),
        ({"density": jnp.float32(0.5)}, "density must be a Python number"),
        ({"selection": "columns"}, "selection must be one of 'in_features'"),
        ({"order": "up"}, "order must be one of"),
        ({"state_free": "adam"}, "state_free must be one of 'sign', 'sgd', 'none'"),
        ({"update_interval": 0}, "update_interval must be an integer"),
    ],
)
def test_bad_arguments_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        ox.scale_by_frugal(**options)

"""Projections out of a subspace, and the memory that holds it."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportOperatorIssue=false

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "wrappers_schedules"
SHAPES = {"w": (3, 4), "b": (4,)}


def tree(seed, dtype=jnp.float32, size=1.0):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(size * rng.normal(size=s), dtype) for k, s in SHAPES.items()}


def once(tx, g, **extra):
    return jax.jit(tx.update)(g, tx.init(g), **extra)


# project_out_subspace -----------------------------------------------------------------


def basis(rows, rank, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return jnp.asarray(np.linalg.qr(rng.normal(size=(rows, rank)))[0], dtype)


def test_nothing_is_left_in_the_span_and_a_second_time_changes_nothing(x64):
    m, g = basis(3, 2, dtype=np.float64), tree(0, jnp.float64)
    bases, tx = {"w": m, "b": None}, ox.project_out_subspace()
    out, state = once(tx, g, bases=bases)
    assert np.abs(m.T @ out["w"]).max() < 1e-15
    again, _ = tx.update(out, state, bases=bases)
    np.testing.assert_allclose(again["w"], out["w"], rtol=0, atol=1e-15)
    np.testing.assert_array_equal(out["b"], g["b"])


@pytest.mark.parametrize("bases", [None, {"w": None, "b": None}])
def test_without_bases_it_is_the_identity(bases):
    g, tx = tree(0), ox.project_out_subspace()
    for link in (tx, ox.bucketed(tx), ox.full_precision(tx)):
        out, _ = once(link, g, bases=bases)
        jax.tree.map(np.testing.assert_array_equal, out, g)


def test_leaves_without_a_basis_may_be_kept_still():
    bases = {"w": basis(3, 1), "b": None}
    out, _ = once(ox.project_out_subspace(zero_unlisted=True), tree(0), bases=bases)
    np.testing.assert_array_equal(out["b"], np.zeros(4))
    assert out["w"].any()


def test_a_basis_that_is_listed_but_has_no_columns_keeps_nothing_still():
    g = tree(0)
    bases = {"w": jnp.zeros((3, 0)), "b": jnp.zeros((4, 2))}
    out, _ = once(ox.project_out_subspace(zero_unlisted=True), g, bases=bases)
    jax.tree.map(np.testing.assert_array_equal, out, g)


def test_rows_of_a_convolutions_basis_are_height_width_and_inputs():
    g = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 3, 4)), jnp.float32)
    m = basis(12, 5)
    out, _ = once(ox.project_out_subspace(), g, bases=m)
    flat = np.asarray(g).reshape(12, 4)
    want = flat - m @ (m.T @ flat)
    np.testing.assert_allclose(out.reshape(12, 4), want, rtol=0, atol=1e-6)


def test_zero_columns_do_nothing():
    g, m = tree(0)["w"], basis(3, 1)
    padded = jnp.concatenate([m, jnp.zeros((3, 2))], axis=1)
    tx = ox.project_out_subspace()
    np.testing.assert_allclose(
        once(tx, g, bases=padded)[0], once(tx, g, bases=m)[0], rtol=0, atol=1e-6
    )


def test_outputs_on_inputs_in_the_span_never_change_under_sgd(x64):
    m, rng = basis(6, 2, dtype=np.float64), np.random.default_rng(0)
    old = jnp.asarray(rng.normal(size=(5, 2))) @ m.T
    x, y = jnp.asarray(rng.normal(size=(9, 6))), jnp.asarray(rng.normal(size=(9, 3)))
    w = start = jnp.asarray(rng.normal(size=(6, 3)))
    tx = optax.chain(ox.project_out_subspace(), optax.sgd(0.05))
    state = tx.init(w)

    def loss(w):
        return jnp.mean((x @ w - y) ** 2)

    for _ in range(50):
        updates, state = tx.update(jax.grad(loss)(w), state, bases=m)
        w = optax.apply_updates(w, updates)
    assert loss(w) < 0.7 * loss(start)
    np.testing.assert_allclose(old @ w, old @ start, rtol=0, atol=1e-14)


@pytest.mark.parametrize("zero_unlisted", [False, True])
def test_stacks_of_equal_leaves_take_bases_of_equal_shapes(zero_unlisted):
    g = {k: tree(i)["w"] for i, k in enumerate("abc")}
    g |= {"d": jnp.ones(2), "e": jnp.ones(2)}
    bases = {k: basis(3, 2, i) for i, k in enumerate("abc")} | {"d": None, "e": None}
    tx = ox.project_out_subspace(zero_unlisted)
    got, _ = once(ox.bucketed(tx), g, bases=bases)
    want, _ = once(tx, g, bases=bases)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), got, want)


@pytest.mark.parametrize("other", [None, jnp.zeros((3, 1))], ids=["none", "fewer"])
def test_stacks_with_unequal_bases_say_what_to_do(other):
    g = {"a": tree(0)["w"], "b": tree(1)["w"]}
    tx = ox.bucketed(ox.project_out_subspace())
    with pytest.raises(ValueError, match="pad bases with zero columns to one shape"):
        once(tx, g, bases={"a": basis(3, 2), "b": other})


def test_in_full_precision_the_projection_of_bfloat16_is_rounded_once():
    g = tree(0, jnp.bfloat16)
    bases = {"w": basis(3, 2).astype(jnp.bfloat16), "b": None}
    got, _ = once(ox.full_precision(ox.project_out_subspace()), g, bases=bases)
    want, _ = once(ox.project_out_subspace(), g, bases=bases)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    m, w = (np.asarray(x, np.float32) for x in (bases["w"], g["w"]))
    exact = jnp.asarray(w - m @ (m.T @ w))
    np.testing.assert_allclose(got["w"].astype(jnp.float32), exact, rtol=2.0**-8)


def test_a_basis_with_rows_that_do_not_fit_is_named_with_its_leaf():
    with pytest.raises(ValueError, match=r"project_out_subspace: leaf \['w'\]"):
        once(ox.project_out_subspace(), tree(0), bases={"w": basis(5, 1), "b": None})


def test_without_the_extra_argument_it_says_so():
    with pytest.raises(ValueError, match=r"project_out_subspace needs .* 'bases'"):
        once(ox.project_out_subspace(), tree(0))


def test_the_golden_is_reproduced_with_a_bias_that_has_no_basis(x64):
    with np.load(GOLDENS / "project_out_subspace.npz") as file:
        golden = {k: jnp.asarray(v) for k, v in file.items() if k != "meta"}
        tolerance = json.loads(str(file["meta"]))["tolerance"]
    names = ("bias", "conv", "dense")
    bases = {name: golden.get(f"x/bases/{name}") for name in names}
    tx = optax.chain(ox.project_out_subspace(), optax.sgd(0.1, momentum=0.0))
    p = {name: golden[f"p0/{name}"] for name in names}
    state, update = tx.init(p), jax.jit(tx.update)
    for t in range(24):
        g = {name: golden[f"g/{name}"][t] for name in names}
        updates, state = update(g, state, p, bases=bases)
        p = optax.apply_updates(p, updates)
        for name in names:
            want = golden[f"p/{name}"][t]
            np.testing.assert_allclose(p[name], want, tolerance, 1e-12)


# update_gradient_memory ---------------------------------------------------------------


def test_the_golden_tasks_give_its_projectors_and_ranks(x64):
    with np.load(GOLDENS / "update_gradient_memory.npz") as file:
        golden = {k: v for k, v in file.items() if k != "meta"}
    bases = None
    for task in range(3):
        seen = {k: golden[f"in/activations{task}/{k}"] for k in ("conv", "dense")}
        bases = ox.update_gradient_memory(bases, seen, threshold=0.9)
        for k, m in bases.items():
            assert m.shape[1] == golden[f"out/rank{task}/{k}"]
            want = golden[f"out/projector{task}/{k}"]
            np.testing.assert_allclose(m @ m.T, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("threshold", "rank"), [(0.5, 1), (0.65, 2), (0.95, 3), (0.99, 4), (1.0, 4)]
)
def test_it_takes_the_fewest_directions_that_reach_the_threshold(threshold, rank):
    # Squared singular values 64, 16, 16, 4 of 100.
    seen = jnp.diag(jnp.array([8.0, 4.0, 4.0, 2.0]))
    m = ox.update_gradient_memory(None, seen, threshold)
    assert m.shape == (4, rank)
    np.testing.assert_allclose(m.T @ m, np.eye(rank), atol=1e-6)


def test_a_basis_that_reaches_the_threshold_is_kept_as_it_is():
    m = basis(4, 2)
    seen = m @ jnp.ones((2, 7))
    np.testing.assert_array_equal(ox.update_gradient_memory(m, seen, 0.95), m)


def test_a_second_task_adds_what_the_first_missed():
    first, second = jnp.eye(4)[:, :1], jnp.eye(4)[:, :2]
    m = ox.update_gradient_memory(None, first)
    m = ox.update_gradient_memory(m, second)
    np.testing.assert_allclose(np.abs(m), np.eye(4)[:, :2], atol=1e-6)


def test_there_are_never_more_columns_than_inputs():
    m = ox.update_gradient_memory(basis(2, 2), jnp.ones((2, 5)), 1.0)
    assert m.shape == (2, 2)


def test_inputs_of_zero_add_nothing():
    assert ox.update_gradient_memory(None, jnp.zeros((3, 4))).shape == (3, 0)


def test_it_takes_and_gives_trees_like_the_parameters():
    seen = {"dense": {"kernel": jnp.eye(3), "bias": None}}
    bases = ox.update_gradient_memory(None, seen, 1.0)
    assert bases["dense"]["bias"] is None
    assert bases["dense"]["kernel"].shape == (3, 3)
    assert bases["dense"]["kernel"].dtype == jnp.float32
    later = {"dense": {"kernel": None, "bias": None}}
    kept = ox.update_gradient_memory(bases, later)
    np.testing.assert_array_equal(kept["dense"]["kernel"], bases["dense"]["kernel"])


def test_bfloat16_activations_give_a_float32_basis():
    assert ox.update_gradient_memory(None, jnp.eye(3, dtype=jnp.bfloat16)).dtype == "f4"


@pytest.mark.parametrize("threshold", [0.0, 1.1])
def test_a_threshold_outside_its_range_is_named(threshold):
    with pytest.raises(ValueError, match="update_gradient_memory: threshold must lie"):
        ox.update_gradient_memory(None, jnp.eye(2), threshold)


@pytest.mark.parametrize(
    ("old", "seen"), [(None, jnp.ones(3)), (basis(4, 1), jnp.ones((3, 2)))]
)
def test_activations_that_are_no_matrix_of_the_layer_are_refused(old, seen):
    with pytest.raises(ValueError, match="matrices \\[fan_in, samples\\]"):
        ox.update_gradient_memory(old, seen)

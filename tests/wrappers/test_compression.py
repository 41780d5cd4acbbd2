"""Compressors, error feedback around them, and the choice of levels."""

# Arrays and trees, which the types of jax and optax leave open.
# pyright: reportOperatorIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox
from tests.test_goldens import HERE, Golden

rng = np.random.default_rng(0)


def compress(tx, g):
    return tx.update(g, tx.init(g))[0]


def normal(*shape, dtype=float):
    return jnp.asarray(rng.normal(size=shape), dtype)


def gradients(steps, dtype=float):
    return {"w": normal(steps, 3, 4, dtype=dtype), "b": normal(steps, 5, dtype=dtype)}


def outputs(tx, grads):
    """What came out of all steps, and the last state."""
    state = tx.init(jax.tree.map(lambda g: g[0], grads))
    return jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], state, grads)[::-1]


@pytest.mark.parametrize(("density", "kept"), [(0.01, 1), (0.25, 3), (0.6, 7), (1, 12)])
def test_topk_keeps_the_largest_entries_of_each_leaf_rounded_down(density, kept):
    g = {"w": normal(3, 4), "b": normal(12) * 1e3}
    for name, out in compress(ox.topk_compressor(density), g).items():
        sizes = np.sort(np.abs(np.ravel(g[name])))
        want = np.where(np.abs(g[name]) >= sizes[-kept], g[name], 0)
        np.testing.assert_array_equal(out, want)


def test_of_equal_entries_the_first_are_kept():
    out = compress(ox.topk_compressor(0.5), jnp.array([1.0, -2.0, 2.0, 2.0, -2.0, 0.0]))
    np.testing.assert_array_equal(out, [0, -2, 2, 2, 0, 0])


def test_a_traced_density_is_a_mask_of_the_same_program():
    g = normal(3, 4)
    densities = jnp.array([0.01, 0.25, 0.6, 1.0])
    got = jax.jit(jax.vmap(lambda d: compress(ox.topk_compressor(d), g)))(densities)
    want = [compress(ox.topk_compressor(d), g) for d in (0.01, 0.25, 0.6, 1.0)]
    np.testing.assert_array_equal(got, np.stack(want))


def test_a_whole_product_is_not_rounded_down_in_float32():
    g = jnp.arange(1.0, 1001.0)
    for density in (0.3, 0.7, 0.9):
        kept = np.count_nonzero(compress(ox.topk_compressor(density), g))
        assert kept == int(density * 1000)


def test_topk_lets_a_nan_be_seen():
    out = compress(ox.topk_compressor(0.3), jnp.array([1.0, 2.0, jnp.nan, 3.0]))
    assert np.isnan(out[2])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [(6, 5), (5, 6), (2, 2, 3, 7)])
def test_lowrank_is_an_orthogonal_projection_of_that_rank(shape):
    g = normal(*shape)
    out = compress(ox.lowrank_compressor(2), g)
    matrix = np.asarray(out).reshape(-1, shape[-1])
    assert np.linalg.matrix_rank(matrix) == 2
    rest = np.ravel(g - out)
    assert abs(rest @ np.ravel(out)) < 1e-14 * rest.size
    assert np.linalg.norm(rest) < np.linalg.norm(g)


@pytest.mark.usefixtures("x64")
def test_power_iterations_approach_the_best_part_of_that_rank():
    u, s, vt = np.linalg.svd(rng.normal(size=(8, 6)))
    s = 2.0 ** -np.arange(6)
    g = jnp.asarray(u[:, :6] * s @ vt)
    best = np.sqrt(np.sum(s[2:] ** 2))
    errors = [
        float(jnp.linalg.norm(g - compress(ox.lowrank_compressor(2, n), g)))
        for n in (1, 3, 30)
    ]
    assert errors[0] > errors[1] >= best * (1 - 1e-12)
    np.testing.assert_allclose(errors[2], best, rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("rank", [3, 100])
def test_a_matrix_of_that_rank_passes_and_vectors_always_do(rank):
    g = {"w": normal(6, 3) @ normal(3, 5), "b": normal(4), "scale": normal()}
    out = compress(ox.lowrank_compressor(rank), g)
    np.testing.assert_allclose(out["w"], g["w"], rtol=0, atol=1e-13)
    np.testing.assert_array_equal(out["b"], g["b"])
    np.testing.assert_array_equal(out["scale"], g["scale"])


def test_each_step_and_each_key_draws_another_start_and_buckets_the_same():
    g = {"a": normal(6, 5), "b": normal(6, 5)}
    tx = ox.lowrank_compressor(1)
    first, state = tx.update(g, tx.init(g))
    again, _ = tx.update(g, state)
    other = compress(ox.lowrank_compressor(1, key=jax.random.key(1)), g)
    assert not np.allclose(first["a"], again["a"])
    assert not np.allclose(first["a"], other["a"])
    bucketed = compress(ox.bucketed(tx), g)
    for name in g:  # sums of the batched product are in another order
        np.testing.assert_allclose(bucketed[name], first[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_lowrank_of_extreme_gradients_is_finite(size):
    g = size * jnp.sign(normal(4, 3))
    out = compress(ox.lowrank_compressor(3), g)
    np.testing.assert_allclose(out, g, rtol=1e-5, atol=1e-5 * size)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "compressor",
    [ox.topk_compressor(0.3), ox.lowrank_compressor(1), ox.scale_by_lion_k()],
    ids=["topk", "lowrank", "another link"],
)
def test_what_went_out_and_what_is_left_is_what_came_in(compressor, dtype):
    grads = gradients(20, dtype)
    tx = ox.compress_with_error_feedback(compressor)
    out, state = outputs(tx, grads)
    for name, g in grads.items():
        assert out[name].dtype == dtype
        total = np.sum(np.asarray(out[name], np.float64), axis=0) + state.residual[name]
        want = np.sum(np.asarray(g, np.float64), axis=0)
        # Twenty additions of float32 to residuals below 30, whatever the dtype.
        np.testing.assert_allclose(total, want, rtol=0, atol=20 * 30 * 2.0**-24)


def test_without_memory_it_is_the_compressor():
    grads = gradients(5)
    got, _ = outputs(
        ox.compress_with_error_feedback(ox.topk_compressor(0.3), decay=0.0), grads
    )
    want, _ = outputs(ox.topk_compressor(0.3), grads)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_the_error_decays():
    tx = ox.compress_with_error_feedback(ox.topk_compressor(0.5), decay=0.5)
    g = jnp.array([3.0, 2.0])
    _, state = tx.update(g, tx.init(g))
    np.testing.assert_array_equal(state.residual, [0, 2])
    out, state = tx.update(jnp.zeros(2), state)
    np.testing.assert_array_equal(out, [0, 1])


def test_parameters_and_extra_arguments_reach_the_compressor():
    seen = []

    def update(updates, state, params=None, **extra):
        seen.append((params, extra))
        return updates, state

    link = optax.GradientTransformationExtraArgs(lambda p: (), update)
    tx = ox.compress_with_error_feedback(link)
    g = jnp.ones(2)
    tx.update(g, tx.init(g), g, value=3.0)
    assert seen[0][0] is g
    assert seen[0][1] == {"value": 3.0}


@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        (lambda: ox.topk_compressor(0.0), "topk_compressor: density"),
        (lambda: ox.topk_compressor(1.5), "topk_compressor: density"),
        (lambda: ox.lowrank_compressor(0), "lowrank_compressor: rank"),
        (lambda: ox.lowrank_compressor(1, 0), "lowrank_compressor: power_iters"),
        (
            lambda: ox.compress_with_error_feedback(optax.identity(), 1.5),
            "compress_with_error_feedback: decay",
        ),
    ],
)
def test_arguments_outside_their_range_are_refused_by_name(make, pattern):
    with pytest.raises(ValueError, match=pattern):
        make()


def problem(seed, layers=6, levels=5):
    """Errors that rise with the level, sizes that fall, a uniform reference."""
    r = np.random.default_rng(seed)
    errors = np.cumsum(r.uniform(0.1, 1, (layers, levels)), axis=1)
    sizes = np.cumsum(r.integers(1, 50, (layers, levels)), axis=1)[:, ::-1]
    return errors, sizes, np.full(layers, 2)


def exhaustive(errors, sizes, reference, alpha, bins):
    """The least size, its least cost, and the levels with both."""
    rows = np.arange(len(errors))
    unit = alpha * errors[rows, reference].sum() / bins
    cost = np.ceil(errors / unit)
    every = itertools.product(range(errors.shape[1]), repeat=len(errors))
    levels = np.array(list(every))
    size, cost = sizes[rows, levels].sum(axis=1), cost[rows, levels].sum(axis=1)
    fits = np.flatnonzero(cost <= bins)
    best = fits[np.lexsort((cost[fits], size[fits]))[0]]
    return size[best], cost[best], levels[best]


@pytest.mark.parametrize(
    ("alpha", "bins"), [(1.0, 10000), (0.8, 10000), (1.3, 50)], ids=str
)
@pytest.mark.parametrize("seed", range(3))
def test_levels_are_those_of_an_exhaustive_search(seed, alpha, bins):
    errors, sizes, reference = problem(seed)
    levels = ox.select_levels_lgreco(errors, sizes, reference, alpha, bins)
    rows = np.arange(6)
    size, _, want = exhaustive(errors, sizes, reference, alpha, bins)
    assert sizes[rows, levels].sum() == size
    np.testing.assert_array_equal(levels, want)
    budget = alpha * errors[rows, reference].sum()
    assert errors[rows, levels].sum() <= budget
    assert size < sizes[rows, reference].sum()


def test_the_golden_satisfies_its_constraint():
    golden = Golden.load(HERE / "curvature/lgreco_levels.npz")
    given = golden.flat("in")
    levels = ox.select_levels_lgreco(**given)
    rows = np.arange(len(levels))
    assert levels.dtype == int
    error, size = (given[name][rows, levels].sum() for name in ("errors", "sizes"))
    np.testing.assert_allclose(error, golden.arrays["out/total_error"], rtol=1e-12)
    assert size == golden.arrays["out/total_size"]
    assert error <= golden.arrays["out/budget"]


@pytest.mark.parametrize("alpha", [0.7, 1.0, 1.9])
def test_one_layer_takes_the_smallest_level_within_the_budget(alpha):
    errors, sizes = np.array([[1.0, 2.0, 3.0, 4.0]]), np.array([[40, 30, 20, 10]])
    levels = ox.select_levels_lgreco(errors, sizes, [1], alpha)
    fits = [c for c in range(4) if errors[0, c] <= alpha * 2.0]
    # A level larger than the reference is not taken: the reference is.
    assert levels.tolist() == [max(1, *fits)]


def test_of_equal_sizes_the_lower_cost_wins_and_then_the_lower_level():
    sizes = np.array([[9, 5, 5, 5]])
    levels = ox.select_levels_lgreco([[1.0, 3.0, 2.0, 2.0]], sizes, [0], alpha=4.0)
    assert levels.tolist() == [2]


def test_where_nothing_fits_or_nothing_is_smaller_the_reference_stays():
    errors, sizes = [[1.0, 2.0], [1.0, 2.0]], [[9, 3], [9, 3]]
    assert ox.select_levels_lgreco(errors, sizes, [1, 1]).tolist() == [1, 1]
    assert ox.select_levels_lgreco(errors, sizes, [1, 1], alpha=0.1).tolist() == [1, 1]
    assert ox.select_levels_lgreco(errors, sizes, [0, 0], bins=1).tolist() == [0, 0]


def test_without_a_budget_only_exact_levels_are_left():
    errors, sizes = [[0.0, 0.0, 1.0]], [[9, 5, 1]]
    assert ox.select_levels_lgreco(errors, sizes, [0]).tolist() == [1]


@pytest.mark.parametrize(
    ("changed", "pattern"),
    [
        ({"sizes": np.ones((3, 2))}, "errors and sizes"),
        ({"reference_level": [0]}, "reference_level"),
        ({"reference_level": [0.0, 1.0]}, "reference_level"),
        ({"reference_level": [0, 2]}, "reference_level"),
        ({"errors": [[1.0, np.nan], [1.0, 1.0]]}, "errors"),
        ({"alpha": -1.0}, "alpha"),
        ({"bins": 0}, "bins"),
    ],
)
def test_tables_that_make_no_sense_are_refused_by_name(changed, pattern):
    given = {"errors": np.ones((2, 2)), "sizes": np.ones((2, 2))}
    given = {**given, "reference_level": [0, 1], **changed}
    with pytest.raises(ValueError, match=f"select_levels_lgreco: {pattern}"):
        ox.select_levels_lgreco(**given)

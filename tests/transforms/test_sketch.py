"""`sketch_gradients` and its operators."""

# Arrays and trees, which the types of jax and optax leave open.
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox
from optax_ext.transforms import sketch as module

KINDS = pytest.mark.parametrize("kind", ["countsketch", "gaussian", "srht"])
rng = np.random.default_rng(0)


def normal(*shape, dtype=float):
    return jnp.asarray(rng.normal(size=shape), dtype)


def sketched(tx, g):
    return tx.update(g, tx.init(g))[0]


def matrix_of(operator):
    """R as a matrix."""
    return jax.vmap(operator.sketch, out_axes=1)(jnp.eye(operator.shape[1]))


@functools.cache
def many(kind, d, s, draws):
    """A gradient, and what came out of it under many keys."""
    g = normal(d)

    def one(key):
        return sketched(ox.sketch_gradients(s, kind, key=key), g)

    return g, jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), draws))


@pytest.mark.parametrize(
    ("kind", "d", "ratio"),
    [
        ("countsketch", 20, 1 + 19 / 4),
        ("gaussian", 20, 1 + 21 / 4),
        ("srht", 16, 16 / 4),  # a projection times d / s
    ],
)
def test_the_mean_is_the_gradient_and_the_square_is_as_derived(kind, d, ratio):
    draws = 20_000
    g, out = many(kind, d, 4, draws)
    norm = float(jnp.linalg.norm(g))
    error = float(jnp.linalg.norm(jnp.mean(out, axis=0) - g)) / norm
    # Its square has the mean (ratio - 1) / draws; half as much again is far outside.
    assert error < 1.5 * np.sqrt((ratio - 1) / draws)
    squares = np.sum(np.asarray(out) ** 2, axis=1) / norm**2
    assert abs(squares.mean() - ratio) < 5 * squares.std() / np.sqrt(draws)


@KINDS
@pytest.mark.parametrize(("s", "d"), [(4, 20), (40, 70), (3, 1)])
def test_restoring_is_the_transpose_of_sketching(kind, s, d):
    operator = module._KINDS[kind](jax.random.key(1), s, d)
    r = matrix_of(operator)
    assert r.shape == operator.shape
    y = normal(operator.shape[0])
    # Sums of up to 70 terms.
    np.testing.assert_allclose(operator.restore(y), r.T @ y, rtol=0, atol=1e-4)


def test_the_rows_of_a_hadamard_sketch_are_orthogonal_and_distinct():
    r = matrix_of(module._srht(jax.random.key(0), 6, 16))
    np.testing.assert_allclose(r @ r.T, 16 / 6 * np.eye(6), rtol=0, atol=1e-5)


@KINDS
def test_it_is_linear(kind):
    a, b = normal(20), normal(20)
    tx = ox.sketch_gradients(4, kind)
    want = 2 * sketched(tx, a) - 3 * sketched(tx, b)
    # Some roundings of entries of size 20.
    np.testing.assert_allclose(sketched(tx, 2 * a - 3 * b), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("s", [16, 100])
def test_a_hadamard_sketch_of_full_size_is_the_identity(s):
    g = normal(16)
    out = sketched(ox.sketch_gradients(s, "srht"), g)
    np.testing.assert_allclose(out, g, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("x64")
def test_an_orthogonal_operator_is_the_identity():
    q, _ = np.linalg.qr(rng.normal(size=(7, 7)))
    g = normal(7)
    tx = ox.sketch_gradients(operator=ox.gaussian_operator(q))
    np.testing.assert_allclose(sketched(tx, g), g, rtol=1e-13)


@pytest.mark.usefixtures("x64")
def test_a_tree_is_one_vector_with_sorted_keys_without_its_holes():
    g = {"b": normal(2, 2), "a": normal(3), "hole": None, "scale": normal()}
    matrix = rng.normal(size=(4, 8))
    tx = ox.sketch_gradients(operator=ox.gaussian_operator(matrix))
    out = sketched(tx, g)
    flat = np.concatenate([g["a"], np.ravel(g["b"]), [g["scale"]]])
    want = matrix.T @ matrix @ flat
    np.testing.assert_allclose(out["a"], want[:3], rtol=1e-12)
    np.testing.assert_allclose(np.ravel(out["b"]), want[3:7], rtol=1e-12)
    np.testing.assert_allclose(out["scale"], want[7], rtol=1e-12)
    assert out["hole"] is None


def test_countsketch_adds_signed_entries_into_buckets():
    operator = ox.countsketch_operator(jnp.array([2, 0, 2]), jnp.array([1, -1, -1]), 3)
    want = np.array([[0, -1, 0], [0, 0, 0], [1, 0, -1]])
    np.testing.assert_array_equal(matrix_of(operator), want)


@KINDS
def test_a_new_matrix_is_drawn_each_step_and_workers_agree(kind):
    g = normal(20)
    tx, other = ox.sketch_gradients(4, kind), ox.sketch_gradients(4, kind)
    first, state = tx.update(g, tx.init(g))
    second, _ = tx.update(g, state)
    assert not np.allclose(first, second)
    np.testing.assert_array_equal(sketched(other, g), first)
    elsewhere = ox.sketch_gradients(4, kind, key=jax.random.key(1))
    assert not np.allclose(sketched(elsewhere, g), first)


def test_noise_has_its_standard_deviation_and_is_new_each_step():
    tx = ox.sketch_gradients(operator=ox.gaussian_operator(np.eye(5)), noise_std=0.5)
    zero = jnp.zeros(5)

    def step(state, _):
        out, state = tx.update(zero, state)
        return state, out

    noise = np.asarray(jax.lax.scan(step, tx.init(zero), length=2000)[1])
    assert len(np.unique(noise[:, 0])) > 1990  # float32 has a few numbers twice
    # 10,000 numbers: five standard errors of a standard deviation are 3.5%.
    np.testing.assert_allclose(noise.std(), 0.5, rtol=0.035)


@KINDS
def test_workers_may_average_their_sketches_instead_of_gradients(kind):
    g = normal(4, 20)
    alone = ox.sketch_gradients(6, kind)
    together = ox.sketch_gradients(6, kind, axis_name="workers")
    out = jax.vmap(lambda g: sketched(together, g), axis_name="workers")(g)
    want = sketched(alone, jnp.mean(g, axis=0))
    for each in np.asarray(out):
        np.testing.assert_allclose(each, want, rtol=0, atol=1e-5)


def test_the_noise_of_each_worker_is_its_own():
    operator = ox.gaussian_operator(np.eye(1000))
    tx = ox.sketch_gradients(operator=operator, noise_std=1.0, axis_name="workers")
    out = jax.vmap(lambda g: sketched(tx, g), axis_name="workers")(jnp.zeros((4, 1000)))
    # A mean of four: half the standard deviation, to five standard errors.
    np.testing.assert_allclose(np.std(out[0]), 0.5, rtol=5 / np.sqrt(2000))


def test_behind_a_small_learning_rate_it_descends():
    x = jnp.ones(20)
    tx = optax.chain(ox.sketch_gradients(5), optax.scale(-0.1))
    state = tx.init(x)
    for _ in range(100):
        updates, state = tx.update(x, state)
        x = optax.apply_updates(x, updates)
    assert jnp.linalg.norm(x) < 0.1


@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        (lambda: ox.sketch_gradients(), "sketch_gradients: give either"),
        (
            lambda: ox.sketch_gradients(2, operator=ox.gaussian_operator(np.eye(2))),
            "sketch_gradients: give either",
        ),
        (lambda: ox.sketch_gradients(0), "sketch_gradients: sketch_dim"),
        (lambda: ox.sketch_gradients(2, "cauchy"), "sketch_gradients: kind"),
        (lambda: ox.sketch_gradients(2, noise_std=-1), "sketch_gradients: noise_std"),
        (lambda: ox.gaussian_operator(np.ones(3)), "gaussian_operator: matrix"),
        (
            lambda: ox.countsketch_operator(jnp.ones(3), jnp.ones(3), 2),
            "countsketch_operator: bucket",
        ),
        (
            lambda: ox.countsketch_operator(jnp.arange(3), jnp.ones(2), 2),
            "countsketch_operator: bucket",
        ),
        (
            lambda: ox.countsketch_operator(jnp.arange(3), jnp.ones(3), 0),
            "countsketch_operator: sketch_dim",
        ),
    ],
)
def test_arguments_that_make_no_sense_are_refused_by_name(make, pattern):
    with pytest.raises(ValueError, match=pattern):
        make()


def test_an_operator_of_another_size_is_refused():
    tx = ox.sketch_gradients(operator=ox.gaussian_operator(np.eye(3)))
    with pytest.raises(ValueError, match="sketch_gradients: the operator takes 3"):
        sketched(tx, jnp.ones(4))

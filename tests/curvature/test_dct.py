"""DCT-Adam and Trion: low-rank updates in columns of a cosine matrix."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), float)


def run(tx, gradients):
    state, out = tx.init(gradients[0]), []
    update = jax.jit(tx.update)
    for g in gradients:
        updates, state = update(g, state)
        out.append(updates)
    return out, state


# The matrix ---------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_the_cosine_matrix_is_orthogonal_to_the_last_digits(x64, n):
    q = ox.dct_matrix(n)
    assert jnp.abs(q.T @ q - jnp.eye(n)).max() < 2e-15
    i, j = np.arange(n)[:, None], np.arange(n)[None]
    want = np.sqrt(2 / n) * np.cos(np.pi * i * (2 * j + 1) / (2 * n))
    want[0] = n**-0.5
    np.testing.assert_allclose(q, want, rtol=0, atol=1e-13)


def test_in_float32_large_angles_lose_no_digits():
    n = 512
    got = np.asarray(ox.dct_matrix(n), np.float64)
    i, j = np.arange(n)[:, None], np.arange(n)[None]
    want = np.sqrt(2 / n) * np.cos(np.pi * i * (2 * j + 1) / (2 * n))
    want[0] = n**-0.5
    # A few roundings of an angle below 2 pi, times the entries' scale of 1/16.
    assert np.abs(got - want).max() < 8e-8


@pytest.mark.parametrize("n", [0, 40000])
def test_sizes_outside_its_range_are_refused(n):
    with pytest.raises(ValueError, match="dct_matrix: n must be"):
        ox.dct_matrix(n)


# DCT-Adam -----------------------------------------------------------------------------


def test_all_but_small_sides_get_plain_adam(x64):
    tx = ox.scale_by_dct_adam(3, 0.8, 0.95, 1e-3, max_dim=40)
    shapes = {"s": (), "b": (6,), "tie": (3, 9), "long": (5, 40)}
    gs = [{k: normal(*s, seed=t) for k, s in shapes.items()} for t in range(3)]
    adam = ox.full_precision(optax.scale_by_adam(0.8, 0.95, 1e-3))
    got, state = run(tx, gs)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12),
        got,
        run(adam, gs)[0],
    )
    assert all(index is None for index in state.indices.values())


@pytest.mark.parametrize("basis", ["dct3", "dct2"])
def test_with_norm_2_no_less_than_its_share_of_the_gradient_is_kept(x64, basis):
    n, r = 12, 4
    g = normal(n, 15)
    tx = ox.scale_by_dct_adam(r, norm_ord=2, error_feedback=True, basis=basis)
    _, state = run(tx, [g])
    lost = jnp.sum(state.residual**2) / jnp.sum(g**2)
    assert 0 < lost <= 1 - r / n


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (2, 3, 9)])
def test_with_feedback_what_was_used_and_the_residual_are_all_gradients(x64, shape):
    # With b1 = b2 = 0 and a huge eps Adam is the identity over eps.
    tx = ox.scale_by_dct_adam(2, 0.0, 0.0, 1e12, error_feedback=True)
    gs = [normal(*shape, seed=t) for t in range(5)]
    out, state = run(tx, gs)
    used = 1e12 * sum(out)
    np.testing.assert_allclose(used + state.residual, sum(gs), rtol=0, atol=1e-9)


def test_without_feedback_there_is_no_residual():
    assert run(ox.scale_by_dct_adam(2), [normal(4, 6)])[1].residual == ()


def test_moments_follow_their_vectors_and_new_ones_start_at_0(x64):
    q, row = ox.dct_matrix(5), jnp.ones((1, 6))

    def along(*which):
        return sum(q[:, [i]] * row for i in which)

    tx = ox.scale_by_dct_adam(2, b1=0.5)
    _, state = run(tx, [along(1, 3)])
    assert state.indices.tolist() == [1, 3]
    _, state = tx.update(along(3, 4), state)
    assert state.indices.tolist() == [3, 4]
    np.testing.assert_allclose(state.mu, np.outer([0.75, 0.5], np.ones(6)))
    still = ox.scale_by_dct_adam(2, b1=0.5, rotate=False)
    _, state = run(still, [along(1, 3), along(3, 4)])
    np.testing.assert_allclose(state.mu, np.outer([0.75, 0.75], np.ones(6)))


def test_vectors_are_chosen_at_step_1_and_at_multiples_of_the_interval():
    q, row = ox.dct_matrix(5), jnp.ones((1, 6))
    tx = ox.scale_by_dct_adam(1, update_interval=3)
    state, seen = tx.init(q[:, [0]] * row), []
    for i in range(5):
        _, state = tx.update(q[:, [i]] * row, state)
        seen.append(int(state.indices[0]))
    assert seen == [0, 0, 2, 2, 2]


def test_a_gradient_of_zeros_keeps_the_vectors():
    g = ox.dct_matrix(5)[:, 3:4] * jnp.ones((1, 6))
    _, state = run(ox.scale_by_dct_adam(1), [g, jnp.zeros_like(g)])
    assert state.indices.tolist() == [3]


def test_the_state_has_exactly_the_bytes_of_the_specification():
    params = {"w": jnp.zeros((64, 48)), "conv": jnp.zeros((3, 3, 8, 48))}
    r = 48 // 4
    for feedback in (False, True):
        tx = ox.scale_by_dct_adam(r, error_feedback=feedback)
        state = jax.eval_shape(tx.init, params)
        got = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        want = sum(4 * (2 * r * longest + r) for longest in (64, 72))
        want += feedback * 4 * (64 * 48 + 72 * 48)
        assert got == want + 4  # the count


def test_decay_and_rate_of_the_optimizer(x64):
    x, g = normal(4, 6), normal(4, 6, seed=1)
    tx = ox.dct_adamw(0.1, 2, weight_decay=0.5, mask=True)
    u = run(ox.scale_by_dct_adam(2), [g])[0][0]
    got, _ = tx.update(g, tx.init(x), x)
    np.testing.assert_allclose(got, -0.1 * (u + 0.5 * x), rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 0}, "scale_by_dct_adam: rank must be an integer"),
        ({"rank": 2, "norm_ord": 3}, "norm_ord must be 1 or 2, got 3"),
        ({"rank": 2, "basis": "dct1"}, "basis must be one of 'dct3', 'dct2'"),
        ({"rank": 2, "b2": 1.0}, "b2 must lie in"),
    ],
)
def test_bad_arguments_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        ox.scale_by_dct_adam(**options)


# Trion --------------------------------------------------------------------------------


def newton_schulz(x, steps):
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(steps):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (2, 2, 9)])
def test_the_update_has_at_most_the_given_rank(x64, shape):
    u = run(ox.scale_by_trion(2), [normal(*shape)])[0][0].reshape(-1, shape[-1])
    assert np.linalg.matrix_rank(np.asarray(u), tol=1e-9) == 2


@pytest.mark.parametrize("basis", ["dct3", "dct2"])
@pytest.mark.parametrize("norm_ord", [1, 2])
def test_full_rank_without_momentum_is_the_orthogonalised_gradient(
    x64, basis, norm_ord
):
    tx = ox.scale_by_trion(
        9, 0.0, ns_steps=3, norm_ord=norm_ord, basis=basis, scaling="none"
    )
    gs = [normal(5, 8, seed=t) for t in range(2)]
    for u, g in zip(run(tx, gs)[0], gs, strict=True):
        want = newton_schulz(np.asarray(g), 3)
        np.testing.assert_allclose(u, want, rtol=0, atol=1e-12)


def test_what_the_subspace_leaves_out_stays_in_the_momentum(x64):
    q = ox.dct_matrix(4)
    small, large = q[:, [1]] * jnp.ones((1, 5)), 3 * q[:, [2]] * jnp.ones((1, 5))
    _, state = run(ox.scale_by_trion(1, momentum=0.75), [small + large])
    np.testing.assert_allclose(state.mu, small + 0.75 * large, rtol=1e-12)


@pytest.mark.parametrize(
    ("scaling", "factor"),
    [("kj", 3**0.5), ("kimi", 0.2 * 12**0.5), ("dion", 3**0.5), ("none", 1.0)],
)
def test_updates_are_scaled_by_their_shape(scaling, factor):
    g = normal(4, 12)
    got = run(ox.scale_by_trion(2, scaling=scaling), [g])[0][0]
    plain = run(ox.scale_by_trion(2, scaling="none"), [g])[0][0]
    np.testing.assert_allclose(got, factor * plain, rtol=1e-5)


def test_stacks_and_extreme_gradients_are_as_single_matrices():
    gs = {name: normal(4, 6, seed=i) for i, name in enumerate("abc")}
    tx = ox.scale_by_trion(2)
    got, want = (run(link, [gs])[0][0] for link in (ox.bucketed(tx), tx))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)
    for size in (0.0, 1e30, 1e-30):
        out, _ = run(tx, [size * gs["a"]] * 3)
        assert all(jnp.isfinite(u).all() for u in out)


def test_vectors_are_refused_with_the_way_out():
    tx = ox.scale_by_trion(2)
    with pytest.raises(ValueError, match=r"scale_by_trion: leaf .*optax\.partition"):
        tx.init({"b": jnp.ones(3)})
    with pytest.raises(ValueError, match="scaling must be one of"):
        ox.scale_by_trion(2, scaling="muon")

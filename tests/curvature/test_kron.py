"""Kron: factors, when and to what they are fitted, and the schedule of fits."""

# Trees of arrays, which the types of optax leave open.
# pyright: reportOperatorIssue=false

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalSubscript=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox
from optax_ext.curvature import _kron_factors as kronecker

ALWAYS = {"update_probability": 1.0}


def normal(*shape, seed=0, dtype=None):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def shapes(params, **options):
    factors = jax.eval_shape(ox.scale_by_kron(**options).init, params).factors
    return [q.shape for q in factors]


def run(tx, grads, **extra):
    """Updates and last state over gradients with a leading axis of steps."""

    def step(state, g):
        u, state = tx.update(g, state, **extra)
        return state, u

    start = tx.init(jax.tree.map(lambda g: g[0], grads))
    state, updates = jax.jit(lambda s, g: jax.lax.scan(step, s, g))(start, grads)
    return updates, state


# Which factors ------------------------------------------------------------------------


def test_matrices_have_triangles_vectors_and_scalars_diagonals():
    assert shapes(jnp.ones((3, 2))) == [(3, 3), (2, 2)]
    assert shapes(jnp.ones(4)) == [(4,)]
    assert shapes(jnp.ones(())) == [(1,)]
    assert shapes(jnp.ones((3, 1))) == [(3, 3), (1,)]


def test_a_convolution_is_a_matrix_or_has_a_factor_for_each_axis():
    conv = jnp.ones((2, 3, 1, 4))
    assert shapes(conv) == [(6, 6), (4, 4)]
    assert shapes(conv, merge_dims=False) == [(2, 2), (3, 3), (1,), (4, 4)]


@pytest.mark.parametrize(
    ("options", "wide", "square"),
    [
        ({"memory_save_mode": "one_diag"}, [(2, 2), (5,)], [(3, 3), (3,)]),
        ({"memory_save_mode": "smart_one_diag"}, [(2, 2), (5,)], [(3, 3), (3, 3)]),
        ({"memory_save_mode": "all_diag"}, [(2,), (5,)], [(3,), (3,)]),
        ({"max_size_triangular": 4}, [(2, 2), (5,)], [(3, 3), (3, 3)]),
        ({"min_ndim_triangular": 3}, [(2,), (5,)], [(3,), (3,)]),
    ],
)
def test_long_axes_may_have_diagonals_to_save_memory(options, wide, square):
    assert shapes(jnp.ones((2, 5)), **options) == wide
    assert shapes(jnp.ones((3, 3)), **options) == square


def test_factors_are_float32_unless_asked_otherwise():
    p = jnp.ones((3, 2), jnp.bfloat16)
    for dtype, want in ((None, jnp.float32), (jnp.bfloat16, jnp.bfloat16)):
        tx = ox.scale_by_kron(precond_dtype=dtype, mu_dtype=dtype)
        state = tx.update(p, tx.init(p))[1]
        assert {q.dtype for q in (*state.factors, state.mu)} == {jnp.dtype(want)}


# Factors ------------------------------------------------------------------------------


def test_factors_act_as_their_kronecker_product(x64):
    q1, q2 = jnp.triu(normal(3, 3)), jnp.triu(normal(2, 2, seed=1))
    x = normal(3, 2, seed=2)
    for second in (q2, jnp.diag(q2)):
        dense = np.kron(q1, q2 if second.ndim == 2 else np.diag(second))
        got = kronecker.apply((q1, second), x).ravel()
        np.testing.assert_allclose(got, dense.T @ dense @ x.ravel(), rtol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 8, 30])
def test_the_lower_bound_is_below_the_norm_and_not_far(n, x64):
    root = normal(n, n)
    m = root @ root.T
    ratio = kronecker._spectral_lower_bound(m) / np.linalg.norm(m, 2)
    assert 0.8 < ratio <= 1 + 1e-12
    assert kronecker._spectral_lower_bound(0 * m) == 0


def test_a_fit_does_not_overflow_on_large_inputs():
    factors = (jnp.eye(2), jnp.eye(3))
    x, v = normal(2, 3), normal(2, 3, seed=1)
    huge = kronecker.fit(factors, 1e30 * x, v, 0.1)
    large = kronecker.fit(factors, 1e10 * x, v, 0.1)
    for a, b in zip(huge, large, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_fits_whiten_gradients_of_a_fixed_covariance():
    left = jnp.diag(jnp.array([10.0, 3.0, 1.0, 0.1])) @ (jnp.eye(4) + 0.3)
    grads = jnp.einsum("ij,tjk->tik", left, normal(2000, 4, 3))
    tx = ox.scale_by_kron(b1=0.0, update_rms=100.0, **ALWAYS)
    updates, state = run(tx, grads)
    squares = jnp.mean(updates[-500:] ** 2, axis=0)
    np.testing.assert_allclose(jnp.mean(squares), 1, atol=0.15)
    np.testing.assert_allclose(squares, 1, atol=0.4)
    for q in state.factors:
        np.testing.assert_array_equal(jnp.tril(q, -1), 0)
        assert (jnp.diag(q) > 0).all()


def test_a_diagonal_on_a_vector_divides_by_root_mean_squares():
    sizes = jnp.repeat(jnp.array([2.0, 1.0, 0.5]), 40)
    signs = jnp.sign(normal(1500, 120))
    tx = ox.scale_by_kron(
        0.0, 0.02, memory_save_mode="all_diag", update_rms=100.0, **ALWAYS
    )
    updates, state = run(tx, signs * sizes[None])
    # Steps are over the largest entry of the leaf, which is one with a large probe, so
    # that large probes count less and the fit ends below 1: at 0.64 for one entry.
    each = jnp.abs(updates[-500:]).mean(0).reshape(3, 40).mean(1)
    np.testing.assert_allclose(each, 1, atol=0.15)
    assert len(state.factors) == 1


# A step -------------------------------------------------------------------------------


def test_without_a_fit_the_update_is_the_scaled_bias_corrected_momentum(x64):
    grads = normal(4, 3, 2)
    tx = ox.scale_by_kron(
        0.8, precond_lr=0.0, precond_init_scale=0.5, update_rms=9.0, **ALWAYS
    )
    updates, _ = run(tx, grads)
    want, _ = run(ox.full_precision(optax.ema(0.8, debias=True)), grads)
    np.testing.assert_allclose(updates, 0.25 * want, rtol=1e-10)


def test_the_root_mean_square_of_each_leaf_is_capped():
    g = {"w": 100 * normal(4, 3), "b": 0.1 * jnp.ones(3)}
    tx = ox.scale_by_kron(precond_lr=0.0, update_rms=0.7, **ALWAYS)
    u, _ = tx.update(g, tx.init(g))
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(u["w"] ** 2)), 0.7, rtol=1e-5)
    np.testing.assert_allclose(u["b"], 0.1, rtol=1e-5)


@pytest.mark.parametrize(
    ("share", "fits", "waited"),
    # The last one fits at t = 0, and at t = 1, 2, ... wants t + 1 steps to have passed.
    [(1.0, 6, 0), (0.5, 3, 0), (0.3, 1, 2), (lambda t: 1 / (1 + t), 1, 5)],
)
def test_a_step_fits_when_one_over_the_share_have_passed(share, fits, waited):
    _, state = run(ox.scale_by_kron(update_probability=share), normal(6, 3, 2))
    assert (state.fits, state.waited) == (fits, waited)


def test_factors_are_fitted_to_momentum_or_to_the_raw_gradient(x64):
    grads, v = normal(2, 3, 2), normal(3, 2, seed=1)
    m_hat = (0.9 * 0.1 * grads[0] + 0.1 * grads[1]) / (1 - 0.9**2)
    for into_momentum, x in ((True, m_hat), (False, grads[1])):
        tx = ox.scale_by_kron(momentum_into_precond_update=into_momentum, **ALWAYS)
        _, before = tx.update(grads[0], tx.init(grads[0]), vector=v)
        _, after = tx.update(grads[1], before, vector=v)
        noisy = x + 2**-11.5 * jnp.mean(jnp.abs(x)) * v
        want = kronecker.fit(before.factors, noisy, v, 0.1)
        for a, b in zip(after.factors, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14)


def test_probes_come_from_the_key_unless_they_are_given():
    g, runs = normal(3, 2), []
    for seed in (0, 1):
        tx = ox.scale_by_kron(key=jax.random.key(seed))
        runs.append(
            [tx.update(g, tx.init(g))[0], tx.update(g, tx.init(g), vector=g)[0]]
        )
    assert (runs[0][0] != runs[1][0]).any()
    np.testing.assert_array_equal(runs[0][1], runs[1][1])


def test_a_leaf_without_gradient_keeps_its_factors():
    grads = {"w": jnp.zeros((5, 3, 2)), "b": normal(5, 3)}
    _, state = run(ox.scale_by_kron(**ALWAYS), grads)
    for q in state.factors["w"]:
        np.testing.assert_array_equal(q, jnp.eye(len(q)))
    assert (state.factors["b"][0] != 1).any()


def test_factors_are_balanced_at_intervals_and_their_product_stays(x64):
    g = normal(3, 2)
    tx = ox.scale_by_kron(precond_lr=0.0, balance_interval=2, **ALWAYS)
    state = tx.init(g)
    state = state._replace(factors=(100 * state.factors[0], state.factors[1]))
    for largest in ([100, 1], [10, 10]):
        u, state = tx.update(g, state)
        sizes = [jnp.max(q) for q in state.factors]
        np.testing.assert_allclose(sizes, largest, rtol=1e-12)
    rms = jnp.sqrt(jnp.mean(g**2))
    np.testing.assert_allclose(u, 1.1 * g / rms, rtol=1e-9)


# The optimizer and the schedule -------------------------------------------------------


@pytest.mark.parametrize("mask", [None, {"w": False, "b": True}])
def test_matrices_decay_or_what_the_mask_says(mask):
    p = {"w": normal(3, 2), "b": normal(3)}
    tx = ox.kron(0.1, weight_decay=0.5, mask=mask)
    u, _ = tx.update(jax.tree.map(jnp.zeros_like, p), tx.init(p), p)
    decays = {"w": True, "b": False} if mask is None else mask
    for name, decay in decays.items():
        want = -0.05 * p[name] if decay else 0 * p[name]
        np.testing.assert_allclose(u[name], want, rtol=1e-6)


def test_the_schedule_is_flat_then_falls_to_its_floor(x64):
    share = ox.kron_update_schedule(0.9, 0.1, 0.01, 100)
    got = [share(t) for t in (0, 100, 200, 10_000)]
    np.testing.assert_allclose(got, [0.9, 0.9, 0.9 * np.exp(-1), 0.1], rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ox.kron_update_schedule(max_prob=1.5), "max_prob must lie in"),
        (lambda: ox.kron_update_schedule(min_prob=0.0), "min_prob must lie in"),
        (lambda: ox.kron_update_schedule(decay=-1.0), "decay must lie in"),
        (lambda: ox.scale_by_kron(b1=1.0), "scale_by_kron: b1 must lie in"),
        (lambda: ox.scale_by_kron(precond_lr=-1.0), "precond_lr must lie in"),
        (lambda: ox.scale_by_kron(precond_init_scale=0.0), "precond_init_scale must"),
        (lambda: ox.scale_by_kron(update_probability=0.0), "update_probability must"),
        (lambda: ox.scale_by_kron(update_rms=0.0), "update_rms must lie in"),
        (lambda: ox.scale_by_kron(balance_interval=0), "balance_interval must be"),
        (lambda: ox.scale_by_kron(max_size_triangular=0), "max_size_triangular must"),
        (lambda: ox.scale_by_kron(memory_save_mode="diag"), "memory_save_mode must be"),
        (lambda: ox.kron(-0.1), "kron: learning_rate must lie in"),
    ],
)
def test_errors_name_method_and_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()

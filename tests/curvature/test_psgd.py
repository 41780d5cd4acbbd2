"""PSGD over all parameters: the fits, the two types, and the groups as matrices."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox

LINKS = {
    "xmat": ox.scale_by_psgd_xmat,
    "lra": functools.partial(ox.scale_by_psgd_lra, rank=2),
}
each = pytest.mark.parametrize("make", LINKS.values(), ids=LINKS)


def normal(*shape, seed=0, dtype=None):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def q_matrix(preconditioner):
    """Q as a dense matrix, from its definition."""
    if isinstance(preconditioner, ox.XmatPreconditioner):
        a, b = preconditioner
        return np.diag(a) + np.diag(b)[:, ::-1]
    u, v, d = preconditioner
    return (np.eye(len(d)) + u @ v.T) @ np.diag(d)


def fitted(make, hessian, probes, **options):
    """The state after Newton fits whose step size falls linearly from 0.1 to 0."""
    n = len(hessian)

    def step(state, inputs):
        v, rate = inputs
        tx = make(b1=0.0, precond_lr=rate, **options)
        h = hessian @ v
        return tx.update(h, state, vector=v, hvp=h)[1], None

    vectors = normal(probes, n, seed=1)
    rates = jnp.linspace(0.1, 0, probes)
    scan = jax.jit(lambda s: jax.lax.scan(step, s, (vectors, rates))[0])
    return scan(make(**options).init(jnp.zeros(n)))


# What a fit converges to --------------------------------------------------------------


def test_an_x_becomes_the_inverse_of_the_absolute_curvature(x64):
    curvatures = jnp.array([100, 30, 10, 3, 1, 0.3, -1, -20])
    state = fitted(ox.scale_by_psgd_xmat, jnp.diag(curvatures), 20_000)
    q = q_matrix(state.preconditioner)
    p = q.T @ q
    np.testing.assert_allclose(np.diag(p) * np.abs(curvatures), 1, atol=3e-3)
    assert np.max(np.abs(p - np.diag(np.diag(p)))) < 4e-4
    a, b = state.preconditioner
    assert np.min(np.abs(a * a[::-1] - b * b[::-1])) > 0


def test_diagonal_plus_low_rank_becomes_the_inverse_of_such_a_hessian(x64):
    hessian = jnp.diag(jnp.linspace(1, 3, 12))
    low = normal(12, 2, seed=2)
    hessian = hessian + low @ low.T
    state = fitted(ox.scale_by_psgd_lra, hessian, 8000, rank=4)
    q = q_matrix(state.preconditioner)
    error = np.linalg.norm(q.T @ q @ hessian - np.eye(12)) / np.sqrt(12)
    assert error < 0.02  # 0.01 in the specification


@each
def test_responses_times_c_make_the_preconditioner_over_c(make, x64):
    g, v, h = normal(7), normal(20, 7, seed=1), normal(20, 7, seed=2)
    tx = make()

    @jax.jit
    def preconditioner(c):
        def step(state, pair):
            return tx.update(g, state, vector=pair[0], hvp=c * pair[1])[1], None

        return jax.lax.scan(step, tx.init(g), (v, h))[0].preconditioner

    one, seven = q_matrix(preconditioner(1.0)), q_matrix(preconditioner(7.0))
    np.testing.assert_allclose(7 * seven.T @ seven, one.T @ one, atol=1e-8)


# One step -----------------------------------------------------------------------------


@each
def test_the_update_is_p_times_the_bias_corrected_momentum(make, x64):
    grads = [{"a": normal(2, 2, seed=i), "b": normal(3, seed=9 + i)} for i in range(3)]
    tx, ema = make(b1=0.8), ox.full_precision(optax.ema(0.8, debias=True))
    state, average = tx.init(grads[0]), ema.init(grads[0])
    for g in grads:
        u, state = tx.update(g, state)
        m_hat, average = ema.update(g, average)
    q = q_matrix(state.preconditioner)
    want = q.T @ q @ np.concatenate([m_hat["a"].ravel(), m_hat["b"]])
    got = np.concatenate([u["a"].ravel(), u["b"]])
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-9)


@each
def test_the_first_scale_is_that_of_the_response(make, x64):
    g, v, h = normal(6), normal(6, seed=1), normal(6, seed=2)
    start = make().init(g).preconditioner
    for given, scale in (
        ({"vector": v}, np.mean(g**4) ** -0.125),
        ({"vector": v, "hvp": h}, np.mean(v**2) ** 0.25 * np.mean(h**4) ** -0.125),
    ):
        _, state = make(precond_lr=0.0).update(g, make().init(g), **given)
        got = q_matrix(state.preconditioner)
        np.testing.assert_allclose(got, scale * q_matrix(start), rtol=1e-12)


@each
def test_an_initial_scale_is_where_q_starts(make, x64):
    g = normal(5)
    _, state = make(precond_lr=0.0, init_scale=0.5).update(
        g, make(init_scale=0.5).init(g)
    )
    want = 0.5 * q_matrix(make().init(g).preconditioner)
    np.testing.assert_allclose(q_matrix(state.preconditioner), want, rtol=1e-12)


@each
def test_gradients_of_zero_teach_nothing(make):
    tx, zero = make(), jnp.zeros(5)
    start = tx.init(zero)
    u, state = tx.update(zero, start)
    assert not u.any()
    jax.tree.map(
        np.testing.assert_array_equal, state.preconditioner, start.preconditioner
    )


@each
def test_it_fits_at_the_first_of_every_k_steps(make):
    tx, state = make(update_interval=3), make().init(normal(5))
    update, changes = jax.jit(tx.update), []
    for i in range(7):
        before = state.preconditioner
        _, state = update(normal(5, seed=i), state)
        pairs = zip(before, state.preconditioner, strict=True)
        changes.append(any(bool((x != y).any()) for x, y in pairs))
    assert changes == [True, False, False, True, False, False, True]


@each
def test_damping_is_noise_relative_to_the_gradient(make, x64):
    g, v = normal(6), normal(6, seed=1)
    h = g + 0.5 * jnp.mean(jnp.abs(g)) * v
    options = {"init_scale": 1.0}
    tx = make(damping=0.5, **options)
    _, white = tx.update(g, tx.init(g), vector=v)
    _, newton = tx.update(g, tx.init(g), vector=v, hvp=h)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 1e-12),
        white.preconditioner,
        newton.preconditioner,
    )


@each
def test_probes_come_from_the_key_unless_they_are_given(make):
    g, runs = normal(6), []
    for seed in (0, 1):
        tx = make(key=jax.random.key(seed))
        state = make().init(g)
        runs.append([tx.update(g, state)[0], tx.update(g, state, vector=g)[0]])
    state = make(key=jax.random.key(1)).init(g)
    assert (make().update(g, state)[0] != runs[0][0]).any()
    np.testing.assert_array_equal(runs[0][1], runs[1][1])


def test_the_middle_of_an_odd_x_belongs_to_the_diagonal(x64):
    tx, state = ox.scale_by_psgd_xmat(), ox.scale_by_psgd_xmat().init(normal(5))
    for i in range(4):
        _, state = tx.update(normal(5, seed=i), state)
    assert state.preconditioner.b[2] == 0
    assert (state.preconditioner.b[:2] != 0).all()


def test_u_and_v_take_turns():
    tx = ox.scale_by_psgd_lra(rank=2, uv_update="alternate")
    state, moved = tx.init(normal(6)), []
    for i in range(3):
        before = state.preconditioner
        _, state = tx.update(normal(6, seed=i), state)
        moved.append(bool((state.preconditioner.U != before.U).any()))
        assert moved[-1] != bool((state.preconditioner.V != before.V).any())
    assert moved == [True, False, True]


def test_u_and_v_are_balanced_at_intervals_and_q_stays(x64):
    tx = ox.scale_by_psgd_lra(rank=2, precond_lr=0.0, balance_interval=2)
    state = tx.init(normal(6))
    state = optax.tree.set(state, U=100 * state.preconditioner.U)
    q = q_matrix(state.preconditioner)
    q = q * np.mean(normal(6) ** 4) ** -0.125
    for ratio_is_1 in (False, False, True):
        _, state = tx.update(normal(6), state)
        u, v, _ = state.preconditioner
        ratio = jnp.linalg.norm(u) / jnp.linalg.norm(v)
        assert bool(jnp.abs(ratio - 1) < 1e-9) is ratio_is_1
        np.testing.assert_allclose(q_matrix(state.preconditioner), q, rtol=1e-9)


@each
def test_holes_are_no_parameters(make):
    g = {"a": normal(2), "hole": None, "masked": optax.MaskedNode(), "b": normal(3)}
    full = {"a": g["a"], "b": g["b"]}
    got, _ = make().update(g, make().init(g))
    want, _ = make().update(full, make().init(full))
    assert got["hole"] is None
    for name in full:
        np.testing.assert_array_equal(got[name], want[name])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ox.scale_by_psgd_xmat(b1=1.0), "scale_by_psgd_xmat: b1 must lie"),
        (lambda: ox.scale_by_psgd_xmat(precond_lr=-1.0), "precond_lr must lie"),
        (lambda: ox.scale_by_psgd_xmat(init_scale=0.0), "init_scale must lie"),
        (lambda: ox.scale_by_psgd_xmat(damping=-1.0), "damping must lie"),
        (lambda: ox.scale_by_psgd_lra(update_interval=0), "update_interval must be an"),
        (lambda: ox.scale_by_psgd_lra(rank=0), "scale_by_psgd_lra: rank must be an"),
        (lambda: ox.scale_by_psgd_lra(balance_interval=0), "balance_interval must be"),
        (lambda: ox.scale_by_psgd_lra(uv_update="both"), "uv_update must be one of"),
        (
            lambda: ox.scale_by_psgd_xmat().update(
                jnp.ones(2), ox.scale_by_psgd_xmat().init(jnp.ones(2)), hvp=jnp.ones(2)
            ),
            "scale_by_psgd_xmat needs the extra argument 'vector'",
        ),
    ],
)
def test_errors_name_method_and_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()

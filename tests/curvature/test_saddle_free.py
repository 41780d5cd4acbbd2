"""Saddle-free Newton: descent whatever the curvature, exact and on Krylov spaces."""

# pyright: reportArgumentType=false, reportCallIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox

RNG = np.random.default_rng(0)


def emitted(tx, f, x):
    def step(x):
        return tx.update(jax.grad(f)(x), tx.init(x), x, value_fn=f)[0]

    return jax.jit(step)(x)


def quadratic(h):
    return lambda x: x @ h @ x / 2 + jnp.sum(x)


def symmetric(n, seed=0):
    a = np.random.default_rng(seed).normal(size=(n, n))
    return jnp.asarray(a + a.T)


def test_it_leaves_the_saddle_where_newton_stays(x64):
    def f(x):
        return 5 * x[0] ** 2 / 2 - x[1] ** 2 / 2 + x[1] ** 4 / 4

    tx = ox.saddle_free_newton(1.0, damping=1e-3)

    @jax.jit
    def steps(x):
        newton = x - jnp.linalg.solve(jax.hessian(f)(x), jax.grad(f)(x))

        def step(_, x):
            return x + tx.update(jax.grad(f)(x), tx.init(x), x, value_fn=f)[0]

        return newton, jax.lax.fori_loop(0, 9, step, x)

    newton, x = steps(jnp.array([0.5, 0.01]))
    assert jnp.abs(newton).max() < 1e-5
    assert abs(abs(x[1]) - 1) < 2e-3 and abs(x[0]) < 1e-3


@pytest.mark.parametrize("rank", [None, 1, 4, 8])
@pytest.mark.parametrize("seed", range(5))
def test_it_goes_downhill_for_every_hessian(x64, rank, seed):
    f, x = quadratic(symmetric(8, seed)), jnp.asarray(RNG.normal(size=8))
    u = emitted(ox.scale_by_saddle_free_newton(rank), f, x)
    assert u @ jax.grad(f)(x) > 0


@pytest.mark.parametrize("rank", [8, 20])
def test_the_whole_krylov_space_is_the_whole_space(x64, rank):
    f, x = quadratic(symmetric(8)), jnp.asarray(RNG.normal(size=8))
    want = emitted(ox.scale_by_saddle_free_newton(damping=0.1), f, x)
    got = emitted(ox.scale_by_saddle_free_newton(rank, damping=0.1), f, x)
    np.testing.assert_allclose(got, want, rtol=1e-8)


@pytest.mark.parametrize("rank", [None, 6])
def test_without_damping_it_is_newtons_step_where_the_loss_is_convex(x64, rank):
    a = symmetric(6)
    h, x = a @ a + jnp.eye(6), jnp.asarray(RNG.normal(size=6))
    f = quadratic(h)
    got = emitted(ox.scale_by_saddle_free_newton(rank, damping=0.0), f, x)
    np.testing.assert_allclose(got, jnp.linalg.solve(h, jax.grad(f)(x)), rtol=1e-8)


def test_the_exact_rule_by_hand(x64):
    f = quadratic(jnp.diag(jnp.array([2.0, -3.0])))
    x = jnp.array([1.0, 1.0])  # gradient (3, -2)
    got = emitted(ox.scale_by_saddle_free_newton(damping=0.5), f, x)
    np.testing.assert_allclose(got, [3 / 2.5, -2 / 3.5], rtol=1e-12)


def test_a_space_that_ends_early_is_enough(x64):
    h = jnp.diag(jnp.array([1.0, 1.0, -2.0, -2.0, 5.0]))
    f, x = quadratic(h), jnp.asarray(RNG.normal(size=5))
    want = emitted(ox.scale_by_saddle_free_newton(damping=0.0), f, x)
    got = emitted(ox.scale_by_saddle_free_newton(5, damping=0.0), f, x)
    np.testing.assert_allclose(got, want, rtol=1e-8)


@pytest.mark.parametrize("rank", [None, 2])
def test_flat_directions_without_damping_are_left_out(rank):
    def f(x):
        return x[0] ** 2 + x[1]

    got = emitted(ox.scale_by_saddle_free_newton(rank, damping=0.0), f, jnp.ones(2))
    assert jnp.isfinite(got).all()


@pytest.mark.parametrize("rank", [None, 2])
def test_no_gradient_no_step(rank):
    x = jnp.zeros(3)
    got = emitted(ox.scale_by_saddle_free_newton(rank), lambda x: jnp.sum(x**2), x)
    np.testing.assert_array_equal(got, 0)


def test_the_best_of_several_dampings_is_kept(x64):
    h = jnp.diag(jnp.array([1.0, 4.0]))
    f, x = quadratic(h), jnp.ones(2)
    candidates = [10.0, 0.01, 1.0]
    tx = ox.scale_by_saddle_free_newton(damping_candidates=candidates)
    want = emitted(ox.scale_by_saddle_free_newton(damping=0.01), f, x)
    np.testing.assert_allclose(emitted(tx, f, x), want, rtol=1e-12)


def test_a_damping_that_ends_in_a_nan_is_not_kept(x64):
    def f(x):  # sqrt of a negative number where the step is long
        return jnp.sum(jnp.sqrt(x) - 0.9 * jnp.log1p(x))

    x = jnp.array([0.1])
    dampings = [1e-6, 100.0]
    values = [
        f(x - emitted(ox.scale_by_saddle_free_newton(None, d), f, x)) for d in dampings
    ]
    assert jnp.isnan(values[0]) and jnp.isfinite(values[1])
    got = emitted(ox.scale_by_saddle_free_newton(damping_candidates=dampings), f, x)
    want = emitted(ox.scale_by_saddle_free_newton(damping=100.0), f, x)
    np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_it_costs_as_many_hessian_vector_products_as_its_rank(rank):
    calls = []

    def f(x):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.sum(jnp.cosh(x))

    x = jnp.arange(5.0)
    tx = ox.scale_by_saddle_free_newton(rank)
    jax.block_until_ready(
        jax.jit(lambda g: tx.update(g, tx.init(x), x, value_fn=f)[0])(jnp.sinh(x))
    )
    jax.effects_barrier()
    assert len(calls) == rank


def test_the_alias_multiplies_by_the_learning_rate(x64):
    f, x = quadratic(symmetric(3)), jnp.ones(3)
    link = emitted(ox.scale_by_saddle_free_newton(2, 0.3), f, x)
    alias = emitted(ox.saddle_free_newton(0.5, 0.3, 2), f, x)
    np.testing.assert_allclose(alias, -0.5 * link, rtol=1e-14)


@pytest.mark.parametrize("rank", [None, 3])
def test_hidden_leaves_do_not_take_part(rank):
    def f(p):
        return jnp.sum(p["a"] ** 2 * p["b"][0]) + p["a"][0]

    params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}
    tx = optax.masked(ox.scale_by_saddle_free_newton(rank), {"a": True, "b": False})
    grads = {"a": jnp.array([7.0, 12.0]), "b": jnp.array([5.0])}

    def value_fn(p):
        return f({"a": p["a"], "b": params["b"]})

    @jax.jit
    def step(grads, params):
        return tx.update(grads, tx.init(params), params, value_fn=value_fn)[0]

    got = step(grads, params)
    np.testing.assert_array_equal(got["b"], grads["b"])
    want = grads["a"] / (6 + 1e-3)
    np.testing.assert_allclose(got["a"], want, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ox.saddle_free_newton(rank=0), "rank must be an integer of 1"),
        (lambda: ox.saddle_free_newton(damping=-1.0), "damping must lie in"),
        (lambda: ox.saddle_free_newton(damping_candidates=[]), "must hold a number"),
        (
            lambda: ox.scale_by_saddle_free_newton(damping_candidates=[-1.0]),
            "damping_candidates must lie in",
        ),
    ],
)
def test_arguments_outside_their_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_is_missing_is_named():
    tx, x = ox.scale_by_saddle_free_newton(), jnp.ones(2)
    with pytest.raises(ValueError, match="saddle_free_newton needs the parameters"):
        tx.update(x, tx.init(x), value_fn=jnp.sum)
    with pytest.raises(ValueError, match=r"saddle_free_newton needs .* 'value_fn'"):
        tx.update(x, tx.init(x), x)

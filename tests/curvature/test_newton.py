"""Gradient-regularised Newton: the search, its edges, and every form of Hessian."""

# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import optax_ext as ox
from tests.curvature.replay import Quartic

newton = ox.gradient_regularized_newton


def run(tx, f, x, steps, **extra):
    """Parameters, values, radii before each step, and the state at the end."""

    def step(carry, _):
        x, state = carry
        value, grads = jax.value_and_grad(f)(x)
        updates, new = tx.update(grads, state, x, value=value, value_fn=f, **extra)
        x = jax.tree.map(jnp.add, x, updates)
        return (x, new), (x, value, state.gamma)

    @jax.jit
    def scan(x):
        return jax.lax.scan(step, (x, tx.init(x)), length=steps)

    (_, state), (xs, values, radii) = scan(x)
    return xs, values, np.append(radii, state.gamma)


def rosenbrock(p):
    return (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2


def trials(radii):
    """Trials of accepted steps: j of them make gamma 2 gamma / 2^(j - 1)."""
    return 2 - np.log2(radii[1:] / radii[:-1])


@pytest.mark.parametrize("name", ["full", "diag", "none"])
def test_the_radii_are_those_of_the_golden_file(x64, name):
    golden = Quartic(f"gns_{name}")
    wanted = golden.arrays["out/gamma"]
    tx = newton(hessian=name)

    def extra(params, t):
        if name != "diag":
            return {}
        sizes, start, out = jnp.diag(golden.a), 0, {}
        for key in sorted(params):
            part = sizes[start : start + params[key].size].reshape(params[key].shape)
            out[key] = part + 3 * golden.c * params[key] ** 2
            start += params[key].size
        return {"hessian_diag": out}

    states = list(golden.states(tx, len(wanted), extra))
    got = [1.0, *(state.gamma for state in states[:-1])]
    np.testing.assert_allclose(got, wanted, rtol=1e-7)


def test_rosenbrock_takes_51_steps_and_105_solves(x64):
    tx, start = newton(), jnp.array([-2.0, 2.0])
    xs, _, radii = run(tx, rosenbrock, start, 51)
    values = jax.vmap(rosenbrock)(xs)
    assert values[49] > 1e-8 > values[50]
    assert trials(radii).sum() == 105


def test_the_loss_falls_at_every_step(x64):
    _, values, radii = run(newton(), rosenbrock, jnp.array([-2.0, 2.0]), 40)
    assert (np.diff(values) < 0).all()
    assert (trials(radii) >= 1).all()


def test_without_a_hessian_the_step_has_the_length_of_the_radius(x64):
    tx = newton(gamma0=0.3, eps=0.1, hessian="none")
    start = jnp.array([3.0, -4.0])
    xs, _, radii = run(tx, lambda x: jnp.sum(jnp.cosh(x)), start, 1)
    # One step accepted at once: gamma is doubled, the step was gamma + eps long.
    np.testing.assert_allclose(radii, [0.3, 0.6])
    np.testing.assert_allclose(jnp.linalg.norm(xs[0] - start), 0.4, rtol=1e-12)


def test_the_radius_has_a_floor_after_a_success(x64):
    tx = newton(gamma0=1e-3, gamma_min=0.5, hessian="none")
    _, _, radii = run(tx, lambda x: jnp.sum(x**2), jnp.ones(2), 1)
    np.testing.assert_allclose(radii, [1e-3, 0.5])


@pytest.mark.parametrize("hessian", ["full", "none"])
def test_no_gradient_no_step_and_no_new_radius(hessian):
    tx = newton(gamma0=0.5, hessian=hessian)
    xs, _, radii = run(tx, lambda x: jnp.sum(x**2), jnp.zeros(2), 2)
    np.testing.assert_array_equal(xs, 0)
    np.testing.assert_array_equal(radii, 0.5)


def count_evaluations(tx, f, x, value, **extra):
    calls = []

    def counting(x):
        jax.debug.callback(lambda: calls.append(1))
        return f(x)

    @jax.jit
    def step(g, x):
        return tx.update(g, tx.init(x), x, value=value, value_fn=counting, **extra)

    out, state = jax.block_until_ready(step(jax.grad(f)(x), x))
    jax.effects_barrier()
    return len(calls), out, state


def test_each_trial_costs_one_evaluation_and_the_search_ends():
    """A value that no step can beat: every trial fails, the last one is emitted."""
    f, x = lambda x: jnp.sum(x**2), jnp.array([3.0, 4.0])
    tx = newton(hessian="none", max_search=7, eps=1e-12)
    calls, out, state = count_evaluations(tx, f, x, -1.0)
    assert calls == 7
    np.testing.assert_allclose(state.gamma, 0.5**7)
    np.testing.assert_allclose(jnp.linalg.norm(out), 0.5**6, rtol=1e-6)


def test_a_step_that_succeeds_at_once_costs_one_evaluation():
    f, x = lambda x: jnp.sum(x**2), jnp.array([3.0, 4.0])
    calls, *_ = count_evaluations(newton(hessian="none"), f, x, 25.0)
    assert calls == 1


def test_a_hessian_that_is_not_positive_costs_trials_not_numbers(x64):
    f = lambda x: jnp.sum(jnp.cos(x))  # noqa: E731  a maximum at 0
    _, values, radii = run(newton(), f, jnp.array([0.1, -0.1]), 12)
    assert np.isfinite(values).all() and np.isfinite(radii).all()
    assert values[-1] < -1.99


def test_a_loss_that_is_nowhere_finite_makes_no_step():
    f = lambda x: jnp.where(jnp.any(x != 1), jnp.nan, jnp.sum(x))  # noqa: E731
    tx = newton(hessian="none", max_search=3)
    calls, out, state = count_evaluations(tx, f, jnp.ones(2), 2.0)
    assert calls == 3
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_allclose(state.gamma, 1 / 8)


def network(p):
    x = jnp.arange(6.0).reshape(3, 2) / 6
    return jnp.tanh(x @ p["w"]) @ p["v"]


def loss(z):
    return jnp.sum((z - 1) ** 2)


PARAMS = {"v": jnp.array([[0.5], [-1.0]]), "w": jnp.array([[1.0, 0.2], [0.3, -0.7]])}


def gauss_newton_matrix(params):
    flat, unravel = ravel_pytree(params)
    j = jax.jacobian(lambda v: network(unravel(v)).ravel())(flat)
    return 2 * j.T @ j


def gauss_newton_product(params):
    product = ox.gnvp(network, loss)
    return lambda v: product(params, v)


def test_a_matrix_of_ones_own_and_its_products_make_the_same_steps(x64):
    params = jax.tree.map(lambda x: x.astype(jnp.float64), PARAMS)
    f = lambda p: loss(network(p))  # noqa: E731
    dense, values, _ = run(newton(hessian=gauss_newton_matrix), f, params, 4)
    products, _, _ = run(
        newton(hessian=gauss_newton_product, solver="cg"), f, params, 4
    )
    # Conjugate gradients stop at a residual of 1e-5.
    for name in dense:
        np.testing.assert_allclose(products[name], dense[name], rtol=1e-3, atol=1e-4)
    assert values[-1] < values[0] / 4


def test_conjugate_gradients_solve_with_the_full_hessian(x64):
    f = lambda x: jnp.sum(jnp.cosh(x)) + jnp.sum(x) ** 2  # noqa: E731
    start = jnp.array([1.0, 2.0, -1.0])
    want, _, _ = run(newton(), f, start, 4)
    got, _, _ = run(newton(solver="cg"), f, start, 4)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_the_number_of_conjugate_gradients_may_be_too_small(x64):
    f = lambda x: jnp.sum(jnp.cosh(x)) + jnp.sum(x) ** 2  # noqa: E731
    start = jnp.array([1.0, 2.0, -1.0])
    want, _, _ = run(newton(), f, start, 1)
    few, _, _ = run(newton(solver="cg", cg_iters=1), f, start, 1)
    assert np.abs(few - want).max() > 1e-3


def test_a_negative_diagonal_counts_as_zero(x64):
    x = jnp.array([1.0, 1.0])
    f = lambda x: jnp.sum(x**2)  # noqa: E731
    got, *_ = run(newton(hessian="diag"), f, x, 1, hessian_diag=jnp.array([-5.0, 2.0]))
    lam = np.sqrt(8) / (1 + 1e-8)
    np.testing.assert_allclose(got[0], 1 - 2 / (np.array([0.0, 2.0]) + lam), rtol=1e-9)


@pytest.mark.parametrize("solver", ["cholesky", "cg"])
def test_leaves_without_gradient_stay_where_they_are(solver):
    f = lambda p: jnp.sum(p["a"] ** 2 * p["b"])  # noqa: E731
    params = {"a": jnp.ones(2), "b": jnp.full(2, 5.0)}
    tx = newton(solver=solver, gamma0=100.0)

    @jax.jit
    def step(p):
        grads = {"a": 2 * p["a"] * p["b"], "b": None}
        return tx.update(grads, tx.init(p), p, value=f(p), value_fn=f)[0]

    out = step(params)
    assert out["b"] is None
    lam = np.sqrt(200) / 100
    np.testing.assert_allclose(out["a"], -10 / (10 + lam), rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma0": 0.0}, r"gamma0 must lie in \(0.0"),
        ({"eps": 0.0}, r"eps must lie in \(0.0"),
        ({"gamma_min": -1.0}, "gamma_min must lie in"),
        ({"max_search": 0}, "max_search must be an integer"),
        ({"cg_iters": 0}, "cg_iters must be an integer"),
        ({"hessian": "block"}, "hessian must be one of 'full', 'diag', 'none'"),
        ({"solver": "lu"}, "solver must be one of 'cholesky', 'cg'"),
    ],
)
def test_arguments_outside_their_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=f"gradient_regularized_newton: {message}"):
        newton(**arguments)


@pytest.mark.parametrize("missing", ["value", "value_fn", "hessian_diag"])
def test_what_is_missing_is_named(missing):
    x, tx = jnp.ones(2), newton(hessian="diag")
    given = {"value": 2.0, "value_fn": jnp.sum, "hessian_diag": x}
    given.pop(missing)
    with pytest.raises(ValueError, match=f"newton needs .* '{missing}'"):
        tx.update(x, tx.init(x), x, **given)
    with pytest.raises(ValueError, match="newton needs the parameters"):
        tx.update(x, tx.init(x))

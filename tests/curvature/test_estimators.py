"""Estimators of the Hessian's diagonal: exact cases, expectations, scheduling."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox


def estimate(estimator, params, **extra):
    state = estimator.init(params)
    return jax.jit(lambda p: estimator.update(None, state, p, **extra)[0])(params)


def symmetric(n=6, seed=0):
    a = np.random.default_rng(seed).normal(size=(n, n))
    return jnp.asarray((a + a.T) / 2, jnp.float32)


def quadratic_of(h):
    return lambda x: x @ h @ x / 2


# Hutchinson ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_one_rademacher_draw_is_exact_for_a_diagonal_hessian(seed):
    params = {"a": jnp.array([1.0, -2.0, 3.0]), "b": jnp.asarray(0.5)}

    def value_fn(p):
        return sum(jnp.sum(x**4) for x in p.values()) / 12 - jnp.sum(p["a"] ** 2)

    h = estimate(
        ox.hutchinson_diag(key=jax.random.key(seed)), params, value_fn=value_fn
    )
    np.testing.assert_allclose(h["a"], params["a"] ** 2 - 2, rtol=2e-7)  # signed
    np.testing.assert_allclose(h["b"], 0.25, rtol=2e-7)


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_the_mean_of_4096_draws_is_the_diagonal(probe):
    h = symmetric()
    diagonal = np.diag(h)
    estimator = ox.hutchinson_diag(probe, num_samples=4096)
    mean = estimate(estimator, jnp.ones(6), value_fn=quadratic_of(h))
    off = np.sum(np.square(h), axis=1) - diagonal**2
    variance = off + (2 * diagonal**2 if probe == "gaussian" else 0)
    error = (mean - diagonal) / np.sqrt(variance / 4096)
    assert np.abs(error).max() < 5
    assert np.abs(error).max() > 0.05  # it is a draw, not the answer


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_single_draws_have_the_variance_of_their_probe(probe):
    h = symmetric()
    estimator = ox.hutchinson_diag(probe)

    def draw(key):
        state = estimator.init(jnp.ones(6))._replace(key=jax.random.key_data(key))
        return estimator.update(None, state, jnp.ones(6), value_fn=quadratic_of(h))[0]

    draws = jax.vmap(draw)(jax.random.split(jax.random.key(1), 4096))
    diagonal = np.diag(h)
    expected = np.sum(np.square(h), axis=1) - diagonal**2
    if probe == "gaussian":
        expected = expected + 2 * diagonal**2
    # The variance of a variance of 4096 draws with a kurtosis of 15 at most.
    np.testing.assert_allclose(np.var(draws, axis=0), expected, rtol=0.25)


def test_draws_follow_from_the_key_and_the_number_of_the_call():
    h = quadratic_of(symmetric())

    def two(key):
        estimator = ox.hutchinson_diag(key=key)
        state = estimator.init(jnp.ones(6))
        first, state = estimator.update(None, state, jnp.ones(6), value_fn=h)
        second, _ = estimator.update(None, state, jnp.ones(6), value_fn=h)
        return np.stack([first, second])

    a, b = two(None), two(jax.random.key(1))
    np.testing.assert_array_equal(a, two(jax.random.key(0)))  # the default
    np.testing.assert_array_equal(a, two(jax.random.PRNGKey(0)))  # raw keys do too
    assert (a[0] != a[1]).any() and (a[0] != b[0]).any()


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_the_state_is_raw_key_data_of_any_implementation(impl):
    estimator = ox.hutchinson_diag(key=jax.random.key(3, impl=impl))
    state = estimator.init(jnp.ones(6))
    assert state.key.dtype == jnp.uint32
    h, after = estimator.update(
        None, state, jnp.ones(6), value_fn=quadratic_of(symmetric())
    )
    assert jnp.isfinite(h).all()
    assert after.key.shape == state.key.shape and (after.key != state.key).any()


def test_two_states_of_one_estimator_do_not_share_a_buffer():
    estimator = ox.hutchinson_diag()
    a, b = estimator.init(jnp.ones(2)), estimator.init(jnp.ones(2))
    assert a.key.unsafe_buffer_pointer() != b.key.unsafe_buffer_pointer()


def test_estimates_of_bfloat16_parameters_are_float32():
    params = {"w": jnp.full((3,), 2.0, jnp.bfloat16)}
    h = estimate(
        ox.hutchinson_diag(num_samples=2),
        params,
        value_fn=lambda p: jnp.sum(p["w"].astype(jnp.float32) ** 4) / 12,
    )
    assert h["w"].dtype == jnp.float32
    np.testing.assert_array_equal(h["w"], [4.0, 4.0, 4.0])


def test_obj_fn_is_another_name_of_value_fn():
    h = quadratic_of(symmetric())
    np.testing.assert_array_equal(
        estimate(ox.hutchinson_diag(), jnp.ones(6), obj_fn=h),
        estimate(ox.hutchinson_diag(), jnp.ones(6), value_fn=h),
    )


def test_masked_leaves_have_no_estimate():
    params = {"a": jnp.ones(2), "b": optax.MaskedNode(), "c": None}
    h = estimate(ox.hutchinson_diag(), params, value_fn=lambda p: jnp.sum(p["a"] ** 2))
    assert h["b"] == optax.MaskedNode() and h["c"] is None
    np.testing.assert_array_equal(h["a"], [2.0, 2.0])


def test_it_fits_optaxs_own_sophia():
    tx = optax.contrib.sophia(0.1, hessian_diagonal_fn=ox.hutchinson_diag())
    x = jnp.ones(6)
    with jax.numpy_dtype_promotion("standard"):
        updates, state = tx.update(x, tx.init(x), x, obj_fn=lambda x: jnp.sum(x**2))
    assert jnp.isfinite(updates).all()
    # One average of the exact diagonal: (1 - b2) * 2.
    np.testing.assert_allclose(optax.tree.get(state, "nu"), 0.02, rtol=1e-5)


# Gauss-Newton-Bartlett ----------------------------------------------------------------

SOFTMAX = np.random.default_rng(0)
X = SOFTMAX.normal(size=(3, 2))  # three examples, two features
W = SOFTMAX.normal(size=(2, 3))  # three classes


def closed_form(x, w):
    logits = x @ w
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return (x.T**2) @ (p * (1 - p)) / len(x)


def test_the_expectation_over_labels_is_the_gauss_newton_diagonal():
    with jax.enable_x64(True):
        x, w = jnp.asarray(X), jnp.asarray(W)
        p = np.asarray(jax.nn.softmax(x @ w))
        total = np.zeros((2, 3))

        @jax.jit
        def given(labels):
            return estimate(
                ox.gauss_newton_bartlett_diag(),
                w,
                logits_fn=lambda w: x @ w,
                sampled_labels=labels,
            )

        for labels in itertools.product(range(3), repeat=3):
            h = given(jnp.asarray(labels))
            total += math.prod(p[i, y] for i, y in enumerate(labels)) * np.asarray(h)
        np.testing.assert_allclose(total, closed_form(X, W), rtol=1e-12)


def test_drawn_labels_give_the_same_expectation():
    x, w = jnp.asarray(X, jnp.float32), jnp.asarray(W, jnp.float32)
    estimator = ox.gauss_newton_bartlett_diag()

    def draw(key):
        state = estimator.init(w)._replace(key=jax.random.key_data(key))
        return estimator.update(None, state, w, logits_fn=lambda w: x @ w)[0]

    draws = np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(5), 4096)))
    error = (draws.mean(0) - closed_form(X, W)) / (draws.std(0) / 64)
    assert np.abs(error).max() < 5
    assert (draws >= 0).all()


def test_by_hand_on_one_example():
    # Logits w, label 0, p = (1/2, 1/2): gradient (p - onehot), B = 1.
    h = estimate(
        ox.gauss_newton_bartlett_diag(),
        jnp.zeros(2),
        logits_fn=lambda w: w[None],
        sampled_labels=jnp.array([0]),
    )
    np.testing.assert_array_equal(h, [0.25, 0.25])


def test_batch_size_replaces_the_number_of_positions_in_the_estimate():
    x, w = jnp.asarray(X, jnp.float32), jnp.asarray(W, jnp.float32)
    how = {"logits_fn": lambda w: x @ w, "sampled_labels": jnp.array([0, 1, 2])}
    three = estimate(ox.gauss_newton_bartlett_diag(), w, **how)
    twelve = estimate(ox.gauss_newton_bartlett_diag(batch_size=12), w, **how)
    np.testing.assert_allclose(twelve, 4 * three, rtol=1e-6)


def test_every_position_of_a_sequence_counts():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 2)), jnp.float32)
    w, labels = jnp.asarray(W, jnp.float32), jnp.array([[0, 1, 2], [2, 2, 0]])
    sequence = estimate(
        ox.gauss_newton_bartlett_diag(),
        w,
        logits_fn=lambda w: x @ w,
        sampled_labels=labels,
    )
    flat = estimate(
        ox.gauss_newton_bartlett_diag(),
        w,
        logits_fn=lambda w: x.reshape(6, 2) @ w,
        sampled_labels=labels.ravel(),
    )
    np.testing.assert_allclose(sequence, flat, rtol=1e-5)


def test_where_leaves_positions_out_as_if_they_were_not_there():
    x = jnp.asarray(X, jnp.float32)
    w, labels = jnp.asarray(W, jnp.float32), jnp.array([0, 1, 2])
    masked = estimate(
        ox.gauss_newton_bartlett_diag(),
        w,
        logits_fn=lambda w: x @ w,
        sampled_labels=labels,
        where=jnp.array([True, False, True]),
    )
    kept = estimate(
        ox.gauss_newton_bartlett_diag(),
        w,
        logits_fn=lambda w: x[::2] @ w,
        sampled_labels=labels[::2],
    )
    np.testing.assert_allclose(masked, kept, rtol=1e-5)


def test_where_nothing_is_kept_the_estimate_is_zero():
    w = jnp.asarray(W, jnp.float32)
    h = estimate(
        ox.gauss_newton_bartlett_diag(),
        w,
        logits_fn=lambda w: jnp.asarray(X, jnp.float32) @ w,
        where=jnp.zeros(3, bool),
    )
    np.testing.assert_array_equal(h, jnp.zeros((2, 3)))


def test_logits_of_bfloat16_parameters_are_widened():
    w = jnp.asarray(W, jnp.bfloat16)
    how = {"sampled_labels": jnp.array([0, 1, 2])}
    h = estimate(
        ox.gauss_newton_bartlett_diag(),
        w,
        logits_fn=lambda w: jnp.asarray(X, jnp.bfloat16) @ w,
        **how,
    )
    exact = estimate(
        ox.gauss_newton_bartlett_diag(),
        w.astype(jnp.float32),
        logits_fn=lambda w: jnp.asarray(X, jnp.float32) @ w,
        **how,
    )
    assert h.dtype == jnp.float32
    # Inputs, logits and the gradient are rounded to 8 bits, and squared.
    np.testing.assert_allclose(h, exact, rtol=0.1, atol=1e-2)


def test_labels_of_another_shape_are_refused():
    with pytest.raises(AssertionError, match="sampled_labels must have the shape of"):
        estimate(
            ox.gauss_newton_bartlett_diag(),
            jnp.asarray(W, jnp.float32),
            logits_fn=lambda w: jnp.asarray(X, jnp.float32) @ w,
            sampled_labels=jnp.array([0, 1]),
        )


# External -----------------------------------------------------------------------------


def test_an_external_diagonal_is_passed_on_in_float32():
    h = {"w": jnp.array([1.0, -2.0], jnp.bfloat16)}
    out = estimate(ox.external_hessian_diag(), None, hessian_diag=h)
    assert out["w"].dtype == jnp.float32
    np.testing.assert_array_equal(out["w"], [1.0, -2.0])


# Averages, every k-th step ------------------------------------------------------------


class Calls(NamedTuple):
    count: jax.Array


def counted(log):
    """An estimator that returns its step number and logs each real call."""

    def update(updates, state, params=None, **extra):
        del updates, extra
        jax.debug.callback(lambda: log.append(1))
        value = (state.count + 1).astype(jnp.float32)
        return jax.tree.map(lambda p: value * jnp.ones_like(p), params), Calls(
            state.count + 1
        )

    return optax.GradientTransformationExtraArgs(
        lambda p: Calls(jnp.zeros([], jnp.int32)), update
    )


LINKS = {
    "ema_hessian_diag": lambda e, k: ox.ema_hessian_diag(e, update_interval=k),
    "precondition": lambda e, k: ox.precondition_by_hessian_diag(e, update_interval=k),
    "sophia": lambda e, k: ox.scale_by_sophia(estimator=e, update_interval=k),
    "adahessian": lambda e, k: ox.scale_by_adahessian(estimator=e, update_interval=k),
}
every_link = pytest.mark.parametrize("make", LINKS.values(), ids=LINKS.keys())


@every_link
@pytest.mark.parametrize("k", [1, 3, 10])
def test_the_estimator_is_called_every_kth_step_and_at_the_first(make, k):
    calls = []
    tx = make(counted(calls), k)
    x = jnp.ones(2)
    state = tx.init(x)
    update = jax.jit(tx.update)
    seen = []
    for _ in range(7):
        _, state = update(x, state, x)
        jax.effects_barrier()
        seen.append(len(calls))
    assert seen == [1 + t // k for t in range(7)]
    assert len(calls) == math.ceil(7 / k)


def primitives(jaxpr, outside_cond):
    """Names of all primitives, with or without those in the branches of a cond."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        if outside_cond and eqn.primitive.name == "cond":
            continue
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from primitives(inner, outside_cond)


@every_link
def test_the_estimator_is_compiled_inside_the_branch_of_a_cond(make):
    tx = make(ox.hutchinson_diag(), 10)
    x = jnp.ones(2)
    jaxpr = jax.make_jaxpr(
        lambda g, s, p: tx.update(g, s, p, value_fn=lambda p: jnp.sum(jnp.sinh(p)))
    )(x, tx.init(x), x)
    assert "cosh" in set(primitives(jaxpr.jaxpr, outside_cond=False))
    assert not {"sinh", "cosh"} & set(primitives(jaxpr.jaxpr, outside_cond=True))


def test_the_average_by_hand():
    tx = ox.ema_hessian_diag(counted([]), decay=0.75, update_interval=2)
    x = jnp.ones(())
    state, seen, update = tx.init(x), [], jax.jit(tx.update)
    for _ in range(5):
        h, state = update(None, state, x)
        seen.append(float(h))
    # Estimates 1, 2, 3 at steps 0, 2, 4; started at zero, and no bias correction.
    first = 0.25 * 1
    second = 0.75 * first + 0.25 * 2
    third = 0.75 * second + 0.25 * 3
    assert seen == [first, first, second, second, third]
    assert state.count == 5 and state.estimator.count == 3


def test_the_key_waits_between_refreshes():
    tx = ox.ema_hessian_diag(ox.hutchinson_diag(), update_interval=3)
    x = jnp.ones(2)
    state, keys = tx.init(x), []
    update = jax.jit(
        lambda s: tx.update(None, s, x, value_fn=lambda x: jnp.sum(x**2))[1]
    )
    for _ in range(4):
        state = update(state)
        keys.append(np.asarray(state.estimator.key))
    assert (keys[0] == keys[1]).all() and (keys[1] == keys[2]).all()
    assert (keys[2] != keys[3]).any()


def test_the_average_of_bfloat16_parameters_is_float32():
    tx = ox.ema_hessian_diag(ox.external_hessian_diag())
    x = jnp.ones(2, jnp.bfloat16)
    h, state = tx.update(None, tx.init(x), x, hessian_diag=x)
    assert h.dtype == state.hessian.dtype == jnp.float32
    np.testing.assert_allclose(h, 0.01, rtol=1e-5)


# Errors -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimator", "params", "message"),
    [
        (ox.hutchinson_diag(), 1.0, "hutchinson_diag needs .* 'value_fn'"),
        (ox.hutchinson_diag(), None, "hutchinson_diag needs the parameters"),
        (ox.gauss_newton_bartlett_diag(), 1.0, "bartlett_diag needs .* 'logits_fn'"),
        (ox.gauss_newton_bartlett_diag(), None, "bartlett_diag needs the parameters"),
        (ox.external_hessian_diag(), 1.0, "external_hessian_diag .* 'hessian_diag'"),
    ],
)
def test_what_is_missing_is_named(estimator, params, message):
    params = None if params is None else jnp.ones(2)
    with pytest.raises(ValueError, match=message):
        estimate(estimator, params)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ox.hutchinson_diag("uniform"), "probe must be one of 'rademacher', "),
        (lambda: ox.hutchinson_diag(num_samples=0), "num_samples must be an integer"),
        (lambda: ox.gauss_newton_bartlett_diag(0), "batch_size must be an integer of"),
        (
            lambda: ox.ema_hessian_diag(ox.hutchinson_diag(), decay=1.0),
            r"ema_hessian_diag: decay must lie in \[0.0, 1.0\)",
        ),
        (
            lambda: ox.ema_hessian_diag(ox.hutchinson_diag(), update_interval=0),
            "update_interval must be an integer of 1 or more, got 0",
        ),
        (
            lambda: ox.precondition_by_hessian_diag(ox.hutchinson_diag(), eps=0.0),
            r"precondition_by_hessian_diag: eps must lie in \(0.0",
        ),
    ],
)
def test_arguments_outside_their_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()

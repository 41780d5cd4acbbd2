"""Several steps on a quadratic model of the loss in the outputs."""

# Arrays, trees and flax models, which the types of jax and optax leave open.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportReturnType=false, reportOptionalMemberAccess=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox

X = np.random.default_rng(0).normal(size=(12, 4))
LABELS = jnp.asarray(np.random.default_rng(1).integers(0, 3, 12))


def start(dtype=jnp.float32):
    rng = np.random.default_rng(2)
    return {
        "w": jnp.asarray(rng.normal(size=(4, 3)), dtype),
        "b": jnp.asarray(rng.normal(size=3), dtype),
    }


def logits_fn(p):
    return jnp.asarray(X, p["w"].dtype) @ p["w"] + p["b"][None]


def loss(z):
    wide = z if z.dtype == jnp.float64 else z.astype(jnp.float32)
    return optax.losses.softmax_cross_entropy_with_integer_labels(wide, LABELS).mean()


def extra(p):
    z = logits_fn(p)
    return {"logits_fn": logits_fn, "logits_grad": jax.grad(loss)(z)}


def step(tx, p, state=None, updates=None):
    state = tx.init(p) if state is None else state
    return tx.update(updates, state, p, **extra(p))


def assert_close(got, want, rtol):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol, rtol * abs(b).max()),
        got,
        want,
    )


def test_one_inner_step_is_the_inner_optimizer(x64):
    p = start(jnp.float64)
    g = jax.grad(lambda p: loss(logits_fn(p)))(p)
    for inner in (optax.sgd(0.3), ox.full_precision(optax.adam(0.1))):
        tx = ox.target_surrogate(inner, inner_steps=1, eta=5.0)
        got, state = step(tx, p)
        assert_close(got, inner.update(g, inner.init(p), p)[0], 1e-13)
        assert state == optax.EmptyState()


def test_inner_steps_are_a_loop_with_a_fresh_state(x64):
    p, inner, eta = start(jnp.float64), optax.sgd(0.3, momentum=0.9), 4.0
    tx = ox.target_surrogate(inner, inner_steps=7, eta=eta)
    for _ in range(2):
        z, d = logits_fn(p), extra(p)["logits_grad"]

        def model(q, z=z, d=d):
            return ox.losses.target_surrogate_loss(logits_fn(q), z, d, eta=eta).sum()

        q, inner_state = p, inner.init(p)
        for _ in range(7):
            u, inner_state = inner.update(jax.grad(model)(q), inner_state, q)
            q = optax.apply_updates(q, u)
        got, _ = step(tx, p)
        assert_close(got, jax.tree.map(jnp.subtract, q, p), 1e-12)
        p = optax.apply_updates(p, got)


def test_the_loss_falls_faster_than_with_one_step_a_gradient():
    # eta = 1 / L = 2 n for a softmax cross-entropy averaged over n.
    def final(tx):
        p = start()
        run = jax.jit(lambda p: optax.apply_updates(p, step(tx, p)[0]))
        for _ in range(10):
            p = run(p)
        return float(loss(logits_fn(p)))

    surrogate = ox.target_surrogate(optax.sgd(0.02), inner_steps=20, eta=24.0)
    # At 20 times its rate, plain descent would take steps of the same first order.
    assert final(surrogate) < final(ox.target_surrogate(optax.sgd(0.02), 1)) - 0.05


@pytest.mark.parametrize("inner_steps", [1, 5])
def test_for_an_eta_of_one_over_l_no_step_raises_the_loss(inner_steps):
    p, tx = start(), ox.target_surrogate(optax.sgd(0.01), inner_steps, eta=24.0)
    run = jax.jit(lambda p: optax.apply_updates(p, step(tx, p)[0]))
    values = [loss(logits_fn(p))]
    for _ in range(20):
        p = run(p)
        values.append(loss(logits_fn(p)))
    assert (np.diff(values) < 1e-6).all()


def test_eta_may_be_a_schedule():
    p = start()
    tx = ox.target_surrogate(optax.sgd(0.1), 3, eta=lambda t: 6.0 / (t + 1.0))
    state = tx.init(p)
    for eta in (6.0, 3.0, 2.0):
        got, state = step(tx, p, state)
        want, _ = step(ox.target_surrogate(optax.sgd(0.1), 3, eta=eta), p)
        assert_close(got, want, 1e-6)
    assert state.count == 3


def test_incoming_updates_are_ignored_but_for_their_holes():
    p, tx = start(), ox.target_surrogate(optax.sgd(0.1), 3, eta=4.0)
    want, _ = step(tx, p)
    nan = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), p)
    assert_close(step(tx, p, updates=nan)[0], want, 1e-7)

    def filled(q):
        return logits_fn({"w": q["w"], "b": p["b"]})

    held, _ = tx.update(
        {"w": p["w"], "b": None},
        tx.init(p),
        p,
        logits_fn=filled,
        logits_grad=extra(p)["logits_grad"],
    )
    assert held["b"] is None
    alone, _ = tx.update(
        None,
        optax.EmptyState(),
        {"w": p["w"]},
        logits_fn=filled,
        logits_grad=extra(p)["logits_grad"],
    )
    assert_close(held["w"], alone["w"], 1e-7)


def test_small_steps_of_half_precision_add_up():
    """Each is below half an ulp of the parameters; ten of them are not."""
    p = {"w": jnp.ones((4, 3), jnp.bfloat16), "b": jnp.ones(3, jnp.bfloat16)}
    tx = ox.target_surrogate(optax.sgd(1e-3), inner_steps=10, eta=24.0)
    once, _ = step(ox.target_surrogate(optax.sgd(1e-3), 1, eta=24.0), p)
    many, _ = step(tx, p)
    assert many["w"].dtype == jnp.bfloat16
    assert_close(
        jax.tree.map(lambda x: x.astype(jnp.float32), many),
        jax.tree.map(lambda x: 10 * x.astype(jnp.float32), once),
        0.05,
    )


def test_inner_sees_the_model_of_the_loss():
    p, seen = start(), {}

    def update(updates, state, params=None, **extra):
        seen.update(extra)
        gap = extra["value_fn"](params) - extra["value"]
        gaps = jax.tree.map(
            lambda a, b, c: jnp.abs(a - b) + jnp.abs(b - c) + jnp.abs(gap),
            extra["grad_fn"](params),
            updates,
            extra["grad"],
        )
        return gaps, state

    inner = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    tx = ox.target_surrogate(inner, 3)
    given = {**extra(p), "obj_fn": loss, "sampled_labels": LABELS}
    gaps, _ = tx.update(None, tx.init(p), p, **given)
    assert not any(gap.any() for gap in jax.tree.leaves(gaps))
    assert "obj_fn" not in seen
    assert seen["sampled_labels"] is LABELS


def test_what_is_wrong_is_named():
    p = start()
    with pytest.raises(ValueError, match="inner_steps must be an integer"):
        ox.target_surrogate(optax.sgd(0.1), inner_steps=0)
    with pytest.raises(ValueError, match="eta must lie in"):
        ox.target_surrogate(optax.sgd(0.1), eta=0.0)
    tx = ox.target_surrogate(optax.sgd(0.1))
    state = tx.init(p)
    with pytest.raises(ValueError, match="target_surrogate needs the parameters"):
        tx.update(None, state)
    for name in ("logits_fn", "logits_grad"):
        rest = {k: v for k, v in extra(p).items() if k != name}
        with pytest.raises(ValueError, match=f"needs the extra argument '{name}'"):
            tx.update(None, state, p, **rest)
    wrong = extra(p) | {"logits_grad": jnp.ones((12, 2))}
    with pytest.raises(ValueError, match=r"logits_grad has shape \(12, 2\)"):
        tx.update(None, state, p, **wrong)

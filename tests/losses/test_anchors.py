"""The penalty for leaving earlier parameters."""

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

PENALTY = ox.losses.anchor_penalty


def trees(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {
        "w": jnp.asarray(rng.normal(size=(3, 2)), dtype),
        "b": jnp.asarray(rng.normal(size=2), dtype),
    }


def test_penalty_is_half_the_weighted_square(x64):
    x, a, f = (trees(i, jnp.float64) for i in range(3))
    want = sum(((x[k] - a[k]) ** 2).sum() for k in x)
    assert PENALTY(x, a, 0.3) == pytest.approx(0.15 * float(want), rel=1e-12)
    want = sum((f[k] * (x[k] - a[k]) ** 2).sum() for k in x)
    assert PENALTY(x, a, 0.3, fisher=f) == pytest.approx(0.15 * float(want), rel=1e-12)


def test_two_quadratic_tasks_have_their_joint_optimum(x64):
    h1, h2 = jnp.array([1.0, 4.0, 0.5]), jnp.array([2.0, 1.0, 3.0])
    first, second = jnp.array([1.0, -1.0, 0.0]), jnp.array([0.0, 2.0, 1.0])

    def task_two(x):
        return jnp.sum(h2 * (x - second) ** 2) / 2 + PENALTY(x, first, 1.0, fisher=h1)

    joint = (h1 * first + h2 * second) / (h1 + h2)
    np.testing.assert_allclose(jax.grad(task_two)(joint), jnp.zeros(3), atol=1e-15)


def test_anchor_and_fisher_are_detached():
    x, a, f = (trees(i) for i in range(3))
    grads = jax.grad(lambda a, f: PENALTY(x, a, 1.0, fisher=f), (0, 1))(a, f)
    assert not any(g.any() for g in jax.tree.leaves(grads))


def test_holes_do_not_count_and_a_tree_of_holes_has_no_penalty():
    x, a = trees(3), trees(4)
    holes = {"w": None, "b": optax.MaskedNode()}
    assert PENALTY(x | {"b": None}, a, 2.0) == ((x["w"] - a["w"]) ** 2).sum()
    assert PENALTY(holes, a, 2.0) == 0
    assert PENALTY({}, {}, 2.0) == 0


def test_half_precision_is_computed_in_float32():
    x, a = trees(5, jnp.bfloat16), trees(6, jnp.bfloat16)
    wide = [jax.tree.map(lambda y: y.astype(jnp.float32), t) for t in (x, a)]
    got, grad = jax.value_and_grad(PENALTY)(x, a, 0.5)
    assert got == PENALTY(*wide, 0.5)
    assert got.dtype == jnp.float32
    assert grad["w"].dtype == jnp.bfloat16


def test_trees_that_differ_are_named():
    x = trees(7)
    with pytest.raises(ValueError, match="anchor_penalty: leaf"):
        PENALTY(x, {"w": x["w"]}, 1.0)
    with pytest.raises(AssertionError, match="params, anchor"):
        PENALTY(x["w"], x["w"].T, 1.0)
    with pytest.raises(TypeError, match="cannot be trained"):
        PENALTY(jnp.arange(3), jnp.arange(3), 1.0)

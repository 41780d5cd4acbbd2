"""`bucketed`: stacks of equal leaves give the numbers of the leaves."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox
from optax_ext import leafwise

SHAPES = {
    "block0": {"w": (3, 4), "b": (4,)},
    "block1": {"w": (3, 4), "b": (4,)},
    "block2": {"w": (3, 4), "b": (4,)},
    "head": (4, 2),
    "scale": (),
    "shift": (),
    "empty": (0, 3),
}
KEYS = {
    "float32[3, 4]#0": 3,
    "float32[4]#0": 3,
    "float32[4, 2]#0": 1,
    "float32[]#0": 2,
    "float32[0, 3]#0": 1,
}


def random_tree(seed, shapes: Any = None, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), dtype),
        SHAPES if shapes is None else shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def run(tx, steps=4, shapes: Any = None, extra=lambda params, t: {}):
    """Parameters after each of a few steps with random gradients."""
    params = random_tree(0, shapes)
    state, trajectory = tx.init(params), []
    update = jax.jit(lambda g, s, p, t: tx.update(g, s, p, **extra(p, t)))
    for t in range(1, steps + 1):
        updates, state = update(random_tree(t, shapes), state, params, t)
        params = optax.apply_updates(params, jax.tree.map(lambda u: -0.1 * u, updates))
        trajectory.append(params)
    return trajectory, state


def assert_same(tx, rtol, **how):
    # Equal operations on equal numbers; only sums over a leaf may change their order.
    plain, stacked = run(tx, **how)[0], run(ox.bucketed(tx), **how)[0]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol),
        stacked,
        plain,
    )


KERNELS: dict[str, dict[str, Any]] = {
    "l1": {},
    "lp": {"p": 1.5},
    "group": {"axis": -1},
    "truncated": {"e": 0.3},
    "topk": {"k": 3},
    "huber": {"e": 0.5},
    "pseudo_huber": {"e": 0.5},
}


@pytest.mark.parametrize("name", KERNELS)
def test_lion_k_is_the_same_in_buckets(name):
    kernel = ox.lion_kernel(name, **KERNELS[name])
    assert_same(ox.scale_by_lion_k(kappa=kernel), rtol=1e-6)


def test_sophia_with_a_given_hessian_is_the_same_in_buckets():
    assert_same(
        ox.scale_by_sophia(
            gamma=0.5, update_interval=2, estimator=ox.external_hessian_diag()
        ),
        rtol=1e-6,
        extra=lambda params, t: {
            "hessian_diag": jax.tree.map(lambda p: jnp.sin(7 * p), params)
        },
    )


def test_sophia_with_sampled_labels_is_the_same_in_buckets():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(8, 5)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 5, size=8))

    def logits_fn(params):
        assert set(params) == {"l0", "l1", "l2"}  # not the stacks
        for name in sorted(params):
            h = x if name == "l0" else jnp.tanh(h)  # noqa: F821
            h = h @ params[name]["w"] + params[name]["b"][None]
        return h

    layer = {"w": (5, 5), "b": (5,)}
    assert_same(
        ox.scale_by_sophia(
            gamma=0.05, update_interval=2, estimator=ox.gauss_newton_bartlett_diag()
        ),
        rtol=1e-5,
        shapes={"l0": layer, "l1": layer, "l2": layer},
        extra=lambda params, t: {"logits_fn": logits_fn, "sampled_labels": labels},
    )


def test_adahessian_averages_each_convolution_kernel_of_a_bucket_by_itself():
    shapes = {f"conv{i}": (3, 3, 2, 4) for i in range(3)} | {"dense": (4, 4)}
    how = {
        "shapes": shapes,
        "extra": lambda params, t: {
            "hessian_diag": jax.tree.map(lambda p: jnp.cos(3 * p), params)
        },
    }
    tx = ox.scale_by_adahessian(estimator=ox.external_hessian_diag())
    assert_same(tx, rtol=1e-6, **how)
    nu = run(ox.bucketed(tx), **how)[1].nu["float32[3, 3, 2, 4]#0"].stack
    np.testing.assert_array_equal(nu, jnp.broadcast_to(nu[:, :1, :1], nu.shape))
    assert (nu[0] != nu[1]).all()


def test_the_global_norm_of_the_stacks_is_that_of_the_leaves():
    assert_same(optax.clip_by_global_norm(0.5), rtol=1e-6)


def test_entrywise_optax_links_are_the_same_in_buckets():
    assert_same(ox.full_precision(optax.scale_by_adam()), rtol=1e-6)


@pytest.mark.parametrize("outside", [True, False], ids=["around", "inside"])
def test_cautious_counts_over_leaves_and_not_over_stacks(outside):
    inner = ox.scale_by_lion_k()
    plain = run(ox.cautious(inner))[0]
    both = (
        ox.cautious(ox.bucketed(inner)) if outside else ox.bucketed(ox.cautious(inner))
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), run(both)[0], plain
    )


def test_the_state_has_one_stack_for_each_shape():
    state = ox.bucketed(ox.scale_by_lion_k()).init(random_tree(0))
    assert {k: v.stack.shape[0] for k, v in state.mu.items()} == KEYS
    assert all(isinstance(v, ox.Bucket) for v in state.mu.values())


def test_a_stack_holds_32_leaves_at_most():
    shapes = {f"layer{i:02}": (2, 3) for i in range(70)}
    tx = ox.scale_by_lion_k(kappa="group")
    state = ox.bucketed(tx).init(random_tree(0, shapes))
    assert {k: v.stack.shape for k, v in state.mu.items()} == {
        "float32[2, 3]#0": (32, 2, 3),
        "float32[2, 3]#1": (32, 2, 3),
        "float32[2, 3]#2": (6, 2, 3),
    }
    assert_same(tx, rtol=1e-6, shapes=shapes, steps=2)


def test_a_rule_is_traced_once_for_each_shape():
    traced = []

    def update(g, slots, p, t):
        traced.append(g.shape)
        return g, slots

    tx = ox.bucketed(leafwise(optax.EmptyState, lambda p: (), update))
    params = random_tree(0)
    tx.update(params, tx.init(params))
    assert sorted(traced) == [(), (3, 4), (4,), (4, 2)]


def test_leaves_of_different_dtypes_are_in_different_stacks():
    params = {"a": jnp.ones(2), "b": jnp.ones(2, jnp.bfloat16), "c": jnp.ones(2)}
    tx = ox.bucketed(ox.scale_by_lion_k())
    state = tx.init(params)
    assert {k: v.stack.shape for k, v in state.mu.items()} == {
        "float32[2]#0": (2, 2),
        "bfloat16[2]#0": (1, 2),
    }
    updates, _ = tx.update(params, state, params)
    assert jax.tree.map(lambda x: x.dtype, updates) == jax.tree.map(
        lambda x: x.dtype, params
    )


# Extra arguments ----------------------------------------------------------------------


def spy(record):
    def update(updates, state, params=None, **extra):
        record(updates, params, extra)
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)


def test_extra_trees_are_stacked_like_the_parameters():
    seen = {}
    params = {"a": jnp.arange(2.0), "b": jnp.arange(2.0) + 10}
    per_example = jax.tree.map(lambda p: jnp.stack([p, -p, p]), params)
    tx = ox.bucketed(spy(lambda u, p, extra: seen.update(extra)))
    tx.update(
        params,
        tx.init(params),
        params,
        grad=params,
        per_example_grads=per_example,
        hessian_diag=None,
        value=jnp.ones(()),
    )
    np.testing.assert_array_equal(
        seen["grad"]["float32[2]#0"].stack, [[0.0, 1.0], [10.0, 11.0]]
    )
    stack = seen["per_example_grads"]["float32[2]#0"].stack
    assert stack.shape == (2, 3, 2)  # leaf, example, entry
    np.testing.assert_array_equal(stack[1], per_example["b"])
    assert seen["hessian_diag"] is None
    assert seen["value"] == 1.0


def test_functions_of_params_are_called_with_the_tree_and_differentiated_in_stacks():
    seen = {}
    params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, 4.0])}

    def record(updates, seen_params, extra):
        seen["gradient"] = jax.grad(extra["value_fn"])(seen_params)
        seen["tree"] = extra["grad_fn"](seen_params)

    tx = ox.bucketed(spy(record))
    tx.update(
        params,
        tx.init(params),
        params,
        value_fn=lambda p: jnp.sum(p["a"] * p["b"]),
        grad_fn=lambda p: {"a": p["b"], "b": p["a"]},
    )
    for found in seen.values():
        np.testing.assert_array_equal(
            found["float32[2]#0"].stack, [[3.0, 4.0], [1.0, 2.0]]
        )


def test_hutchinson_through_a_bucket_is_exact_for_a_diagonal_hessian():
    params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, 4.0])}
    seen = {}

    def record(updates, p, extra):
        estimator = ox.hutchinson_diag()
        seen["h"], _ = estimator.update(None, estimator.init(p), p, **extra)

    tx = ox.bucketed(spy(record))
    tx.update(
        params,
        tx.init(params),
        params,
        value_fn=lambda p: sum(jnp.sum(x**4) for x in p.values()) / 12,
    )
    np.testing.assert_array_equal(
        seen["h"]["float32[2]#0"].stack, [[1.0, 4.0], [9.0, 16.0]]
    )


# Trees that do not fit ----------------------------------------------------------------


def test_masked_leaves_stay_out_of_the_stacks():
    params = {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2)}
    tx = optax.masked(
        ox.bucketed(ox.scale_by_lion_k()), {"a": True, "b": False, "c": True}
    )
    state = tx.init(params)
    assert state.inner_state.mu["float32[2]#0"].stack.shape == (2, 2)
    updates, _ = tx.update(jax.tree.map(lambda p: 5 * p, params), state, params)
    np.testing.assert_array_equal(updates["a"], [1.0, 1.0])
    np.testing.assert_array_equal(updates["b"], [5.0, 5.0])


def test_parameters_that_are_none_stay_none():
    params = {"a": jnp.ones(2), "b": None}
    tx = ox.bucketed(ox.scale_by_lion_k())
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["b"] is None


def test_a_tree_without_leaves_passes():
    tx = ox.bucketed(ox.scale_by_lion_k())
    assert tx.update({}, tx.init({}), {})[0] == {}


@pytest.mark.parametrize("hole", [None, optax.MaskedNode()], ids=["None", "MaskedNode"])
def test_a_gradient_that_is_missing_for_an_array_is_an_error_with_the_way_out(hole):
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    tx = ox.bucketed(ox.scale_by_lion_k())
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"bucketed: some gradients are None.*optax\."):
        tx.update({"a": jnp.ones(2), "b": hole}, state, params)


def test_a_stack_inside_stays_a_stack():
    params = {k: jnp.linspace(0.1, 1.0, 3) for k in "abc"}
    once = ox.bucketed(ox.project_radial())
    twice = ox.bucketed(ox.full_precision(once))
    u = {k: jnp.array([1.0, -1.0, 2.0]) for k in "abc"}
    want = once.update(u, once.init(params), params, grad=params)[0]
    got = twice.update(u, twice.init(params), params, grad=params)[0]
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_gradients_of_another_structure_are_named():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    tx = ox.bucketed(ox.scale_by_lion_k())
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"bucketed: leaf \['b'\]"):
        tx.update({"a": jnp.ones(2)}, state, params)


def test_gradients_of_another_shape_are_an_error():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    tx = ox.bucketed(ox.scale_by_lion_k())
    state = tx.init(params)
    with pytest.raises(ValueError, match="shape"):
        tx.update({"a": jnp.ones(3), "b": jnp.ones(3)}, state, params)

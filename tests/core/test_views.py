"""`viewed` and `full_precision`: links that see other parameters."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox
from optax_ext._core.views import viewed

BF16 = jnp.bfloat16


def quadratic(params):
    """A loss in the dtype of its parameters."""
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(params)) / 2


def random_params(dtype, seed=0):
    rng = np.random.default_rng(seed)
    params = {"w": rng.normal(size=(3, 4)), "b": rng.normal(size=(4,))}
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


def wide(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def probe(record):
    """A link that hands what it sees to `record` and doubles its updates."""

    def update(updates, state, params=None, **extra):
        record(updates, params, extra)
        return jax.tree.map(lambda u: 2 * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)


# full_precision -----------------------------------------------------------------------

OPTAX = {
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "lion": lambda: optax.lion(1e-2),
    "lamb": lambda: optax.lamb(1e-2),
    "radam": lambda: optax.radam(1e-2),
    "adafactor": lambda: optax.adafactor(1e-2),
    "clip and momentum": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax.sgd(optax.cosine_decay_schedule(0.1, 9))
    ),
}


@pytest.mark.parametrize("make", OPTAX.values(), ids=OPTAX.keys())
def test_bfloat16_updates_are_the_float32_updates_rounded_once(make):
    narrow, exact = ox.full_precision(make()), make()
    p = random_params(BF16)
    s16, s32 = narrow.init(p), exact.init(wide(p))
    for seed in range(3):
        g = random_params(BF16, seed + 1)
        u16, s16 = narrow.update(g, s16, p)
        with jax.numpy_dtype_promotion("standard"):
            u32, s32 = exact.update(wide(g), s32, wide(p))
        jax.tree.map(
            lambda a, b: np.testing.assert_array_equal(a, b.astype(BF16)), u16, u32
        )
        jax.tree.map(np.testing.assert_array_equal, s16, s32)
        p = optax.apply_updates(p, u16)


def test_float32_leaves_are_left_alone():
    inner = optax.adam(1e-2)
    p, g = random_params(jnp.float32), random_params(jnp.float32, 1)
    with jax.numpy_dtype_promotion("standard"):
        expected, _ = inner.update(g, inner.init(p), p)
    tx = ox.full_precision(inner)
    actual, _ = tx.update(g, tx.init(p), p)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_adamw_runs_inside_full_precision_where_it_raises_alone():
    p = random_params(BF16)
    alone = optax.adamw(1e-2)
    with pytest.raises(ValueError, match="strict"):
        alone.update(p, alone.init(p), p)
    tx = ox.full_precision(alone)
    updates, _ = tx.update(p, tx.init(p), p)
    assert all(jnp.isfinite(u).all() for u in jax.tree.leaves(updates))


def test_the_second_moment_of_adamw_does_not_stall_inside_full_precision():
    one = {"w": jnp.ones((2,), BF16)}

    def nu_after_3000(tx):
        def step(state, _):
            return tx.update(one, state, one)[1], None

        return optax.tree.get(jax.lax.scan(step, tx.init(one), length=3000)[0], "nu")

    exact = 1 - 0.999**3000
    with jax.numpy_dtype_promotion("standard"):
        stalled = nu_after_3000(optax.adamw(1e-3))["w"]
    assert (stalled < 0.75 * exact).all()  # what full_precision is there for
    nu = nu_after_3000(ox.full_precision(optax.adamw(1e-3)))["w"]
    # 3000 additions in float32, each off by half an ulp: 3000 * 2**-24 = 1.8e-4.
    np.testing.assert_allclose(nu, exact, rtol=2e-4)


def test_scheduled_learning_rates_are_not_rounded_to_bfloat16():
    seen = []

    class Spy(NamedTuple):
        pass

    def update(updates, state, params=None):
        seen.append(float(updates[0]))
        return updates, state

    spy = optax.GradientTransformation(lambda p: Spy(), update)
    tx = ox.full_precision(
        optax.chain(optax.scale_by_schedule(lambda c: 1.001 + 0 * c), spy)
    )
    g = jnp.ones(2, BF16)
    out, _ = tx.update(g, tx.init(g), g)
    assert seen == [float(np.float32(1.001))]
    assert out.dtype == BF16


@pytest.mark.parametrize(
    ("grad_dtype", "param_dtype"),
    [(jnp.float32, BF16), (BF16, jnp.float32)],
    ids=["wide gradients", "narrow gradients"],
)
def test_updates_come_back_in_the_gradients_dtype(grad_dtype, param_dtype):
    p, g = random_params(param_dtype), random_params(grad_dtype, 1)
    tx = ox.full_precision(optax.adamw(1e-2))
    updates, _ = tx.update(g, tx.init(p), p)
    reference = optax.adamw(1e-2)
    with jax.numpy_dtype_promotion("standard"):
        exact, _ = reference.update(wide(g), reference.init(wide(p)), wide(p))
    for u, e in zip(jax.tree.leaves(updates), jax.tree.leaves(exact), strict=True):
        assert u.dtype == grad_dtype
        np.testing.assert_array_equal(u, e.astype(grad_dtype))


def test_functions_of_params_are_called_with_parameters_in_their_own_dtype():
    called_with = []

    def value_fn(p):
        called_with.append(jax.tree.map(lambda x: x.dtype, p))
        return quadratic(p)

    def grad_fn(p):
        called_with.append(jax.tree.map(lambda x: x.dtype, p))
        return p

    def record(updates, params, extra):
        del updates
        assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}
        gradient = jax.grad(extra["value_fn"])(params)
        assert {x.dtype for x in jax.tree.leaves(gradient)} == {np.dtype(np.float32)}
        assert {x.dtype for x in jax.tree.leaves(extra["grad_fn"](params))} == {
            np.dtype(np.float32)
        }

    p = {"w": jnp.ones(2, BF16), "v": jnp.ones(2, jnp.float16), "f": jnp.ones(2)}
    tx = ox.full_precision(probe(record))
    tx.update(p, tx.init(p), p, value_fn=value_fn, grad_fn=grad_fn)
    own = jax.tree.map(lambda x: x.dtype, p)
    assert called_with == [own, own]


def test_extra_trees_are_cast_and_other_extra_arguments_are_not():
    seen = {}

    def record(updates, params, extra):
        del updates, params
        seen.update(extra)

    p = {"w": jnp.ones(2, BF16)}
    labels = jnp.arange(3)
    tx = ox.full_precision(probe(record))
    tx.update(
        p,
        tx.init(p),
        p,
        grad=p,
        per_example_grads={"w": jnp.ones((5, 2), BF16)},
        hessian_diag=None,
        sampled_labels=labels,
        value=jnp.ones((), BF16),
    )
    assert seen["grad"]["w"].dtype == jnp.float32
    assert seen["per_example_grads"]["w"].dtype == jnp.float32
    assert seen["per_example_grads"]["w"].shape == (5, 2)
    assert seen["hessian_diag"] is None
    assert seen["sampled_labels"] is labels
    assert seen["value"].dtype == BF16


@pytest.mark.parametrize("hole", [None, optax.MaskedNode()], ids=["None", "MaskedNode"])
def test_holes_pass_through_full_precision(hole):
    tx = ox.full_precision(optax.sgd(0.5))
    p = {"w": jnp.ones(2, BF16), "hole": hole}
    updates, _ = tx.update(p, tx.init(p), p)
    assert updates["hole"] == hole
    np.testing.assert_array_equal(updates["w"].astype(jnp.float32), [-0.5, -0.5])


def test_value_fn_of_a_masked_tree_sees_the_mask():
    structures = []

    def value_fn(p):
        structures.append(jax.tree.structure(p))
        return quadratic(p)

    p = random_params(BF16)
    tx = optax.masked(
        ox.full_precision(probe(lambda u, p, extra: extra["value_fn"](p))),
        {"w": True, "b": False},
    )
    tx.update(p, tx.init(p), p, value_fn=value_fn)
    assert structures == [jax.tree.structure({"w": 0, "b": optax.MaskedNode()})]


def test_full_precision_keeps_float64():
    with jax.enable_x64(True):
        p = {"w": jnp.full(2, 1 / 3, jnp.float64)}
        tx = ox.full_precision(optax.sgd(1.0))
        updates, _ = tx.update(p, tx.init(p), p)
        np.testing.assert_array_equal(updates["w"], -p["w"])
        assert updates["w"].dtype == jnp.float64


def test_full_precision_without_params_follows_the_gradients():
    tx = ox.full_precision(optax.scale(0.5))
    g = {"w": jnp.ones(2, BF16)}
    updates, _ = tx.update(g, tx.init(g))
    assert updates["w"].dtype == BF16


# viewed -------------------------------------------------------------------------------


def test_a_view_and_its_way_back_leave_an_inner_link_unchanged():
    class Reversed:
        @staticmethod
        def to(tree):
            return jax.tree.map(lambda x: x[::-1], tree)

        back = to

    p, g = random_params(jnp.float32), random_params(jnp.float32, 1)
    inner = optax.scale_by_adam()
    tx = viewed(inner, lambda params: Reversed())
    a, b = tx.init(p), inner.init(p)
    for _ in range(2):
        with jax.numpy_dtype_promotion("standard"):
            u, a = tx.update(g, a, p)
            v, b = inner.update(g, b, p)
        jax.tree.map(np.testing.assert_array_equal, u, v)


def test_a_view_translates_what_functions_of_params_see():
    class Doubled:
        @staticmethod
        def to(tree):
            return jax.tree.map(lambda x: 2 * x, tree)

        @staticmethod
        def back(tree):
            return jax.tree.map(lambda x: x / 2, tree)

    values = {}

    def record(updates, params, extra):
        del updates
        values["value"] = extra["value_fn"](params)
        values["gradient"] = jax.grad(extra["value_fn"])(params)
        values["grad_fn"] = extra["grad_fn"](params)

    p = {"w": jnp.array([3.0, 4.0])}
    tx = viewed(probe(record), lambda params: Doubled())
    tx.update(p, tx.init(p), p, value_fn=quadratic, grad_fn=lambda p: p)
    assert values["value"] == 12.5
    np.testing.assert_array_equal(values["gradient"]["w"], [1.5, 2.0])  # chain rule
    np.testing.assert_array_equal(values["grad_fn"]["w"], [6.0, 8.0])  # a tree: to()

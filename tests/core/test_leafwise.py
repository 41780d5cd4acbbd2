"""`leafwise`, `map_leaves` and `init_leaves`: the driver under every link."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox
from optax_ext import leafwise
from optax_ext._core.leaves import map_leaves
from optax_ext._core.trees import computing_dtype


class AdamState(NamedTuple):
    count: jax.Array
    mu: optax.Updates
    nu: optax.Updates


def adam(b1=0.9, b2=0.999, eps=1e-8):
    """The example of the docstring of `leafwise`, word for word."""

    def init(p):
        return jnp.zeros_like(p), jnp.zeros_like(p)

    def update(g, slots, p, t):
        m, v = slots
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
        return m_hat / (jnp.sqrt(v_hat) + eps), (m, v)

    return leafwise(AdamState, init, update)


class OneSlot(NamedTuple):
    total: Any


def running_sum():
    """Emits the sum of the gradients so far."""

    def init(p):
        return (jnp.zeros_like(p),)

    def update(g, slots, p, t):
        total = slots[0] + g
        return total, (total,)

    return leafwise(OneSlot, init, update)


def gradients(shapes, steps=20, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {
            k: jnp.asarray(
                rng.normal(size=s) * 10.0 ** rng.integers(-3, 3), jnp.float32
            )
            for k, s in shapes.items()
        }
        for _ in range(steps)
    ]


def buffers(*trees):
    return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(trees)]


# The rule and optax's Adam ------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_docstrings_adam_equals_optax_adam(dtype):
    with jax.enable_x64(dtype == "float64"):
        shapes = {"w": (3, 4), "b": (4,), "s": ()}
        grads = [
            jax.tree.map(lambda x: x.astype(dtype), g)
            for g in gradients(shapes, steps=30)
        ]
        ours, theirs = adam(), optax.scale_by_adam()
        a, b = ours.init(grads[0]), theirs.init(grads[0])
        for g in grads:
            u, a = ours.update(g, a)
            with jax.numpy_dtype_promotion("standard"):
                v, b = theirs.update(g, b)
            jax.tree.map(np.testing.assert_array_equal, tuple(a), tuple(b))
            # The same operations on the same moments: two divisions, a root, a sum
            # and a quotient, each rounded once (optax compiles some of them together).
            near = functools.partial(
                np.testing.assert_allclose, rtol=4 * float(jnp.finfo(dtype).eps)
            )
            jax.tree.map(near, u, v)
        assert a.mu["w"].dtype == u["w"].dtype == dtype


def test_bfloat16_leaves_have_float32_moments_and_round_only_the_direction():
    steps = gradients({"w": (5, 3)}, steps=40)
    narrow = [jax.tree.map(lambda x: x.astype(jnp.bfloat16), g) for g in steps]
    wide = [jax.tree.map(lambda x: x.astype(jnp.float32), g) for g in narrow]
    tx = adam()
    s16, s32 = tx.init(narrow[0]), tx.init(wide[0])
    for g16, g32 in zip(narrow, wide, strict=True):
        u16, s16 = tx.update(g16, s16)
        u32, s32 = tx.update(g32, s32)
        assert u16["w"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(u16["w"], u32["w"].astype(jnp.bfloat16))
        np.testing.assert_array_equal(s16.nu["w"], s32.nu["w"])


def test_the_second_moment_of_bfloat16_parameters_does_not_stall():
    tx = adam()
    ones = {"w": jnp.ones((2,), jnp.bfloat16)}

    def step(state, _):
        return tx.update(ones, state)[1], None

    state = jax.lax.scan(step, tx.init(ones), length=3000)[0]
    exact = 1 - 0.999**3000
    # 3000 additions in float32, each off by half an ulp: 3000 * 2**-24 = 1.8e-4.
    np.testing.assert_allclose(state.nu["w"], exact, rtol=2e-4)


def test_a_gradient_narrower_than_the_parameter_is_computed_in_the_parameters_dtype():
    seen = []

    def update(g, slots, p, t):
        seen.append((g.dtype, p.dtype))
        return g, slots

    tx = leafwise(optax.EmptyState, lambda p: (), update)
    g, p = jnp.ones(2, jnp.bfloat16), jnp.ones(2, jnp.float32)
    out, _ = tx.update(g, tx.init(p), p)
    assert seen == [(jnp.float32, jnp.float32)]
    assert out.dtype == jnp.bfloat16


def test_slots_come_back_in_the_dtype_they_were_stored_in():
    def init(p):
        return (jnp.zeros_like(p, dtype=jnp.bfloat16),)

    def update(g, slots, p, t):
        assert slots[0].dtype == g.dtype == jnp.float32
        return g, (slots[0] + g,)

    tx = leafwise(OneSlot, init, update)
    state = tx.init(jnp.ones(2))
    for _ in range(3):
        _, state = tx.update(jnp.ones(2), state)
    assert state.total.dtype == jnp.bfloat16


def test_integer_slots_are_left_alone():
    def init(p):
        return (jnp.zeros(p.shape, jnp.int32),)

    def update(g, slots, p, t):
        assert slots[0].dtype == jnp.int32
        return g, (slots[0] + 1,)

    tx = leafwise(OneSlot, init, update)
    _, state = tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    np.testing.assert_array_equal(state.total, [1, 1])


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((jnp.bfloat16,), jnp.float32),
        ((jnp.float16, jnp.bfloat16), jnp.float32),
        ((jnp.float32, jnp.int32), jnp.float32),
        ((jnp.float32, jnp.float64), jnp.float64),
        ((jnp.complex64,), jnp.complex64),
        ((jnp.float32, jnp.complex64), jnp.complex64),
    ],
)
def test_the_computing_dtype_is_the_widest_and_float32_at_least(dtypes, expected):
    assert computing_dtype(*(np.zeros(1, d) for d in dtypes)) == expected


# Trees --------------------------------------------------------------------------------


@pytest.mark.parametrize("hole", [None, optax.MaskedNode()], ids=["None", "MaskedNode"])
def test_holes_in_the_gradients_pass_and_leave_their_state_alone(hole):
    tx = adam()
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    state = tx.init(params)
    _, state = tx.update(params, state, params)
    out, after = tx.update({"a": jnp.ones(2), "b": hole}, state, params)
    assert out["b"] is hole or out["b"] == hole
    assert after.mu["b"] is state.mu["b"]
    assert (after.mu["a"] != state.mu["a"]).all()


@pytest.mark.parametrize("hole", [None, optax.MaskedNode()], ids=["None", "MaskedNode"])
def test_holes_in_the_parameters_are_holes_in_the_state(hole):
    tx = adam()
    params = {"a": jnp.ones(2), "b": hole}
    state = tx.init(params)
    assert state.mu["b"] == hole
    out, state = tx.update(params, state, params)
    assert out["b"] == hole
    assert state.nu["b"] == hole


def test_extra_trees_are_skipped_where_the_gradients_have_a_hole():
    # optax masks updates, params and state, but not the trees in extra arguments.
    updates = {"a": jnp.ones(2), "b": optax.MaskedNode(), "c": None}
    extra = {"a": jnp.full(2, 3.0), "b": jnp.ones(7), "c": {"deep": jnp.ones(1)}}
    out, _ = map_leaves(lambda u, s, e: (u + e, s), updates, (), (extra,))
    np.testing.assert_array_equal(out["a"], [4.0, 4.0])
    assert out["b"] == optax.MaskedNode()
    assert out["c"] is None


def test_leaves_of_size_zero_never_reach_the_rule():
    def update(g, slots, p, t):
        return g / jnp.max(jnp.abs(g)), slots  # max of nothing raises

    tx = leafwise(optax.EmptyState, lambda p: (), update)
    params = {"empty": jnp.zeros((0, 3)), "w": jnp.full(2, 4.0)}
    out, _ = tx.update(params, tx.init(params))
    assert out["empty"].shape == (0, 3)
    np.testing.assert_array_equal(out["w"], [1.0, 1.0])


def test_a_tree_without_leaves_still_counts():
    tx = adam()
    out, state = tx.update({}, tx.init({}))
    assert out == {}
    assert state.count == 1


def test_state_fields_are_trees_like_params():
    params = {"layer": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, "scale": jnp.ones(())}
    state = adam().init(params)
    for slot in (state.mu, state.nu):
        assert jax.tree.structure(slot) == jax.tree.structure(params)
    assert optax.tree.get(state, "mu") is state.mu
    doubled = optax.tree_map_params(adam(), lambda x: x + 2, state)
    np.testing.assert_array_equal(doubled.nu["scale"], 2.0)
    assert doubled.count == 0


# Buffers and abstract init ------------------------------------------------------------

SHARING_RULES = {
    "the parameter itself": lambda p: (p, p),
    "a reshape of it": lambda p: (p.reshape(p.shape), p.ravel().reshape(p.shape)),
    "a cast of it": lambda p: (p.astype(p.dtype), jnp.asarray(p)),
    "one array twice": lambda p: (jnp.zeros_like(p),) * 2,
}


@pytest.mark.parametrize("how", ["eager", "jit", "bucketed"])
@pytest.mark.parametrize("rule", SHARING_RULES.values(), ids=SHARING_RULES.keys())
def test_no_slot_shares_a_buffer_with_a_parameter_or_another_slot(rule, how):
    class Two(NamedTuple):
        a: Any
        b: Any

    tx = leafwise(Two, rule, lambda g, s, p, t: (g, s))
    if how == "bucketed":
        tx = ox.bucketed(tx)
    init = jax.jit(tx.init) if how == "jit" else tx.init
    params = {"w": jnp.arange(6.0).reshape(2, 3), "v": jnp.arange(6.0)}
    state = init(params)
    all_buffers = buffers(params, state)
    assert len(all_buffers) == 6
    assert len(set(all_buffers)) == 6


def test_a_slot_that_starts_as_the_parameter_can_be_donated_with_it():
    def update(g, slots, p, t):
        return g, (p,)

    tx = leafwise(OneSlot, lambda p: (p,), update)
    params = {"w": jnp.ones((8, 8))}
    state = tx.init(params)
    step = jax.jit(tx.update, donate_argnums=(1, 2))
    _, new = step({"w": jnp.ones((8, 8))}, state, params)
    np.testing.assert_array_equal(new.total["w"], 1.0)


def test_init_from_shapes_gives_the_shapes_of_init():
    params = {"w": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones(3), "hole": None}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    for tx in (adam(), ox.bucketed(adam()), ox.full_precision(adam())):
        concrete, abstract = tx.init(params), tx.init(shapes)
        assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
        for x, y in zip(
            jax.tree.leaves(concrete), jax.tree.leaves(abstract), strict=True
        ):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)


# Stacks -------------------------------------------------------------------------------


def test_a_norm_in_a_rule_stays_one_of_a_single_leaf_in_a_bucket():
    def update(g, slots, p, t):
        return g / jnp.linalg.norm(g), slots

    tx = leafwise(optax.EmptyState, lambda p: (), update)
    stack = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2, 3)), jnp.float32)
    bucket = ox.Bucket(stack)
    out, _ = tx.update(bucket, tx.init(bucket))
    for row, leaf in zip(out.stack, stack, strict=True):
        np.testing.assert_allclose(row, leaf / jnp.linalg.norm(leaf), rtol=1e-6)


def test_slots_of_a_bucket_are_stacks_of_the_leafs_slots():
    class One(NamedTuple):
        norm: Any

    tx = leafwise(One, lambda p: (jnp.sum(p),), lambda g, s, p, t: (g, s))
    state = tx.init(ox.Bucket(jnp.arange(6.0).reshape(3, 2)))
    np.testing.assert_array_equal(state.norm.stack, [1.0, 5.0, 9.0])


def test_scan_keeps_the_state_as_it_is():
    tx = running_sum()
    params = {"w": jnp.zeros(2, jnp.bfloat16), "hole": None}

    def step(state, g):
        out, state = tx.update({"w": g, "hole": None}, state)
        return state, out["w"]

    state, outs = jax.lax.scan(step, tx.init(params), jnp.ones((4, 2), jnp.bfloat16))
    np.testing.assert_array_equal(outs[:, 0].astype(jnp.float32), [1, 2, 3, 4])
    assert state.total["w"].dtype == jnp.float32

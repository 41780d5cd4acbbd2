"""The plumbing (stored, graft, branch, skip_spikes, record) around every kind of link.

What conformance asks of the catalogued methods, for those that have no entry there.
"""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization

import optax_ext as ox

LINKS = {
    "lion_k": lambda: ox.scale_by_lion_k(),
    "adam": lambda: ox.full_precision(optax.scale_by_adam()),
    "sophia": lambda: ox.scale_by_sophia(
        update_interval=2, estimator=ox.external_hessian_diag()
    ),
    "cautious": lambda: ox.cautious(optax.trace(0.9)),
    "masked": lambda: optax.masked(
        ox.full_precision(optax.scale_by_adam()), {"w": True, "b": False, "s": True}
    ),
}
WRAPPERS = {
    "stored bfloat16": lambda tx: ox.stored(tx, "bfloat16"),
    "stored uint8": lambda tx: ox.stored(tx, "uint8", min_size=8),
    "stored nearest": lambda tx: ox.stored(tx, "bfloat16", "nearest"),
    "graft": lambda tx: ox.graft(tx, optax.trace(0.5)),
    "grafted": lambda tx: ox.graft(optax.trace(0.5), tx),
    "branch": lambda tx: ox.branch({"a": tx, "b": optax.trace(0.5)}, "mean"),
    "skip_spikes": lambda tx: ox.skip_spikes(tx, warmup_steps=1),
    "record": lambda tx: ox.record(tx, max_norm=1.0, max_delta=0.1, name="all"),
}
SHAPES = {"w": (64, 64), "b": (64,), "s": ()}
EACH = pytest.mark.parametrize("wrapper", WRAPPERS)


def tree(seed: int, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in SHAPES.items()}


def make(wrapper: str, link: str = "adam"):
    return optax.with_extra_args_support(WRAPPERS[wrapper](LINKS[link]()))


def step(tx, state, grads, params):
    curvature = jax.tree.map(jnp.ones_like, params)
    return tx.update(grads, state, params, hessian_diag=curvature, unknown=object())


def spec(t):
    leaves, treedef = jax.tree.flatten(t)
    return treedef, [(x.shape, x.dtype, getattr(x, "weak_type", False)) for x in leaves]


def scan(tx, state, params, seeds=(1, 2, 3)):
    grads = [tree(seed, params["w"].dtype) for seed in seeds]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *grads)
    body = lambda s, g: step(tx, s, g, params)[::-1]  # noqa: E731
    return jax.lax.scan(body, state, stacked)


@EACH
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_scans_around_every_kind_of_link(wrapper, link, dtype):
    params = tree(0, dtype)
    tx = make(wrapper, link)
    if dtype == "bfloat16" and link == "cautious":
        # optax.trace keeps the gradient's dtype.
        tx = WRAPPERS[wrapper](ox.full_precision(LINKS[link]()))
        tx = optax.with_extra_args_support(tx)
    state = tx.init(params)
    updates, after = jax.eval_shape(lambda s: step(tx, s, params, params), state)
    assert spec(after) == spec(state)
    assert spec(updates) == spec(jax.eval_shape(lambda: params))
    scanned = jax.eval_shape(lambda s: scan(tx, s, params)[0], state)
    assert spec(scanned) == spec(state)


@EACH
@pytest.mark.parametrize("link", LINKS)
def test_it_gives_finite_numbers_around_every_kind_of_link(wrapper, link):
    tx, params = make(wrapper, link), tree(0)
    state = tx.init(params)
    for seed in (1, 2):
        updates, state = step(tx, state, tree(seed), params)
    numbers = jax.tree.leaves((updates, ox.unpack_stored_state(state)))
    assert all(jnp.isfinite(x).all() for x in numbers if x.dtype != jnp.uint32)


@functools.cache
def standard(wrapper: str):
    """State after two steps, and the third step from it."""
    tx, params = make(wrapper, "lion_k"), tree(0)
    state = scan(tx, tx.init(params), params, (1, 2))[0]
    third = jax.jit(lambda s: step(tx, s, tree(3), params))
    return tx, params, state, third


def assert_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


@EACH
def test_flax_serialization_resumes_bit_equal(wrapper):
    tx, params, state, third = standard(wrapper)
    saved = serialization.to_bytes(state)
    restored = serialization.from_bytes(tx.init(params), saved)
    restored = jax.tree.map(jnp.asarray, restored)
    # Of one structure, in shapes and dtypes too: nothing is compiled for it anew.
    assert jax.eval_shape(lambda: restored) == jax.eval_shape(lambda: state)
    assert_equal(third(restored), third(state))


def test_an_orbax_checkpoint_resumes_bit_equal(tmp_path):
    states = {name: standard(name)[2] for name in WRAPPERS}
    fresh = {n: jax.eval_shape(standard(n)[0].init, tree(0)) for n in WRAPPERS}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "states", states)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "states", fresh)
    for name, state in states.items():
        third = standard(name)[3]
        assert jax.tree.structure(restored[name]) == jax.tree.structure(state)
        assert_equal(third(restored[name]), third(state))


@EACH
def test_abstract_init_has_the_structure_of_the_real_one(wrapper):
    tx, params = make(wrapper, "lion_k"), tree(0)
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    abstract, real = tx.init(shapes), tx.init(params)
    assert spec(jax.eval_shape(tx.init, params)) == spec(real)
    assert jax.tree.structure(abstract) == jax.tree.structure(real)
    kinds = jax.tree.map(
        lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), abstract, real
    )
    assert all(jax.tree.leaves(kinds))


@EACH
def test_parameters_and_state_can_be_donated(wrapper):
    tx, params = make(wrapper, "lion_k"), tree(0)

    def train(params, state, grads):
        updates, state = step(tx, state, grads, params)
        return optax.apply_updates(params, updates), state

    donating = jax.jit(train, donate_argnums=(0, 1))
    carry = params, tx.init(params)
    for seed in (1, 2):
        leaves = jax.tree.leaves(carry)
        buffers = {x.unsafe_buffer_pointer() for x in leaves}
        assert len(buffers) == len(leaves), "one buffer is in two places"
        given = jax.tree.leaves(carry[0])
        carry = donating(*carry, tree(seed))
        assert all(x.is_deleted() for x in given)


@EACH
def test_it_can_be_mapped_over(wrapper):
    """Two runs side by side give the numbers of each alone."""
    tx = make(wrapper, "lion_k")
    params, grads = [tree(0), tree(1)], [tree(2), tree(3)]

    def run(params, grads):
        return step(tx, tx.init(params), grads, params)[0]

    stacked = jax.tree.map(lambda *x: jnp.stack(x), params[0], params[1])
    both = jax.tree.map(lambda *x: jnp.stack(x), grads[0], grads[1])
    mapped = jax.jit(jax.vmap(run))(stacked, both)
    for i in (0, 1):
        got = jax.tree.map(lambda x: x[i], mapped)
        # Sums over a leaf in another order.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6),
            got,
            run(params[i], grads[i]),
        )


@EACH
def test_masked_and_partitioned_leaves_are_left_alone(wrapper):
    tx, params, grads = make(wrapper), tree(0), tree(1)
    masked = optax.masked(tx, {"w": True, "b": False, "s": True})
    updates, state = step(masked, masked.init(params), grads, params)
    assert_equal(updates["b"], grads["b"])
    alone = {"w": params["w"], "b": None, "s": params["s"]}
    want = step(tx, tx.init(alone), {**grads, "b": None}, alone)[0]
    np.testing.assert_allclose(updates["w"], want["w"], rtol=1e-5)
    split = optax.partition(
        {"train": tx, "frozen": optax.set_to_zero()},
        {"w": "train", "b": "frozen", "s": "frozen"},
    )
    updates, state = step(split, split.init(params), grads, params)
    assert not updates["b"].any()
    assert all(x.shape != (64,) for x in jax.tree.leaves(state))


@EACH
def test_empty_trees_holes_and_empty_leaves_pass(wrapper):
    tx = WRAPPERS[wrapper](optax.trace(0.9))
    for params in ({}, {"a": None, "b": jnp.ones(3)}, {"a": jnp.zeros((0, 3))}):
        updates, _ = tx.update(params, tx.init(params), params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)


@EACH
@pytest.mark.parametrize("size", [0.0, 1e30, 1e-30])
def test_finite_gradients_never_make_a_nan(wrapper, size):
    tx, params = make(wrapper, "lion_k"), tree(0)
    state = tx.init(params)
    for seed in (1, 2):
        grads = jax.tree.map(lambda g: jnp.sign(g) * jnp.float32(size), tree(seed))
        updates, state = step(tx, state, grads, params)
        for x in jax.tree.leaves((updates, ox.unpack_stored_state(state))):
            assert not jnp.isnan(x).any()


@EACH
def test_a_nan_behind_apply_if_finite_leaves_no_trace(wrapper):
    params = tree(0)
    nan = jax.tree.map(lambda g: jnp.full_like(g, jnp.nan), params)
    outside = optax.apply_if_finite(make(wrapper, "lion_k"), max_consecutive_errors=3)
    inside = WRAPPERS[wrapper](
        optax.apply_if_finite(LINKS["lion_k"](), max_consecutive_errors=3)
    )
    for tx in (outside, optax.with_extra_args_support(inside)):
        run = jax.jit(lambda state, grads: step(tx, state, grads, params))
        state = run(tx.init(params), tree(1))[1]
        updates, after = run(state, nan)
        assert not any(x.any() for x in jax.tree.leaves(updates) if tx is outside)
        before, after = (optax.tree.get_all_with_path(x, "mu") for x in (state, after))
        assert before
        assert_equal([x for _, x in after], [x for _, x in before])

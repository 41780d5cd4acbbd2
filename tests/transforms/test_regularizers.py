"""Links that add the gradient of a regulariser."""

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


def trees(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = {"conv": (3, 3, 2, 4), "dense": (5, 3), "bias": (3,)}
    return {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}


def assert_close(got, want, rtol=1e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol, rtol * abs(b).max()),
        got,
        want,
    )


def run(tx, params, grads, state=None):
    state = tx.init(params) if state is None else state
    return tx.update(grads, state, params)


def test_decay_to_zero_is_weight_decay():
    x, g = trees(0), trees(1)
    anchor = jax.tree.map(jnp.zeros_like, x)
    got, _ = run(ox.add_anchor_decay(0.3, anchor=anchor), x, g)
    want, _ = run(optax.add_decayed_weights(0.3), x, g)
    assert_close(got, want)


def test_the_pull_is_the_gradient_of_the_penalty(x64):
    x, g, a, f = (trees(i, jnp.float64) for i in range(4))
    got, _ = run(ox.add_anchor_decay(0.3, anchor=a, fisher=f), x, g)
    pull = jax.grad(ox.losses.anchor_penalty)(x, a, 0.3, fisher=f)
    assert_close(got, jax.tree.map(jnp.add, g, pull), 1e-14)


def test_the_anchor_is_where_training_began_and_no_buffer_of_it():
    x, g = trees(4), trees(5)
    tx = ox.add_anchor_decay(0.5)
    state = tx.init(x)
    assert_close(run(tx, x, g, state)[0], g)
    moved = jax.tree.map(lambda p: p + 2, x)
    assert_close(run(tx, moved, g, state)[0], jax.tree.map(lambda u: u + 1, g), 1e-5)
    pointers = [p.unsafe_buffer_pointer() for p in jax.tree.leaves((x, state.anchor))]
    assert len(set(pointers)) == 6


def test_a_new_task_swaps_anchor_and_fisher_in_the_state():
    x, g, a, f = (trees(i) for i in range(6, 10))
    tx = ox.add_anchor_decay(0.5, fisher=jax.tree.map(jnp.ones_like, x))
    state = optax.tree.set(tx.init(x), anchor=a, fisher=f)
    want, _ = run(ox.add_anchor_decay(0.5, anchor=a, fisher=f), x, g)
    assert_close(run(tx, x, g, state)[0], want)


def test_anchors_of_half_precision_are_float32():
    x = trees(10, jnp.bfloat16)
    state = ox.add_anchor_decay(0.5).init(x)
    assert {a.dtype for a in jax.tree.leaves(state.anchor)} == {jnp.dtype("float32")}
    assert state.fisher is None


def test_strength_may_be_a_schedule():
    x, g = {"w": jnp.ones(2)}, {"w": jnp.zeros(2)}
    tx = ox.add_anchor_decay(lambda t: 0.1 * (t + 1.0), anchor={"w": jnp.zeros(2)})
    state = tx.init(x)
    for strength in (0.1, 0.2, 0.3):
        out, state = tx.update(g, state, x)
        np.testing.assert_allclose(out["w"], strength, rtol=1e-6)


def test_the_place_in_the_chain_decides_what_scales_the_pull():
    """Behind Adam the pull is as strong as it says, before it at most one."""
    x, zero = {"w": jnp.full(2, 100.0)}, {"w": jnp.zeros(2)}
    decay = ox.add_anchor_decay(0.5, anchor=zero)
    g = {"w": jnp.full(2, 1e-3)}
    adam = ox.full_precision(optax.scale_by_adam())
    inside, _ = run(optax.chain(decay, adam), x, g)
    behind, _ = run(optax.chain(adam, decay), x, g)
    np.testing.assert_allclose(inside["w"], 1.0, rtol=1e-5)
    np.testing.assert_allclose(behind["w"], 51.0, rtol=1e-4)


@pytest.mark.parametrize(
    "link",
    [
        lambda **more: ox.add_anchor_decay(
            0.5, anchor=jax.tree.map(jnp.zeros_like, trees(0)), **more
        ),
        lambda **more: ox.add_orthogonal_regularizer(0.5, **more),
    ],
    ids=["anchor", "orthogonal"],
)
def test_a_mask_leaves_the_others_untouched(link):
    x, g = trees(11), trees(12)
    mask = {"conv": False, "dense": True, "bias": False}
    for given in (mask, lambda params: mask):
        got, _ = run(link(mask=given), x, g)
        assert_close(got["dense"], run(link(), x, g)[0]["dense"])
        for name in ("conv", "bias"):
            np.testing.assert_array_equal(got[name], g[name])


def test_regularizer_adds_the_gradients_of_the_penalties(x64):
    x, g = trees(13, jnp.float64), trees(14, jnp.float64)
    for stride in (1, 2, {"conv": 2, "dense": 1, "bias": 1}):
        got, state = run(ox.add_orthogonal_regularizer(0.3, stride=stride), x, g)
        s = 1 if stride == 1 else 2
        conv = jax.grad(ox.losses.orthogonal_conv_penalty)(x["conv"], stride=s)
        dense = jax.grad(ox.losses.orthogonal_dense_penalty)(x["dense"])
        assert_close(got["conv"], g["conv"] + 0.3 * conv, 1e-13)
        assert_close(got["dense"], g["dense"] + 0.3 * dense, 1e-13)
        np.testing.assert_array_equal(got["bias"], g["bias"])
        assert state == optax.EmptyState()


def test_equal_kernels_in_buckets_are_regularised_one_by_one():
    x = {k: trees(seed)["conv"] for k, seed in (("a", 15), ("b", 16))}
    g = jax.tree.map(jnp.zeros_like, x)
    link = ox.add_orthogonal_regularizer(0.3, stride=2)
    assert_close(run(ox.bucketed(link), x, g)[0], run(link, x, g)[0], 1e-5)


def test_descent_along_the_regulariser_alone_makes_isometries():
    x = {"dense": 0.3 * trees(17)["dense"]}
    tx = optax.chain(ox.add_orthogonal_regularizer(), optax.sgd(0.3))
    g = jax.tree.map(jnp.zeros_like, x)

    @jax.jit
    def step(x):
        return optax.apply_updates(x, run(tx, x, g)[0])

    for _ in range(500):
        x = step(x)
    singular = jnp.linalg.svd(x["dense"], compute_uv=False)
    np.testing.assert_allclose(singular, 1.0, atol=1e-4)


def test_what_is_wrong_is_named():
    x, g = trees(18), trees(19)
    for name in ("add_anchor_decay", "add_orthogonal_regularizer"):
        tx = getattr(ox, name)(0.1)
        with pytest.raises(ValueError, match=f"{name} needs the parameters"):
            tx.update(g, tx.init(x))
        with pytest.raises(TypeError, match=f"{name}: strength must be a number"):
            getattr(ox, name)("0.1")
    with pytest.raises(ValueError, match="add_anchor_decay: leaf"):
        ox.add_anchor_decay(0.1, anchor={"conv": x["conv"]}).init(x)
    oblong = {"conv": jnp.ones((3, 2, 1, 1))}
    with pytest.raises(
        ValueError, match=r"leaf \['conv'\]: .* a kernel must be square"
    ):
        run(ox.add_orthogonal_regularizer(), oblong, oblong)

"""Bloop: an auxiliary gradient that keeps out of the main one's way."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportOperatorIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox

SHAPES = {"w": (3, 4), "b": (4,)}


def tree(seed, dtype=jnp.float32, size=1.0):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(size * rng.normal(size=s), dtype) for k, s in SHAPES.items()}


def dot(a, b):
    return sum(float(jnp.vdot(a[k], b[k])) for k in a)


def once(tx, g, **extra):
    return jax.jit(tx.update)(g, tx.init(g), **extra)


def test_what_is_added_is_orthogonal_to_the_average_over_the_whole_tree(x64):
    tx = ox.bloop(aux_weight=0.7, ema_rate=0.3, eps=0.0)
    state = tx.init(tree(0, jnp.float64))
    update = jax.jit(tx.update)
    for t in range(5):
        g, a = tree(2 * t, jnp.float64), tree(2 * t + 1, jnp.float64)
        out, state = update(g, state, aux_grads=a)
        added = jax.tree.map(jnp.subtract, out, g)
        # 16 terms of order 1, each rounded a few times.
        assert abs(dot(added, state.mu)) < 1e-14
        # Leaf by leaf it is not.
        assert abs(float(jnp.vdot(added["w"], state.mu["w"]))) > 1e-3


def test_the_average_is_updated_before_the_projection():
    g, a = jnp.array([4.0, 0.0]), jnp.array([1.0, 1.0])
    tx = ox.bloop(aux_weight=1.0, ema_rate=0.25)
    out, state = once(tx, g, aux_grads=a)
    np.testing.assert_array_equal(state.mu, [1.0, 0.0])
    # r m is (1, 0) up to eps.
    np.testing.assert_allclose(out, [4.0, 1.0], atol=1e-6)


def test_eps_is_added_to_the_squared_length_of_the_average():
    g, a = jnp.array([1.0, 0.0]), jnp.array([2.0, 0.0])
    out, _ = once(ox.bloop(1.0, ema_rate=0.5, eps=0.75), g, aux_grads=a)
    # m = 1/2, r = 1 / (1/4 + 3/4).
    np.testing.assert_allclose(out, [1 + 2 - 0.5, 0.0], rtol=3e-7)


def test_a_weight_of_zero_is_the_identity():
    g = tree(0)
    out, _ = once(ox.bloop(aux_weight=0.0), g, aux_grads=tree(1))
    jax.tree.map(np.testing.assert_array_equal, out, g)


def test_an_auxiliary_gradient_along_the_average_adds_nothing():
    g = tree(0)
    out, _ = once(
        ox.bloop(0.5, eps=0.0), g, aux_grads=jax.tree.map(lambda x: -3 * x, g)
    )
    for k in g:
        np.testing.assert_allclose(out[k], g[k], rtol=1e-6)


def test_without_a_main_gradient_the_auxiliary_one_passes():
    zero, a = jax.tree.map(jnp.zeros_like, tree(0)), tree(1)
    out, _ = once(ox.bloop(0.5, eps=0.0), zero, aux_grads=a)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, 0.5 * y), out, a)


def test_the_average_may_start_at_the_first_gradient():
    tx = ox.bloop(ema_rate=0.25, init="grad")
    g, h = jnp.array([4.0, 8.0]), jnp.array([0.0, 4.0])
    state = tx.init(g)
    _, state = tx.update(g, state, aux_grads=g)
    np.testing.assert_array_equal(state.mu, g)
    _, state = tx.update(h, state, aux_grads=g)
    np.testing.assert_array_equal(state.mu, [3.0, 7.0])
    assert isinstance(state, ox.BloopState)
    assert state.count == 2


def test_the_scale_of_the_average_does_not_matter_without_eps():
    g, a = tree(0), tree(1)
    outs = [
        once(ox.bloop(0.5, ema_rate=rate, eps=0.0), g, aux_grads=a)[0]
        for rate in (1.0, 0.01)
    ]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), *outs)


@pytest.mark.parametrize(
    ("max_ratio", "r"), [(None, 4.0), (2.5, 2.5), (9.0, 4.0), (0.0, 0.0)]
)
def test_the_ratio_is_bounded_from_above(max_ratio, r):
    g, a = jnp.array([2.0, 0.0]), jnp.array([8.0, 1.0])
    tx = ox.bloop(1.0, ema_rate=1.0, eps=0.0, max_ratio=max_ratio)
    np.testing.assert_allclose(once(tx, g, aux_grads=a)[0], [2 + 8 - 2 * r, 1.0], 1e-6)


def test_a_negative_ratio_is_not_bounded():
    g, a = jnp.array([2.0, 0.0]), jnp.array([-8.0, 1.0])
    tx = ox.bloop(1.0, ema_rate=1.0, eps=0.0, max_ratio=2.5)
    np.testing.assert_allclose(once(tx, g, aux_grads=a)[0], [2.0, 1.0], rtol=1e-6)


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_the_projection_neither_overflows_nor_underflows(size):
    g, a = jnp.array([size, 0.0]), jnp.array([-size, size])
    out, _ = once(ox.bloop(1.0, eps=0.0), g, aux_grads=a)
    np.testing.assert_allclose(out / size, [1.0, 1.0], rtol=1e-6)


def test_holes_of_the_updates_do_not_count():
    tx = ox.bloop(1.0, ema_rate=1.0, eps=0.0)
    g, a = tree(0), tree(1)
    holed = {"w": g["w"], "b": None}
    out, _ = tx.update(holed, tx.init(g), aux_grads=a)
    want, _ = once(tx, {"w": g["w"]}, aux_grads={"w": a["w"]})
    assert out["b"] is None
    np.testing.assert_allclose(out["w"], want["w"], rtol=1e-6)


def test_holes_of_the_updates_do_not_count_against_an_average_that_they_have():
    tx = ox.bloop(1.0, ema_rate=0.5, eps=0.0)
    g, a = tree(0), tree(1)
    _, state = tx.update(g, tx.init(g), aux_grads=a)
    holed = {"w": g["w"], "b": optax.MaskedNode()}
    out, after = tx.update(holed, state, aux_grads=a)
    alone = state._replace(mu={"w": state.mu["w"]})
    want, _ = tx.update({"w": g["w"]}, alone, aux_grads={"w": a["w"]})
    np.testing.assert_allclose(out["w"], want["w"], rtol=1e-6)
    np.testing.assert_array_equal(after.mu["b"], state.mu["b"])


def test_float64_trees_are_projected_in_float64_and_may_mix_with_float32(x64):
    g = {"w": jnp.ones(2, jnp.float64), "b": jnp.ones(2, jnp.float32)}
    out, _ = once(ox.bloop(), g, aux_grads=jax.tree.map(lambda x: -x, g))
    assert (out["w"].dtype, out["b"].dtype) == (jnp.float64, jnp.float32)


# The specification says "flat noisy y" without the deviation.
NOISE_OF_Y = 0.3


def toy(ema_rate, aux_weight=1.0, orthogonal=True):
    """Mean of the last half of 20000 noisy steps on the specification's toy."""
    tx = ox.bloop(aux_weight, ema_rate) if orthogonal else None

    def step(carry, key):
        p, state = carry
        noise = jax.random.normal(key, (2,)) * jnp.array([1.0, NOISE_OF_Y])
        # Main: (x - 1)^2 / 2, flat in y; auxiliary: (x - 3)^2 / 2 + (y - 2)^2 / 2.
        g = jnp.array([p[0] - 1, 0.0]) + noise
        a = p - jnp.array([3.0, 2.0])
        if tx is None:
            d = g + aux_weight * a
        else:
            d, state = tx.update(g, state, aux_grads=a)
        p = p - 0.01 * d
        return (p, state), p

    start = jnp.zeros(2)
    state = () if tx is None else tx.init(start)
    keys = jax.random.split(jax.random.key(0), 20000)
    _, path = jax.jit(lambda: jax.lax.scan(step, (start, state), keys))()
    return np.asarray(path[10000:]).mean(axis=0)


@pytest.mark.parametrize(
    ("ema_rate", "orthogonal", "x"),
    [(0.01, True, 1.11), (1.0, True, 1.36), (1.0, False, 2.01)],
    ids=["bloop", "no average", "plain sum"],
)
def test_the_average_keeps_noise_from_hiding_the_main_loss(ema_rate, orthogonal, x):
    got = toy(ema_rate, orthogonal=orthogonal)
    # The mean of 10000 steps scatters by about 1 / sqrt(10000), over a curvature of 1.
    np.testing.assert_allclose(got, [x, 2.0], atol=0.03)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ema_rate": 1.5}, "ema_rate must lie in"),
        ({"eps": -1.0}, "eps must lie in"),
        ({"max_ratio": -1.0}, "max_ratio must lie in"),
        ({"init": "params"}, "init must be one of 'zeros', 'grad'"),
    ],
)
def test_bloops_errors_name_the_argument(options, message):
    with pytest.raises(ValueError, match=f"bloop: {message}"):
        ox.bloop(**options)


def test_bloop_without_auxiliary_gradients_says_so():
    with pytest.raises(ValueError, match="bloop needs the extra argument 'aux_grads'"):
        once(ox.bloop(), tree(0))

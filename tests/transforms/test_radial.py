"""The radial projection, AdamP and SGDP."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def once(tx, u, p, g):
    return jax.jit(tx.update)(u, tx.init(p), p, grad=g)[0]


@functools.partial(jax.jit, static_argnames="axis")
def orthogonal(x, p, axis=None):
    """The part of x that is orthogonal to p."""
    dot = jnp.sum(x * p, axis, keepdims=True) / jnp.sum(p * p, axis, keepdims=True)
    return x - p * dot


def run(tx, p, gradients):
    state, update = tx.init(p), jax.jit(tx.update)
    path = [p]
    for g in gradients:
        u, state = update(g, state, p)
        p = optax.apply_updates(p, u)
        path.append(p)
    return path


# The link -----------------------------------------------------------------------------


def test_a_gradient_orthogonal_to_each_channel_projects_each_channel():
    p, u = normal(4, 3), normal(4, 3, seed=1)
    g = orthogonal(normal(4, 3, seed=2), p, axis=0)
    out = once(ox.project_radial(), u, p, g)
    # What is left of <p, u> is rounding: 4 products of order 1.
    np.testing.assert_allclose(jnp.sum(p * out, axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(out, orthogonal(u, p, 0), rtol=1e-5, atol=1e-6)


def test_the_step_of_a_projected_channel_obeys_pythagoras():
    p, u = normal(4, 3), normal(4, 3, seed=1)
    out = once(ox.project_radial(), u, p, orthogonal(u, p, axis=0))
    squares = [jnp.sum(x**2) for x in (p + out, p, out)]
    np.testing.assert_allclose(squares[0], squares[1] + squares[2], rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_what_is_left_of_the_radial_part_is_twice_eps_over_the_norm():
    p, u = np.random.default_rng(0).normal(size=(2, 40, 3)) * [[[2.0]], [[1.0]]]
    p, u = jnp.asarray(p), jnp.asarray(u)
    out = once(ox.project_radial(eps=1e-6), u, p, orthogonal(u, p, axis=0))
    left = jnp.sum(p * out, axis=0) / jnp.sum(p * u, axis=0)
    norm = jnp.linalg.norm(p, axis=0)
    np.testing.assert_allclose(left, 2e-6 / norm, rtol=1e-5)


def test_a_gradient_orthogonal_to_the_whole_leaf_only_projects_the_whole_leaf():
    p, u = normal(4, 3), normal(4, 3, seed=1)
    g = orthogonal(p * jnp.array([[1.0, -2.0, 3.0]]), p)  # radial in each channel
    out = once(ox.project_radial(), u, p, g)
    np.testing.assert_allclose(jnp.sum(p * out), 0, atol=1e-5)
    np.testing.assert_allclose(out, orthogonal(u, p), rtol=1e-5, atol=1e-6)
    assert float(jnp.max(jnp.abs(jnp.sum(p * out, axis=0)))) > 0.1


def test_the_gradient_decides_and_not_the_update():
    p = normal(4, 3)
    u = orthogonal(normal(4, 3, seed=1), p)
    np.testing.assert_array_equal(once(ox.project_radial(), u, p, p), u)


def test_leaves_of_rank_below_2_pass():
    p = {"vector": normal(3), "scalar": jnp.float32(2.0)}
    u = {"vector": normal(3, seed=1), "scalar": jnp.float32(1.0)}
    zero = jax.tree.map(jnp.zeros_like, p)
    out = once(ox.project_radial(weight_decay=0.5), u, p, zero)
    expected = jax.tree.map(lambda u, p: u + 0.5 * p, u, p)
    jax.tree.map(np.testing.assert_array_equal, out, expected)


@pytest.mark.parametrize(("factor", "projected"), [(0.9, True), (1.1, False)])
@pytest.mark.parametrize("view", ["channel", "layer"])
def test_the_bound_on_the_cosine_is_delta_over_the_root_of_the_entries(
    factor, projected, view
):
    delta, p = 0.3, jnp.ones((16, 2))
    if view == "channel":  # orthogonal to p in each channel
        entries, other = 16, jnp.tile(jnp.array([[1.0], [-1.0]]), (8, 2))
    else:  # orthogonal to p as a whole, and along p in each channel
        entries, other = 32, jnp.tile(jnp.array([[1.0, -1.0]]), (16, 1))
    cosine = factor * delta / entries**0.5
    g = cosine * p + (1 - cosine**2) ** 0.5 * other
    out = once(ox.project_radial(delta=delta), p, p, g)
    assert bool(jnp.abs(out).max() < 1e-6) is projected


def test_one_channel_that_is_not_orthogonal_stops_the_channel_view():
    p = jnp.ones((8, 2))
    g = orthogonal(normal(8, 2), p, axis=0).at[:, 1].add(5.0)
    np.testing.assert_array_equal(once(ox.project_radial(), p, p, g), p)


def test_the_channel_axis_says_which_axis_holds_the_rows():
    p, u = normal(3, 4), normal(3, 4, seed=1)
    g = orthogonal(u, p, axis=1)
    out = once(ox.project_radial(channel_axis=0), u, p, g)
    turned = once(ox.project_radial(), u.T, p.T, g.T).T
    np.testing.assert_allclose(out, turned, rtol=1e-5, atol=1e-6)
    assert not np.allclose(out, once(ox.project_radial(), u, p, g), rtol=1e-3)


def test_the_channels_of_a_convolution_are_its_last_axis():
    p, u = normal(2, 2, 3, 4), normal(2, 2, 3, 4, seed=1)
    g = orthogonal(u, p, axis=(0, 1, 2))
    out = once(ox.project_radial(), u, p, g)
    np.testing.assert_allclose(jnp.sum(p * out, axis=(0, 1, 2)), 0, atol=2e-6)


def test_a_zero_gradient_counts_as_orthogonal_and_decays_less():
    p = normal(4, 3)
    tx = ox.project_radial(weight_decay=0.5, wd_ratio=0.25)
    out = once(tx, jnp.zeros((4, 3)), p, jnp.zeros((4, 3)))
    np.testing.assert_allclose(out, 0.125 * p, rtol=1e-6)


def test_norms_below_eps_are_taken_for_eps():
    p, tiny = jnp.ones((4, 1)), jnp.full((4, 1), 1e-3)
    for eps, projected in ((1e-8, False), (1.0, True)):  # cosine 1, or 2e-3
        out = once(ox.project_radial(eps=eps), p, p, tiny)
        assert bool((out != p).any()) is projected


@pytest.mark.parametrize(
    "mask",
    [{"a": True, "b": False}, lambda params: {"a": True, "b": False}],
    ids=["tree", "function"],
)
def test_the_mask_limits_decay_and_not_the_projection(mask):
    p = {"a": normal(4, 3), "b": normal(4, 3)}
    u = {"a": normal(4, 3, seed=1), "b": normal(4, 3, seed=1)}
    zero = jax.tree.map(jnp.zeros_like, p)
    out = once(ox.project_radial(weight_decay=1.0, mask=mask), u, p, zero)
    np.testing.assert_allclose(out["a"] - out["b"], 0.1 * p["a"], atol=1e-6)
    np.testing.assert_allclose(jnp.sum(p["b"] * out["b"], axis=0), 0, atol=1e-6)


def test_it_works_behind_any_link_in_a_chain():
    p, g = normal(4, 3), normal(4, 3, seed=1)
    g = orthogonal(g, p, axis=0)
    for link in (
        optax.scale_by_adam(),
        optax.trace(0.9),
        optax.scale_by_rms(),
        ox.scale_by_lion_k(),
        ox.cautious(optax.scale_by_adam()),
        optax.scale(3.0),
    ):
        link = ox.full_precision(link)
        direction, _ = link.update(g, link.init(p), p)
        tx = optax.chain(link, ox.project_radial())
        out = tx.update(g, tx.init(p), p, grad=g)[0]
        np.testing.assert_allclose(out, orthogonal(direction, p, 0), atol=1e-5)


def test_masked_leaves_are_skipped_in_the_raw_gradient_too():
    p = {"a": normal(4, 3), "b": normal(4, 3), "c": None}
    zero = {"a": jnp.zeros((4, 3)), "b": jnp.zeros((4, 3)), "c": None}
    tx = optax.masked(ox.project_radial(), {"a": True, "b": False, "c": None})
    out = once(tx, p, p, zero)
    np.testing.assert_allclose(out["a"], 0, atol=1e-6)
    np.testing.assert_array_equal(out["b"], p["b"])


def test_it_asks_for_what_it_needs():
    tx, p = ox.project_radial(), jnp.ones((2, 2))
    with pytest.raises(ValueError, match="project_radial needs the parameters"):
        tx.update(p, tx.init(p), grad=p)
    with pytest.raises(ValueError, match=r"project_radial needs the extra .* 'grad'"):
        tx.update(p, tx.init(p), p)
    with pytest.raises(ValueError, match="channel_axis is 2, the rank 2"):
        once(ox.project_radial(channel_axis=2), p, p, p)


@pytest.mark.parametrize(
    "options", [{"delta": -1.0}, {"wd_ratio": -0.1}, {"eps": 0.0}], ids=str
)
def test_arguments_outside_their_range_are_named(options):
    with pytest.raises(ValueError, match=f"project_radial: {next(iter(options))} must"):
        ox.project_radial(**options)


# The optimizers -----------------------------------------------------------------------


def adamw(*args, **options):
    return ox.full_precision(optax.adamw(*args, **options))


def gradients(n, *shape):
    return [normal(*shape, seed=t) for t in range(n)]


def test_on_vectors_adamp_is_adamw():
    options = {"b1": 0.8, "b2": 0.95, "eps": 1e-3, "weight_decay": 0.1}
    ours = run(ox.adamp(0.05, **options), normal(5), gradients(6, 5))
    theirs = run(adamw(0.05, **options), normal(5), gradients(6, 5))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_nesterov_looks_one_moment_ahead_under_one_bias_correction():
    b1, b2, eps, rate = 0.8, 0.95, 1e-3, 0.05
    p, grads = normal(5), gradients(6, 5)
    path = run(ox.adamp(rate, b1, b2, eps, nesterov=True), p, grads)
    m = v = 0.0
    for t, g in enumerate(np.asarray(grads, np.float64), 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        numerator = (b1 * m + (1 - b1) * g) / (1 - b1**t)
        p = p - rate * numerator / (np.sqrt(v / (1 - b2**t)) + eps)
        np.testing.assert_allclose(path[t], p, rtol=2e-5)


def test_with_a_parallel_gradient_adamp_is_adamw():
    p, options = normal(4, 3), {"weight_decay": 0.1}
    # |p| changes by 1 % at most: the gradient stays parallel well above the bound.
    grads = [p * x for x in (1.0, -2.0, 0.5)]
    ours = run(ox.adamp(1e-3, **options), p, grads)
    theirs = run(adamw(1e-3, **options), p, grads)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_with_zero_gradients_matrices_decay_by_the_ratio():
    tx = ox.adamp(0.1, weight_decay=0.1, wd_ratio=0.1)
    path = run(tx, normal(4, 3), [jnp.zeros((4, 3))] * 3)
    np.testing.assert_allclose(path[3], 0.999**3 * path[0], rtol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dampening", [0.0, 0.4])
def test_on_vectors_sgdp_is_sgd_with_momentum(nesterov, dampening):
    momentum, rate, decay = 0.8, 0.05, 0.02
    tx = ox.sgdp(rate, momentum, dampening, decay, nesterov)
    p, grads, buffer = normal(5), gradients(5, 5), 0.0
    for t, at in enumerate(run(tx, p, grads)[1:]):
        buffer = momentum * buffer + (1 - dampening) * grads[t]
        u = grads[t] + momentum * buffer if nesterov else buffer
        p = p - rate * (u + decay / (1 - momentum) * p)
        np.testing.assert_allclose(at, p, rtol=1e-5, atol=1e-7)


def test_the_stored_momentum_is_not_projected():
    p, g = normal(4, 3), jnp.zeros((4, 3))
    tx = ox.sgdp(0.1)
    _, state = tx.update(p, tx.init(p), p)
    _, state = tx.update(g, state, p)  # a projected step
    np.testing.assert_allclose(optax.tree.get(state, "trace"), 0.9 * p, rtol=1e-6)


@pytest.mark.parametrize("make", [ox.adamp, ox.sgdp])
def test_every_argument_of_the_projection_reaches_it(make):
    p, zero = normal(4, 3), jnp.zeros((4, 3))
    momentum = 0.9 if make is ox.sgdp else 0.0
    # A zero gradient is orthogonal for any bound but 0, and then decays in full.
    for delta, ratio in ((0.1, 0.5), (0.0, 1.0)):
        tx = make(1.0, weight_decay=0.1, wd_ratio=0.5, delta=delta, eps=1e-4)
        u, _ = tx.update(zero, tx.init(p), p)
        np.testing.assert_allclose(u, -0.1 * ratio / (1 - momentum) * p, rtol=1e-5)
    tx = make(1.0, weight_decay=0.1, mask=False)
    np.testing.assert_array_equal(tx.update(zero, tx.init(p), p)[0], zero)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_moments_are_float32(dtype):
    state = ox.adamp(0.1).init(jnp.ones((2, 2), dtype))
    assert optax.tree.get(state, "nu").dtype == jnp.float32


def test_on_a_scale_free_loss_the_weights_hardly_grow():
    """Noisy regression of w / |w| in 8 dimensions: 1.17 and 2.48 in the spec."""
    target = normal(8, 1) / jnp.linalg.norm(normal(8, 1))

    def gradient(w, key):
        noise = jax.random.normal(key, w.shape)

        def loss(w):
            unit = w / jnp.linalg.norm(w)
            return jnp.sum((unit - target) ** 2) / 2 + jnp.sum(unit * noise)

        return jax.grad(loss)(w)

    def length_after(tx):
        def step(carry, key):
            w, state = carry
            u, state = tx.update(gradient(w, key), state, w)
            return (optax.apply_updates(w, u), state), None

        w = jnp.eye(8, 1)
        keys = jax.random.split(jax.random.key(0), 300)
        return jnp.linalg.norm(jax.lax.scan(step, (w, tx.init(w)), keys)[0][0])

    projected, plain = (
        length_after(ox.adamp(0.05)),
        length_after(ox.adamp(0.05, delta=0.0)),
    )
    assert projected < 1.5 < 2 < plain


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (ox.adamp, {"b1": 1.0}),
        (ox.adamp, {"b2": -0.1}),
        (ox.sgdp, {"momentum": 1.0}),
        (ox.sgdp, {"learning_rate": -1.0}),
    ],
)
def test_the_optimizers_name_arguments_outside_their_range(make, options):
    name = next(iter(options))
    with pytest.raises(ValueError, match=f"{make.__name__}: {name} must lie in"):
        make(**{"learning_rate": 0.1, **options})

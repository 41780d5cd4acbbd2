"""Gradients in the tangent space, weights on their initial spheres."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def once(tx, g, w):
    return jax.jit(tx.update)(g, tx.init(w), w)[0]


# perp_grad ----------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [(5,), (4, 3), (2, 2, 3, 4)])
def test_the_output_is_orthogonal_to_the_weights_and_as_long_as_the_gradient(shape):
    w, g = normal(*shape, dtype="float64"), normal(*shape, seed=1, dtype="float64")
    out = once(ox.perp_grad(), g, w)
    size = jnp.linalg.norm(g)
    np.testing.assert_allclose(jnp.linalg.norm(out), size, rtol=1e-15)
    assert abs(float(jnp.sum(w * out))) < 1e-15 * size * jnp.linalg.norm(w)


def test_without_renormalizing_it_is_the_plain_projection():
    w, g = normal(4, 3), normal(4, 3, seed=1)
    out = once(ox.perp_grad(renormalize=False), g, w)
    expected = g - w * (jnp.sum(w * g) / jnp.sum(w * w))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_eps_is_added_to_both_denominators():
    w, g = normal(4, 3), normal(4, 3, seed=1)
    h = g - w * (jnp.sum(w * g) / (jnp.sum(w * w) + 0.5))
    out = once(ox.perp_grad(eps=0.5, renormalize=False), g, w)
    np.testing.assert_allclose(out, h, rtol=1e-5, atol=1e-6)
    scale = jnp.linalg.norm(g) / (jnp.linalg.norm(h) + 0.5)
    np.testing.assert_allclose(once(ox.perp_grad(eps=0.5), g, w), h * scale, rtol=1e-5)


def test_zero_weights_leave_the_gradient_as_it_is():
    g = normal(5)
    np.testing.assert_allclose(once(ox.perp_grad(), g, jnp.zeros(5)), g, rtol=2.4e-7)


def test_what_is_only_rounding_error_is_not_scaled_up():
    w, g = normal(200, 1), normal(200, 1, seed=1)
    rows = jax.vmap(lambda w, g: ox.perp_grad().update(g, optax.EmptyState(), w)[0])
    out = jax.jit(rows)(w, g)  # leaves of one element: nothing is orthogonal
    assert (jnp.abs(out) <= 16 * 2.0**-23 * jnp.abs(g)).all()
    w = normal(4, 3)
    assert jnp.linalg.norm(once(ox.perp_grad(), 3 * w, w)) < 1e-5


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("weight", [0.0, 1e-30, 1.0, 1e30])
def test_extreme_gradients_and_weights_stay_finite(size, weight):
    w, g = normal(4, 3) * weight, normal(4, 3, seed=1) * size
    out = once(ox.perp_grad(), g, w)
    assert jnp.isfinite(out).all()
    if weight >= 1 and size >= 1e-20:
        cosine = jnp.sum((w / weight) * (out / size))
        np.testing.assert_allclose(cosine, 0, atol=2e-6)
        np.testing.assert_allclose(
            jnp.linalg.norm(out / size), jnp.linalg.norm(g / size), rtol=1e-5
        )


def test_the_mask_of_perp_grad_says_which_leaves_are_treated():
    w, g = {"a": normal(3), "b": normal(3)}, {"a": normal(3), "b": normal(3)}
    out = once(ox.perp_grad(mask={"a": True, "b": False}), g, w)
    assert jnp.linalg.norm(out["a"]) < 1e-5
    np.testing.assert_array_equal(out["b"], g["b"])


def test_it_works_in_front_of_any_link():
    w, g = normal(4, 3), normal(4, 3, seed=1)
    projected = once(ox.perp_grad(), g, w)
    for link in (
        optax.scale_by_adam(),
        optax.trace(0.9),
        ox.scale_by_lion_k(),
        ox.cautious(optax.scale_by_adam()),
        ox.mars(0.1),
        ox.adamp(0.1),
    ):
        link = ox.full_precision(link)
        out = once(optax.chain(ox.perp_grad(), link), g, w)
        np.testing.assert_allclose(out, once(link, projected, w), rtol=1e-5)


# project_to_init_norm -----------------------------------------------------------------


def descend(tx, w, steps=5):
    state, update = tx.init(w), jax.jit(tx.update)
    path = [w]
    for t in range(steps):
        g = jax.tree.map(lambda x, t=t: normal(*x.shape, seed=t + 5, dtype=x.dtype), w)
        u, state = update(g, state, w)
        w = optax.apply_updates(w, u)
        path.append(w)
    return path


def norms(path, name):
    return [np.linalg.norm(np.asarray(w[name]).ravel()) for w in path]


def matrices(dtype=jnp.float32):
    shapes = {"bias": (3,), "conv": (2, 2, 1, 3), "dense": (4, 3)}
    return {name: normal(*s, dtype=dtype) for name, s in shapes.items()}


@pytest.mark.usefixtures("x64")
def test_after_each_step_the_weights_have_their_initial_norms():
    tx = optax.chain(optax.sgd(0.3), ox.project_to_init_norm())
    path = descend(tx, matrices("float64"))
    for name in ("conv", "dense"):
        np.testing.assert_allclose(norms(path, name), norms(path, name)[0], rtol=1e-12)


def test_the_direction_of_the_weights_is_that_of_the_step():
    w = matrices()
    tx = optax.chain(optax.sgd(0.3), ox.project_to_init_norm())
    got, plain = descend(tx, w, 1)[1], descend(optax.sgd(0.3), w, 1)[1]
    for name in ("conv", "dense"):
        scale = np.linalg.norm(w[name]) / np.linalg.norm(plain[name])
        np.testing.assert_allclose(got[name], scale * plain[name], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got["bias"], plain["bias"])


def test_between_projections_the_steps_are_the_inner_ones():
    tx = optax.chain(optax.sgd(0.3), ox.project_to_init_norm(every=3))
    path, plain = descend(tx, matrices(), 6), descend(optax.sgd(0.3), matrices(), 6)
    for t in (1, 2):
        jax.tree.map(np.testing.assert_array_equal, path[t], plain[t])
    lengths = np.asarray(norms(path, "dense")) / norms(path, "dense")[0]
    np.testing.assert_allclose(lengths[[3, 6]], 1, rtol=1e-6)
    assert (np.abs(lengths[[1, 2, 4, 5]] - 1) > 1e-3).all()


@pytest.mark.parametrize("axis", [0, -1, (0, 1, 2)])
def test_norms_along_axes_are_kept_each(axis):
    w = {"conv": normal(2, 2, 2, 3)}
    tx = optax.chain(optax.sgd(0.3), ox.project_to_init_norm(axis=axis))
    state = tx.init(w)
    lengths = [jnp.sqrt(jnp.sum(p["conv"] ** 2, axis)) for p in descend(tx, w, 2)]
    np.testing.assert_allclose(lengths[2], lengths[0], rtol=1e-6)
    kept = jnp.sqrt(jnp.sum(w["conv"] ** 2, axis, keepdims=True))
    np.testing.assert_allclose(state[-1].norm["conv"], kept, rtol=1e-6)


def test_the_state_is_a_count_and_one_scalar_a_leaf():
    state = ox.project_to_init_norm().init({"w": jnp.array([[3.0, 4.0]])})
    assert isinstance(state, ox.InitNormState)
    assert (int(state.count), float(state.norm["w"])) == (0, 5.0)


def test_lengths_up_to_eps_leave_the_step_as_it_is():
    tx = ox.project_to_init_norm(eps=0.1)
    w, u = jnp.full((2, 2), 0.04), jnp.ones((2, 2))
    np.testing.assert_array_equal(once(tx, u, w), u)  # |w| = 0.08 at init
    w = jnp.ones((2, 2))
    np.testing.assert_array_equal(once(tx, -0.96 * w, w), -0.96 * w)  # 0.08 after it
    np.testing.assert_array_equal(once(tx, -w, w), -w)
    zero = jnp.zeros((2, 2))
    np.testing.assert_array_equal(once(ox.project_to_init_norm(), u, zero), u)


def test_the_mask_of_the_projection_says_which_leaves_are_treated():
    w, mask = matrices(), {"bias": True, "conv": False, "dense": False}
    for given in (mask, lambda params: mask):
        tx = optax.chain(optax.sgd(0.3), ox.project_to_init_norm(given))
        path, plain = descend(tx, w, 2), descend(optax.sgd(0.3), w, 2)
        np.testing.assert_allclose(norms(path, "bias"), norms(path, "bias")[0], 1e-6)
        np.testing.assert_array_equal(path[2]["dense"], plain[2]["dense"])


def test_a_network_that_normalises_gives_the_same_outputs_after_the_projection():
    w = {"a": normal(4, 6), "b": normal(6, 3)}
    x = normal(5, 4, seed=9)

    def normalised(x):
        mean = jnp.mean(x, axis=-1, keepdims=True)
        return (x - mean) / jnp.std(x, axis=-1, keepdims=True)

    def network(w):
        return normalised(jnp.tanh(normalised(x @ w["a"])) @ w["b"])

    g = jax.tree.map(lambda w: normal(*w.shape, seed=3), w)
    tx = optax.chain(optax.sgd(0.3), ox.project_to_init_norm())
    after = optax.apply_updates(w, once(tx, g, w))
    plain = optax.apply_updates(w, once(optax.sgd(0.3), g, w))
    np.testing.assert_allclose(network(after), network(plain), rtol=1e-4, atol=1e-5)
    assert not np.allclose(after["a"], plain["a"], rtol=1e-2)


def test_holes_have_no_norm():
    w = {"a": normal(2, 2), "b": None}
    tx = ox.project_to_init_norm()
    assert tx.init(w).norm["b"] is None
    assert once(tx, w, w)["b"] is None


@pytest.mark.parametrize("make", [ox.perp_grad, ox.project_to_init_norm])
def test_links_ask_for_the_parameters(make):
    tx, g = make(), jnp.ones((2, 2))
    with pytest.raises(ValueError, match=f"{make.__name__} needs the parameters"):
        tx.update(g, tx.init(g))


def test_arguments_outside_their_range_are_named():
    with pytest.raises(ValueError, match="project_to_init_norm: every must be an int"):
        ox.project_to_init_norm(every=0)
    with pytest.raises(ValueError, match="project_to_init_norm: eps must lie in"):
        ox.project_to_init_norm(eps=-1.0)
    with pytest.raises(ValueError, match="perp_grad: eps must lie in"):
        ox.perp_grad(eps=-1.0)


# effective_learning_rate --------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_effective_learning_rate_is_the_rate_over_the_norm_or_its_square(dtype):
    w = {"w": jnp.array([[3.0, 4.0]], dtype), "b": None}
    for kind, expected in (("sgd", 0.02), ("adam", 0.1)):
        rates = ox.effective_learning_rate(w, jnp.float32(0.5), kind)
        assert rates["b"] is None
        np.testing.assert_allclose(rates["w"], expected, rtol=1e-6)


def test_it_predicts_how_far_a_gradient_step_turns_a_scale_free_weight():
    w = {"w": normal(4, 3)}

    def value(w):
        return jnp.sum(normal(4, 3, seed=1) * w["w"]) / jnp.linalg.norm(w["w"])

    def turned(w, rate):
        after = jax.tree.map(lambda w, g: w - rate * g, w, jax.grad(value)(w))
        return after["w"] / jnp.linalg.norm(after["w"])

    rate = ox.effective_learning_rate(w, 0.1)["w"]
    unit = {"w": w["w"] / jnp.linalg.norm(w["w"])}
    np.testing.assert_allclose(turned(w, 0.1), turned(unit, rate), rtol=1e-5, atol=1e-6)


def test_an_unknown_kind_is_named():
    with pytest.raises(
        ValueError, match="effective_learning_rate: kind must be one of"
    ):
        ox.effective_learning_rate({}, 0.1, "lion")

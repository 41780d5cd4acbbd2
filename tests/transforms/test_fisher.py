"""FAdam: preconditioning, the two cuts, the adaptive eps and decay in the metric."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox


def draws(shape, steps, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(steps, *shape)), dtype)


def directions(tx, gradients, params=None):
    def step(state, g):
        direction, state = tx.update(g, state, params)
        return state, (direction, state)

    return jax.lax.scan(step, tx.init(gradients[0]), gradients)[1]


def reference(g, p, b1, b2, eps, eps2, clip, rho, weight_decay):
    """The four lines of the specification, in NumPy."""

    def rms(a):
        return np.sqrt(np.mean(a**2))

    m, fisher, out = np.zeros_like(p), np.zeros_like(p), []
    for t, g_t in enumerate(g, start=1):
        b2_t = b2 * (1 - b2 ** (t - 1)) / (1 - b2**t)
        fisher = b2_t * fisher + (1 - b2_t) * g_t**2
        e = min(eps, eps2 * rms(g_t)) if rms(g_t) else eps
        d = fisher**rho + e ** (2 * rho)
        q, w = g_t / d, p / d
        m = b1 * m + (1 - b1) * q / max(1, rms(q) / clip)
        out.append(m + weight_decay * w / max(1, rms(w) / clip))
    return np.stack(out)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "changed",
    [
        {"b1": 0.5},
        {"b2": 0.7},
        {"eps": 0.3, "eps2": 10.0},
        {"eps": 0.3, "eps2": 0.1},
        {"clip": 0.4},
        {"clip": 3.0},
        {"rho": 0.3},
        {"rho": 0.8, "eps": 0.1, "eps2": 1.0},
        {"weight_decay": 0.0},
        {"eps2": 0.0},
    ],
    ids=str,
)
def test_every_argument_does_what_the_specification_says(changed):
    defaults = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "eps2": 0.01, "clip": 1.0}
    options = {**defaults, "rho": 0.5, "weight_decay": 0.2, **changed}
    g = (
        draws((3, 4), 8, jnp.float64)
        * jnp.asarray([1.0, 30, 1, 0, 9, 1, 1, 1e-9])[:, None, None]
    )
    p = jnp.linspace(-2.0, 3.0, 12).reshape(3, 4)
    ours, _ = directions(ox.scale_by_fadam(**options), g, p)
    theirs = reference(np.asarray(g), np.asarray(p), **options)
    np.testing.assert_allclose(ours, theirs, rtol=1e-11)


@pytest.mark.usefixtures("x64")
def test_the_fisher_is_adams_corrected_second_moment():
    g = draws((5,), 200, jnp.float64)
    _, states = directions(ox.scale_by_fadam(), g)
    _, adam = directions(ox.full_precision(optax.scale_by_adam()), g)
    t = np.arange(1, 201)[:, None]
    np.testing.assert_allclose(states.fisher, adam.nu / (1 - 0.999**t), rtol=1e-13)


@pytest.mark.usefixtures("x64")
def test_the_first_step_is_the_sign_times_1_minus_b1():
    g = jnp.asarray([[3.0, -1e-5, 20.0]])
    out = directions(ox.scale_by_fadam(b1=0.8, eps=1e-7), g)[0][0]
    short = 1 / (1 + 1e-7 / np.abs(g[0]))
    np.testing.assert_allclose(out, 0.2 * np.sign(g[0]) * short, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_without_momentum_decay_and_cut_it_is_adam_without_momentum():
    g = draws((5,), 30, jnp.float64)
    ours, _ = directions(ox.scale_by_fadam(b1=0.0, clip=float("inf")), g)
    theirs, _ = directions(ox.full_precision(optax.scale_by_adam(b1=0.0)), g)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize("clip", [0.3, 1.0])
def test_the_preconditioned_gradient_is_cut_to_the_root_mean_square(clip):
    g = draws((3, 4), 20) * jnp.geomspace(1.0, 1e6, 20).reshape(20, 1, 1)
    out, _ = directions(ox.scale_by_fadam(b1=0.0, clip=clip), g)
    rms = np.sqrt(np.mean(np.asarray(out) ** 2, axis=(1, 2)))
    assert (rms <= clip * (1 + 1e-6)).all()
    np.testing.assert_allclose(rms[1:], np.full(19, clip), rtol=1e-6)


def test_the_adaptive_eps_makes_tiny_gradients_scale_free():
    g = draws((8,), 20) * jnp.float32(1e-8)
    adaptive = ox.scale_by_fadam()
    near, _ = directions(adaptive, g)
    far, _ = directions(adaptive, g * jnp.float32(2.0**-10))
    np.testing.assert_array_equal(far, near)
    constant = ox.scale_by_fadam(eps2=1e9)
    near, _ = directions(constant, g)
    far, _ = directions(constant, g * jnp.float32(2.0**-10))
    assert np.abs(near).max() > 100 * np.abs(far).max()


def test_one_dead_row_switches_decay_off_for_the_live_rows():
    g = jnp.ones((1, 2, 4)).at[:, 1].set(0)
    p = jnp.ones((2, 4))
    with_decay, _ = directions(ox.scale_by_fadam(weight_decay=1.0), g, p)
    shift = (with_decay - directions(ox.scale_by_fadam(), g)[0])[0]
    assert (np.abs(shift[0]) < 1e-6).all()
    np.testing.assert_allclose(shift[1], np.full(4, 2**0.5), rtol=1e-6)
    alive, _ = directions(ox.scale_by_fadam(weight_decay=1.0), jnp.ones((1, 2, 4)), p)
    np.testing.assert_allclose(alive, np.full((1, 2, 4), 1.1), rtol=1e-5)


@pytest.mark.parametrize(
    "mask",
    [{"a": True, "b": False}, lambda params: {"a": True, "b": False}],
    ids=["tree", "function"],
)
def test_masked_leaves_do_not_decay(mask):
    p = {"a": jnp.ones(2), "b": jnp.ones(2)}
    tx = ox.scale_by_fadam(weight_decay=0.5, mask=mask)
    out, _ = tx.update(p, tx.init(p), p)
    np.testing.assert_allclose(out["a"], [0.6, 0.6], rtol=1e-4)
    np.testing.assert_allclose(out["b"], [0.1, 0.1], rtol=1e-4)


def test_the_optimizer_is_its_link_and_the_learning_rate():
    options = {"b1": 0.8, "b2": 0.9, "eps": 1e-4, "eps2": 0.1, "clip": 0.5, "rho": 0.4}
    p = jnp.ones(5)
    tx = ox.fadam(0.5, 0.2, **options)
    link = ox.scale_by_fadam(**options, weight_decay=0.2)
    state, other = tx.init(p), link.init(p)
    for g in draws((5,), 3):
        updates, state = tx.update(g, state, p)
        direction, other = link.update(g, other, p)
        np.testing.assert_array_equal(updates, -0.5 * direction)
    default = ox.fadam(1.0)
    decayed, _ = default.update(p, default.init(p), p)
    np.testing.assert_allclose(decayed, np.full(5, -0.101), rtol=1e-4)


def test_zero_gradients_give_decay_alone():
    p = jnp.asarray([1.0, -3.0])
    out, states = directions(ox.scale_by_fadam(weight_decay=0.1), jnp.zeros((3, 2)), p)
    want = 0.1 * np.asarray(p) / np.sqrt(5)  # cut to a root-mean-square of 1
    np.testing.assert_allclose(out, np.broadcast_to(want, (3, 2)), rtol=1e-6)
    np.testing.assert_array_equal(states.mu, np.zeros((3, 2)))


@pytest.mark.parametrize("size", [1e30, 1e-30, 1e-36, 1e-39])
@pytest.mark.parametrize("rho", [0.5, 1.0])
def test_gradients_at_the_edges_of_float32_keep_everything_finite(size, rho):
    g = jnp.sign(draws((4,), 3)) * jnp.float32(size)
    tx = ox.scale_by_fadam(weight_decay=0.1, rho=rho)
    out, states = directions(tx, g, jnp.full(4, 10.0))
    assert np.isfinite(out).all()
    assert not any(np.isnan(x).any() for x in jax.tree.leaves(states))


def test_parameters_are_needed_for_decay_only():
    g = jnp.ones(2)
    free, decaying = ox.scale_by_fadam(), ox.scale_by_fadam(weight_decay=0.1)
    free.update(g, free.init(g))
    with pytest.raises(ValueError, match="scale_by_fadam needs the parameters"):
        decaying.update(g, decaying.init(g))


@pytest.mark.parametrize(
    "bad",
    [
        {"b1": 1.0},
        {"b2": 1.0},
        {"eps": -1.0},
        {"eps2": -1.0},
        {"clip": 0.0},
        {"rho": 0},
    ],
)
def test_an_argument_outside_its_range_is_named(bad):
    with pytest.raises(ValueError, match=f"scale_by_fadam: {next(iter(bad))} must"):
        ox.scale_by_fadam(**bad)

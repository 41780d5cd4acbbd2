"""`adahessian`: Adam on the Hessian's diagonal."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox


def given(**options):
    return ox.scale_by_adahessian(estimator=ox.external_hessian_diag(), **options)


def random_steps(shape, steps=6, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(2, *shape)) for _ in range(steps)]


def run(tx, steps, dtype=jnp.float32):
    """Directions after each step."""
    x = jnp.zeros(steps[0].shape[1:], dtype)
    state, out = tx.init(x), []
    update = jax.jit(lambda g, h, s: tx.update(g, s, x, hessian_diag=h))
    for g, h in steps:
        u, state = update(jnp.asarray(g, dtype), jnp.asarray(h, dtype), state)
        out.append(np.asarray(u))
    return np.stack(out), state


def by_hand(steps, d, b1=0.9, b2=0.999, eps=1e-4, power=1.0):
    """The rule in NumPy, with D already averaged; returns the directions."""
    m = s = 0.0
    out = []
    for t, ((g, _), d_t) in enumerate(zip(steps, d, strict=True), start=1):
        m = b1 * m + (1 - b1) * g
        s = b2 * s + (1 - b2) * d_t**2
        root = np.sqrt(s / (1 - b2**t))
        out.append((m / (1 - b1**t)) / (root**power + eps))
    return np.stack(out)


def test_newtons_step_on_a_diagonal_quadratic():
    # The real estimator: one Rademacher draw is exact on a diagonal Hessian.
    tx = ox.adahessian(1.0, b1=0.0, b2=0.0, eps=0.0)
    h = jnp.array([1.0, 4.0, 100.0])

    def value_fn(x):
        return jnp.sum(h * (x - 2) ** 2) / 2

    x = jnp.array([3.0, -5.0, 7.0])
    updates, _ = tx.update(jax.grad(value_fn)(x), tx.init(x), x, value_fn=value_fn)
    np.testing.assert_allclose(x + updates, [2.0, 2.0, 2.0], rtol=1e-5)


def test_power_0_is_the_corrected_momentum_over_1_plus_eps():
    steps = random_steps((3,))
    actual, _ = run(given(hessian_power=0.0, eps=0.25), steps)
    m, out = 0.0, []
    for t, (g, _) in enumerate(steps, start=1):
        m = 0.9 * m + 0.1 * g
        out.append(m / (1 - 0.9**t) / 1.25)
    np.testing.assert_allclose(actual, np.stack(out), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_the_rule_in_numpy(power):
    with jax.enable_x64(True):
        steps = random_steps((3, 2))
        options = {"b1": 0.8, "b2": 0.95, "eps": 0.01}
        actual, _ = run(given(hessian_power=power, **options), steps, jnp.float64)
        d = [np.abs(h) for _, h in steps]
        expected = by_hand(steps, d, power=power, **options)
        np.testing.assert_allclose(actual, expected, rtol=1e-12)


# Spatial average ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((5,), ()),
        ((4, 3), ()),
        ((3, 2, 4), (0,)),
        ((3, 3, 2, 4), (0, 1)),
        ((2, 2, 2, 3, 2), (0, 1, 2)),
    ],
    ids=["bias", "dense", "1-D conv", "2-D conv", "3-D conv"],
)
def test_the_window_of_a_convolution_shares_one_second_moment(shape, axes):
    steps = random_steps(shape)
    actual, state = run(given(), steps)
    nu = np.asarray(state.nu)
    np.testing.assert_array_equal(
        nu,
        np.broadcast_to(
            nu[
                tuple(slice(1) if i in axes else slice(None) for i in range(len(shape)))
            ],
            shape,
        ),
    )
    # The absolute value comes first, then the mean.
    d = [
        np.broadcast_to(np.abs(h).mean(axes, keepdims=True), shape)
        if axes
        else np.abs(h)
        for _, h in steps
    ]
    # 1 - b2^t cancels in float32: 6e-8 / (2 * 1e-3).
    np.testing.assert_allclose(actual, by_hand(steps, d), rtol=5e-5, atol=1e-6)


def test_no_spatial_average_keeps_every_entry():
    steps = random_steps((3, 3, 2, 4))
    actual, _ = run(given(spatial_average=False), steps)
    d = [np.abs(h) for _, h in steps]
    np.testing.assert_allclose(actual, by_hand(steps, d), rtol=5e-5, atol=1e-6)


def test_a_function_averages_by_path():
    def over_inputs(path, d):
        name = path[-1].key
        return (
            jnp.broadcast_to(jnp.mean(d, axis=0, keepdims=True), d.shape)
            if name == "kernel"
            else d
        )

    tx = given(spatial_average=over_inputs)
    x = {"kernel": jnp.zeros((2, 2)), "other": jnp.zeros((2, 2))}
    h = jax.tree.map(lambda _: jnp.array([[1.0, -2.0], [3.0, 4.0]]), x)
    _, state = tx.update(x, tx.init(x), x, hessian_diag=h)
    root = jax.tree.map(lambda s: np.sqrt(s / 0.001), state.nu)
    np.testing.assert_allclose(root["kernel"], [[2.0, 3.0], [2.0, 3.0]], rtol=5e-5)
    np.testing.assert_allclose(root["other"], [[1.0, 2.0], [3.0, 4.0]], rtol=5e-5)


# Interval -----------------------------------------------------------------------------


def test_between_refreshes_the_last_curvature_enters_and_the_bias_stays_right():
    with jax.enable_x64(True):
        steps = random_steps((3, 3, 2, 4), steps=7)
        actual, state = run(given(update_interval=3), steps, jnp.float64)
        last = [steps[t - t % 3][1] for t in range(7)]
        d = [np.broadcast_to(np.abs(h).mean((0, 1)), h.shape) for h in last]
        np.testing.assert_allclose(actual, by_hand(steps, d), rtol=1e-10)
        np.testing.assert_array_equal(state.hessian, steps[6][1])  # signed, raw


def test_with_constant_curvature_the_interval_changes_nothing():
    g, h = random_steps((4,), steps=1)[0]
    steps = [np.stack([g, h])] * 6
    every, _ = run(given(), steps)
    fourth, _ = run(given(update_interval=4), steps)
    np.testing.assert_array_equal(every, fourth)
    # Averages of constants are the constants, once corrected.
    np.testing.assert_allclose(fourth[-1], g / (np.abs(h) + 1e-4), rtol=5e-5)


def test_only_a_cached_curvature_is_in_the_state():
    x = {"w": jnp.zeros(3, jnp.bfloat16)}
    assert given().init(x).hessian == ()
    state = given(update_interval=2).init(x)
    assert state.hessian["w"].dtype == jnp.float32


@pytest.mark.parametrize("interval", [1, 2])
def test_masked_leaves_have_no_curvature_although_extra_trees_are_not_masked(interval):
    x = {"a": jnp.ones(2), "b": jnp.ones(2)}
    tx = optax.masked(given(update_interval=interval), {"a": True, "b": False})
    state = tx.init(x)
    for _ in range(2):
        u, state = tx.update(x, state, x, hessian_diag=x)
    np.testing.assert_allclose(u["a"], 1.0, rtol=2e-4)
    np.testing.assert_array_equal(u["b"], x["b"])


@pytest.mark.parametrize("interval", [1, 2])
def test_a_float32_estimate_of_float64_parameters_is_taken(interval):
    with jax.enable_x64(True):
        x = jnp.ones(2, jnp.float64)
        tx = given(update_interval=interval)
        u, state = tx.update(
            x, tx.init(x), x, hessian_diag=jnp.full(2, 2.0, jnp.float32)
        )
        assert u.dtype == state.nu.dtype == jnp.float64
        np.testing.assert_allclose(u, 1 / (2 + 1e-4), rtol=1e-12)


# The optimizer ------------------------------------------------------------------------


def test_the_optimizer_adds_decay_and_the_learning_rate():
    tx = ox.adahessian(0.1, weight_decay=0.5, estimator=ox.external_hessian_diag())
    x = jnp.linspace(1.0, 2.0, 5)
    g, h = (jnp.asarray(a, jnp.float32) for a in random_steps((5,), 1)[0])
    updates, _ = tx.update(g, tx.init(x), x, hessian_diag=h)
    u, _ = given().update(g, given().init(x), x, hessian_diag=h)
    np.testing.assert_allclose(updates, -0.1 * (u + 0.5 * x), rtol=1e-6)


def test_the_defaults_are_those_of_the_authors_code():
    x = jnp.ones(2)
    tx, explicit = (
        ox.adahessian(),
        ox.adahessian(0.15, 0.9, 0.999, 1e-4, 0.0, None, 1.0, True, 1),
    )

    def value_fn(x):
        return jnp.sum(x**4)

    a, b = (t.update(x, t.init(x), x, value_fn=value_fn)[0] for t in (tx, explicit))
    np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(a, -0.15 / (12 + 1e-4), rtol=5e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"b1": 1.0}, "scale_by_adahessian: b1 must lie in"),
        ({"eps": -1.0}, r"scale_by_adahessian: eps must lie in \[0.0"),
        ({"hessian_power": 1.1}, r"hessian_power must lie in \[0.0, 1.0\], got 1.1"),
        ({"update_interval": 0}, "scale_by_adahessian: update_interval must be"),
    ],
)
def test_arguments_outside_their_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ox.adahessian(**options)

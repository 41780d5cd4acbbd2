"""Sign momentum: `lion_k`, its kernels, and what decay makes of them."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox


def draws(shape, steps, seed=0):
    return jnp.asarray(
        np.random.default_rng(seed).normal(size=(steps, *shape)), jnp.float32
    )


def trajectory(tx, x, gradients):
    """Positions after each step, compiled."""

    def step(carry, g):
        x, state = carry
        updates, state = tx.update(g, state, x)
        x = optax.apply_updates(x, updates)
        return (x, state), x

    return jax.jit(lambda x: jax.lax.scan(step, (x, tx.init(x)), gradients)[1])(x)


def minimised(tx, gradient, x, steps):
    """The position after so many steps on a function of the given gradient."""

    def step(carry, _):
        x, state = carry
        updates, state = tx.update(gradient(x), state, x)
        return (optax.apply_updates(x, updates), state), None

    with jax.numpy_dtype_promotion("standard"):  # optax's schedules
        return jax.lax.scan(step, (x, tx.init(x)), length=steps)[0][0]


# Lion, and its smooth relative in optax -----------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_l1_is_optax_lion_bit_for_bit(dtype):
    with jax.enable_x64(dtype == "float64"):
        x = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4).astype(dtype)
        g = draws((3, 4), 100).astype(dtype)
        options = {"b1": 0.95, "b2": 0.98, "weight_decay": 0.1}
        ours = trajectory(ox.lion_k(1e-2, **options), x, g)
        theirs = trajectory(optax.lion(1e-2, **options), x, g)
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == dtype


def test_l1_is_optax_lion_bit_for_bit_with_a_schedule_and_a_mask():
    x, g = {"a": jnp.ones(3), "b": jnp.ones(3)}, draws((3,), 30)
    options = {
        "learning_rate": optax.linear_schedule(1e-2, 1e-3, 30),
        "weight_decay": 0.1,
        "mask": {"a": True, "b": False},
    }
    with jax.numpy_dtype_promotion("standard"):
        ours = trajectory(ox.lion_k(**options), x, {"a": g, "b": g})
        theirs = trajectory(optax.lion(**options), x, {"a": g, "b": g})
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.usefixtures("optimized")
def test_huber_of_width_1_is_optax_lions_refined_mode_bit_for_bit():
    x, g = jnp.zeros((3, 4)), 2 * draws((3, 4), 100)
    ours = trajectory(ox.scale_by_lion_k(kappa=ox.lion_kernel("huber", e=1.0)), x, g)
    theirs = trajectory(optax.scale_by_lion(mode="refined"), x, g)
    np.testing.assert_array_equal(ours, theirs)


def test_two_steps_by_hand():
    tx = ox.scale_by_lion_k(b1=0.5, b2=0.75, kappa=lambda u: u)
    state = tx.init(jnp.zeros(()))
    first, state = tx.update(jnp.asarray(4.0), state)
    second, state = tx.update(jnp.asarray(-2.0), state)
    assert first == 0.5 * 4.0  # u = b1 * 0 + (1 - b1) * 4
    assert second == 0.5 * 1.0 + 0.5 * -2.0  # m was (1 - b2) * 4 = 1
    assert state.mu == 0.75 * 1.0 + 0.25 * -2.0


def test_the_momentum_is_kept_in_mu_dtype():
    tx = ox.scale_by_lion_k(mu_dtype=jnp.bfloat16)
    g = jnp.ones(2)
    state = tx.init(g)
    for _ in range(2):
        direction, state = tx.update(g, state)
    assert state.mu.dtype == jnp.bfloat16
    assert direction.dtype == jnp.float32


# Kernels ------------------------------------------------------------------------------

# Name, parameters, K.
CONVEX = {
    "l1": ({}, lambda u: np.abs(u).sum()),
    "lp 1.5": ({"p": 1.5}, lambda u: (np.abs(u) ** 1.5).sum() ** (1 / 1.5)),
    "lp 3": ({"p": 3.0}, lambda u: (np.abs(u) ** 3).sum() ** (1 / 3)),
    "group": ({}, lambda u: np.linalg.norm(u, axis=-1).sum()),
    "group 0": ({"axis": 0}, lambda u: np.linalg.norm(u, axis=0).sum()),
    "group all": ({"axis": (0, 1)}, np.linalg.norm),
    "truncated": ({"e": 0.5}, lambda u: np.maximum(np.abs(u) - 0.5, 0).sum()),
    "topk": ({"k": 4}, lambda u: np.sort(np.abs(u).ravel())[-4:].sum()),
    "huber": (
        {"e": 0.7},
        lambda u: np.where(np.abs(u) < 0.7, u**2 / 1.4, np.abs(u) - 0.35).sum(),
    ),
    "pseudo_huber": ({"e": 0.7}, lambda u: (np.sqrt(u**2 + 0.49) - 0.7).sum()),
}


def kernel_of(row):
    return ox.lion_kernel(row.split()[0], **CONVEX[row][0])


every_kernel = pytest.mark.parametrize("row", CONVEX)


@every_kernel
def test_kernels_are_gradients_of_k(row):
    function = CONVEX[row][1]
    u = np.random.default_rng(0).normal(size=(3, 4))
    h = 1e-5
    slopes = np.zeros_like(u)
    for i in np.ndindex(u.shape):
        step = np.zeros_like(u)
        step[i] = h
        slopes[i] = (function(u + step) - function(u - step)) / (2 * h)
    with jax.enable_x64(True):
        actual = kernel_of(row)(jnp.asarray(u))
    # Truncation is h^2 times a third derivative of order 10, rounding 1e-16 * 5 / h.
    np.testing.assert_allclose(actual, slopes, rtol=0, atol=2e-9)


@every_kernel
def test_kernels_are_odd(row):
    u = draws((3, 4), 1)[0]
    np.testing.assert_array_equal(kernel_of(row)(-u), -kernel_of(row)(u))


@every_kernel
def test_an_all_zero_leaf_gives_zero(row):
    np.testing.assert_array_equal(kernel_of(row)(jnp.zeros((3, 4))), jnp.zeros((3, 4)))


@every_kernel
@pytest.mark.parametrize("scale", [1e30, 1e-30], ids=["huge", "tiny"])
def test_huge_and_tiny_momenta_give_finite_directions_of_size_1_at_most(row, scale):
    out = kernel_of(row)(draws((3, 4), 1)[0] * jnp.float32(scale))
    assert jnp.isfinite(out).all()
    assert jnp.abs(out).max() <= 1
    homogeneous = row.split()[0] in ("l1", "lp", "group", "topk")
    if homogeneous:  # degree 0: the size of the momentum does not matter
        near = kernel_of(row)(draws((3, 4), 1)[0])
        np.testing.assert_allclose(out, near, rtol=1e-5)


@every_kernel
def test_directions_obey_the_constraint_of_the_conjugate(row):
    for u in draws((3, 4), 20):
        d = np.asarray(kernel_of(row)(u), np.float64)
        assert np.abs(d).max() <= 1
        if row.startswith("lp"):
            q = 1 / (1 - 1 / CONVEX[row][0]["p"])
            np.testing.assert_allclose((np.abs(d) ** q).sum(), 1.0, rtol=1e-5)
        if row.startswith("group"):
            axis = CONVEX[row][0].get("axis", -1)
            norms = np.linalg.norm(d, axis=axis)
            np.testing.assert_allclose(norms, np.ones_like(norms), rtol=1e-6)
        if row == "topk":
            assert np.abs(d).sum() == 4


def test_group_of_a_scalar_is_its_sign():
    np.testing.assert_array_equal(ox.lion_kernel("group")(jnp.asarray(-3.0)), -1.0)


def test_a_zero_group_gives_zero_beside_others():
    out = ox.lion_kernel("group")(jnp.array([[3.0, 4.0], [0.0, 0.0]]))
    np.testing.assert_allclose(out, [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6)


def test_lp_of_2_is_the_group_of_all():
    u = draws((3, 4), 1)[0]
    np.testing.assert_allclose(
        ox.lion_kernel("lp", p=2.0)(u),
        ox.lion_kernel("group", axis=(0, 1))(u),
        rtol=1e-6,
    )


def test_topk_counts_every_tie_at_the_kth_place():
    out = ox.lion_kernel("topk", k=2)(jnp.array([3.0, -1.0, 1.0, 0.5]))
    np.testing.assert_array_equal(out, [1.0, -1.0, 1.0, 0.0])


@pytest.mark.parametrize("k", [12, 13, 10**6])
def test_topk_of_all_entries_is_l1(k):
    u = draws((3, 4), 1)[0]
    np.testing.assert_array_equal(ox.lion_kernel("topk", k=k)(u), jnp.sign(u))


def test_truncation_at_0_is_l1():
    u = jnp.array([-2.0, 0.0, 1e-30])
    np.testing.assert_array_equal(ox.lion_kernel("truncated", e=0.0)(u), jnp.sign(u))


def test_truncation_drops_what_is_exactly_at_the_threshold():
    out = ox.lion_kernel("truncated", e=0.5)(jnp.array([0.5, -0.5, 0.75]))
    np.testing.assert_array_equal(out, [0.0, 0.0, 1.0])


# What decay makes of the kernel: minimise f(x) + K*(wd x) / wd ------------------------


@pytest.mark.parametrize("row", ["l1", "huber", "pseudo_huber", "truncated"])
@pytest.mark.parametrize("start", [5.0, -7.0])
def test_the_distance_to_the_box_shrinks_by_the_decay_at_every_step(row, start):
    learning_rate, decay = 0.05, 0.5  # the box is |x| <= 2
    tx = ox.lion_k(learning_rate, kappa=kernel_of(row), weight_decay=decay)
    x = trajectory(tx, jnp.full((4,), start), draws((4,), 150))
    x = jnp.concatenate([jnp.full((1, 4), start), x])
    outside = jnp.maximum(jnp.abs(x) - 2, 0)
    bound = (1 - learning_rate * decay) * outside[:-1]
    assert (outside[1:] <= bound * (1 + 1e-6) + 1e-6).all()
    assert (outside[-1] < 0.1).all() and (outside[1] > 0).all()


def test_lion_ends_at_the_box():
    tx = ox.lion_k(0.01, weight_decay=1.0)
    x = minimised(tx, lambda x: x - 3, jnp.asarray(0.0), 2000)
    # Geometric: 0.99^2000 = 2e-9 of the way is left, and float32 rounds at 1.
    np.testing.assert_allclose(x, 1.0, rtol=1e-5)


@pytest.mark.parametrize(("e", "end"), [(0.25, 0.4), (1.0, 0.25)])
def test_huber_shrinks_the_solution_by_1_plus_e(e, end):
    tx = ox.lion_k(0.01, kappa=ox.lion_kernel("huber", e=e), weight_decay=1.0)
    x = minimised(tx, lambda x: x - 0.5, jnp.asarray(0.0), 3000)
    np.testing.assert_allclose(x, end, rtol=1e-5)


@pytest.mark.parametrize("row", ["lp 1.5", "lp 3", "group", "huber", "pseudo_huber"])
def test_smooth_kernels_end_where_gradient_and_decay_balance(row):
    target = jnp.array([[1.5, -0.4, 0.3], [0.1, 2.0, -1.0]])
    tx = ox.lion_k(3e-3, kappa=kernel_of(row), weight_decay=1.0)
    x = minimised(tx, lambda x: x - target, jnp.zeros((2, 3)), 8000)
    # -grad f is in the subdifferential of K*, so x = -grad K(grad f); the time constant
    # is 1 / learning_rate steps, 24 of which have passed.
    np.testing.assert_allclose(x, -kernel_of(row)(x - target), atol=1e-4)


def test_the_group_kernel_projects_on_balls():
    target = jnp.array([[3.0, 4.0], [0.0, -2.0]])
    tx = ox.lion_k(3e-3, kappa="group", weight_decay=1.0)
    x = minimised(tx, lambda x: x - target, jnp.zeros((2, 2)), 8000)
    # Steps below half an ulp of x vanish: 2^-25 / 3e-3 = 1e-5 of the way is left.
    np.testing.assert_allclose(x, [[0.6, 0.8], [0.0, -1.0]], atol=3e-5)


def test_truncation_adds_a_soft_threshold_on_the_box():
    # Kernel and decay jump, so positions hover within a few learning rates.
    schedule = optax.linear_schedule(1e-2, 1e-4, 6000)
    tx = ox.lion_k(schedule, kappa=ox.lion_kernel("truncated", e=0.2), weight_decay=1.0)
    target = jnp.array([0.5, -0.6, 0.1, 3.0])
    x = minimised(tx, lambda x: x - target, jnp.zeros(4), 8000)
    np.testing.assert_allclose(x, [0.3, -0.4, 0.0, 1.0], atol=5e-3)


def test_topk_adds_an_l1_ball_to_the_box():
    # Projection of the target on |x|_inf <= 1, |x|_1 <= 2: soft threshold at 0.25.
    schedule = optax.linear_schedule(1e-2, 1e-4, 6000)
    tx = ox.lion_k(schedule, kappa=ox.lion_kernel("topk", k=2), weight_decay=1.0)
    target = jnp.array([0.9, -0.85, 0.75, 0.5])
    x = minimised(tx, lambda x: x - target, jnp.zeros(4), 8000)
    np.testing.assert_allclose(x, [0.65, -0.6, 0.5, 0.25], atol=2e-2)
    assert jnp.abs(x).sum() <= 2.01


# Errors -------------------------------------------------------------------------------


def test_an_unknown_kernel_is_named_with_the_choices():
    with pytest.raises(
        ValueError, match=r"name must be one of 'l1', 'lp', .* got 'l2'"
    ):
        ox.lion_kernel("l2")
    with pytest.raises(ValueError, match="got 'l2'"):
        ox.scale_by_lion_k(kappa="l2")


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("lp", {"p": 1.0}, r"lion_kernel\('lp'\): p must lie in \(1.0, inf\]"),
        ("truncated", {"e": -0.1}, r"lion_kernel\('truncated'\): e must lie in \[0.0"),
        ("huber", {"e": 0.0}, r"lion_kernel\('huber'\): e must lie in \(0.0"),
        ("pseudo_huber", {"e": 0.0}, r"lion_kernel\('pseudo_huber'\): e must lie in"),
        ("topk", {"k": 0}, r"lion_kernel\('topk'\): k must be an integer .*got 0"),
        ("topk", {"k": 2.0}, r"lion_kernel\('topk'\): k must be an integer .*got 2\.0"),
    ],
)
def test_kernel_parameters_outside_their_range_are_named(name, params, message):
    with pytest.raises(ValueError, match=message):
        ox.lion_kernel(name, **params)


def test_a_parameter_that_the_kernel_does_not_have_is_a_type_error():
    with pytest.raises(TypeError, match="e"):
        ox.lion_kernel("l1", e=0.1)
    with pytest.raises(TypeError, match="'p'"):
        ox.scale_by_lion_k(kappa="lp")


def test_rates_outside_0_to_1_are_named():
    for name in ("b1", "b2"):
        with pytest.raises(ValueError, match=rf"lion_k: {name} must lie in \[0.0, 1.0"):
            ox.lion_k(0.1, **{name: 1.0})


def test_learning_rate_times_decay_must_stay_below_1():
    with pytest.raises(ValueError, match=r"learning_rate \* weight_decay must"):
        ox.lion_k(0.5, weight_decay=2.0)
    ox.lion_k(0.5, weight_decay=1.9)
    ox.lion_k(optax.constant_schedule(0.5), weight_decay=2.0)  # cannot be known


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "b1"])
def test_hyper_parameters_may_be_traced(name):
    options = {"learning_rate": 0.1, "weight_decay": 0.2, "b1": 0.9}
    x, g = jnp.array([1.0, -2.0]), jnp.array([0.3, 0.1])

    def step(value):
        tx = ox.lion_k(**(options | {name: value}))
        return tx.update(g, tx.init(x), x)[0]

    values = jnp.array([0.3, 0.5])
    np.testing.assert_allclose(
        jax.vmap(step)(values), jnp.stack([step(0.3), step(0.5)]), rtol=1e-6
    )


def test_weight_decay_none_is_no_decay():
    x, g = jnp.array([1.0, -2.0]), jnp.array([0.3, 0.1])
    none, zero = ox.lion_k(0.1, weight_decay=None), ox.lion_k(0.1, weight_decay=0.0)
    np.testing.assert_array_equal(
        none.update(g, none.init(x), x)[0], zero.update(g, zero.init(x), x)[0]
    )

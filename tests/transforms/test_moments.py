"""diffGrad, Adam-atan2 and AdamNC: what each makes of Adam's moments."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox


def draws(shape, steps, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(steps, *shape)), dtype)


def directions(tx, gradients):
    """What a link emits for each gradient, and its last state."""

    def step(state, g):
        direction, state = tx.update(g, state)
        return state, direction

    state, out = jax.lax.scan(step, tx.init(gradients[0]), gradients)
    return out, state


def adam(**options):
    return ox.full_precision(optax.scale_by_adam(**options))


# diffGrad -----------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
def test_diffgrad_is_half_of_adam_from_the_second_equal_gradient_on():
    g = jnp.full((10, 1), 0.7)
    ours, _ = directions(ox.scale_by_diffgrad(), g)
    theirs, _ = directions(adam(), g)
    np.testing.assert_allclose(ours[0] / theirs[0], [0.6681877722], rtol=1e-10)
    np.testing.assert_array_equal(ours[1:], 0.5 * theirs[1:])


def test_diffgrad_is_adam_where_the_gradient_jumps():
    g = jnp.asarray([[1e3], [-1e3]] * 5)
    ours, _ = directions(ox.scale_by_diffgrad(), g)
    np.testing.assert_array_equal(ours, directions(adam(), g)[0])


def test_diffgrad_lies_between_half_of_adam_and_all_of_it():
    g = draws((3, 4), 30)
    ours, state = directions(ox.scale_by_diffgrad(0.8, 0.99), g)
    theirs, base = directions(adam(b1=0.8, b2=0.99), g)
    change = np.abs(np.diff(np.asarray(g), axis=0, prepend=0))
    ratio = np.asarray(ours / theirs)
    assert (ratio >= 0.5).all()
    assert (ratio < 1).all()
    np.testing.assert_allclose(ratio, 1 / (1 + np.exp(-change)), rtol=1e-5)
    # The moments see the plain gradient.
    np.testing.assert_array_equal(state.mu, base.mu)
    np.testing.assert_array_equal(state.nu, base.nu)
    np.testing.assert_array_equal(state.previous, g[-1])


def test_diffgrads_eps_is_added_after_the_bias_correction():
    g = jnp.full((1, 1), 2.0)
    xi = 1 / (1 + math.exp(-2))
    # Adam's 1 - b2^t cancels in float32: 6e-8 / (2 * 1e-3) relative.
    out, _ = directions(ox.scale_by_diffgrad(eps=0.5), g)
    np.testing.assert_allclose(out, [[xi * 2 / 2.5]], rtol=3e-5)
    out, _ = directions(ox.scale_by_diffgrad(eps=0.0, eps_root=5.0), g)
    np.testing.assert_allclose(out, [[xi * 2 / 3]], rtol=3e-5)


# Adam-atan2 ---------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (1.27, 1.0), (1.0, 3.0), (2.0, 0.5)])
def test_the_first_step_of_adam_atan2_has_one_size_and_zeros_stay(a, b):
    g = jnp.asarray([[3.0, -1e-9, 0.0, 1e9]])
    out, _ = directions(ox.scale_by_adam_atan2(a=a, b=b), g)
    size = a * math.atan(1 / b)  # a pi / 4 at b = 1
    np.testing.assert_allclose(out, [[size, -size, 0, size]], rtol=1e-12)


def test_the_scale_of_the_gradient_changes_no_bit_until_squares_underflow():
    g = draws((16,), 20)
    tx = ox.scale_by_adam_atan2()
    near, _ = directions(tx, g)
    for exponent in (-20, -40, -50, 30):
        far, _ = directions(tx, g * jnp.float32(2.0**exponent))
        np.testing.assert_array_equal(far, near)
    far, _ = directions(tx, g * jnp.float32(2.0**-60))
    assert not np.array_equal(far, near)


@pytest.mark.usefixtures("x64")
def test_a_small_direction_of_adam_atan2_is_adams_without_eps():
    g = draws((50,), 40, dtype=jnp.float64)
    a, b = 1.5, 2.0
    ours, _ = directions(ox.scale_by_adam_atan2(0.95, 0.99, a, b), g)
    theirs, _ = directions(adam(b1=0.95, b2=0.99, eps=0.0), g)
    ratio = np.abs(theirs) / b
    # arctan(r) = r - r^3 / 3 + ..., an alternating series.
    gap = np.abs(ours - a / b * theirs)
    assert (gap <= a * ratio**3 / 3 + 1e-15).all()
    assert (ratio < 0.1).any()
    assert (np.abs(ours) <= a * np.pi / 2).all()


def test_adam_atan2_gives_its_bound_where_the_second_moment_is_lost():
    g = jnp.full((1, 2), 1e-30)  # its square underflows
    out, _ = directions(ox.scale_by_adam_atan2(a=2.0), g)
    np.testing.assert_allclose(out, np.full((1, 2), np.pi), rtol=1e-6)


def test_the_first_moment_of_adam_atan2_is_kept_in_mu_dtype():
    for mu_dtype, expected in ((None, jnp.float32), (jnp.bfloat16, jnp.bfloat16)):
        state = ox.scale_by_adam_atan2(mu_dtype=mu_dtype).init(jnp.ones(2))
        assert (state.mu.dtype, state.nu.dtype) == (expected, jnp.float32)


# AdamNC -------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
def test_adamncs_second_moment_is_the_mean_of_all_squares():
    g = draws((4,), 25, dtype=jnp.float64)
    for steps in (1, 2, 7, 25):
        _, state = directions(ox.scale_by_adamnc(), g[:steps])
        want = np.mean(np.asarray(g[:steps]) ** 2, axis=0)
        np.testing.assert_allclose(state.nu, want, rtol=1e-14)


def test_a_constant_gradient_makes_adamncs_second_moment_its_square():
    for steps in (1, 3, 10, 100):
        g = jnp.full((steps, 1), 3.0)
        _, state = directions(ox.scale_by_adamnc(), g)
        # A rounding of 2^-24 a step, whose share falls as 1/t.
        np.testing.assert_allclose(state.nu, [9.0], rtol=3e-7)


def test_adamnc_does_not_correct_its_bias_and_lets_b1_decay():
    g = jnp.asarray([[2.0], [4.0]])
    tx = ox.scale_by_adamnc(b1=0.5, eps=1.0, eps_root=6.0, b1_decay=0.5)
    out, state = directions(tx, g)
    m1 = 0.5 * 2.0
    m2 = 0.25 * m1 + 0.75 * 4.0
    np.testing.assert_allclose(out[0], [m1 / (math.sqrt(4 + 6) + 1)], rtol=1e-6)
    np.testing.assert_allclose(out[1], [m2 / (math.sqrt(10 + 6) + 1)], rtol=1e-6)
    np.testing.assert_allclose(state.mu, [m2], rtol=1e-6)


def test_adamnc_gives_0_for_entries_without_a_gradient():
    out, _ = directions(ox.scale_by_adamnc(), jnp.zeros((3, 2)))
    np.testing.assert_array_equal(out, np.zeros((3, 2)))


AMSGRAD = {"bias_correction_mu": False, "bias_correction_nu": False}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("tx", "end"),
    [
        (adam(b1=0.0, b2=0.1), 1.0),
        (ox.full_precision(optax.scale_by_amsgrad(0.0, 0.1, **AMSGRAD)), -0.99857),
        (ox.scale_by_adamnc(b1=0.0), -0.99787),
    ],
    ids=["adam", "amsgrad", "adamnc"],
)
def test_adam_fails_on_the_papers_counterexample_and_adamnc_does_not(tx, end):
    # f = 3x at every third step, else -x, on [-1, 1]: the mean is smallest at -1.
    def step(carry, t):
        x, state = carry
        g = jnp.where(t % 3 == 1, 3.0, -1.0)
        direction, state = tx.update(g, state)
        x = jnp.clip(x - 0.5 / jnp.sqrt(t.astype(float)) * direction, -1.0, 1.0)
        return (x, state), None

    x = jnp.zeros(())
    (x, _), _ = jax.lax.scan(step, (x, tx.init(x)), jnp.arange(1, 60_001))
    np.testing.assert_allclose(x, end, rtol=0, atol=1e-5)


# The optimizers, and what all share ---------------------------------------------------

OPTIMIZERS = {
    "diffgrad": (
        ox.diffgrad,
        ox.scale_by_diffgrad,
        {"b1": 0.8, "b2": 0.9, "eps": 1e-3, "eps_root": 1e-4},
    ),
    "adam_atan2": (
        ox.adam_atan2,
        ox.scale_by_adam_atan2,
        {"b1": 0.8, "b2": 0.9, "a": 1.27, "b": 0.5, "mu_dtype": jnp.bfloat16},
    ),
}


@pytest.mark.parametrize(
    ("ours", "link", "options"), OPTIMIZERS.values(), ids=[*OPTIMIZERS]
)
def test_the_optimizer_is_its_link_with_decay_and_learning_rate(ours, link, options):
    mask = {"a": True, "b": False}
    chain = optax.chain(
        link(**options),
        optax.add_decayed_weights(0.3, mask),
        optax.scale_by_learning_rate(0.5),
    )
    tx = ours(0.5, weight_decay=0.3, mask=mask, **options)
    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    state, other = tx.init(params), chain.init(params)
    for g in draws((3,), 3):
        updates, state = tx.update({"a": g, "b": g}, state, params)
        want, other = chain.update({"a": g, "b": g}, other, params)
        jax.tree.map(np.testing.assert_array_equal, updates, want)
        # The mask spares decay only.
        np.testing.assert_allclose(
            updates["b"] - updates["a"], np.full(3, 0.15), rtol=1e-5
        )


LINKS = (ox.scale_by_diffgrad, ox.scale_by_adam_atan2, ox.scale_by_adamnc)


@pytest.mark.parametrize("link", LINKS, ids=lambda link: link.__name__)
@pytest.mark.parametrize("size", [0.0, 1e30, 1e-30])
def test_gradients_at_the_edges_of_float32_make_no_nan(link, size):
    g = jnp.sign(draws((4,), 6)) * jnp.float32(size)
    out, state = directions(link(), g)
    assert not np.isnan(out).any()
    assert not any(np.isnan(x).any() for x in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("make", "bad"),
    [
        (ox.scale_by_diffgrad, {"b1": 1.0}),
        (ox.scale_by_diffgrad, {"b2": -0.1}),
        (ox.scale_by_diffgrad, {"eps": -1.0}),
        (ox.scale_by_diffgrad, {"eps_root": -1.0}),
        (ox.scale_by_adam_atan2, {"a": 0.0}),
        (ox.scale_by_adam_atan2, {"b": 0.0}),
        (ox.scale_by_adamnc, {"b1": 1.0}),
        (ox.scale_by_adamnc, {"b1_decay": 0.0}),
        (ox.scale_by_adamnc, {"b1_decay": 1.5}),
    ],
)
def test_an_argument_outside_its_range_is_named(make, bad):
    with pytest.raises(ValueError, match=f"{make.__name__}: {next(iter(bad))} must"):
        make(**bad)

"""Signal-to-noise ratios of gradients, and the optimizers made of them."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox


def examples(seed=0, k=8, shape=(3, 4), dtype=jnp.float32):
    """Gradients of k examples with means and deviations of order 1."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape) + rng.normal(size=(k, *shape)), dtype)


def mean(each):
    return jnp.mean(each, axis=0)


def once(tx, each):
    g = mean(each)
    return jax.jit(tx.update)(g, tx.init(g), per_example_grads=each)[0]


def printed(each, gamma=0.1, eps=1e-12):
    """The printed ratio, in NumPy and float64."""
    each = np.asarray(each, np.float64)
    m = each.mean(axis=0)
    r = m**2 / (each.var(axis=0) + eps)
    return np.clip(r / r.mean(), gamma, 1)


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5, 1.0])
def test_it_is_the_printed_formula_and_lies_between_gamma_and_one(gamma):
    each = examples()
    got = once(ox.scale_by_gsnr(gamma), each) / mean(each)
    # Variances and squares of order 1, each rounded about 10 times.
    np.testing.assert_allclose(got, printed(each, gamma), rtol=1e-5)
    assert (got >= gamma * (1 - 1e-6)).all()
    assert (got <= 1 + 1e-6).all()


@pytest.mark.parametrize("scale", [1e-3, 2.0, 1e4, 1e30])
def test_a_common_factor_of_all_gradients_changes_nothing(scale):
    each, tx = examples(), ox.scale_by_gsnr()
    want = once(tx, each)
    np.testing.assert_allclose(once(tx, each * scale) / scale, want, rtol=1e-5)


def test_eps_is_in_units_of_the_squared_gradient():
    each = examples()
    for scale, eps in ((1.0, 0.5), (1e-3, 1e-6), (30.0, 1e3)):
        got = once(ox.scale_by_gsnr(eps=eps), scale * each) / (scale * mean(each))
        np.testing.assert_allclose(got, printed(scale * each, eps=eps), rtol=1e-5)


def test_far_below_eps_the_ratio_is_that_of_the_squared_means():
    each = 1e-30 * examples()
    m = mean(each) / 1e-30
    got = once(ox.scale_by_gsnr(0.0), each) / mean(each)
    np.testing.assert_allclose(got, np.clip(m**2 / np.mean(m**2), 0, 1), rtol=1e-5)


def test_gradients_of_1e30_that_all_agree_pass_unchanged():
    each = jnp.full((8, 3), 1e30)
    np.testing.assert_allclose(once(ox.scale_by_gsnr(), each), each[0], rtol=1e-6)


def test_equal_ratios_everywhere_are_plain_sgd():
    m = jnp.array([[1.0, -2.0], [0.5, 4.0]])
    each = jnp.stack([m / 2, m + m / 2])
    np.testing.assert_array_equal(once(ox.scale_by_gsnr(eps=1e-30), each), m)


def test_a_leaf_of_zeros_stays_zero_and_its_ratio_is_gamma():
    tx, zero = ox.scale_by_gsnr(0.25, b3=0.5), jnp.zeros((4, 3))
    out, state = tx.update(zero[0], tx.init(zero[0]), per_example_grads=zero)
    np.testing.assert_array_equal(out, zero[0])
    np.testing.assert_array_equal(state.ratio, np.full(3, 0.125))


def test_the_mean_is_over_one_leaf():
    trees = {"a": examples(0), "b": 100 * examples(1, shape=(5,))}
    tx, g = ox.scale_by_gsnr(), jax.tree.map(mean, trees)
    out, _ = tx.update(g, tx.init(g), per_example_grads=trees)
    for k, each in trees.items():
        np.testing.assert_allclose(out[k], once(tx, each), rtol=1e-6)


def test_mean_squares_do_instead_of_single_gradients(x64):
    each, tx = examples(dtype=jnp.float64), ox.scale_by_gsnr()
    g = mean(each)
    out, _ = tx.update(g, tx.init(g), grad_sq_mean=mean(each**2))
    np.testing.assert_allclose(out, once(tx, each), rtol=1e-12)


def test_mean_squares_below_the_squared_mean_count_as_no_variance():
    g, tx = jnp.array([1.0, 2.0]), ox.scale_by_gsnr(0.0)
    out, _ = tx.update(g, tx.init(g), grad_sq_mean=g**2 - 0.01)
    # Both variances are zero: the ratios are as 1 to 4, their mean 2.5.
    np.testing.assert_allclose(out, [1 / 2.5, 2.0], rtol=1e-6)


def test_single_gradients_come_first_where_both_are_given():
    each, tx = examples(), ox.scale_by_gsnr()
    g = mean(each)
    out, _ = tx.update(
        g, tx.init(g), per_example_grads=each, grad_sq_mean=jnp.full_like(g, jnp.nan)
    )
    np.testing.assert_allclose(out, once(tx, each), rtol=1e-6)


def test_single_gradients_keep_the_variance_that_mean_squares_lose():
    # Deviations of 1e-4 around 1: their squares are below the rounding of g^2 = 1.
    each = 1 + 1e-4 * jnp.asarray(
        np.random.default_rng(0).normal(size=(8, 6)), jnp.float32
    )
    got = once(ox.scale_by_gsnr(), each) / mean(each)
    # A deviation of 1e-4 at 1 has relative rounding 6e-4.
    np.testing.assert_allclose(got, printed(each), rtol=5e-3)


def test_the_average_over_time_is_bias_corrected():
    tx, b3 = ox.scale_by_gsnr(b3=0.75), 0.75
    each = [examples(seed) for seed in range(3)]
    state, p = tx.init(mean(each[0])), 0.0
    assert isinstance(state, ox.GsnrState)
    for t, e in enumerate(each, 1):
        out, state = tx.update(mean(e), state, per_example_grads=e)
        p = b3 * p + (1 - b3) * printed(e)
        np.testing.assert_allclose(out, p / (1 - b3**t) * mean(e), rtol=2e-5)
    assert state.count == 3


def test_without_an_average_there_is_no_state():
    assert ox.scale_by_gsnr().init(jnp.ones(2)) == optax.EmptyState()


def test_buckets_take_the_mean_of_each_leaf():
    trees = {"a": examples(0), "b": 100 * examples(1)}
    g = jax.tree.map(mean, trees)
    for tx in (ox.scale_by_gsnr(), ox.scale_by_gsnr(b3=0.9), ox.vr_lamb(0.1)):
        got, want = (
            jax.jit(each.update)(g, each.init(g), g, per_example_grads=trees)[0]
            for each in (ox.bucketed(tx), tx)
        )
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-5), got, want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 1.5}, "gamma must lie in"),
        ({"b3": 1.0}, "b3 must lie in"),
        ({"eps": 0.0}, "eps must lie in"),
    ],
)
def test_errors_name_the_argument(options, message):
    with pytest.raises(ValueError, match=f"scale_by_gsnr: {message}"):
        ox.scale_by_gsnr(**options)


def test_without_gradients_of_examples_it_says_so():
    tx, g = ox.scale_by_gsnr(), jnp.ones(2)
    with pytest.raises(ValueError, match=r"scale_by_gsnr needs .*per_example_grads"):
        tx.update(g, tx.init(g))


def test_gradients_without_an_example_axis_are_refused():
    tx, g = ox.scale_by_gsnr(), {"w": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match=r"\['w'\].*\(2, 3\), needs \(examples"):
        tx.update(g, tx.init(g), per_example_grads=g)


# The optimizers -----------------------------------------------------------------------

RATE = 0.05
CHAINS = {
    "vr_sgd": (ox.vr_sgd, [], {"b3": None}),
    "vr_momentum": (ox.vr_momentum, [optax.trace(0.8)], {"b3": None, "momentum": 0.8}),
    "vr_adam": (
        ox.vr_adam,
        [optax.scale_by_adam(0.8, 0.99, 1e-4)],
        {"b1": 0.8, "b2": 0.99, "b3": 0.9, "eps": 1e-4},
    ),
    "vr_lamb": (
        ox.vr_lamb,
        [
            optax.scale_by_adam(0.8, 0.99, 1e-4),
            optax.add_decayed_weights(0.3, {"w": True, "b": False}),
            optax.scale_by_trust_ratio(),
        ],
        {
            "b1": 0.8,
            "b2": 0.99,
            "b3": 0.9,
            "eps": 1e-4,
            "weight_decay": 0.3,
            "mask": {"w": True, "b": False},
        },
    ),
}
every_chain = pytest.mark.parametrize(
    ("make", "links", "options"), CHAINS.values(), ids=CHAINS
)


def assert_equal_trajectories(a, b, rtol, disagree=True):
    x = y = {"w": jnp.ones((3, 4)), "b": jnp.zeros(3)}
    s, r = a.init(x), b.init(y)
    step, other = jax.jit(a.update), jax.jit(b.update)
    for t in range(4):
        each = {"w": examples(t), "b": examples(t + 9, shape=(3,))}
        if not disagree:  # half and one and a half of one gradient
            each = jax.tree.map(lambda e: jnp.stack([e[0] / 2, 1.5 * e[0]]), each)
        g = jax.tree.map(mean, each)
        u, s = step(g, s, x, per_example_grads=each)
        v, r = other(g, r, y, per_example_grads=each)
        x, y = optax.apply_updates(x, u), optax.apply_updates(y, v)
        for k in x:
            np.testing.assert_allclose(x[k], y[k], rtol=rtol)


@every_chain
def test_it_is_the_ratio_before_its_base(make, links, options):
    chain = optax.chain(
        ox.scale_by_gsnr(0.2, options["b3"], 1e-3),
        *links,
        optax.scale_by_learning_rate(RATE),
    )
    tx = make(RATE, gamma=0.2, gsnr_eps=1e-3, **options)
    assert_equal_trajectories(tx, ox.full_precision(chain), rtol=1e-6)


@every_chain
def test_where_the_ratio_is_the_same_everywhere_it_is_its_base(make, links, options):
    base = ox.full_precision(
        optax.with_extra_args_support(
            optax.chain(*links, optax.scale_by_learning_rate(RATE))
        )
    )
    tx = make(RATE, gsnr_eps=1e-30, **options)
    assert_equal_trajectories(tx, base, rtol=1e-5, disagree=False)


@every_chain
def test_the_learning_rate_may_be_a_schedule(make, links, options):
    halved = make(lambda count: RATE / (count + 1), **options)
    each = {"w": examples(), "b": examples(1, shape=(3,))}
    g = jax.tree.map(mean, each)
    plain, x = make(RATE, **options), {"w": jnp.ones((3, 4)), "b": jnp.ones(3)}
    s, r = halved.init(x), plain.init(x)
    for t in (1, 2):
        out, s = jax.jit(halved.update)(g, s, x, per_example_grads=each)
        want, r = jax.jit(plain.update)(g, r, x, per_example_grads=each)
        np.testing.assert_allclose(t * out["w"], want["w"], rtol=1e-6)


def test_the_defaults_of_lamb_are_optaxs():
    base = ox.full_precision(optax.with_extra_args_support(optax.lamb(RATE)))
    tx = ox.vr_lamb(RATE, gsnr_eps=1e-30)
    assert_equal_trajectories(tx, base, rtol=1e-5, disagree=False)


def test_lambs_trust_ratio_is_one_for_leaves_or_steps_of_zero():
    tx = ox.vr_lamb(0.5, eps=1.0)
    g = {"fresh": jnp.ones(2), "dead": jnp.zeros(2)}
    x = {"fresh": jnp.zeros(2), "dead": jnp.ones(2)}
    each = jax.tree.map(lambda a: jnp.stack([a, a]), g)
    updates, _ = tx.update(g, tx.init(x), x, per_example_grads=each)
    # Adam's first step is g / (|g| + eps) = 1/2; 1 - b2 cancels in float32.
    np.testing.assert_allclose(updates["fresh"], [-0.25, -0.25], rtol=1e-4)
    np.testing.assert_array_equal(updates["dead"], [0.0, 0.0])


def test_lamb_without_params_says_so():
    each = examples()
    with pytest.raises(ValueError, match="vr_lamb needs the parameters"):
        once(ox.vr_lamb(0.1), each)


def test_a_momentum_outside_its_range_is_named():
    with pytest.raises(ValueError, match="vr_momentum: momentum must lie in"):
        ox.vr_momentum(0.1, momentum=1.0)

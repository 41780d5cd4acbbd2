"""Weightings with an average for each range of noise levels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ext as ox


def schedule(**options):
    return ox.adaptive_noise_schedule(
        **{"num_bins": 4, "logsnr_min": -4.0, "logsnr_max": 4.0, "decay": 0.5} | options
    )


def test_bins_move_to_the_mean_of_their_losses_and_others_stay(x64):
    s = schedule()
    logsnr = jnp.array([-3.0, -2.5, 0.0, 3.9])
    losses = jnp.array([2.0, 4.0, 0.0, 9.0])
    _, state = s.update(losses, s.init(), logsnr=logsnr)
    np.testing.assert_allclose(state.bins, [2.0, 1.0, 0.5, 5.0])


def test_levels_outside_the_interval_go_to_the_end_bins():
    s = schedule(decay=0.0)
    logsnr = jnp.array([-1e4, 1e4, 4.0])
    _, state = s.update(jnp.array([5.0, 2.0, 4.0]), s.init(), logsnr=logsnr)
    np.testing.assert_allclose(state.bins, [5.0, 1.0, 1.0, 3.0])


def test_weights_are_those_of_the_density_before_the_update():
    s = schedule()
    logsnr = jnp.array([-3.0, 3.0])
    weights, state = s.update(jnp.array([7.0, 1.0]), s.init(), logsnr=logsnr)
    np.testing.assert_allclose(weights, [8.0, 8.0])  # uniform on [-4, 4]
    weights, _ = s.update(jnp.ones(2), state, logsnr=logsnr)
    # Bins 4, 1, 1, 1 of width 2: densities 4/14 and 1/14.
    np.testing.assert_allclose(weights, [3.5, 14.0], rtol=1e-6)


def test_quantiles_invert_the_cumulative_density():
    s = schedule()
    state = s.init()._replace(bins=jnp.array([3.0, 1.0, 0.0, 4.0]))
    u = jnp.array([0.0, 0.125, 0.375, 0.4375, 0.75, 1.0])
    want = [-4.0, -4.0 + 2 / 3, -2.0, -1.0, 3.0, 4.0]
    np.testing.assert_allclose(s.quantile(state, u), want, rtol=1e-6)


def test_weighted_mean_over_drawn_levels_is_the_integral(x64):
    s = schedule(num_bins=20)
    # No jump of the density falls between two of the 250 levels in a unit of mass.
    bins = jnp.asarray(np.tile([1.0, 4.0, 2.0, 9.0, 4.0], 4))
    state = s.init()._replace(bins=bins)
    logsnr = s.quantile(state, (jnp.arange(20_000.0) + 0.5) / 20_000)
    weights, _ = s.update(jnp.ones(20_000), state, logsnr=logsnr)
    integral = np.mean(weights * jnp.cos(logsnr))
    np.testing.assert_allclose(integral, 2 * np.sin(4.0), rtol=1e-6)


def test_a_bin_without_loss_stays_finite_and_can_come_back():
    s = schedule(decay=0.0)
    at = jnp.array([-3.0, -1.0, 1.0, 3.0])
    _, state = s.update(jnp.zeros(4), s.init(), logsnr=at)
    weights, state = s.update(jnp.ones(4), state, logsnr=at)
    np.testing.assert_allclose(weights, np.full(4, 8.0), rtol=1e-6)
    np.testing.assert_array_equal(state.bins, jnp.ones(4))
    _, one_left = s.update(jnp.array([0.0, 0.0, 0.0, 1.0]), state, logsnr=at)
    assert jnp.isfinite(s.quantile(one_left, jnp.linspace(0.0, 1.0, 9))).all()


def test_decay_and_the_number_of_bins_have_the_documented_defaults():
    s = ox.adaptive_noise_schedule()
    state = s.init()
    assert state.bins.shape == (100,)
    logsnr, state = jnp.array([-19.9, 19.9]), s.init()
    weights, state = s.update(jnp.array([3.0, 1.0]), state, logsnr=logsnr)
    np.testing.assert_allclose(weights, [40.0, 40.0], rtol=1e-6)
    np.testing.assert_allclose(state.bins[jnp.array([0, -1])], [1.002, 1.0], rtol=1e-6)


def test_no_gradient_flows_through_the_schedule():
    s = schedule()

    def total(losses, logsnr):
        weights, state = s.update(losses, s.init(), logsnr=logsnr)
        return jnp.sum(weights) + jnp.sum(state.bins)

    for grad in jax.grad(total, (0, 1))(jnp.ones(3), jnp.array([-1.0, 0.0, 2.0])):
        assert not grad.any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_is_stable_under_jit_and_scan(dtype):
    s = schedule()
    rng = np.random.default_rng(1)
    losses, logsnr = (
        jnp.asarray(rng.uniform(low, 4.0, (6, 5)), dtype) for low in (0.1, -4.0)
    )

    def step(state, each):
        weights, state = s.update(each[0], state, logsnr=each[1])
        return state, weights

    state, weights = jax.jit(lambda *a: jax.lax.scan(step, s.init(), a))(losses, logsnr)
    want = s.init()
    for t in range(6):
        want, each = step(want, (losses[t], logsnr[t]))
        np.testing.assert_allclose(weights[t], each, rtol=1e-5)
    assert weights.dtype == state.bins.dtype == jnp.float32
    np.testing.assert_allclose(state.bins, want.bins, rtol=1e-5)


def test_float32_losses_keep_float32_weights_under_x64(x64):
    s = schedule()
    losses = jnp.ones(2, jnp.float32)
    weights, state = s.update(losses, s.init(), logsnr=losses)
    assert weights.dtype == jnp.float32
    assert state.bins.dtype == s.init().bins.dtype
    assert s.quantile(state, losses).dtype == jnp.float32
    w = ox.f_distill_weighting()
    weights, state = w.update(None, w.init(), log_ratio=losses, t=losses)
    assert weights.dtype == jnp.float32
    assert state.bins.dtype == w.init().bins.dtype


def h(f, r):
    return {
        "kl": r,
        "js": r / (1 + r),
        "hellinger": np.sqrt(r),
    }[f]


@pytest.mark.parametrize("f", ["kl", "js", "hellinger"])
@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_ratios_are_divided_by_the_updated_average_of_their_bin(x64, f, decay, eps):
    w = ox.f_distill_weighting(f=f, num_bins=2, decay=decay, eps=eps)
    ratio = np.array([1.0, 3.0, 10.0, 0.5])
    t = jnp.array([0.1, 0.2, 0.6, 1.7])
    weights, state = w.update(None, w.init(), log_ratio=jnp.log(ratio), t=t)
    means = np.array([4.0, 10.5]) / (2 + eps)
    bins = decay + (1 - decay) * means
    np.testing.assert_allclose(state.bins, bins, rtol=1e-12)
    plain = h(f, ratio / (bins[np.array([0, 0, 1, 1])] + eps))
    np.testing.assert_allclose(weights, plain / (plain.mean() + eps), rtol=1e-12)


def test_bins_span_the_given_times_and_empty_ones_stay():
    w = ox.f_distill_weighting(num_bins=4, t_min=-1.0, t_max=3.0)
    log_ratio = jnp.log(jnp.array([2.0, 4.0, 8.0]))
    t = jnp.array([-7.0, 0.5, 3.0])
    _, state = w.update(None, w.init(), log_ratio=log_ratio, t=t)
    np.testing.assert_allclose(state.bins, [2.0, 4.0, 1.0, 8.0], rtol=1e-5)


def test_ratios_are_clipped_before_they_are_averaged():
    w = ox.f_distill_weighting(f="kl", num_bins=1, ratio_min=0.5, ratio_max=4.0)
    log_ratio = jnp.array([-1e4, 1e4])
    weights, state = w.update(None, w.init(), log_ratio=log_ratio, t=jnp.zeros(2))
    np.testing.assert_allclose(state.bins, [2.25], rtol=1e-5)
    np.testing.assert_allclose(weights, [0.5 / 2.25, 4 / 2.25], rtol=1e-5)


def test_losses_are_ignored_and_nothing_has_a_gradient():
    w = ox.f_distill_weighting()

    def total(log_ratio, t):
        weights, state = w.update(jnp.ones(3), w.init(), log_ratio=log_ratio, t=t)
        return weights[0] + state.bins.sum()

    t = jnp.array([0.1, 0.1, 0.9])
    for grad in jax.grad(total, (0, 1))(jnp.array([1.0, -1.0, 0.5]), t):
        assert not grad.any()


def test_unknown_extra_arguments_are_ignored():
    s, w = schedule(), ox.f_distill_weighting()
    x = jnp.ones(3)
    s.update(x, s.init(), logsnr=x, value=1.0)
    w.update(x, w.init(), log_ratio=x, t=x, value=1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: schedule(num_bins=0), "num_bins must be"),
        (lambda: schedule(logsnr_max=-4.0), "logsnr_max must lie"),
        (lambda: schedule(decay=1.1), "decay must lie"),
        (lambda: ox.f_distill_weighting(f="tv"), "f must be one of"),
        (lambda: ox.f_distill_weighting(num_bins=0), "num_bins must be"),
        (lambda: ox.f_distill_weighting(t_max=0.0), "t_max must lie"),
        (lambda: ox.f_distill_weighting(decay=-0.1), "decay must lie"),
        (lambda: ox.f_distill_weighting(ratio_min=0.0), "ratio_min must lie"),
    ],
)
def test_bad_hyperparameters_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("shape", [(2,), (3, 1)])
def test_shapes_that_do_not_fit_are_named(shape):
    s, w = schedule(), ox.f_distill_weighting()
    x, other = jnp.ones(3), jnp.ones(shape)
    with pytest.raises(AssertionError, match="losses, logsnr"):
        s.update(x, s.init(), logsnr=other)
    with pytest.raises(AssertionError, match="log_ratio, t"):
        w.update(None, w.init(), log_ratio=x, t=other)

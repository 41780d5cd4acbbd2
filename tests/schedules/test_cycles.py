"""One cycle, the infinite schedule, and cosines that are warmed up again."""

# optax's types let a schedule's value and a state be almost anything.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox

PIECES = dict(warmup_steps=10, cooldown_steps=20, constant_steps=50, anneal_steps=20)


def values(schedule, *counts):
    return np.array([float(schedule(jnp.asarray(c, jnp.int32))) for c in counts])


class TestOneCycle:
    def test_the_rate_is_optaxs_at_every_step(self, x64):
        rate, _ = ox.one_cycle(100, 0.1, div_factor=10, final_div_factor=100)
        optaxs = optax.linear_onecycle_schedule(100, 0.1, 0.45, 0.9, 10, 100)
        with jax.numpy_dtype_promotion("standard"):
            want = [float(optaxs(count)) for count in range(120)]
        # optax accumulates factors: two roundings of the largest value.
        np.testing.assert_allclose(values(rate, *range(120)), want, atol=3e-17)

    @pytest.mark.parametrize("pct_start", [0.3, 0.45])
    def test_the_corners(self, x64, pct_start):
        rate, momentum = ox.one_cycle(200, 0.3, 5.0, 20.0, pct_start, 0.9, 0.6)
        s = int(200 * pct_start)
        corners = (0, s, 2 * s, 200, 10_000)
        want = [0.06, 0.3, 0.06, 0.003, 0.003]
        np.testing.assert_allclose(values(rate, *corners), want, rtol=1e-14)
        want = [0.9, 0.6, 0.9, 0.9, 0.9]
        np.testing.assert_allclose(values(momentum, *corners), want, rtol=1e-14)

    def test_momentum_is_smallest_exactly_where_the_rate_is_largest(self):
        rate, momentum = ox.one_cycle(100, 0.1)
        rates, momenta = (values(s, *range(101)) for s in (rate, momentum))
        assert rates.argmax() == momenta.argmin() == 45
        assert (rates == rates.max()).sum() == (momenta == momenta.min()).sum() == 1

    def test_each_piece_is_a_straight_line(self, x64):
        rate, momentum = ox.one_cycle(100, 0.1)
        for schedule in (rate, momentum):
            for start, stop in ((0, 45), (45, 90), (90, 100)):
                bend = np.diff(values(schedule, *range(start, stop + 1)), 2)
                np.testing.assert_allclose(bend, 0, atol=1e-15)

    def test_the_cycle_ends_on_its_step_where_a_share_would_round_down(self):
        # 58 / 200 * 200 is 57.99..., so a share of the steps would end at 57.
        rate, _ = ox.one_cycle(200, 1.0, pct_start=0.1475)
        np.testing.assert_allclose(values(rate, 29, 58), [1.0, 0.1], rtol=1e-6)

    def test_up_and_down_alone_jumps_to_the_final_rate(self):
        rate, _ = ox.one_cycle(10, 1.0, pct_start=0.5)
        np.testing.assert_allclose(values(rate, 5, 9, 10), [1.0, 0.28, 0.001], 1e-6)

    def test_it_drives_sgd_through_injected_hyperparameters(self):
        rate, momentum = ox.one_cycle(100, 0.1)
        tx = ox.inject_hyperparams(optax.sgd)(learning_rate=rate, momentum=momentum)
        state = tx.init(jnp.zeros(2))
        _, state = tx.update(jnp.ones(2), state)
        got = state.hyperparams
        np.testing.assert_allclose(got["learning_rate"], 0.01, rtol=1e-6)
        np.testing.assert_allclose(got["momentum"], 0.95, rtol=1e-6)

    def test_values_outside_their_range_are_refused(self):
        for changed, message in [
            ({"pct_start": 0.6}, r"pct_start must lie in \(0.0, 0.5\]"),
            ({"pct_start": 0.005}, "less than one step: raise pct_start"),
            ({"total_steps": 0}, "total_steps must be an integer"),
            ({"div_factor": 0.0}, "div_factor must lie"),
            ({"final_div_factor": 0.0}, "final_div_factor must lie"),
            ({"max_momentum": 1.0}, "max_momentum must lie"),
            ({"min_momentum": -0.1}, "min_momentum must lie"),
            ({"peak_value": -1.0}, "peak_value must lie"),
        ]:
            with pytest.raises(ValueError, match=f"^one_cycle: .*{message}"):
                ox.one_cycle(**{"total_steps": 100, "peak_value": 0.1, **changed})


class TestInfinite:
    @pytest.mark.parametrize("cooldown", ["cosine", "rsqrt"])
    def test_the_corners_are_exact(self, x64, cooldown):
        s = ox.infinite_schedule(3e-4, 1.65e-4, 3e-5, **PIECES, cooldown=cooldown)
        got = values(s, 0, 10, 30, 79, 80, 100, 2**31 - 1)
        want = [0, 3e-4, 1.65e-4, 1.65e-4, 1.65e-4, 3e-5, 3e-5]
        np.testing.assert_allclose(got, want, rtol=3e-16)

    def test_half_way_through_the_anneal_is_the_geometric_mean(self, x64):
        s = ox.infinite_schedule(3e-4, 1.65e-4, 3e-5, **PIECES)
        np.testing.assert_allclose(values(s, 90), (1.65e-4 * 3e-5) ** 0.5, rtol=1e-14)

    def test_half_way_through_the_cool_down(self, x64):
        cosine, root = (
            ox.infinite_schedule(3.0, 1.0, 0.5, **PIECES, cooldown=c, alpha=8.0)
            for c in ("cosine", "rsqrt")
        )
        np.testing.assert_allclose(values(cosine, 20), 2.0, rtol=1e-14)
        # h(1/2) = 5^-1/2 - 1, h(1) = 1/3 - 1.
        want = 3 - 2 * (1 - 5**-0.5) / (2 / 3)
        np.testing.assert_allclose(values(root, 20), want, rtol=1e-14)

    def test_it_warms_up_from_the_initial_value(self):
        s = ox.infinite_schedule(1.0, 0.5, 0.1, **PIECES, init_value=0.2)
        np.testing.assert_allclose(values(s, 0, 5, 10), [0.2, 0.6, 1.0], rtol=1e-6)

    @pytest.mark.parametrize("cooldown", ["cosine", "rsqrt"])
    def test_nothing_jumps(self, cooldown):
        s = ox.infinite_schedule(1.0, 0.5, 0.1, **PIECES, cooldown=cooldown)
        steps = np.abs(np.diff(values(s, *range(110))))
        # The steepest is the start of the cool-down by roots: 5 per unit of x.
        assert steps.max() < 0.14

    def test_pieces_of_no_steps_are_left_out(self):
        none = dict.fromkeys(PIECES, 0)
        for name, want in [
            ("warmup_steps", [0.0, 0.5, 0.25]),
            ("cooldown_steps", [1.0, 0.75, 0.25]),
            ("constant_steps", [0.5, 0.5, 0.25]),
            ("anneal_steps", [0.5, 0.125**0.5, 0.25]),
        ]:
            s = ox.infinite_schedule(1.0, 0.5, 0.25, **{**none, name: 2})
            np.testing.assert_allclose(values(s, 0, 1, 2), want, rtol=1e-6)
        s = ox.infinite_schedule(1.0, 0.5, 0.25, **none)
        np.testing.assert_allclose(values(s, 0, 5), 0.25)

    def test_the_rate_may_also_rise_at_the_end(self):
        s = ox.infinite_schedule(1.0, 0.5, 2.0, **PIECES)
        got = values(s, 90, 99, 100, 2**31 - 1)
        np.testing.assert_allclose(got, [1.0, 2 * 0.25**0.05, 2, 2], rtol=1e-6)

    def test_values_outside_their_range_are_refused(self):
        for changed, message in [
            ({"cooldown": "linear"}, "must be one of 'cosine', 'rsqrt'"),
            ({"end_value": 0.0}, "end_value must lie"),
            ({"constant_value": 0.0}, "constant_value must lie"),
            ({"alpha": 0.0}, "alpha must lie"),
            ({"peak_value": -1.0}, "peak_value must lie"),
            ({"init_value": -1.0}, "init_value must lie"),
            *(({name: -1}, f"{name} must be an integer") for name in PIECES),
            *(({name: False}, f"{name} must be an integer") for name in PIECES),
        ]:
            given = {"peak_value": 1.0, "constant_value": 0.5, "end_value": 0.1}
            with pytest.raises(ValueError, match=f"^infinite_schedule: .*{message}"):
                ox.infinite_schedule(**{**given, **PIECES, **changed})


class TestRewarmedCosine:
    def test_the_corners(self, x64):
        s = ox.rewarmed_cosine_schedule([40, 60], [3.0, 2.0], 0.5, [5, 8], 0.1)
        got = values(s, 0, 5, 40, 48, 100, 2**31 - 1)
        np.testing.assert_allclose(got, [0.1, 3.0, 0.5, 2.0, 0.5, 0.5], rtol=1e-14)
        # Half way down: (35 steps from 5, 52 steps from 48).
        np.testing.assert_allclose(values(s, 74), 1.25, rtol=1e-14)
        np.testing.assert_allclose(np.mean(values(s, 22, 23)), 1.75, rtol=1e-14)

    def test_one_stage_is_optaxs_warm_up_and_cosine(self, x64):
        s = ox.rewarmed_cosine_schedule([50], 0.3, 0.03, 7, init_value=0.01)
        optaxs = optax.warmup_cosine_decay_schedule(0.01, 0.3, 7, 50, 0.03)
        with jax.numpy_dtype_promotion("standard"):
            want = [float(optaxs(count)) for count in range(70)]
        np.testing.assert_allclose(values(s, *range(70)), want, rtol=1e-14)

    def test_one_value_serves_all_stages(self):
        one = ox.rewarmed_cosine_schedule((20, 30, 10), 1.0, 0.1, 4)
        each = ox.rewarmed_cosine_schedule((20, 30, 10), [1.0] * 3, 0.1, [4] * 3)
        np.testing.assert_array_equal(values(one, *range(70)), values(each, *range(70)))

    def test_a_stage_without_warm_up_starts_at_its_peak(self):
        s = ox.rewarmed_cosine_schedule([10, 10], 1.0, 0.1, [0, 2])
        np.testing.assert_allclose(values(s, 0, 10, 12), [1.0, 0.1, 1.0], rtol=1e-6)

    def test_a_peak_of_zero_is_no_division_by_zero(self):
        s = ox.rewarmed_cosine_schedule([10], 0.0, 0.1, 2)
        np.testing.assert_allclose(values(s, 2, 6, 10), [0, 0.05, 0.1], atol=1e-8)

    def test_what_does_not_fit_is_refused(self):
        for changed, message in [
            ({"peak_value": [1.0]}, "2 stages, peak_value has 1"),
            ({"warmup_steps": [1, 2, 3]}, "2 stages, warmup_steps has 3"),
            ({"stage_steps": []}, "stage_steps has 0 stages"),
            ({"stage_steps": [10, 0]}, "stage_steps must be an integer"),
            ({"warmup_steps": 10}, "must be less than the 10 steps"),
            ({"warmup_steps": -1}, "warmup_steps must be an integer"),
            ({"peak_value": -1.0}, "peak_value must lie"),
            ({"end_value": -1.0}, "end_value must lie"),
            ({"init_value": -1.0}, "init_value must lie"),
        ]:
            given = {"stage_steps": [10, 20], "peak_value": 1.0, "end_value": 0.1}
            with pytest.raises(ValueError, match=f"rewarmed_cosine.*{message}"):
                ox.rewarmed_cosine_schedule(**{**given, "warmup_steps": 2, **changed})

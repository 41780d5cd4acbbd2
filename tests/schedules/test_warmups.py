"""Warm-ups and step sizes that go with optimizers of optax."""

# optax's types let a schedule's value and a state be almost anything.
# pyright: reportArgumentType=false, reportCallIssue=false

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox


def at(schedule, *steps):
    """Values at steps counted from 1."""
    return [float(schedule(jnp.asarray(t - 1, jnp.int32))) for t in steps]


class TestAdemamix:
    def test_the_specifications_decay_rates(self, x64):
        b3 = ox.ademamix_b3_schedule(0.9, 0.9999, warmup_steps=1000)
        want = [0.94996374319, 0.9998001996255]
        np.testing.assert_allclose(at(b3, 1, 500), want, rtol=1e-11)
        assert at(b3, 1000, 1001, 10**9) == [0.9999] * 3

    def test_half_way_the_half_life_is_the_mean_of_both(self, x64):
        b3 = ox.ademamix_b3_schedule(0.9, 0.9999, warmup_steps=1000)
        half_lives = [math.log(0.5) / math.log(b) for b in (0.9, 0.9999)]
        (b,) = at(b3, 500)
        np.testing.assert_allclose(math.log(0.5) / math.log(b), np.mean(half_lives))
        assert round(np.mean(half_lives), 3) == 3468.852

    def test_the_specifications_weights(self):
        alpha = ox.ademamix_alpha_schedule(5.0, warmup_steps=1000)
        np.testing.assert_allclose(
            at(alpha, 1, 500, 1000, 2000), [0.005, 2.5, 5, 5], rtol=3e-7
        )

    def test_without_a_fast_rate_the_half_life_grows_from_zero(self, x64):
        b3 = ox.ademamix_b3_schedule(b1=0.0, b3=0.99, warmup_steps=10)
        want = [0.99 ** (10 / t) for t in (1, 5, 10)]
        np.testing.assert_allclose(at(b3, 1, 5, 10), want, rtol=1e-14)

    def test_float32_keeps_the_digits_of_the_half_life(self):
        b3 = ox.ademamix_b3_schedule(0.9, 0.9999, warmup_steps=1000)
        want = 1 - 0.9998001996255
        # One rounding of a number near 1 is 6e-8 of 2e-4.
        np.testing.assert_allclose(1 - at(b3, 500)[0], want, rtol=6e-4)

    def test_without_the_slow_average_ademamix_is_adam(self):
        with jax.numpy_dtype_promotion("standard"):
            params, grads = jnp.ones(3), jnp.array([0.3, -2.0, 0.0])
            mixed = optax.contrib.ademamix(
                0.1,
                b3=ox.ademamix_b3_schedule(warmup_steps=5),
                alpha=ox.ademamix_alpha_schedule(0.0, warmup_steps=5),
            )
            got, want = (
                tx.update(grads, tx.init(params), params)[0]
                for tx in (mixed, optax.adam(0.1))
            )
        np.testing.assert_array_equal(got, want)

    def test_values_outside_their_range_are_refused(self):
        with pytest.raises(ValueError, match=r"b1 must lie in \[0.0, 1.0\)"):
            ox.ademamix_b3_schedule(b1=1.0, warmup_steps=3)
        with pytest.raises(ValueError, match=r"b3 must lie in \(0.0, 1.0\)"):
            ox.ademamix_b3_schedule(b3=1.0, warmup_steps=3)
        with pytest.raises(ValueError, match="b3 must lie"):
            ox.ademamix_b3_schedule(b3=0.0, warmup_steps=3)
        with pytest.raises(ValueError, match="alpha must lie"):
            ox.ademamix_alpha_schedule(-1.0, warmup_steps=3)
        for make in (ox.ademamix_b3_schedule, ox.ademamix_alpha_schedule):
            with pytest.raises(ValueError, match="warmup_steps must be an integer"):
                make(warmup_steps=0)


class TestRectification:
    STEPS = (6, 7, 10, 100, 1000, 10_000)
    VALUES = (0.02582111, 0.03273881, 0.04899801, 0.21533544, 0.64532565, 0.9997733)

    def test_the_specifications_values(self, x64):
        r = ox.rectification_schedule(0.999)
        assert at(r, 1, 2, 3, 4, 5) == [0.0] * 5
        np.testing.assert_allclose(at(r, *self.STEPS), self.VALUES, rtol=3e-7)

    def test_float32_has_three_digits_where_the_terms_cancel(self):
        # rho of 6 is the difference of 1999 and 1993, which float32 knows to 1e-4.
        r = ox.rectification_schedule(0.999)
        np.testing.assert_allclose(at(r, *self.STEPS), self.VALUES, rtol=3e-4)

    @pytest.mark.parametrize("b2", [0.9, 0.95, 0.99, 0.999])
    def test_it_first_moves_at_step_6(self, b2):
        r = ox.rectification_schedule(b2)
        assert [value > 0 for value in at(r, 4, 5, 6, 7)] == [False, False, True, True]

    def test_a_lower_threshold_moves_earlier_at_the_same_size(self, x64):
        low, usual = (ox.rectification_schedule(0.99, t) for t in (4.0, 5.0))
        assert at(low, 4) == [0.0]
        (fifth,) = at(low, 5)
        infinity = 199.0
        rho = infinity - 10 * 0.99**5 / (1 - 0.99**5)
        ratio = (rho - 4) * (rho - 2) * infinity / (195 * 197 * rho)
        np.testing.assert_allclose(fifth, math.sqrt(ratio), rtol=1e-10)
        assert at(low, 6, 50) == at(usual, 6, 50)

    def test_below_the_threshold_nothing_is_nan_even_in_the_gradient(self):
        r = ox.rectification_schedule(0.999)
        slopes = jax.vmap(jax.grad(r))(jnp.arange(8.0))
        assert jnp.isfinite(slopes).all()

    def test_with_adam_it_is_radam_from_step_6_on(self, x64):
        rng = np.random.default_rng(0)
        ours = optax.chain(
            optax.scale_by_adam(b2=0.99),
            optax.scale_by_schedule(ox.rectification_schedule(0.99)),
        )
        radam = optax.scale_by_radam(b2=0.99)
        states = [tx.init(jnp.zeros(3)) for tx in (ours, radam)]
        with jax.numpy_dtype_promotion("standard"):
            for t in range(1, 10):
                g = jnp.asarray(rng.normal(size=3))
                got, states[0] = ours.update(g, states[0])
                want, states[1] = radam.update(g, states[1])
                if t < 6:
                    np.testing.assert_array_equal(got, 0)
                else:
                    np.testing.assert_allclose(got, want, rtol=1e-10)

    def test_a_rate_that_never_moves_is_refused(self):
        with pytest.raises(ValueError, match=r"rho stays below 5.*take b2 above 2/3"):
            ox.rectification_schedule(2 / 3)
        with pytest.raises(ValueError, match=r"threshold must lie in \[4.0"):
            ox.rectification_schedule(threshold=3.9)
        with pytest.raises(ValueError, match="b2 must lie"):
            ox.rectification_schedule(1.0)


class TestRelativeStep:
    def test_the_specifications_values(self):
        plain, warm = (
            ox.relative_step_schedule(),
            ox.relative_step_schedule(warmup_init=True),
        )
        np.testing.assert_allclose(at(plain, 1, 10_000, 40_000), [0.01, 0.01, 0.005])
        np.testing.assert_allclose(at(warm, 1, 10_000, 40_000), [1e-6, 0.01, 0.005])

    def test_the_cap_is_an_argument(self):
        capped = ox.relative_step_schedule(max_step=0.4)
        np.testing.assert_allclose(at(capped, 1, 6, 16), [0.4, 0.4, 0.25], rtol=2e-7)
        with pytest.raises(ValueError, match="max_step must lie"):
            ox.relative_step_schedule(0.0)

    def test_for_vectors_factored_moments_are_the_plain_ones(self):
        with jax.numpy_dtype_promotion("standard"):
            params, grads = jnp.ones(3), jnp.array([0.3, -2.0, 0.1])
            out = []
            for factored in (True, False):
                tx = optax.adafactor(
                    ox.relative_step_schedule(),
                    min_dim_size_to_factor=1,
                    factored=factored,
                )
                out.append(tx.update(grads, tx.init(params), params)[0])
        np.testing.assert_array_equal(*out)

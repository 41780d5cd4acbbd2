"""Schedules from gradient norms, and the link that keeps them."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox
from optax_ext.schedules.refinement import _smoothed

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens/wrappers_schedules"


def values(schedule, n):
    return np.array([float(schedule(count)) for count in range(n)])


def norms(seed=0, n=40):
    return np.random.default_rng(seed).uniform(0.5, 3.0, n)


class TestRefinedSchedule:
    @pytest.mark.parametrize("kind", ["adam", "sgd"])
    def test_constant_norms_give_linear_decay(self, x64, kind):
        got = values(ox.refined_schedule(np.full(10, 0.3), kind=kind), 10)
        np.testing.assert_allclose(got, (9 - np.arange(10)) / 9, rtol=1e-15)

    @pytest.mark.parametrize("factor", [1e-200, 1e200])
    @pytest.mark.parametrize("kind", ["adam", "sgd"])
    def test_scaling_all_norms_changes_nothing(self, x64, kind, factor):
        got = values(ox.refined_schedule(factor * norms(), kind=kind), 40)
        want = values(ox.refined_schedule(norms(), kind=kind), 40)
        np.testing.assert_allclose(got, want, rtol=1e-14)

    @pytest.mark.parametrize("kind", ["adam", "sgd"])
    def test_norms_that_fall_at_first_warm_the_rate_up(self, kind):
        falling = np.append(np.linspace(10, 1, 20), np.ones(80))
        got = values(ox.refined_schedule(falling, kind=kind, smooth=0.0), 100)
        assert got.argmax() == 19

    @pytest.mark.parametrize(("kind", "power"), [("adam", 1), ("sgd", 2)])
    def test_the_closed_form_without_smoothing(self, x64, kind, power):
        w = norms() ** -power
        s = np.array([w[t] * w[t + 1 :].sum() for t in range(40)])
        got = values(ox.refined_schedule(norms(), 0.7, kind, smooth=0.0), 40)
        np.testing.assert_allclose(got, 0.7 * s / s.max(), rtol=1e-13)

    def test_it_holds_its_ends(self):
        s = ox.refined_schedule(norms())
        assert s(39) == s(40) == s(2**31 - 1) == 0
        assert s(-3) == s(0)

    @pytest.mark.parametrize("kind", ["adam", "sgd"])
    def test_the_official_scripts_medians(self, kind):
        with np.load(GOLDENS / f"refined_schedule_{kind}.npz") as file:
            got = _smoothed(file["in/grad_norms"], 0.1)
            np.testing.assert_allclose(got, file["out/smoothed"], rtol=1e-15)

    def test_a_window_longer_than_the_run_still_reflects(self):
        got = values(ox.refined_schedule(norms(n=6), smooth=1.0), 6)
        assert np.isfinite(got).all()
        assert got.max() == 1

    @pytest.mark.parametrize("bad", [0.0, np.nan, np.inf, -np.inf])
    def test_norms_that_are_no_norms_are_interpolated(self, bad):
        good = np.linspace(3.0, 1.0, 20)
        broken = good.copy()
        broken[[5, 6, 11]] = bad
        got = values(ox.refined_schedule(broken, smooth=0.0), 20)
        want = values(ox.refined_schedule(good, smooth=0.0), 20)
        np.testing.assert_allclose(got, want, rtol=1e-6)

    def test_what_cannot_be_refined_is_refused(self):
        with pytest.raises(ValueError, match=r"two or more norms .* got 1 among 3"):
            ox.refined_schedule([1.0, 0.0, np.nan])
        with pytest.raises(ValueError, match=r"must have shape \[n\], got \(2, 1\)"):
            ox.refined_schedule([[1.0], [2.0]])
        with pytest.raises(ValueError, match="kind must be one of 'adam', 'sgd'"):
            ox.refined_schedule([1.0, 2.0], kind="lion")
        with pytest.raises(ValueError, match="smooth must lie"):
            ox.refined_schedule([1.0, 2.0], smooth=1.5)
        with pytest.raises(ValueError, match="peak_value must lie"):
            ox.refined_schedule([1.0, 2.0], peak_value=-1.0)


TREE = {"a": jnp.array([[3.0, -4.0]]), "b": jnp.float32(12.0)}


class TestRecordGradNorms:
    @pytest.mark.parametrize(("ord", "want"), [(1, 19.0), (2, 13.0)])
    def test_it_keeps_the_norm_of_the_whole_tree_and_changes_nothing(self, ord, want):
        tx = ox.record_grad_norms(3, ord)
        updates, state = tx.update(TREE, tx.init(TREE))
        assert updates is TREE
        np.testing.assert_allclose(ox.grad_norms(state), [want, 0, 0], rtol=1e-6)

    def test_what_comes_after_the_last_place_is_dropped(self):
        tx = ox.record_grad_norms(2)
        grads = jnp.arange(1.0, 6.0)[:, None]
        state, _ = jax.lax.scan(
            lambda s, g: tx.update(g, s)[::-1], tx.init(grads[0]), grads
        )
        np.testing.assert_array_equal(ox.grad_norms(state), [1, 2])
        assert state.count == 5

    def test_holes_do_not_count(self):
        tx = optax.masked(ox.record_grad_norms(1), {"a": True, "b": False})
        _, state = tx.update(TREE, tx.init(TREE))
        np.testing.assert_allclose(ox.grad_norms(state), [5.0], rtol=1e-6)

    @pytest.mark.parametrize("ord", [1, 2])
    def test_an_empty_tree_has_norm_0(self, ord):
        tx = ox.record_grad_norms(1, ord)
        _, state = tx.update({}, tx.init({}))
        np.testing.assert_array_equal(ox.grad_norms(state), [0.0])

    @pytest.mark.parametrize("ord", [1, 2])
    def test_norms_are_as_wide_as_the_widest_leaf(self, x64, ord):
        tx = ox.record_grad_norms(1, ord)
        grads = {"a": jnp.ones(2, jnp.float64), "b": jnp.ones(1, jnp.bfloat16)}
        _, state = tx.update(grads, tx.init(grads))
        assert ox.grad_norms(state).dtype == jnp.float64
        want = 3 if ord == 1 else 3**0.5
        np.testing.assert_allclose(ox.grad_norms(state), [want], rtol=1e-15)

    def test_complex_gradients_have_real_norms(self):
        grads = jnp.array([3 + 4j])
        for ord in (1, 2):
            tx = ox.record_grad_norms(1, ord)
            _, state = tx.update(grads, tx.init(grads))
            assert ox.grad_norms(state).dtype == jnp.float32
            np.testing.assert_allclose(ox.grad_norms(state), [5.0], rtol=1e-6)

    def test_a_second_run_takes_its_schedule_from_the_first(self):
        tx = optax.chain(ox.record_grad_norms(20, ord=1), optax.sgd(0.1))
        x = jnp.array([2.0, -1.0])
        state = tx.init(x)
        for _ in range(20):
            updates, state = tx.update(x, state)
            x = optax.apply_updates(x, updates)
        rate = ox.refined_schedule(ox.grad_norms(state), peak_value=0.1)
        assert values(rate, 20).max() == np.float32(0.1)

    def test_the_reader_wants_one_record(self):
        two = optax.chain(ox.record_grad_norms(1), ox.record_grad_norms(1))
        with pytest.raises(ValueError, match=r"^grad_norms: .* 2 GradNormsState"):
            ox.grad_norms(two.init(jnp.ones(2)))
        with pytest.raises(ValueError, match=r"0 GradNormsState.*record_grad_norms"):
            ox.grad_norms(optax.adam(0.1).init(jnp.ones(2)))

    def test_other_norms_are_refused(self):
        with pytest.raises(ValueError, match="ord must be 1 or 2, got 3"):
            ox.record_grad_norms(1, ord=3)
        with pytest.raises(ValueError, match="num_steps must be an integer"):
            ox.record_grad_norms(0)

"""The distance from the start against the logarithm of the step."""

import numpy as np
import pytest

import optax_ext as ox


def test_a_logarithm_is_fitted_exactly():
    t = np.arange(1, 50)
    fit = ox.weight_distance_log_fit(t, 0.7 * np.log(t) + 0.2)
    np.testing.assert_allclose(fit, [0.7, 0.2, 1.0], rtol=1e-12)
    assert (fit.slope, fit.intercept, fit.r_squared) == fit


def test_with_noise_it_is_the_least_squares_line():
    rng, t = np.random.default_rng(0), np.arange(1, 30)
    y = np.log(t) + rng.normal(size=t.size)
    slope, intercept = np.polyfit(np.log(t), y, 1)
    r = np.corrcoef(np.log(t), y)[0, 1]
    fit = ox.weight_distance_log_fit(t.tolist(), y.tolist())
    np.testing.assert_allclose(fit, [slope, intercept, r**2], rtol=1e-10)


def test_distances_that_do_not_vary_are_explained():
    assert ox.weight_distance_log_fit([1, 2], [3.0, 3.0]) == (0.0, 3.0, 1.0)


@pytest.mark.parametrize("steps", [[0, 1, 2], [3, 3, 3], [0.5, 1, 2]])
def test_steps_must_differ_and_count_from_1(steps):
    with pytest.raises(ValueError, match="two or more different steps, counted from 1"):
        ox.weight_distance_log_fit(steps, [1.0, 2.0, 3.0])


@pytest.mark.parametrize(("steps", "distances"), [([1, 2], [1.0]), (1.0, 1.0)])
def test_steps_and_distances_go_together(steps, distances):
    with pytest.raises(ValueError, match=r"must have one shape \[n\], got"):
        ox.weight_distance_log_fit(steps, distances)


def test_no_steps_at_all_are_refused():
    with pytest.raises(ValueError, match="two or more different steps"):
        ox.weight_distance_log_fit([], [])

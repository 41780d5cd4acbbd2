"""Power laws with a floor."""

import pathlib

import numpy as np
import pytest

import optax_ext as ox

GOLDEN = pathlib.Path(__file__).parents[1] / "goldens/wrappers_schedules"


def test_the_published_points_give_the_published_law():
    with np.load(GOLDEN / "fit_scaling_law.npz") as file:
        arrays = dict(file)
    law = ox.fit_scaling_law(arrays["in/sizes"], arrays["in/losses"])
    np.testing.assert_allclose(law, arrays["out/coefficients"], rtol=1e-6)
    np.testing.assert_allclose(law, [2.46943, -0.423108, 2.92330], rtol=1e-5)
    predicted = law.a * arrays["in/new_sizes"] ** law.b + law.c
    np.testing.assert_allclose(predicted, arrays["out/prediction"], rtol=1e-7)


@pytest.mark.parametrize("unit", [1.0, 1e6])
@pytest.mark.parametrize(
    ("a", "b", "c"), [(2.0, -0.5, 3.0), (5.0, -0.05, 0.0), (-1.0, 0.3, 4.0)]
)
def test_a_law_is_found_exactly_whatever_the_unit(a, b, c, unit):
    n = np.array([1.0, 3.0, 10.0, 40.0, 100.0])
    law = ox.fit_scaling_law(unit * n, a * n**b + c)
    np.testing.assert_allclose([law.a * unit**b, law.b, law.c], [a, b, c], 1e-5, 1e-5)


def test_with_noise_no_law_nearby_is_better():
    rng, n = np.random.default_rng(0), np.geomspace(1, 1000, 12)
    y = 2 * n**-0.4 + 3 + 0.02 * rng.normal(size=12)
    law = np.array(ox.fit_scaling_law(n, y))

    def left(a, b, c):
        return np.sum((a * n**b + c - y) ** 2)

    for direction in rng.normal(size=(20, 3)):
        assert left(*law) <= left(*(law + 1e-4 * direction))


def test_what_cannot_be_fitted_is_refused():
    for sizes, losses, message in [
        ([1, 2, 2], [3.0, 2.0, 2.1], "three or more different sizes"),
        ([1, 2, 3], [3.0, 2.0], r"one shape \[n\], got \(3,\) and \(2,\)"),
        ([0, 1, 2], [3.0, 2.0, 1.0], "sizes must be above 0"),
        ([1, 2, 3], [3.0, np.nan, 1.0], "all values finite"),
        (1.0, 2.0, r"one shape \[n\]"),
    ]:
        with pytest.raises(ValueError, match=f"^fit_scaling_law: .*{message}"):
            ox.fit_scaling_law(sizes, losses)

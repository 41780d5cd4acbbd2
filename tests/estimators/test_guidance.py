"""Adaptive projected guidance."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ext as ox

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "wrappers_schedules"


def predictions(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(2, *shape)), jnp.float32)


def once(guide, c, u):
    return guide.update(c, u, guide.init(c))[0]


def dot(a, b):
    return jnp.sum(a * b, axis=tuple(range(1, a.ndim)))


@pytest.mark.usefixtures("x64")
def test_it_follows_the_official_function_step_by_step():
    with np.load(GOLDENS / "adaptive_projected_guidance.npz") as file:
        c, u, want = (file[k] for k in ("in/pred_cond", "in/pred_uncond", "out/pred"))
    guide = ox.adaptive_projected_guidance(scale=7.5, norm_threshold=2.5)
    state = guide.init(jnp.asarray(c[0]))
    for t in range(len(c)):
        out, state = guide.update(jnp.asarray(c[t]), jnp.asarray(u[t]), state)
        np.testing.assert_allclose(out, want[t], rtol=1e-11, atol=1e-13)


def test_with_eta_1_and_no_momentum_it_is_classifier_free_guidance():
    c, u = predictions(3, 4, 2)
    guide = ox.adaptive_projected_guidance(5.0, eta=1.0, momentum=0.0)
    # The parallel part is taken out and put back: a few roundings of |c| + 5 |c - u|.
    np.testing.assert_allclose(once(guide, c, u), u + 5 * (c - u), rtol=1e-5, atol=2e-6)


@pytest.mark.usefixtures("x64")
def test_with_eta_0_the_guidance_is_orthogonal_to_the_prediction():
    c, u = predictions(3, 4, 2).astype("float64")
    out = once(ox.adaptive_projected_guidance(5.0), c, u)
    np.testing.assert_allclose(dot(out - c, c), 0, atol=1e-13)


def test_eta_is_the_share_of_the_parallel_part_that_is_kept():
    c, u = predictions(3, 4)
    out = once(ox.adaptive_projected_guidance(3.0, eta=0.25), c, u)
    expected = 0.25 * 2 * dot(c - u, c)
    np.testing.assert_allclose(dot(out - c, c), expected, rtol=1e-4, atol=1e-5)


def test_scale_1_is_the_conditional_prediction():
    c, u = predictions(3, 4)
    np.testing.assert_array_equal(once(ox.adaptive_projected_guidance(1.0), c, u), c)


def test_the_threshold_caps_the_difference_of_each_example():
    c, u = predictions(2, 50)
    u = u.at[1].set(c[1] + 0.01)  # a short difference stays as it is
    guide = ox.adaptive_projected_guidance(2.0, eta=1.0, norm_threshold=0.5)
    lengths = jnp.linalg.norm(once(guide, c, u) - c, axis=1)
    short = jnp.linalg.norm(c[1] - u[1])
    np.testing.assert_allclose(lengths, [0.5, short], rtol=1e-4)


def test_the_momentum_averages_differences_before_they_are_clipped():
    c, u = predictions(3, 4)
    guide = ox.adaptive_projected_guidance(2.0, 1.0, norm_threshold=0.1, momentum=0.7)
    state = guide.init(c)
    average = 0.0
    for factor in (1.0, -2.0, 0.5):
        _, state = guide.update(factor * c, factor * u, state)
        average = 0.7 * average + factor * (c - u)
        np.testing.assert_allclose(state.average, average, rtol=1e-5, atol=1e-6)


def test_each_example_is_guided_alone():
    c, u = predictions(3, 4, 2)
    guide = ox.adaptive_projected_guidance(5.0, norm_threshold=1.0)
    alone = jnp.concatenate([once(guide, c[i : i + 1], u[i : i + 1]) for i in range(3)])
    np.testing.assert_allclose(once(guide, c, u), alone, rtol=1e-5, atol=1e-6)


def test_equal_predictions_and_zero_predictions_give_no_nan():
    c, zero = predictions(2, 3)[0], jnp.zeros((2, 3))
    guide = ox.adaptive_projected_guidance(5.0, norm_threshold=1.0)
    np.testing.assert_array_equal(once(guide, c, c), c)
    assert jnp.isfinite(once(guide, zero, c)).all()
    assert jnp.isfinite(once(guide, zero, zero)).all()


def test_half_precision_is_computed_in_float32_and_comes_back():
    c, u = predictions(2, 64).astype(jnp.bfloat16)
    guide = ox.adaptive_projected_guidance(5.0)
    out, state = guide.update(c, u, guide.init(c))
    assert (out.dtype, state.average.dtype) == (jnp.bfloat16, jnp.float32)
    wide = once(guide, c.astype("float32"), u.astype("float32"))
    np.testing.assert_array_equal(out, wide.astype(jnp.bfloat16))


def test_it_runs_in_a_scan_and_maps_over_the_scale():
    c, u = predictions(4, 2, 3)

    def sample(scale):
        guide = ox.adaptive_projected_guidance(scale)

        def step(state, pair):
            c, u = pair
            return guide.update(c, u, state)[::-1]

        return jax.lax.scan(step, guide.init(c[0]), (c, u))[1]

    out = jax.jit(jax.vmap(sample))(jnp.array([1.0, 3.0]))
    np.testing.assert_array_equal(out[0], c)
    guide = ox.adaptive_projected_guidance(3.0)
    np.testing.assert_allclose(out[1][0], once(guide, c[0], u[0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"norm_threshold": 0.0}, {"momentum": 1.0}, {"momentum": -1.0}], ids=str
)
def test_arguments_outside_their_range_are_named(options):
    name = next(iter(options))
    with pytest.raises(ValueError, match=f"adaptive_projected_guidance: {name} must"):
        ox.adaptive_projected_guidance(2.0, **options)


def test_predictions_of_different_shapes_are_refused():
    guide = ox.adaptive_projected_guidance(2.0)
    c = jnp.ones((2, 3))
    for u, state in ((jnp.ones((2, 1)), c), (c, jnp.ones((1, 3)))):
        with pytest.raises(ValueError, match="must have one shape"):
            guide.update(c, u, guide.init(state))

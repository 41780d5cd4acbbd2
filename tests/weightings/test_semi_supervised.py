"""The weight of uncertain examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ext as ox

MASKS = jnp.array([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])


def test_the_first_batch_starts_the_average_and_the_present_one_is_in_it():
    weighting = ox.certain_ratio(decay=0.9)
    state, ratios = weighting.init(), []
    for mask in MASKS:
        ratio, state = weighting.update(mask, state)
        ratios.append(ratio)
    second = 0.9 * 0.25 + 0.1 * 0.75
    np.testing.assert_allclose(ratios, [0.25, second, 0.9 * second + 0.1], rtol=1e-6)
    assert state.count == 3 and state.ratio == ratios[-1]


def test_a_batch_without_certain_examples_counts_as_the_first():
    weighting = ox.certain_ratio(decay=0.5)
    ratio, state = weighting.update(jnp.zeros(4), weighting.init())
    assert ratio == 0
    assert weighting.update(jnp.ones(4), state)[0] == 0.5


def test_a_scan_is_a_loop():
    weighting = ox.certain_ratio()

    def step(state, mask):
        ratio, state = weighting.update(mask, state)
        return state, ratio

    state, ratios = jax.jit(lambda: jax.lax.scan(step, weighting.init(), MASKS))()
    again = weighting.init()
    for mask, got in zip(MASKS, ratios, strict=True):
        want, again = weighting.update(mask, again)
        np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(state.ratio, again.ratio, rtol=1e-6)


def test_the_ratio_has_no_gradient_and_ignores_other_arguments():
    weighting = ox.certain_ratio()
    grads = jax.grad(lambda mask: weighting.update(mask, weighting.init(), step=3)[0])(
        MASKS[0]
    )
    np.testing.assert_array_equal(grads, 0)


def test_a_mask_in_bfloat16_is_averaged_in_float32():
    weighting = ox.certain_ratio()
    mask = (jnp.arange(1000) < 333).astype(jnp.bfloat16)
    ratio, state = weighting.update(mask, weighting.init())
    np.testing.assert_allclose(ratio, 0.333, rtol=1e-6)
    assert ratio.dtype == state.ratio.dtype == jnp.float32


def test_it_weighs_the_loss_that_it_is_made_for():
    weak = jnp.array([[0.97, 0.02, 0.01], [0.5, 0.48, 0.02]])
    out = ox.losses.shrinkmatch_loss(weak, jnp.zeros((2, 3)))
    weighting = ox.certain_ratio()
    ratio, _ = weighting.update(out.mask, weighting.init())
    total = out.certain.mean() + ratio * out.shrink.mean()
    want = np.log(3) / 2 + 0.5 * 0.5 * np.log(2) / 2
    np.testing.assert_allclose(total, want, rtol=1e-6)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="decay must lie"):
        ox.certain_ratio(decay=1.0)
    weighting = ox.certain_ratio()
    with pytest.raises(AssertionError, match="mask of shrinkmatch_loss"):
        weighting.update(jnp.ones(3, bool), weighting.init())

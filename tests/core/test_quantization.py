"""Rounding to bfloat16 and to block-wise 8 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_ext._core.quantization import (
    Blockwise,
    from_blockwise,
    random_bits,
    round_to_bfloat16,
    to_blockwise,
    unpacked,
)

BF16_MAX = float(jnp.finfo(jnp.bfloat16).max)


def bits(shape, seed=0):
    shape = (shape,) if isinstance(shape, int) else shape
    return random_bits(jax.random.key(seed), shape)


def normal(shape, seed=0, spread=1.0):
    """Normal numbers whose sizes differ as exp(N(0, spread))."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * np.exp(spread * rng.normal(size=shape))
    return jnp.asarray(x, jnp.float32)


# Random bits --------------------------------------------------------------------------


def test_random_bits_are_even():
    """As many of each upper and lower byte as chance allows."""
    x = np.asarray(bits((512, 512)))
    for byte in (x >> 8, x & 255):
        counts = np.bincount(byte.ravel(), minlength=256)
        # Chi-square of 255 degrees of freedom: 255 +- 22.6, five deviations.
        expected = x.size / 256
        chi_square = np.sum((counts - expected) ** 2) / expected
        assert abs(chi_square - 255) < 113


def test_random_bits_are_not_correlated():
    """Between neighbours, rows, steps and leaves; 2^18 pairs have 0.002 by chance."""
    keys = jax.random.split(jax.random.key(0))
    leaves = [random_bits(jax.random.fold_in(keys[0], i), (512, 512)) for i in (0, 1)]
    a, b, c = (
        np.asarray(x, np.float64) for x in (*leaves, random_bits(keys[1], (512, 512)))
    )
    pairs = [(a[:, 1:], a[:, :-1]), (a[1:], a[:-1]), (a[:, 2:], a[:, :-2])]
    pairs += [(a, b), (a, c), (b, c), (a[:, 1:], b[:, :-1])]
    for x, y in pairs:
        assert abs(np.corrcoef(x.ravel(), y.ravel())[0, 1]) < 0.01


def test_random_bits_of_any_shape():
    assert bits(()).shape == ()
    assert bits((0, 3)).shape == (0, 3)
    x = bits((3, 4, 5, 6))
    assert x.dtype == jnp.uint16
    assert len(np.unique(x)) > 350  # of 360: no two places share a hash input


# bfloat16 -----------------------------------------------------------------------------


@pytest.mark.parametrize("x", [1.001, -1.001, 3e-30, -7.77e20, 1e-39, 0.7])
def test_stochastic_rounding_to_bfloat16_is_unbiased(x):
    n = 2**16
    each = jnp.arange(n, dtype=jnp.uint16)  # every pattern of random bits once
    got = np.asarray(round_to_bfloat16(jnp.full(n, x, jnp.float32), each), np.float64)
    assert len(np.unique(got)) <= 2
    # Exact but for the float64 sum: the pattern's lower half is the chance.
    np.testing.assert_allclose(got.mean(), np.float64(np.float32(x)), rtol=1e-12)


def test_the_mean_of_many_draws_is_the_number():
    n = 40_000
    x = jnp.full(n, 1 + 0.3 / 128, jnp.float32)
    got = np.asarray(round_to_bfloat16(x, bits(n)), np.float64)
    # A Bernoulli number of chance 0.3, gap 1/128: five standard deviations of a mean.
    error = 5 * np.sqrt(0.3 * 0.7 / n) / 128
    assert abs(got.mean() - (1 + 0.3 / 128)) < error
    assert set(np.unique(got)) == {1.0, 1 + 1 / 128}


@pytest.mark.parametrize("x", [0.0, -0.0, 1.0, -2.5, BF16_MAX, 2.0**-130])
def test_a_bfloat16_number_stays_what_it_is(x):
    got = round_to_bfloat16(jnp.full(1000, x, jnp.float32), bits(1000))
    np.testing.assert_array_equal(np.asarray(got, np.float64), x)


@pytest.mark.parametrize("draw", [None, 0, 1234, 65535])
@pytest.mark.parametrize("sign", [1, -1])
def test_finite_numbers_stay_finite_and_others_stay_what_they_are(draw, sign):
    draw = None if draw is None else jnp.full(1, draw, jnp.uint16)
    top = sign * jnp.asarray([jnp.finfo(jnp.float32).max])
    assert float(round_to_bfloat16(top, draw)[0]) == sign * BF16_MAX
    inf = round_to_bfloat16(sign * jnp.asarray([jnp.inf]), draw)
    assert float(inf[0]) == sign * np.inf
    assert jnp.isnan(round_to_bfloat16(jnp.asarray([jnp.nan]), draw)).all()


# 8 bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [False, True])
@pytest.mark.parametrize("positive", [False, True])
def test_8_bits_are_off_by_at_most_one_level(draw, positive):
    x = normal((16, 512))
    x = jnp.abs(x) if positive else x
    top = 255 if positive else 127
    got = from_blockwise(to_blockwise(x, bits(x.shape) if draw else None, 256))
    blocks = np.asarray(x).reshape(16, 2, 256)
    scale = np.abs(blocks).max(-1, keepdims=True)
    q = np.floor(top * (np.abs(blocks) / scale) ** 0.25)
    gap = scale * (((q + 1) / top) ** 4 - (q / top) ** 4)
    error = np.abs(np.asarray(got).reshape(blocks.shape) - blocks)
    assert (error <= gap * (1 if draw else 0.5) * 1.001 + 1e-6 * scale).all()


@pytest.mark.parametrize("positive", [False, True])
def test_stochastic_rounding_to_8_bits_is_unbiased(positive):
    x = normal((256,), spread=0.5)
    x = jnp.abs(x) if positive else x
    n = 4000
    each = jax.vmap(lambda b: from_blockwise(to_blockwise(x, b, 256)))(bits((n, 256)))
    got = np.asarray(each, np.float64)
    # Half a gap is the largest standard deviation; 5 of the mean's, and its rounding.
    gap = np.ptp(got, axis=0)
    error = np.abs(got.mean(0) - np.asarray(x))
    assert (error < 5 * 0.5 * gap / np.sqrt(n) + 1e-5 * np.abs(x).max()).all()


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("shape", [(4, 700), (3, 3, 5, 40), (17,), (2, 300), ()])
def test_what_was_encoded_encodes_to_itself(positive, shape):
    x = jnp.square(normal(shape, spread=2)) if positive else normal(shape, spread=2)
    once = to_blockwise(x, bits(shape, 1), 256)
    for draw in (None, bits(shape, 2), bits(shape, 3)):
        again = to_blockwise(from_blockwise(once), draw, 256)
        jax.tree.map(np.testing.assert_array_equal, again, once)


def test_the_largest_entry_of_a_block_is_exact():
    x = normal((8, 256))
    got = from_blockwise(to_blockwise(x, bits(x.shape), 256))
    largest = jnp.argmax(jnp.abs(x), axis=-1)
    for row, column in enumerate(largest):
        assert got[row, column] == x[row, column]


def test_zero_is_exact_and_no_positive_entry_becomes_zero():
    x = jnp.asarray([0.0, 1e-30, 1e-12, 1e-3, 1.0])
    for draw in (None, bits(5), jnp.zeros(5, jnp.uint16), jnp.full(5, 65535, "uint16")):
        got = from_blockwise(to_blockwise(x, draw, 256))
        assert got[0] == 0
        assert (got[1:] > 0).all()
    zeros = to_blockwise(jnp.zeros((2, 300)), None, 256)
    assert not from_blockwise(zeros).any()


@pytest.mark.parametrize(
    ("shape", "scales"),
    [
        ((4, 512), (4, 2)),
        ((4, 300), (4, 2)),
        ((1000,), (4,)),
        ((3, 3, 16, 32), (3, 3, 2)),
        ((100, 10), (4,)),
        ((3,), (1,)),
        ((), (1,)),
    ],
)
def test_blocks_run_along_the_last_axes(shape, scales):
    packed = to_blockwise(normal(shape), None, 256)
    assert packed.codes.shape == shape
    assert packed.codes.dtype == jnp.uint8
    assert packed.scales.shape == scales
    assert from_blockwise(packed).shape == shape


def test_each_block_has_its_own_scale_and_sign():
    x = jnp.stack([jnp.linspace(0, 1, 256), jnp.linspace(-100, 50, 256)]).reshape(512)
    packed = to_blockwise(x, None, 256)
    np.testing.assert_array_equal(packed.scales, [1, -100])
    assert packed.codes[255] == 255
    assert packed.codes[256] == 1  # -127


def test_huge_infinite_and_tiny_blocks_stay_finite():
    for x in (1e37, -1e37, 1e38, jnp.inf, -jnp.inf):
        got = from_blockwise(to_blockwise(jnp.asarray([x, 1.0]), None, 256))
        assert got[0] == jnp.float32(np.clip(x, -(2.0**126), 2.0**126))
        assert 0 <= got[1] < 1e30
    for x in (1e-30, 1e-39, 1e-45):
        got = from_blockwise(to_blockwise(jnp.asarray([x, -x]), bits(2), 256))
        assert (jnp.abs(got) <= 1.001 * jnp.float32(x)).all()


def test_a_nan_marks_its_block_and_no_other():
    x = normal((2, 256)).at[0, 3].set(jnp.nan)
    got = from_blockwise(to_blockwise(x, None, 256))
    assert jnp.isnan(got[0]).all()
    assert jnp.isfinite(got[1]).all()


def test_unpacked_widens_what_is_narrow_only():
    x = jnp.ones((2, 2))
    assert unpacked(x.astype(jnp.bfloat16)).dtype == jnp.float32
    assert unpacked(to_blockwise(x, None, 256)).dtype == jnp.float32
    assert unpacked(jnp.zeros([], jnp.int32)).dtype == jnp.int32
    assert isinstance(to_blockwise(x, None, 256), Blockwise)

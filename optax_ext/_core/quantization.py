r"""Rounding float32 arrays to 16 and to 8 bits, to the nearest or at random.

*bfloat16.* Stochastic rounding adds 16 random bits to the bit pattern of a float32 and
cuts off the lower half. The chance of going up is the distance to the lower neighbour
in units of the gap, so the mean is the number itself.

*8 bits.* The entries of a block share the largest magnitude s among them; each keeps
the number q of a level of :math:`[0, 1]`, q up to 255 in a block without negative
entries, else up to 127 and a sign:

.. math:: x = s\,\text{sign}(q)\,(q / q_\text{max})^4

The fourth power lays the levels densely where numbers are small: second moments differ
by orders of magnitude inside a block. An Adam on blocks of 256 entries whose scales
differ as exp(N(0, 1)) takes steps that are off by 0.13 of their size (by 0.29 with a
square; by 0.43 with a linear code, whose smallest level is most of a small moment; by
0.02 with second moments in bfloat16). A positive entry of a block without negative
ones is never rounded to 0, but up to the smallest level, 2e-10 s: Adam divides by it.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Beyond it, XLA's reciprocal of a scale is subnormal, which it flushes to 0.
_MAX = 2.0**126
_TINY = float(jnp.finfo(jnp.float32).tiny)
_MAX_BFLOAT16 = float(jnp.finfo(jnp.bfloat16).max)
# A decoded array must encode to itself: levels are off by roundings of float32 only.
_SAME = 1e-4


class Blockwise(NamedTuple):
    """An array in 8 bits an entry and 32 bits a block.

    Attributes:
      codes: uint8, the shape of the array. q in blocks without negative entries,
        128 + q in the others.
      scales: float32 [..., blocks], the largest magnitude of each block, with a minus
        sign where the block has negative entries.
    """

    codes: jax.Array
    scales: jax.Array


def random_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Random uint16 for rounding, several times cheaper than `jax.random.bits`.

    The place of an entry in the array is hashed with two words drawn from the key. One
    pass over the array that fuses with what uses it and keeps its sharding. Rounding
    needs numbers that are even and not correlated, not ones that cannot be guessed.
    """
    first, second = jax.random.bits(key, (2,), jnp.uint32)
    place, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        place += along * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    return (_mix(_mix(place + first) ^ second) >> 16).astype(jnp.uint16)


def _mix(x: jax.Array) -> jax.Array:
    """A one-to-one map of 32 bits on which each bit of x has a say (lowbias32)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def round_to_bfloat16(x: jax.Array, bits: jax.Array | None) -> jax.Array:
    """Round a float32 array to bfloat16; finite numbers stay finite.

    Args:
      x: float32 array.
      bits: random uint16 of the same shape for stochastic rounding; None rounds to the
        nearest.
    """
    finite = jnp.isfinite(x)
    above = finite & (jnp.abs(x) > _MAX_BFLOAT16)
    x = jnp.where(above, jnp.copysign(_MAX_BFLOAT16, x), x)
    nearest = x.astype(jnp.bfloat16)
    if bits is None:
        return nearest
    pattern = jax.lax.bitcast_convert_type(x, jnp.uint32) + bits.astype(jnp.uint32)
    upper = jax.lax.shift_right_logical(pattern, jnp.full_like(pattern, 16))
    rounded = jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(finite, rounded, nearest)


@functools.partial(jax.jit, static_argnames="block_size")
def to_blockwise(x: jax.Array, bits: jax.Array | None, block_size: int) -> Blockwise:
    """Round a float32 array to 8 bits an entry.

    Blocks run along the last axis (along the last axes together where the last one is
    shorter than a block), all of one length, so that arrays may be sharded on any axis.
    Entries beyond 2^126 = 8.5e37 are cut off there. A NaN makes its block NaN.

    Args:
      x: float32 array.
      bits: random uint16 of the same shape for stochastic rounding; None rounds to the
        nearest.
      block_size: largest number of entries in a block.
    """
    x = jnp.clip(x, -_MAX, _MAX)
    lead, length = x.shape, 1
    while lead and length < block_size:
        lead, length = lead[:-1], length * lead[-1]
    count = -(-length // block_size)
    blocks = _split(x, lead, length, count)
    largest = jnp.max(jnp.abs(blocks), axis=-1)
    # XLA flushes subnormal numbers to 0 in products.
    largest = jnp.where(largest < _TINY, jnp.zeros_like(largest), largest)
    scales = jnp.where(jnp.min(blocks, axis=-1) < 0, -largest, largest)

    per_block = jnp.where(largest == 0, 0.0, 1 / jnp.where(largest == 0, 1.0, largest))
    ratio = jnp.abs(x) * _spread(per_block, x.shape)
    signed = _spread(scales < 0, x.shape)
    low = jnp.floor(_top(signed) * jnp.sqrt(jnp.sqrt(ratio)))
    below, above = _level(low, signed), _level(low + 1, signed)
    chance = 0.5 if bits is None else (bits.astype(jnp.float32) + 0.5) / 2**16
    chance = jnp.clip(chance, _SAME, 1 - _SAME)
    q = jnp.where(ratio - below > chance * (above - below), low + 1, low)
    q = jnp.clip(q, jnp.where(signed | (ratio == 0), 0.0, 1.0), _top(signed))
    codes = jnp.where(signed, 128 + jnp.sign(x) * q, q)
    return Blockwise(codes.astype(jnp.uint8), scales)


@jax.jit
def from_blockwise(packed: Blockwise) -> jax.Array:
    """The float32 array that `packed` stands for."""
    scale = _spread(packed.scales, packed.codes.shape)
    signed = scale < 0
    q = packed.codes.astype(jnp.float32) - jnp.where(signed, 128.0, 0.0)
    return jnp.abs(scale) * jnp.sign(q) * _level(jnp.abs(q), signed)


def _top(signed: jax.Array) -> jax.Array:
    return jnp.where(signed, 127.0, 255.0)


def _level(q: jax.Array, signed: jax.Array) -> jax.Array:
    return (q * jnp.where(signed, 1 / 127, 1 / 255)) ** 4


def _split(x: jax.Array, lead: tuple[int, ...], length: int, count: int) -> jax.Array:
    """Array -> blocks [*lead, count, width], the last one filled up with zeros."""
    width = -(-length // count)
    flat = x.reshape(*lead, length)
    missing = [(0, 0)] * len(lead) + [(0, count * width - length)]
    return jnp.pad(flat, missing).reshape(*lead, count, width)


def _spread(scales: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The scale of each entry of an array; the shapes say where blocks begin."""
    lead, count = scales.shape[:-1], scales.shape[-1]
    length = math.prod(shape[len(lead) :])
    width = -(-length // count)
    each = jnp.broadcast_to(scales[..., None], (*lead, count, width))
    return each.reshape(*lead, count * width)[..., :length].reshape(shape)


def unpacked(leaf: Any) -> jax.Array:
    """A bfloat16 or `Blockwise` leaf in float32; other leaves as they are."""
    if isinstance(leaf, Blockwise):
        return from_blockwise(leaf)
    return leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf

"""Dropout bits of attention: a hash of (seed, row, head, query, key), the same on every backend.

A generator with a state would tie the bits to the order in which blocks are visited, which differs
between the forward and the backward pass, between backends and between shards. A hash of the
global position needs no state: a kernel computes the bits of the tile that it has at hand.
"""

import jax
import jax.numpy as jnp
import numpy as np

# The multipliers of Murmur3's finaliser, and of the two-round hash that Chris Wellons' search found
# to have the least bias ("Prospecting for Hash Functions", 2018). As int32, which every backend
# multiplies (modulo 2^32), shifts and compares.
_MURMUR = np.array([0x85EBCA6B, 0xC2B2AE35], np.uint32).view(np.int32)
_ROUNDS = np.array([0x7FEB352D, 0x846CA68B], np.uint32).view(np.int32)
_STREAMS = np.array([0x9E3779B9, 0x3C6EF372], np.uint32).view(np.int32)
_COLUMN = np.uint32(0xDAA66D2B).view(np.int32)


def keep(
    seed: jax.Array,
    batch_index: jax.Array,
    head_index: jax.Array,
    query_index: jax.Array,
    key_index: jax.Array,
    rate: float,
) -> jax.Array:
    """Returns which attention weights survive dropout, each with probability 1 - rate.

    A bit depends on nothing but the seed and the four global indices. The costs: some thirty
    operations for each element of the broadcast of seed, batch, head and query indices, seven for
    each of the key indices, and seven for each element of the result. So pass the indices with the
    dimensions of size 1 that they have, and keys as a row where queries are a column.

    Args:
      seed: int32 scalar.
      batch_index: int32, of any shape that broadcasts with the others; so the next three.
      head_index: index of the query head.
      query_index: index of the query, counted from the first query, whatever the shift.
      key_index: index of the key.
      rate: probability of dropping, in [0, 1), a multiple of 2^-32 in effect.

    Returns:
      bool, of the common shape.
    """
    row = [_mix(seed ^ stream) for stream in _STREAMS]
    for index in (batch_index, head_index, query_index):
        row = [_mix(state ^ index) for state in row]
    # Two words a row: with one, added to the column's, two rows whose words differ by what two
    # columns' words differ would share bits. Adding the second between the rounds undoes that.
    bits = (row[0] ^ (key_index * _COLUMN)) * _ROUNDS[0]
    bits = ((bits ^ _shift(bits, 15)) + row[1]) * _ROUNDS[1]
    # Comparing reads a product's high bits first, which are its well mixed ones.
    return bits >= threshold(rate)


def threshold(rate: float) -> np.int32:
    """Returns the int32 below which a hash, uniform over all int32, says drop."""
    return np.int32(min(round(rate * 2**32), 2**32 - 1) - 2**31)


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ _shift(x, 16)) * _MURMUR[0]
    x = (x ^ _shift(x, 13)) * _MURMUR[1]
    return x ^ _shift(x, 16)


def _shift(x: jax.Array, bits: int) -> jax.Array:
    x = jnp.asarray(x)
    return jax.lax.shift_right_logical(x, jnp.full_like(x, bits))

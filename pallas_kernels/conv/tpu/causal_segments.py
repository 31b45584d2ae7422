"""Which taps of an output lie in its segment: bits in lanes, made masks of whole registers.

Legend: B batch, T positions, W words of 32 taps.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.conv.tpu.causal_plan import Plan, Taps
from pallas_kernels.conv.tpu.layout import LANES, up

BITS = 32


def bits(ids_BT: jax.Array, taps: Taps, rows: int) -> jax.Array:
    """Returns bits_BWT: that of a tap tells whether the position it reads has the output's id.

    T is filled up to a multiple of `rows` lanes, and with a tap's bits the words of 32.
    """
    (B, T), n = ids_BT.shape, len(taps.shift)
    before, after = taps.before, taps.after
    padded = jnp.pad(ids_BT, ((0, 0), (before, after)))
    words = []
    for first in range(0, n, BITS):
        word_BT = jnp.zeros((B, T), jnp.uint32)
        for bit, shift in enumerate(taps.shift[first : first + BITS]):
            same_BT = padded[:, before + shift : before + shift + T] == ids_BT
            word_BT |= same_BT.astype(jnp.uint32) << bit
        words.append(word_BT)
    bits_BWT = jax.lax.bitcast_convert_type(jnp.stack(words, axis=1), jnp.int32)
    return jnp.pad(bits_BWT, ((0, 0), (0, 0), (0, up(T, rows) - T)))


def spec(plan: Plan, index: Any) -> pl.BlockSpec:
    """Returns the block of the bits; `index` is of the batch and the rows, of a grid step."""
    words = -(-len(plan.taps.shift) // BITS)

    def block(*ids):
        b, t = index(*ids)
        return b, 0, t

    return pl.BlockSpec((plan.batch, words, plan.rows), block)


def scratch(plan: Plan) -> dict[str, Any]:
    """Returns what of VMEM the masks take."""
    return {'masks': pltpu.VMEM((len(plan.taps.shift), plan.rows, LANES), jnp.int32)}


def expand(plan: Plan, refs: Any, b: Any) -> None:
    """Makes the masks of a block: for every tap and row, all bits of a register's row or none."""

    def piece(k, _):
        at = pl.multiple_of(k * LANES, LANES)
        columns = {}
        for tap, shift in enumerate(plan.taps.shift):
            if not shift:  # an output's own position is of its segment
                continue
            word, bit = divmod(tap, BITS)
            if word not in columns:
                row = refs.bits[b, word : word + 1, pl.ds(at, LANES)]
                columns[word] = jnp.broadcast_to(row, (LANES, LANES)).T
            # The bit is moved to the sign, and the sign to everywhere.
            mask = (columns[word] << (BITS - 1 - bit)) >> (BITS - 1)
            refs.masks[tap, pl.ds(at, LANES)] = mask

    jax.lax.fori_loop(0, plan.rows // LANES, piece, None)


def read(plan: Plan, refs: Any, column: int, tap: int, at: Any) -> jax.Array:
    """Returns what tap number `tap` reads for a chunk of outputs, zeros from other segments."""
    shift = plan.taps.shift[tap]
    x = refs.rows[column, pl.ds(plan.before + at + shift, plan.chunk)]
    if not shift or not hasattr(refs, 'masks'):
        return x
    mask = refs.masks[tap, pl.ds(at, plan.chunk)]
    return pltpu.bitcast(pltpu.bitcast(x, jnp.int32) & mask, jnp.float32)

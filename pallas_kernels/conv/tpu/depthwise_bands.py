"""A depthwise kernel's weights as matrices of pixels by pixels: bands of one channel each.

Legend: K L kernel rows and columns, C channels, F phases, T and U tiles of inputs that a tile of
outputs sees, R S rows and columns of a tile, N blocks of channels, n tiles of a block, g channels
of a tile, z lanes of a tile: pixels and channels.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.conv.tpu.depthwise_plan import Plan
from pallas_kernels.conv.tpu.depthwise_tiles import WORDS, as_words, to_tiles
from pallas_kernels.conv.tpu.layout import LANES

ROW = 1 << 16  # of a code of rows and columns: more than columns count
NOWHERE = 1 << 30


def words(words_ref: Any, w_ref: Any) -> None:
    """Writes a kernel's weights [K, L, 128] as words [K L, 128], each all copies of one weight."""
    K, L, _ = w_ref.shape
    for k in range(K):
        found = jax.lax.bitcast_convert_type(w_ref[k].astype(jnp.float32), jnp.uint32)
        if w_ref.dtype.itemsize == 2:
            found |= found >> 16
        words_ref[pl.ds(k * L, L)] = found


def spread(plan: Plan, spread_ref: Any, words_ref: Any) -> None:
    """Writes, for every tile, the weights of its channels into all of its lanes: [n, K L, 128]."""
    for start in range(0, words_ref.shape[0], WORDS):
        rows = pl.ds(start, WORDS)
        words = jnp.broadcast_to(words_ref[rows][None], (plan.n, WORDS, LANES))
        spread_ref[:, rows] = to_tiles(words, plan.g)


def expand(plan: Plan, expanded_ref: Any, spread_ref: Any) -> None:
    """Writes the bands' matrices [z in, z out], in the order of pixels that the tiles have."""
    target, step = as_words(expanded_ref), WORDS * plan.packed

    @pl.loop(0, plan.n)
    def _(j):
        @pl.loop(0, LANES // step, unroll=4)
        def _(part):
            low = part * step
            made: dict = {}
            for index in np.ndindex(*plan.bands, plan.registers, plan.registers):
                f, t, u, v_in, v_out = index
                taps, registers = _taps(plan, *index)
                if (taps, registers) not in made:
                    row, lane = (_iota(axis) for axis in range(2))
                    groups = (low + row * plan.packed) // plan.g, lane // plan.g
                    codes = _codes(plan, j, groups, registers)
                    made[taps, registers] = _band(plan, spread_ref, j, codes, taps)
                start = pl.multiple_of(v_in * LANES // plan.packed + part * WORDS, WORDS)
                rows = pl.ds(start, WORDS)
                target[j, f, t, u, rows, pl.ds(v_out * LANES, LANES)] = made[taps, registers]


def _band(plan: Plan, spread_ref: Any, j: Any, codes: jax.Array, taps: tuple) -> jax.Array:
    """The words of 8 rows of a band, of the taps (code, weight)."""
    band = jnp.zeros((WORDS, LANES), jnp.uint32)
    for code, tap in taps:
        weight = jnp.broadcast_to(spread_ref[j, pl.ds(tap, 1)], band.shape)
        band = jnp.where(codes == code, weight, band)
    return band & _own_channel(plan)


def _own_channel(plan: Plan) -> jax.Array:
    """Bits of words whose row and lane are of one channel."""
    row, lane = (_iota(axis) for axis in range(2))
    bits = 32 // plan.packed
    found = jnp.zeros((WORDS, LANES), jnp.uint32)
    for half in range(plan.packed):
        own = (row * plan.packed + half) % plan.g == lane % plan.g
        mask = np.uint32(((1 << bits) - 1) << (half * bits))
        found |= jnp.where(own, mask, np.uint32(0))
    return found


def _iota(axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, (WORDS, LANES), axis)


def _codes(plan: Plan, j: Any, groups: tuple, registers: tuple[int, int]) -> jax.Array:
    """Codes of how input pixels lie to output pixels, of both groups in registers of tile j."""
    S, n = plan.tile[1], plan.n
    p_in, p_out = (((m - j) & (n - 1)) + v * n for m, v in zip(groups, registers, strict=True))
    (r_in, s_in), (r_out, s_out) = ((p // S, p % S) for p in (p_in, p_out))
    rows, cols = plan.rows, plan.cols
    code = s_in * cols.up - s_out * cols.down
    if n > S:  # else a register is of one row
        code += ROW * (r_in * rows.up - r_out * plan.phases * rows.down)
    return jnp.where(s_out < plan.Q, code, NOWHERE)


@functools.lru_cache
def _taps(plan: Plan, f: int, t: int, u: int, v_in: int, v_out: int) -> tuple[tuple, tuple]:
    """Taps (code, weight) that join registers of tiles, and the registers that codes are of."""
    (R, S), n, L = plan.tile, plan.n, len(plan.cols.offsets)
    rows_in, rows_out = ({(v * n + p) // S for p in range(n)} for v in (v_in, v_out))
    cols_in, cols_out = ({(v * n + p) % S for p in range(n)} for v in (v_in, v_out))
    found = []
    for k, row_offset in enumerate(plan.rows.offsets):
        # the input row low + t R + r_in, times up, is (f + phases r_out) down + offset
        y = f * plan.rows.down + row_offset - (plan.low + t * R) * plan.rows.up
        joined = {
            (r, q) for r in rows_in for q in rows_out
            if r * plan.rows.up - q * plan.phases * plan.rows.down == y
        }  # fmt: skip
        if not joined:
            continue
        for tap, col_offset in enumerate(plan.cols.offsets):
            x = col_offset - (plan.col_low + u * S) * plan.cols.up
            if any(
                s * plan.cols.up - q * plan.cols.down == x
                for s in cols_in
                for q in cols_out
                if q < plan.Q
            ):
                found.append(((0 if n <= S else ROW * y) + x, k * L + tap))
    return tuple(found), ((0, 0) if n == S else (v_in, v_out))


def gather(plan: Plan, dw_ref: Any, taps_ref: Any, bands: dict, j: Any) -> None:
    """Adds the gradient of tile j's bands to that of the weights that they came from.

    Args:
      plan: what is static.
      dw_ref: float32 [K L, 128].
      taps_ref: scratch of its shape.
      bands: by (t, u), [i out, z in], the output pixels as the tile has them.
      j: the tile.
    """
    found: dict[int, list] = {}
    codes: dict = {}
    for (t, u), band_iz in bands.items():
        for v_in, v_out, low in np.ndindex(plan.registers, plan.registers, max(1, plan.n // WORDS)):
            taps, registers = _taps(plan, 0, t, u, v_in, v_out)
            if (registers, low) not in codes:
                groups = _iota(1) // plan.g, low * WORDS + _iota(0)
                codes[registers, low] = _codes(plan, j, groups, registers)
            start = v_out * plan.n + low * WORDS
            part = band_iz[start : start + WORDS, v_in * LANES : (v_in + 1) * LANES]
            for code, tap in taps:
                own = jnp.where(codes[registers, low] == code, part, 0.0)
                found.setdefault(tap, []).append(own)
    taps_ref[...] = jnp.zeros_like(taps_ref)
    for tap, parts in found.items():
        taps_ref[pl.ds(tap, 1)] = jnp.sum(sum(parts), axis=0, keepdims=True)
    sums = taps_ref[...]
    for bit in (1 << k for k in range(plan.n.bit_length() - 1)):
        sums += pltpu.roll(sums, bit * plan.g, 1)
    group = jax.lax.broadcasted_iota(jnp.int32, sums.shape, 1) // plan.g
    dw_ref[...] += jnp.where(group == j, sums, 0.0)

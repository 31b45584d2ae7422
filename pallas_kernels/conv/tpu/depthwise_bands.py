"""A depthwise kernel's weights as matrices of pixels by pixels: bands of one channel each.

Legend: K L kernel rows and columns, C channels, F phases, T and U tiles of inputs that a tile of
outputs sees, R S rows and columns of a tile, N blocks of channels, n tiles of a block, g channels
of a tile, z lanes of a tile: pixels and channels.
"""

import functools
from collections.abc import Callable, Sequence
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
MOST_PLACES = 64  # matrices of 128 x 128 whose rows are all made in one piece of code


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
    """Writes the bands' matrices [z in, z out], in the order of pixels that the tiles have.

    Without a stride all of a matrix's rows hold the same weights, as far to the right as the row's
    pixel is: those of the first pixels are selected, the others turned and masked.
    """
    target, step = as_words(expanded_ref), WORDS * plan.packed
    places = list(np.ndindex(*plan.bands, plan.registers, plan.registers))
    turns = plan.turns and plan.cols.down == 1
    parts = LANES // step if len(places) <= MOST_PLACES else 2

    @pl.loop(0, plan.n, unroll=2)
    def _(j):
        weight = lambda tap: jnp.broadcast_to(spread_ref[j, pl.ds(tap, 1)], (WORDS, LANES))  # noqa: E731
        row, lane = _iota(0) * plan.packed // plan.g, _iota(1) // plan.g
        away = row - lane & plan.n - 1
        first: dict = {}
        for taps in dict.fromkeys(
            one for at in places for one in _apart(plan, _taps(plan, *at)[0])
        ):
            if turns:
                first[taps] = _selected(
                    away, [(_place(plan, code), tap) for code, tap in taps], weight
                )

        @pl.loop(0, LANES // step, unroll=parts)
        def _(part):
            low, own = part * step, _own_channel(plan, part * step)
            groups = (low + _iota(0) * plan.packed) // plan.g, lane
            made: dict = {}
            masks: dict = {}
            for index in places:
                f, t, u, v_in, v_out = index
                taps, registers = _taps(plan, *index)
                if (taps, registers) not in made:
                    codes = _codes(plan, j, groups, registers)
                    band = jnp.zeros((WORDS, LANES), jnp.uint32)
                    for one in _apart(plan, taps):
                        key = registers, tuple(code for code, _ in one)
                        if not turns:
                            band |= _selected(codes, one, weight) & own
                            continue
                        if key not in masks:
                            masks[key] = jnp.where(_among(codes, key[1]), own, np.uint32(0))
                        band |= pltpu.roll(first[one], low // plan.g * plan.g, 1) & masks[key]
                    made[taps, registers] = band
                start = pl.multiple_of(v_in * LANES // plan.packed + part * WORDS, WORDS)
                rows = pl.ds(start, WORDS)
                target[j, f, t, u, rows, pl.ds(v_out * LANES, LANES)] = made[taps, registers]


def _selected(codes: jax.Array, taps: Sequence[tuple], weight: Callable) -> jax.Array:
    """The words of 8 rows of a band, of the taps (code, weight)."""
    band = jnp.zeros(codes.shape, jnp.uint32)
    for code, tap in taps:
        band = jnp.where(codes == code, weight(tap), band)
    return band


def _own_channel(plan: Plan, low: Any) -> jax.Array:
    """Bits of words whose row, counted from a band's row `low`, and lane are of one channel."""
    row, lane = low + _iota(0) * plan.packed, _iota(1)
    bits = 32 // plan.packed
    found = jnp.zeros((WORDS, LANES), jnp.uint32)
    for half in range(plan.packed):
        own = (row + half) % plan.g == lane % plan.g
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


def gather(plan: Plan, total_ref: Any, taps_ref: Any, sums_ref: Any, j: Any) -> None:
    """Adds the gradient of tile j's bands to that of the weights that they came from.

    What belongs to one weight lies in all rows, as far to the right as the row's pixel is. So rows
    are turned back by their pixel; what then lies in the same lanes is summed, for several weights
    at once. Sums are of 8 rows, pixels among these are turned back at the end.

    Args:
      plan: what is static.
      total_ref: float32 [K L, 128].
      taps_ref: scratch of its shape.
      sums_ref: float32 [n, T, U, z out, z in], the tiles' gradients.
      j: the tile.
    """
    n, g, down = plan.n, plan.g, plan.cols.down
    row, lane = (_iota(axis) for axis in range(2))
    own = row % g == lane % g
    masks: dict = {}
    sums: dict = {}
    for first in range(0, LANES, WORDS):
        found: dict = {}
        for t, u, v_in, v_out in np.ndindex(plan.T, plan.U, plan.registers, plan.registers):
            taps, registers = _taps(plan, 0, t, u, v_in, v_out)
            for part in _apart(plan, taps):
                codes = tuple(code for code, _ in part)
                key = first, registers, codes
                if key not in masks:
                    groups = lane // g, (first + row) // g
                    masks[key] = own & _among(_codes(plan, j, groups, registers), codes)
                window = pl.ds(v_out * LANES + first, WORDS), pl.ds(v_in * LANES, LANES)
                values = sums_ref[j, t, u, *window]
                places = tuple(sorted((tap, _place(plan, code)) for code, tap in part))
                found.setdefault((places, key), []).append(values)
        for (places, key), parts in found.items():
            mine = jnp.where(masks[key], sum(parts), 0.0)
            turned = pltpu.roll(mine, -(first // g) * down * g % LANES, 1) if plan.turns else mine
            sums[places] = sums[places] + turned if places in sums else turned
    # Row r of 8 is of a pixel r // g further, and lanes of tile j begin with group j (1 - down).
    rows: dict = {}
    for places, sum_ in sums.items():
        total = jnp.zeros((1, LANES), jnp.float32)
        pixels = -(-WORDS // g) if plan.turns else 1
        for pixel in range(pixels):
            part = jnp.where(row // g == pixel, sum_, 0.0) if pixels > 1 else sum_
            part = jnp.sum(part, axis=0, keepdims=True)
            total += pltpu.roll(part, -pixel * down * g % LANES, 1) if pixel else part
        for bit in [] if plan.turns else [1 << k for k in range(n.bit_length() - 1)]:
            total += pltpu.roll(total, bit * g, 1)
        for tap, place in places:
            mine = pltpu.roll(total, -place * g % LANES, 1)
            rows[tap] = rows[tap] + mine if tap in rows else mine
    for tap, mine in rows.items():
        taps_ref[pl.ds(tap, 1)] = mine
    turned = pltpu.roll(taps_ref[...], (down * j & (n - 1)) * g, 1)
    total_ref[...] += jnp.where(
        jax.lax.broadcasted_iota(jnp.int32, turned.shape, 1) // g == j, turned, 0.0
    )


def _among(codes: jax.Array, wanted: tuple[int, ...]) -> jax.Array:
    """Where the codes are among those given."""
    if len(wanted) > 2 and max(wanted) - min(wanted) == len(wanted) - 1:
        return (codes >= min(wanted)) & (codes <= max(wanted))
    return functools.reduce(jnp.logical_or, [codes == code for code in wanted])


def _place(plan: Plan, code: int) -> int:
    """The group of lanes where a weight's gradient is once its rows are turned back."""
    y = (code + ROW // 2) // ROW
    return (y * plan.tile[1] + code - y * ROW) % plan.n


def _apart(plan: Plan, taps: tuple[tuple[int, int], ...]) -> list[tuple]:
    """Splits taps (code, weight) into as few parts as have each weight in lanes of its own."""
    parts: list[dict[int, tuple[int, int]]] = []
    for code, tap in taps:
        place = _place(plan, code)
        part = next((part for part in parts if plan.turns and place not in part), None)
        if part is None:
            parts.append(part := {})
        part[place] = code, tap
    return [tuple(part.values()) for part in parts]

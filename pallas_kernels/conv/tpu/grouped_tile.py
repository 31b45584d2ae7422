"""The kernel of a tile, which takes all that a tile sees to all that it makes.

It is a matrix of blocks, one for each column that a tile sees and each output that it makes, and
where a tap lies between them the block is that tap's. Blocks that are diagonal themselves may come
in halves, 64 channels each: the matrix is then of blocks half as large, twice, and less of it is
zero. Halves of two columns share lanes: `swapped` brings them together and apart.

Legend: X Y channels and features of a block.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.conv.tpu.grouped_axis import ABSENT
from pallas_kernels.conv.tpu.grouped_plan import HALF, Plan


def swapped(left: jax.Array, right: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the first halves of the lanes of two arrays, side by side, and their second ones."""
    dtype = left.dtype
    packed = dtype.itemsize < 4
    if packed:  # lanes of words: what is in a word stays together
        left, right = pltpu.bitcast(left, jnp.int32), pltpu.bitcast(right, jnp.int32)
    first = jax.lax.broadcasted_iota(jnp.int32, left.shape, 1) < HALF
    both = (
        jnp.where(first, left, pltpu.roll(right, HALF, 1)),
        jnp.where(first, pltpu.roll(left, HALF, 1), right),
    )
    return tuple(pltpu.bitcast(x, dtype) for x in both) if packed else both


def assemble(plan: Plan, w_ref: Any, tile_ref: Any) -> None:
    """Writes the kernel for every row that a tile sees, and a last one of zeros."""
    tile_ref[len(plan.rows.offsets)] = jnp.zeros(tile_ref.shape[1:], tile_ref.dtype)
    for m, half, rows, lanes, taps in _blocks(plan):
        size = rows.stop - rows.start
        own = slice(half * size, (half + 1) * size)  # of a diagonal block
        zeros = jnp.zeros((size, lanes.stop - lanes.start), tile_ref.dtype)
        parts = [zeros if tap is None else w_ref[(*tap, own)] for tap in taps]
        tile_ref[m, half, rows, lanes] = swapped(*parts)[half] if len(parts) == 2 else parts[0]


def fold(plan: Plan, sums_ref: Any, dw_ref: Any) -> None:
    """Adds up a tile's gradient of the kernel, turned over, to that of each tap."""
    dw_ref[...] = jnp.zeros_like(dw_ref)
    found: dict[tuple, jax.Array] = {}
    for m, half, rows, lanes, taps in _blocks(plan):
        part = sums_ref[m, half, rows, lanes]
        blank, parts = jnp.zeros_like(part), [part]
        if len(taps) == 2:
            parts = swapped(blank, part) if half else swapped(part, blank)
        for tap, block in zip(taps, parts, strict=True):
            if tap is not None:
                sums = found.get((tap, half))
                found[tap, half] = block if sums is None else sums + block
    for tap in {tap for tap, _ in found}:
        halves = [found[tap, half] for half in range(plan.halves)]
        dw_ref[tap] = jnp.concatenate(halves).T


def _blocks(plan: Plan) -> Iterator[tuple[int, int, slice, slice, list]]:
    """Yields places in the kernel: row seen, half, sublanes, lanes, and the taps side by side."""
    rows, cols = plan.rows, plan.cols
    seen = range(plan.seen)
    outs = [(r, s) for r in range(rows.outs) for s in range(cols.outs)]

    def tap(m: int, n: int, out: tuple[int, int]) -> tuple[int, int] | None:
        if n >= len(cols.offsets):
            return None
        found = rows.taps[m][out[0]], cols.taps[n][out[1]]
        return None if ABSENT in found else found

    down, across = (outs, seen) if plan.back else (seen, outs)
    height, width = plan.block_shape
    for m in range(len(rows.offsets)):
        for half in range(plan.halves):
            for i, a in enumerate(down):
                for j in range(0, len(across), plan.halves):
                    pair = across[j : j + plan.halves]
                    taps = [tap(m, *((b, a) if plan.back else (a, b))) for b in pair]
                    sublanes = slice(i * height, (i + 1) * height)
                    at = j // plan.halves
                    yield m, half, sublanes, slice(at * width, (at + 1) * width), taps

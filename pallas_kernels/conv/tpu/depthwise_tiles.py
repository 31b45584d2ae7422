"""Registers of one pixel and 128 channels turned into tiles of many pixels and few channels.

A block transposition of lanes in three moves: each pixel's register is rotated by as many groups
of g lanes as the pixel has before it, then registers trade groups in log2(n) rounds of selects.
Tile j so gets its pixels in an order that is rotated by j, which the bands follow and which saves
a second rotation. From tiles to pixels the same moves run backwards.

Legend: R S rows and columns of a tile, g channels of a tile, n = 128 / g tiles of a block of
channels and pixels of a register.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.conv.tpu.depthwise_plan import Plan
from pallas_kernels.conv.tpu.layout import LANES

Scalar = Any  # an int, or an int32 scalar of a kernel
WORDS = 8  # rows of a register of 32-bit words


def trade(words: jax.Array, g: int) -> jax.Array:
    """Returns registers j, [n, ...], whose group m of lanes is that of register (m - j) mod n."""
    n = words.shape[0]
    group = jax.lax.broadcasted_iota(jnp.int32, words.shape, words.ndim - 1) // g
    traded = _turned(_reversed(words), 1)
    for bit in (1 << k for k in range(n.bit_length() - 1)):
        traded = jax.lax.select(group & bit != 0, _turned(traded, bit), traded)
    return traded


def to_tiles(words: jax.Array, g: int) -> jax.Array:
    """Returns the words of n tiles, [n, ...], from those of n pixels."""
    return trade(_rotated(words, g), g)


def to_pixels(words: jax.Array, g: int) -> jax.Array:
    """Returns the words of n pixels, [n, ...], from those of n tiles."""
    return _rotated(trade(words, g), -g)


def _reversed(words: jax.Array) -> jax.Array:
    n = words.shape[0]
    return jax.lax.concatenate([words[k : k + 1] for k in range(n - 1, -1, -1)], 0)


def _turned(words: jax.Array, by: int) -> jax.Array:
    """Registers whose number k is that of the given k - by."""
    return jax.lax.concatenate([words[-by:], words[:-by]], 0)


def _rotated(words: jax.Array, by: int) -> jax.Array:
    """Registers whose lanes are rotated by as much as they have registers before them."""
    last, one = words.ndim - 1, words[:1]
    rest = [pltpu.roll(words[p : p + 1], p * by % LANES, last) for p in range(1, len(words))]
    return jax.lax.concatenate([one, *rest], 0)


def as_words(ref: Any) -> Any:
    """Returns a view of a block in VMEM as 32-bit words: rows of small types lie in one word."""
    return ref.bitcast(jnp.uint32)


def split(index: Scalar, sizes: Sequence[int]) -> list[Scalar]:
    """Returns the indices of dimensions of the given sizes from that of all of them together."""
    parts, most = [], math.prod(sizes)
    for size in reversed(sizes):
        if size == 1:
            parts.append(0)
        elif size == sizes[0] and len(parts) == len(sizes) - 1:
            parts.append(index)
        else:
            quotient = _divided(index, size, most)
            parts.append(index - quotient * size)
            index = quotient
            most = -(-most // size)
    return parts[::-1]


def _divided(index: Scalar, by: int, most: int) -> Scalar:
    """Returns index // by for an index below `most`, if it is small by a product: that is fast."""
    if most * by < 1 << 16:
        return index * -(-(1 << 16) // by) >> 16
    return jax.lax.div(index, by)


@dataclasses.dataclass(frozen=True)
class Turn:
    """Work that turns a block into tiles or back, cut into `count` equal parts.

    Attributes:
      sizes: of the parts' dimensions; the last is of the batch, in registers.
      one: does one part, of which it gets the indices.
    """

    sizes: tuple[int, ...]
    one: Callable[..., None]

    @property
    def count(self) -> int:
        """How many parts there are."""
        total = 1
        for size in self.sizes:
            total *= size
        return total

    def part(self, index: Scalar) -> None:
        """Does a part; those past the last do the last again."""
        if not isinstance(index, int):
            index = jax.lax.min(index, self.count - 1)
        *outer, batch = split(index, self.sizes)
        start = batch * WORDS
        if not isinstance(start, int):
            start = pl.multiple_of(start, WORDS)
        self.one(*outer, pl.ds(start, WORDS))


def inputs_turn(
    plan: Plan, tiles_ref: Any, ref: Any, place: Sequence[Scalar], head: bool = False
) -> Turn:
    """Turns a block of the inputs into tiles.

    Args:
      plan: what is static.
      tiles_ref: as `Plan.tiles_in`.
      ref: as `Plan.in_block`.
      place: which block of rows and of columns it is.
      head: whether it is the tiles above an image's first block, of the rows `Plan.head`.
    """
    (R, S), down = plan.tile, plan.rows.down
    sizes = plan.rows.inputs, plan.cols.inputs
    (first, base), source, target = plan.window(place), as_words(ref), as_words(tiles_ref)
    filled = range(plan.carried) if head else plan.filled
    base = (plan.head.start, 0) if head else base
    first_rows = [i * plan.row_step + plan.low for i in range(plan.grid[2])]
    check_row = first_rows[0] < 0 or first_rows[-1] + plan.J * R > sizes[0]
    tiles = range(plan.grid[3] * plan.col_tiles), range(plan.U)
    columns = [
        [q * plan.col_step + plan.col_low + u * S + s for q in tiles[0] for u in tiles[1]]
        for s in range(S)
    ]
    check_cols = [min(seen) < 0 or max(seen) >= sizes[1] for seen in columns]

    def one(a, u, split_J, J, batch):
        J += filled.start
        row = first[0] + (J * down + split_J) * R
        col = first[1] + a * plan.col_step + u * S
        rows = [_inside(row + r, sizes[0], check_row) for r in range(R)]
        cols = [_inside(col + s, sizes[1], check) for s, check in enumerate(check_cols)]

        def read(r, s, count):
            (at, valid), (left, col_valid) = rows[r], cols[s]
            words = source[at - base[0], pl.ds(left - base[1], count), batch]
            return _only(words, valid & col_valid)

        words = _pixels(plan, read, check_cols)
        target[:, u, a, split_J, J, :, batch] = to_tiles(words, plan.g)

    return Turn((plan.col_tiles, plan.U, down, len(filled), plan.batch_registers), one)


def clear(plan: Plan, tiles_ref: Any) -> None:
    """Writes zeros to the tiles of inputs that `inputs_turn` leaves out: all are padding."""
    for J in set(range(plan.carried, tiles_ref.shape[4])) - set(plan.filled):
        tiles_ref[:, :, :, :, J] = jnp.zeros_like(tiles_ref[:, :, :, :, J])


def outputs_turn(plan: Plan, tiles_ref: Any, ref: Any, place: Sequence[Scalar]) -> Turn:
    """Turns a block of what lies as the outputs do into tiles; zero beyond the image."""
    (R, S), F = plan.tile, plan.phases
    source, target = as_words(ref), as_words(tiles_ref)
    sizes, held, spans = (plan.rows.outputs, plan.cols.outputs), plan.out_block, plan.out_span
    left = [
        size if count == 1 else jnp.minimum(size - at * span, most)
        for size, count, at, span, most in zip(
            sizes, plan.grid[2:], place, spans, held, strict=False
        )
    ]
    check_row = plan.grid[2] * spans[0] > sizes[0]
    check_col = plan.grid[3] * spans[1] > sizes[1]

    def one(f, a, i, batch):
        rows = [_inside(f + F * (i * R + r), left[0], check_row) for r in range(R)]
        cols = [_inside(a * plan.Q + s, left[1], check_col) for s in range(plan.Q)]

        def read(r, s, count):
            if s >= plan.Q:
                return jnp.zeros((count, WORDS, LANES), jnp.uint32)
            words = source[rows[r][0], pl.ds(cols[s][0], count), batch]
            return _only(words, rows[r][1] & cols[s][1])

        words = _pixels(plan, read, [check_col or s >= plan.Q for s in range(S)])
        target[:, f, a, i, :, batch] = to_tiles(words, plan.g)

    return Turn((F, plan.col_tiles, plan.row_tiles, plan.batch_registers), one)


def results_turn(plan: Plan, ref: Any, tiles_ref: Any) -> Turn:
    """Turns tiles into a block of the outputs."""
    (R, S), F = plan.tile, plan.phases
    source, target = as_words(tiles_ref), as_words(ref)
    rows, cols = plan.out_block[:2]

    guarded = [(plan.col_tiles - 1) * plan.Q + s >= cols for s in range(S)]

    writes = [
        (*plan.pixel(v, p), v, p, count)
        for v in range(plan.registers)
        for p, count in _runs(plan, v, guarded)
        if plan.pixel(v, p)[1] < plan.Q
    ]
    # Of a row or column beyond the block the last one inside is written, again and rightly later.
    writes.sort(key=lambda write: (-write[0], -write[1]))
    spills = plan.out_span[0] > rows

    def one(f, a, i, batch):
        words = to_pixels(source[:, f, a, i, :, batch], plan.g)
        for r, s, v, p, count in writes:
            count = min(count, plan.Q - s)
            row, col, inside = f + F * (i * R + r), a * plan.Q + s, True
            if spills and F == 1:
                row = _smaller(row, rows - 1)
            elif spills:
                inside = row < rows
            if guarded[s]:
                col = _smaller(col, cols - 1)
            _write(target, (row, pl.ds(col, count), batch), words[p : p + count, v], inside)

    return Turn((F, plan.col_tiles, plan.row_tiles, plan.batch_registers), one)


def _runs(plan: Plan, v: int, alone: Sequence[bool]) -> list[tuple[int, int]]:
    """Returns (first, count) of a register's pixels that follow each other in a row of the image.

    Columns that are `alone` are runs of their own.
    """
    runs: list[tuple[int, int]] = []
    for p in range(plan.n):
        s = plan.pixel(v, p)[1]
        if runs and s > 0 and not alone[s] and not alone[s - 1]:
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((p, 1))
    return runs


def _pixels(plan: Plan, read: Callable[..., jax.Array], alone: Sequence[bool]) -> jax.Array:
    """Returns the n pixels of all registers of a tile, [n, registers, rows, 128]."""
    registers = []
    for v in range(plan.registers):
        runs = [read(*plan.pixel(v, p), count) for p, count in _runs(plan, v, alone)]
        registers.append(jax.lax.concatenate(runs, 0)[:, None])
    return jax.lax.concatenate(registers, 1)


def _smaller(a: Scalar, b: int) -> Scalar:
    return min(a, b) if isinstance(a, int) else jax.lax.min(a, b)


def _write(ref: Any, index: tuple, words: jax.Array, inside: Scalar) -> None:
    if inside is False:
        return

    def write():
        ref[index] = words

    write() if inside is True else pl.when(inside)(write)


def _inside(at: Scalar, size: Scalar, check: bool) -> tuple[Scalar, Scalar]:
    """Returns a place within an image that ends at `size`, and whether that is where it was."""
    if not check:
        return at, True
    last = size - 1
    if isinstance(at, int) and isinstance(size, int):
        return min(max(at, 0), last), 0 <= at <= last
    return jax.lax.clamp(0, at, last), (at >= 0) & (at <= last)


def _only(words: jax.Array, valid: Scalar) -> jax.Array:
    """The words, zero where not valid."""
    if valid is True:
        return words
    zeros = jnp.zeros_like(words)
    return zeros if valid is False else jax.lax.select(valid, words, zeros)

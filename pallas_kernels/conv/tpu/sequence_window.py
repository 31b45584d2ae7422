"""The rows of a sequence that a block of outputs reads, in VMEM: a block and what is around it.

Sequences lie as they are, [B, T, C]: positions on sublanes. A tap is then a shift of sublanes. The
load of 32-bit rows 128 lanes wide begins at any sublane for nothing, where rows of bfloat16 begin
at whole registers only: the rows are held in float32, whatever their type.

Legend: T positions, N positions of a piece, C channels.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.conv.tpu.layout import LANES, largest_divisor, up

# Positions of a matrix product; shorter ones wait for each other's results.
CHUNK = 1024
# Blocks of few chunks are cut finer, and no block is cut more often than the loop is unrolled.
FINE = 256
UNROLL = 16
# Multiplications by a position's channels that are straight code.
CODE = 8192 * 256 * 256
# A block's first positions are those of a tile, whatever the type.
ALIGN = 16


@dataclasses.dataclass(frozen=True)
class Window:
    """Rows in VMEM, all static: `before`, those of a block, `after`.

    The rows are kept in columns of 128 lanes, each contiguous: only then is an unaligned load one.

    Attributes:
      rows: positions of a block.
      before, after: positions around it, multiples of 16 that divide `rows`, or 0.
      channels: C.
    """

    rows: int
    before: int
    after: int
    channels: int

    @property
    def scratch(self) -> Any:
        """The memory that holds it."""
        lanes = min(self.channels, LANES)
        size = self.before + self.rows + self.after
        return pltpu.VMEM((-(-self.channels // LANES), size, lanes), jnp.float32)

    def store(self, ref: Any, start: Any, x_NC: jax.Array) -> None:
        """Puts x at the position `start`, which counts from the block's first."""
        rows = pl.ds(self.before + start, x_NC.shape[0])
        x_NC = x_NC.astype(jnp.float32)
        for column in range(ref.shape[0]):
            low = column * LANES
            high = min(low + LANES, self.channels)
            ref[column, rows, : high - low] = x_NC[:, low:high]

    def load(self, ref: Any, start: Any, size: int) -> jax.Array:
        """Returns `size` rows from the position `start` on, in float32."""
        rows = pl.ds(self.before + start, size)
        columns = []
        for column in range(ref.shape[0]):
            lanes = min(LANES, self.channels - column * LANES)
            columns.append(ref[column, rows, :lanes])
        return joined(columns)


def block_rows(T: int, most: int, least: int = 0) -> int:
    """Returns how many positions a block has: about `most`, and such that they divide T if any do.

    They make chunks of 1024 or, of short sequences and wide ones, of 256. Where it takes more than
    one block, none is shorter than `least`.
    """
    most = max(most, 2 * least)
    if max(min(most, CHUNK), FINE) >= T:
        return up(T, ALIGN)
    unit = CHUNK if T > 4 * CHUNK and most >= CHUNK else FINE
    fewest = -(-T // max(most, unit))
    for blocks in range(fewest, 2 * fewest + 1):
        if T % (blocks * unit) == 0 and T // blocks >= least:
            return T // blocks
    return up(-(-T // fewest), unit)


def around(size: int, rows: int) -> int:
    """Returns the smallest divisor of `rows`, of whole tiles, that holds `size` positions."""
    if not size:
        return 0
    tiles = rows // ALIGN
    return ALIGN * next(n for n in range(1, tiles + 1) if tiles % n == 0 and n * ALIGN >= size)


def for_chunks(rows: int, body: Any, *, weights: int = 0, reverse: bool = False) -> None:
    """Calls `body(start, size)` for every chunk of a block, in order.

    `weights` is how many a position is multiplied with: a product is straight code, and so is what
    is unrolled, of which there is a limit.
    """
    most = CODE // max(1, weights)
    size = ALIGN * largest_divisor(rows // ALIGN, max(FINE, min(CHUNK, most // 2)) // ALIGN)
    chunks = rows // size

    def one(n, _):
        n = chunks - 1 - n if reverse else n
        body(pl.multiple_of(n * size, size), size)

    if chunks == 1:
        body(0, size)
    else:
        unroll = largest_divisor(chunks, max(1, min(UNROLL, most // size)))
        jax.lax.fori_loop(0, chunks, one, None, unroll=unroll)


def at_once(rows: int, weights: int) -> bool:
    """Whether one product over all positions of a block is not too much straight code."""
    return rows * weights <= CODE


def joined(columns: Sequence[jax.Array]) -> jax.Array:
    """Returns arrays side by side."""
    return columns[0] if len(columns) == 1 else jnp.concatenate(columns, axis=1)


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    """Matrix product accumulated in float32, exact products also for float32 inputs."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def product(taps: Sequence[jax.Array], w_ref: Any) -> jax.Array:
    """Returns the sum of `taps[k] @ w_ref[k]`, one product where channels fill the lanes.

    One contraction over all taps fills an MXU that is wider than the channels.
    """
    K, C, _ = w_ref.shape
    if C % LANES == 0:
        return dot(joined(taps), w_ref[...].reshape(K * C, -1))
    total = dot(taps[0], w_ref[0])
    for k in range(1, K):
        total += dot(taps[k], w_ref[k])
    return total


def own_segment(x_NC: jax.Array, same_1N: jax.Array) -> jax.Array:
    """Returns x where `same`, a row of float32, is not 0, and zeros elsewhere."""
    N, C = x_NC.shape
    columns = -(-C // LANES)
    lanes = -(-N // LANES) * LANES
    if lanes != N:
        same_1N = jnp.concatenate([same_1N, jnp.zeros((1, lanes - N), same_1N.dtype)], axis=1)
    same_NL = jnp.broadcast_to(same_1N, (LANES, lanes)).T[:N]
    same_NC = joined([same_NL] * columns)[:, :C]
    return jnp.where(same_NC != 0, x_NC.astype(jnp.float32), 0).astype(x_NC.dtype)


def whole_blocks(same_BKT: jax.Array, rows: int) -> jax.Array:
    """Returns a mask as float32, with as many positions as whole blocks have."""
    T = same_BKT.shape[2]
    return jnp.pad(same_BKT.astype(jnp.float32), ((0, 0), (0, 0), (0, up(T, rows) - T)))

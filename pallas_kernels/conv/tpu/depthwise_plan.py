"""How a depthwise convolution is laid out for the matrix unit: tiles of few channels, many pixels.

A tile is the lanes of one product: R rows x S columns of pixels x g channels. A convolution is
then a product with a band matrix, [input pixels and channels, output pixels and channels], zero
off the channels' diagonal; stride, dilation and the columns' padding are where its band lies. In
the rows a block of outputs is a sum over tiles of inputs, all of one image's rows in turn.

Legend: B batch, H W input rows and columns, K L kernel rows and columns, P Q output rows and
columns, C channels, R S rows and columns of a tile, g channels of a tile, n = 128 / g tiles of
a block of channels.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from pallas_kernels.conv.tpu.layout import LANES


@dataclasses.dataclass(frozen=True)
class Axis:
    """What outputs see along one dimension: through tap k, o sees (o * down + offsets[k]) / up.

    Only where that is whole and one of the inputs. A convolution has `up` 1 and its stride for
    `down`; the gradient of its input has these the other way round.
    """

    inputs: int
    outputs: int
    down: int
    up: int
    offsets: tuple[int, ...]

    @classmethod
    def of(cls, inputs: int, outputs: int, taps: int, stride: int, dilation: int, low: int):
        """Returns a convolution's axis."""
        return cls(inputs, outputs, stride, 1, tuple(k * dilation - low for k in range(taps)))

    @property
    def turned(self) -> 'Axis':
        """The axis of the gradient of the inputs."""
        return Axis(
            self.outputs, self.inputs, self.up, self.down, tuple(-k for k in self.offsets)
        )  # fmt: skip

    def taps(self, output: int) -> list[tuple[int, int]]:
        """Returns (input, tap) for all inputs that an output sees, padding among them."""
        at = [(output * self.down + offset, k) for k, offset in enumerate(self.offsets)]
        return [(place // self.up, k) for place, k in at if place % self.up == 0]

    def reach(self, outputs: range) -> tuple[int, int]:
        """Returns the first and the last input that some of the outputs see."""
        seen = [place for o in outputs for place, _ in self.taps(o)]
        return (min(seen), max(seen)) if seen else (0, 0)


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is static in a call but its epilogue.

    Attributes:
      rows, cols: their axes.
      side: lanes of a tile.
      tile: R and S.
      low: first input row of the first tile of inputs, for a block that starts at row 0.
      T: tiles of inputs, one below the other, that a tile of outputs sees.
      Q: columns of a tile of outputs that are used.
      col_low, U: first input column and width in tiles of what a tile of outputs sees.
      row_tiles, col_tiles, batch: tiles of outputs and images of a block.
      sizes: B and C, padded.
      packed: elements of a 32-bit word.
      cores: that share the blocks.
      at_once: tiles whose products are laid out together.
    """

    rows: Axis
    cols: Axis
    side: int
    tile: tuple[int, int]
    low: int
    T: int
    Q: int
    col_low: int
    U: int
    row_tiles: int
    col_tiles: int
    batch: int
    sizes: tuple[int, int]
    packed: int
    cores: int
    at_once: int = 1

    @property
    def pixels(self) -> int:
        """Pixels of a tile."""
        return self.tile[0] * self.tile[1]

    @property
    def g(self) -> int:
        """Channels of a tile."""
        return self.side // self.pixels

    @property
    def n(self) -> int:
        """Tiles that the lanes of a register go to; also pixels of a register in a tile."""
        return LANES // self.g

    @property
    def registers(self) -> int:
        """Registers side by side in a tile."""
        return self.side // LANES

    @property
    def batch_registers(self) -> int:
        """Registers one below the other in the images of a block."""
        return self.batch // (8 * self.packed)

    @property
    def phases(self) -> int:
        """Kinds of output rows, by which of the kernel's rows they see."""
        return self.rows.up

    @property
    def J(self) -> int:
        """Tiles of input rows of a block."""
        return (self.row_tiles - 1) * self.rows.down + self.T

    @property
    def carried(self) -> int:
        """The first tiles of input rows, if they are kept from the block before, which is above."""
        blocks = self.grid[2]
        above = blocks > 1 and self.grid[3] == 1 and self.per_core % blocks == 0
        return self.T - 1 if above and self.rows.down == 1 else 0

    @property
    def head(self) -> range:
        """Input rows of the carried tiles of an image's first block, one at least."""
        first = max(self.low, 0)
        rows = max(1, self.low + self.carried * self.tile[0] - first)
        rows = min(rows, self.rows.inputs)
        first = min(first, self.rows.inputs - rows)
        return range(first, first + rows)

    @property
    def filled(self) -> range:
        """The tiles of input rows, of `down` side by side, that are read and not all padding."""
        R, down = self.tile[0], self.rows.down
        if self.grid[2] > 1:
            return range(self.carried, -(-self.J // down))
        first, last = max(0, -self.low), min(self.J * R, self.rows.inputs - self.low) - 1
        return range(min(first, last) // R // down, last // R // down + 1)

    @property
    def out_span(self) -> tuple[int, int]:
        """Output rows and columns of a block of whole tiles."""
        return self.phases * self.tile[0] * self.row_tiles, self.Q * self.col_tiles

    @property
    def row_step(self) -> int:
        """Input rows from a block to the next."""
        return self.out_span[0] * self.rows.down // self.rows.up

    @property
    def col_step(self) -> int:
        """Input columns from a tile to the next."""
        return self.Q * self.cols.down // self.cols.up

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """Blocks of channels, batch, rows, columns."""
        B, C = self.sizes
        outputs = self.rows.outputs, self.cols.outputs
        blocks = (-(-size // span) for size, span in zip(outputs, self.out_span, strict=True))
        return C // LANES, B // self.batch, *blocks

    @property
    def items(self) -> int:
        """Blocks that there are."""
        return math.prod(self.grid)

    @property
    def per_core(self) -> int:
        """Blocks that a core does, one after the other."""
        return -(-self.items // self.cores)

    def block(self, core, step):
        """Returns the indices, as in `grid`, of the block that a core does in a step.

        Steps before the first do the first block, those past the last one the last.
        """
        step = jnp.clip(step, 0, self.per_core - 1)
        index = jnp.minimum(core * self.per_core + step, self.items - 1)
        found = []
        for size in self.grid[:0:-1]:
            found.append(jax.lax.rem(index, size) if size > 1 else 0)
            index = jax.lax.div(index, size) if size > 1 else index
        return (index, *found[::-1])

    def window(self, place):
        """Returns the first input pixel of a block's tiles, and that of `in_block`."""
        axes, held, counts = (self.rows, self.cols), self.in_block, self.grid[2:]
        steps, lows = (self.row_step, self.col_step * self.col_tiles), (self.low, self.col_low)
        first = tuple(at * step + low for at, step, low in zip(place, steps, lows, strict=True))
        kept = self.carried * self.tile[0], 0
        base = tuple(
            0 if count == 1 else jnp.clip(at + above, 0, axis.inputs - size)
            for at, above, axis, size, count in zip(first, kept, axes, held, counts, strict=False)
        )
        return first, base

    @property
    def in_block(self) -> tuple[int, int, int, int]:
        """Shape of a block of x_HWBC."""
        _, _, *blocks = self.grid
        rows = (self.J - self.carried) * self.tile[0]
        needs = rows, (self.col_tiles - 1) * self.col_step + self.U * self.tile[1]
        sizes = self.rows.inputs, self.cols.inputs
        whole = (
            size if count == 1 else min(size, need)
            for size, need, count in zip(sizes, needs, blocks, strict=True)
        )
        return *whole, self.batch, LANES

    @property
    def out_block(self) -> tuple[int, int, int, int]:
        """Shape of a block of y_PQBO."""
        outputs = self.rows.outputs, self.cols.outputs
        rows, cols = map(min, self.out_span, outputs)
        return rows, cols, self.batch, LANES

    @property
    def tiles_in(self) -> tuple[int, ...]:
        """Shape of a block's inputs as tiles: row tiles split so that a stride takes a slice."""
        down, tile = self.rows.down, (self.registers, self.batch, LANES)
        return self.n, self.U, self.col_tiles, down, -(-self.J // down), *tile

    @property
    def tiles_out(self) -> tuple[int, ...]:
        """Shape of a block's outputs as tiles."""
        tile = self.registers, self.batch, LANES
        return self.n, self.phases, self.col_tiles, self.row_tiles, *tile

    @property
    def turns(self) -> bool:
        """Whether what an output sees lies, in the pixels' order, as far on as the output does."""
        rows, cols = self.rows, self.cols
        one_row = self.n <= self.tile[1]
        return rows.up == cols.up == 1 and (one_row or rows.down == cols.down)

    def pixel(self, register: int, p: int) -> tuple[int, int]:
        """Returns row and column in its tile of a register's pixel p."""
        return divmod(register * self.n + p, self.tile[1])

    @property
    def bands(self) -> tuple[int, ...]:
        """Matrices of one group of channels: phases, T, U."""
        return self.phases, self.T, self.U

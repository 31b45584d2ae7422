"""How a depthwise kernel cuts its output into blocks, and which input each block has at hand.

A block's input is in shared memory as patches. One patch serves a run of consecutive taps: where
taps lie close, one for all of them is least, as neighbours share what they read; where they are
dilated far apart, one for each.

Legend: B batch, H W input rows and columns, K L kernel rows and columns, C channels.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.conv.arguments import ConvBlockSizes
from pallas_kernels.conv.gpu.axes import Axis
from pallas_kernels.hopper import SHARED_MEMORY

VECTOR = 256  # numbers of a vector: two for each thread of a warpgroup
LONGEST = 256  # of a copy, in any dimension
RUN = 8  # taps of a row that are taken in one go, of kernels with more than twice as many
# Of a block: so that a few of them share a multiprocessor, and copy while another one computes.
USUAL = SHARED_MEMORY // 3


@dataclasses.dataclass(frozen=True)
class Patches:
    """The patches along one axis for `block` outputs: each is for `run` taps."""

    axis: Axis
    block: int
    run: int

    @property
    def count(self) -> int:
        """How many patches there are."""
        return -(-self.axis.taps // self.run)

    @property
    def size(self) -> int:
        """How many positions a patch has."""
        return (self.block - 1) * self.axis.stride + (self.run - 1) * self.axis.step + 1

    @property
    def blocks(self) -> int:
        """How many blocks the outputs come to."""
        return -(-self.axis.out // self.block)

    def start(self, block: jax.Array, patch: int) -> jax.Array:
        """Returns where in the input a patch begins."""
        first = self.axis.first + patch * self.run * self.axis.step
        return block * (self.block * self.axis.stride) + first

    def place(self, output: jax.Array | int, tap: jax.Array | int) -> tuple:
        """Returns which patch, and where in it, an output of the block reads at a tap."""
        if isinstance(tap, int):
            patch, tap = divmod(tap, self.run)
        else:
            patch, tap = lax.div(tap, jnp.int32(self.run)), lax.rem(tap, jnp.int32(self.run))
        return patch, output * self.axis.stride + tap * self.axis.step


def patches(axis: Axis, block: int) -> Patches | None:
    """Returns the patches with the least positions in all, or None where none can be copied."""
    # Taps that are taken in one go lie in one patch.
    runs = range(1, axis.taps + 1) if axis.taps <= 2 * RUN else range(RUN, axis.taps + RUN, RUN)
    found = [Patches(axis, block, min(run, axis.taps)) for run in runs]
    found = [x for x in found if x.size <= LONGEST]
    return min(found, key=lambda x: (x.count * x.size, x.count), default=None)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A block of the output: rows and columns of it, and `channels` of `given` ones.

    A vector holds `fold` neighbouring columns, all channels of the block in each; one, where what
    it reads does not lie side by side, or each column is asked about (`by_column`).
    """

    rows: Patches
    columns: Patches
    channels: int
    given: int
    by_column: bool

    @property
    def fold(self) -> int:
        """Columns of a vector."""
        return 1 if self.by_column else VECTOR // self.channels

    @property
    def vector(self) -> tuple[int, int]:
        """Shape of a vector."""
        return self.fold, self.channels

    @property
    def layout(self) -> object:
        """How a vector lies in the registers."""
        size = self.fold * self.channels // 128
        return plgpu.Layout.WG_STRIDED(self.vector, vec_size=size)

    @property
    def channel_blocks(self) -> int:
        """How many blocks the channels come to."""
        return -(-self.given // self.channels)

    @property
    def patch_shape(self) -> tuple[int, ...]:
        """Shape of a block's input in shared memory."""
        rows, columns = self.rows, self.columns
        # TMA writes to multiples of 128 bytes: two columns of the narrowest blocks.
        across = columns.size + (columns.size % 2 if self.channels < 64 else 0)
        return (rows.count, columns.count, rows.size, across, self.channels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of a block of the output."""
        return self.rows.block, self.columns.block, self.channels

    def count(self, batch: int) -> int:
        """How many blocks there are."""
        return batch * self.rows.blocks * self.columns.blocks * self.channel_blocks

    def bytes(self, outputs: int) -> int:
        """Shared memory of a block, in 16-bit numbers: its input and so many times its output."""
        return 2 * (math.prod(self.patch_shape) + outputs * math.prod(self.shape))

    def without_padding(self, x_BHWC: jax.Array) -> tuple[jax.Array, 'Blocks']:
        """Returns x with the zeros before its first row and column, and blocks of that.

        For the interpreter of JAX 0.12, which fills in what lies beyond an array's end, as TMA
        does, but not what lies before it.
        """
        parts, pads = [], [(0, 0)]
        for part in (self.rows, self.columns):
            low = max(0, -part.axis.first)
            axis = part.axis
            axis = dataclasses.replace(axis, size=axis.size + low, first=axis.first + low)
            parts.append(dataclasses.replace(part, axis=axis))
            pads.append((low, 0))
        return jnp.pad(x_BHWC, (*pads, (0, 0))), dataclasses.replace(
            self, rows=parts[0], columns=parts[1]
        )

    def copy(self, x: jax.Ref, x_smem: jax.Ref, place: tuple, barrier: jax.Ref) -> None:
        """Copies the input of the block at `place`: batch entry, row, column, channel block."""
        batch, row, column, channel = place
        *_, down, across, _ = self.patch_shape
        for i, j in itertools.product(range(self.rows.count), range(self.columns.count)):
            rows = pl.ds(self.rows.start(row, i), down)
            columns = pl.ds(self.columns.start(column, j), across)
            channels = pl.ds(channel * self.channels, self.channels)
            source = x.at[batch, rows, columns, channels]
            plgpu.copy_gmem_to_smem(source, x_smem.at[i, j], barrier)

    def output(self, place: tuple) -> tuple:
        """Returns where in the output a block lies."""
        batch, *rest = place
        return (batch, *(pl.ds(i * n, n) for i, n in zip(rest, self.shape, strict=True)))

    def unfold(self, index: jax.Array) -> tuple[jax.Array, ...]:
        """Returns the place of the `index`-th block, channels running fastest."""
        place = []
        for size in (self.channel_blocks, self.columns.blocks, self.rows.blocks):
            place.append(lax.rem(index, jnp.int32(size)))
            index = lax.div(index, jnp.int32(size))
        return index, *place[::-1]


def blocks(
    axes: tuple[Axis, Axis],
    channels: int,
    *,
    outputs: int,
    slots: int = 1,
    by_column: bool = False,
    sizes: ConvBlockSizes | None = None,
) -> Blocks | None:
    """Returns the blocks of a depthwise convolution, or None where none fits the shared memory.

    Args:
      axes: its rows and columns.
      channels: how many there are.
      outputs: how many arrays of the output's shape a block holds.
      slots: how many blocks are in shared memory at a time.
      by_column: whether a vector must not have more than one column.
      sizes: rows and columns that are asked for.
    """
    (rows, columns), found = axes, []
    by_column = by_column or columns.stride > 1
    widths = (256, 128) if by_column else (256, 128, 64, 32)
    for width in widths:
        wasted = -channels % width / (channels + -channels % width)
        for across, down in itertools.product((64, 32, 16, 8), (8, 4, 2, 1)):
            across = (sizes and sizes.cols) or across
            down = (sizes and sizes.rows) or min(down, rows.out)
            parts = patches(rows, down), patches(columns, across)
            if None in parts:
                continue
            block = Blocks(*parts, width, channels, by_column)
            held = slots * block.bytes(outputs)
            if across % block.fold or held > SHARED_MEMORY:
                continue
            cost = _cost(block, outputs) / (1 - wasted)
            # A block that has a multiprocessor to itself copies and computes by turns.
            cost *= 1 if held <= USUAL else 1.5
            found.append((cost, -across, -down, block))
    return min(found, key=lambda x: x[:3], default=(None,))[-1]


def _cost(block: Blocks, outputs: int) -> float:
    """Returns what a block moves for each number of the output that counts; less is better."""
    rows, columns = block.rows, block.columns
    counted = rows.axis.out * columns.axis.out / (rows.blocks * columns.blocks)
    moved = math.prod(block.patch_shape[:-1]) + outputs * rows.block * columns.block
    return moved / counted * (1 + 16 / block.channels)  # narrow copies are slower

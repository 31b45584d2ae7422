"""Which channels and which part of an image one grid step of a grouped convolution takes.

Groups side by side fill lanes: the kernel of a block of them is block-diagonal, and where that
leaves half of a wide matrix unit empty, two columns of the output share a matrix product.

Legend: B batch, C O channels and features, G groups, D E channels and features of a group, X Y
channels and features of a block, K L taps.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.chip import Chip
from pallas_kernels.conv.arguments import ConvBlockSizes
from pallas_kernels.conv.tpu import layout
from pallas_kernels.conv.tpu.grouped_axis import Axis

LANES = layout.LANES
HALF = LANES // 2
WIDEST = 384  # lanes of several groups that are worth more than channels padded to a power of two
MOST_ROWS = 1024  # of a matrix product
SHARE = 0.75  # of the memory for blocks; the rest is the compiler's


@dataclasses.dataclass(frozen=True)
class Lanes:
    """Groups of a block, after padding; all static.

    Attributes:
      groups: that there are.
      D, E: channels and features of a group, padded.
      together: groups of a block.
    """

    groups: int
    D: int
    E: int
    together: int

    @property
    def X(self) -> int:
        """Channels of a block."""
        return self.together * self.D

    @property
    def Y(self) -> int:
        """Features of a block."""
        return self.together * self.E

    @property
    def blocks(self) -> int:
        """Blocks of groups; the last may hold groups that do not exist."""
        return -(-self.groups // self.together)

    def swapped(self) -> 'Lanes':
        """The same with features for channels."""
        return dataclasses.replace(self, D=self.E, E=self.D)


def lanes(groups: int, D: int, E: int) -> Lanes:
    """Returns the groups of a block: as few as fill whole lanes, or padded so that a few do."""
    together = math.lcm(LANES // math.gcd(D, LANES), LANES // math.gcd(E, LANES))
    if together > 1 and together * max(D, E) > WIDEST:
        if max(D, E) <= LANES:
            D = E = 1 << (max(D, E) - 1).bit_length()
            together = LANES // D
        else:
            D, E, together = layout.up(D, LANES), layout.up(E, LANES), 1
    return Lanes(groups, D, E, together)


def spread(x: jax.Array, groups: int, size: int, to: int, blocks_of: int) -> jax.Array:
    """Returns the last dimension with groups padded from `size` to `to`, and their number."""
    outer = x.shape[:-1]
    count = layout.up(groups, blocks_of)
    if (size, count) == (to, groups):
        return x
    x = x.reshape(*outer, groups, size)
    x = jnp.pad(x, ((0, 0),) * len(outer) + ((0, count - groups), (0, to - size)))
    return x.reshape(*outer, count * to)


def gathered(x: jax.Array, groups: int, size: int, to: int) -> jax.Array:
    """Returns the last dimension without what `spread` added."""
    if x.shape[-1] == groups * size:
        return x
    x = x.reshape(*x.shape[:-1], -1, to)[..., :groups, :size]
    return x.reshape(*x.shape[:-2], groups * size)


def diagonal(w_KLDO: jax.Array, at: Lanes) -> jax.Array:
    """Returns the block-diagonal kernels [K, L, X, features], a block's beside another's."""
    K, L, D, features = w_KLDO.shape
    w_KLDO = spread(w_KLDO, at.groups, features // at.groups, at.E, at.together)
    w_KLDO = jnp.pad(w_KLDO, ((0, 0), (0, 0), (0, at.D - D), (0, 0)))
    if at.together == 1:
        return w_KLDO
    group_X = np.arange(at.X) // at.D
    group_O = np.arange(w_KLDO.shape[3]) // at.E % at.together
    same_XO = jnp.asarray(group_X[:, None] == group_O[None], w_KLDO.dtype)
    w_KLnDO = jnp.broadcast_to(w_KLDO[:, :, None], (K, L, at.together, *w_KLDO.shape[2:]))
    return w_KLnDO.reshape(K, L, at.X, -1) * same_XO[None, None]


@dataclasses.dataclass(frozen=True)
class Plan:
    """One call; all static.

    Attributes:
      rows, cols: tiles of the output.
      lanes: of a block.
      halves: into which a diagonal block is split, 1 or 2; see `grouped_tile`.
      back: whether features are taken to channels, for the gradient of the inputs.
      batch: images of a block, a multiple of the sublanes.
      row_tiles: tiles of rows in a block.
      activation: of the epilogue.
      given: names of the epilogue's operands.
      keep: whether u is written, too.
    """

    rows: Axis
    cols: Axis
    lanes: Lanes
    halves: int = 1
    back: bool = False
    batch: int = 0
    row_tiles: int = 0
    activation: str | None = None
    given: tuple[str, ...] = ()
    keep: bool = False

    @property
    def lanes_in(self) -> int:
        """Channels of a block that are summed."""
        return self.lanes.Y if self.back else self.lanes.X

    @property
    def lanes_out(self) -> int:
        """Channels of a block that are made; not all of a group's where these are many."""
        return (self.lanes.X if self.back else self.lanes.Y) // self.splits

    @property
    def splits(self) -> int:
        """Blocks that make one group's channels."""
        made = (self.lanes.X if self.back else self.lanes.Y) // LANES
        return made // layout.largest_divisor(made, 2) if self.lanes.together == 1 else 1

    @property
    def blocks(self) -> int:
        """Blocks of the channels that are made."""
        return self.lanes.blocks * self.splits

    @property
    def rows_in(self) -> int:
        """Input rows of a block, with those that its neighbours see as well."""
        rows = self.rows
        return min(rows.inputs, (self.row_tiles - 1) * rows.step + rows.reach)

    @property
    def row_blocks(self) -> int:
        """Blocks of rows."""
        return -(-self.rows.tiles // self.row_tiles)

    def first_row(self, block):
        """The first input row of a block, inside the image."""
        rows = self.rows
        wanted = block * self.row_tiles * rows.step + rows.offsets[0]
        return jnp.clip(wanted, 0, rows.inputs - self.rows_in)

    def in_shape(self) -> tuple[int, int, int, int]:
        """A block of the inputs."""
        return self.rows_in, self.cols.inputs, self.batch, self.lanes_in

    def out_shape(self) -> tuple[int, int, int, int]:
        """A block of the outputs."""
        return self.row_tiles * self.rows.outs, self.cols.outputs, self.batch, self.lanes_out

    @property
    def outs(self) -> int:
        """Outputs of a tile."""
        return self.rows.outs * self.cols.outs

    @property
    def seen(self) -> int:
        """Columns that a tile sees; one more where halves are paired."""
        return layout.up(len(self.cols.offsets), self.halves)

    @property
    def block_shape(self) -> tuple[int, int]:
        """One tap's part of a tile's kernel, or half of it beside another's."""
        down, across = self.lanes_in, self.lanes_out
        down, across = (across, down) if self.back else (down, across)
        return down // self.halves, across

    def tile_shape(self, rows: int) -> tuple[int, int, int, int]:
        """The kernels of a tile for so many rows that it sees."""
        height, width = self.block_shape
        down, across = (self.outs, self.seen) if self.back else (self.seen, self.outs)
        return rows, self.halves, down * height, across * width // self.halves

    def passes(self, mxu: int) -> float:
        """Passes through the matrix unit for every row of it and output of a tile."""
        contracted, made = (n // self.halves for n in (self.lanes_in, self.lanes_out))
        each = -(-self.seen * contracted // mxu) * -(-self.outs * made // mxu)
        return self.halves * len(self.rows.offsets) * each / self.outs

    def kernel_shape(self, K: int, L: int) -> tuple[int, int, int, int]:
        """A block of the kernels."""
        shape = (self.lanes_out, self.lanes_in) if self.back else (self.lanes_in, self.lanes_out)
        return K, L, *shape

    def kernel_block(self, c) -> tuple:
        """Which block of the kernels makes block c."""
        return (0, 0, c % self.splits, c // self.splits) if self.back else (0, 0, 0, c)

    def bytes(self, dtype) -> int:
        """VMEM of the blocks, two of each, and of one row of tiles between."""
        size = jnp.dtype(dtype).itemsize
        outs = 1 + self.keep + ('residual' in self.given)
        blocks = layout.tile_bytes(self.in_shape(), dtype)
        blocks += outs * layout.tile_bytes(self.out_shape(), dtype)
        rows = len(self.rows.offsets) + 1
        kernels = layout.tile_bytes(self.tile_shape(rows), jnp.float32)
        line = 2 * 4 * self.outs * self.lanes_out + size * self.seen * self.lanes_in
        return 2 * blocks + 2 * kernels + self.cols.tiles * self.batch * line


def tilings(at: Lanes, mxu: int, stride: tuple[int, int]) -> list[tuple[int, int, int]]:
    """Returns halves, rows and columns of tiles worth a try; the latter multiples of a stride."""
    found = [(1, 1, n) for n in (1, 2) if n * LANES <= mxu]
    # A unit of 128 is full without halves; what it would save goes into moving them.
    if mxu > LANES == at.X == at.Y and HALF % at.D == 0 and at.D == at.E:
        found += [(2, 1, 2), (2, 2, 2), (2, 1, 4)]
    up = layout.up
    return [(halves, up(r, stride[0]), up(s, stride[1])) for halves, r, s in found]


def fitted(plan: Plan, B: int, dtype, chip: Chip, sizes: ConvBlockSizes | None) -> Plan:
    """Returns the plan with the most rows, and images, of a block that fit.

    Blocks are wanted so large that few rows are read twice, and so small that there are many.
    """
    least = layout.sublanes(dtype)
    B = layout.up(B, least)
    batches = [n for n in range(least, B + 1, least) if B % n == 0]
    lines = [n for n in batches if n * plan.cols.tiles <= MOST_ROWS] or batches[:1]
    batch = layout.up(sizes.batch, least) if sizes and sizes.batch else lines[-1]
    tiles = plan.rows.tiles
    wanted = -(-sizes.rows // plan.rows.outs) if sizes and sizes.rows else -(-tiles // 4)
    for batch in [n for n in reversed(batches) if n <= batch] or batches[:1]:
        for row_tiles in range(max(1, min(wanted, tiles)), 0, -1):
            found = dataclasses.replace(plan, batch=batch, row_tiles=row_tiles)
            if found.bytes(dtype) <= SHARE * chip.vmem_limit:
                return found
    return dataclasses.replace(plan, batch=batches[0], row_tiles=1)

"""Which rows a depthwise convolution over positions reads, and the blocks it is done in.

Everything here is static. Output q reads, by one tap after the other, the inputs q + shift; taps
that meet padding only are left out. Legend: B batch, T inputs, Q outputs, C channels.
"""

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp

from pallas_kernels.chip import MIB, Chip
from pallas_kernels.conv.arguments import ConvBlockSizes, Spec
from pallas_kernels.conv.tpu.layout import LANES, sublanes, up

CHUNKS = ((8, 32), (math.inf, 128))  # rows in registers at a time, of kernels up to a length
UNROLLED = 64  # taps, of chunks in one piece of straight code
MOST_COLUMNS, COLUMN_ROWS = 8, 8192  # side by side, and their rows together
STEP_S = 0.2e-6  # what a turn of the grid costs, about; see schedule_run.py
LEAST = 256  # rows of a block that lanes are not made wider for
SHARE = 0.8  # of VMEM's limit that blocks are planned for


@dataclasses.dataclass(frozen=True)
class Taps:
    """The taps that meet inputs: their index in the kernel, and how far from an output they read.

    Attributes:
      index: of the kernel's positions.
      shift: of the input read, minus the output's position.
      inputs, outputs: positions that there are.
    """

    index: tuple[int, ...]
    shift: tuple[int, ...]
    inputs: int
    outputs: int

    @property
    def before(self) -> int:
        """Rows before an output's own that are read."""
        return max(0, -min(self.shift))

    @property
    def after(self) -> int:
        """Rows after an output's own that are read."""
        return max(0, *self.shift)

    @property
    def turned(self) -> 'Taps':
        """The taps of the gradient: every output gives back to what it has read."""
        return Taps(self.index, tuple(-s for s in self.shift), self.outputs, self.inputs)


def taps(spec: Spec, kernel: int, T: int) -> Taps:
    """Returns the taps of `kernel` positions over T inputs."""
    _, Q = spec.out_size((1, T), (1, kernel))
    shifts = [tap * spec.dilation[1] - spec.padding[1][0] for tap in range(kernel)]
    found = [(tap, shift) for tap, shift in enumerate(shifts) if -Q < shift < T]
    index, shift = zip(*found, strict=True) if found else ((), ())
    return Taps(index, shift, T, Q)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the work is cut.

    A step makes a block of [batch, rows, lanes] outputs. It has the inputs of the same positions,
    what is carried from the neighbouring block, which was the step before, and, where rows are
    read that a later step brings, a view of those.

    Attributes:
      taps: what is read.
      size: (B, C).
      batch, rows, lanes: of a block.
      down: whether the blocks are taken from the last to the first, and rows that come after
        an output are carried; otherwise it is those before.
      chunk: rows in registers at a time.
      unroll, columns: chunks in one piece of straight code, one after the other and side by side.
      view: rows of the view; 0 where there is none.
      gradient: whether outputs that do not exist are read: it is for the kernel's gradient.
    """

    taps: Taps
    size: tuple[int, int]
    batch: int
    rows: int
    lanes: int
    down: bool
    chunk: int
    unroll: int
    columns: int
    view: int
    gradient: bool

    @property
    def steps(self) -> tuple[int, int, int]:
        """Blocks of the batch, of lanes, of rows."""
        B, C = self.size
        rows = -(-self.taps.outputs // self.rows)
        return -(-B // self.batch), -(-C // self.lanes), rows

    @property
    def groups(self) -> int:
        """Registers that lie side by side in a block."""
        return self.lanes // LANES

    @property
    def before(self) -> int:
        """Rows kept before a block: whole registers."""
        return up(self.taps.before, 8)

    @property
    def after(self) -> int:
        """Rows kept after a block."""
        return up(self.taps.after, 8)

    @property
    def carried(self) -> int:
        """Rows that one step leaves to the next."""
        if self.steps[2] == 1:
            return 0
        return self.after if self.down else self.before

    @property
    def both(self) -> bool:
        """Whether rows on either side of an output are read."""
        return self.taps.before > 0 and self.taps.after > 0

    def block(self, step: Any) -> Any:
        """Which block of rows a step makes."""
        return self.steps[2] - 1 - step if self.down else step

    @property
    def cut(self) -> bool:
        """Whether rows of a block that do not exist count."""
        end = self.steps[2] * self.rows
        seen = end if self.gradient else self.taps.outputs + max(self.taps.shift)
        exist = min(self.taps.inputs, self.taps.outputs) if self.gradient else self.taps.inputs
        return exist < min(end, seen)


def plan(
    taps: Taps,
    size: tuple[int, int],
    dtype: Any,
    chip: Chip,
    sizes: ConvBlockSizes | None = None,
    *,
    arrays: int = 2,
    segments: bool = False,
    gradient: bool = False,
) -> Plan | None:
    """Returns the plan of a call; None if its rows do not fit into VMEM.

    Args:
      taps: what is read.
      size: (B, C).
      dtype: of inputs and outputs.
      chip: whose VMEM and memory it is cut for.
      sizes: of a block, where they are given.
      arrays: as large as the inputs, that are fetched or stored.
      segments: whether there are segment ids.
      gradient: whether it is the kernel's: channels are then what cores share.
    """
    sizes, (B, C), tile = sizes or ConvBlockSizes(), size, sublanes(dtype)
    itemsize, groups = jnp.dtype(dtype).itemsize, up(C, LANES) // LANES
    chunk = next(n for most, n in CHUNKS if len(taps.shift) <= most)
    chunk = min(chunk, _power(taps.outputs, tile))
    view = _power(taps.after, tile) if taps.after else 0
    # Powers of two: a view is a block of its own rows, which divide a block's; ids lie in lanes.
    unit = max(chunk, view, LANES if segments or taps.outputs > LANES else 1)
    most = up(taps.outputs, unit)
    least = min(most, up(max(taps.before, taps.after, LEAST), unit))
    cost = functools.partial(_bytes, taps, itemsize=itemsize, arrays=arrays, segments=segments)
    total = B * up(max(taps.outputs, taps.inputs), tile) * groups * LANES * itemsize
    wanted, limit = _block_bytes(total, chip), chip.vmem_limit * SHARE

    def fits(rows: int, lanes: int, batch: int = 1) -> bool:
        small = batch * rows * lanes * itemsize <= wanted
        return small and cost(rows, lanes, batch) <= limit

    # Cores share the channels, or else the batch.
    apart = (gradient or B == 1) and groups >= chip.cores
    widest = groups // chip.cores if apart else groups
    lanes = _largest(lambda n: fits(least, n * LANES), groups, widest) * LANES
    lanes = up(sizes.features or lanes, LANES)
    rows = _largest(lambda n: fits(n * unit, lanes), most // unit) * unit
    rows = min(most, max(up(sizes.cols or rows, unit), up(max(taps.before, taps.after), unit)))
    batch = 1
    if rows == most:
        share = B if apart else max(1, B // chip.cores)
        batch = sizes.batch or _largest(lambda n: fits(rows, lanes, n), B, share)
    given = sizes.cols or sizes.features or sizes.batch  # is taken
    if not given and cost(rows, lanes, batch) > limit:
        return None
    straight = 1 << max(0, (UNROLLED // len(taps.shift)).bit_length() - 1)
    unroll = math.gcd(rows // chunk, straight)
    beside = min(MOST_COLUMNS, straight // unroll, max(1, COLUMN_ROWS // rows))
    columns = math.gcd(lanes // LANES, 1 << (beside.bit_length() - 1))
    down = taps.before == 0 < taps.after
    found = Plan(taps, size, batch, rows, lanes, down, chunk, unroll, columns, view, gradient)
    # What comes after the last block is looked at where there is something, and else is zeros.
    alone = taps.inputs <= found.steps[2] * rows and (down or found.steps[2] == 1)
    return dataclasses.replace(found, view=0) if alone else found


def _power(size: int, unit: int) -> int:
    """Returns the least multiple of `unit` by a power of two that is not below `size`."""
    return unit << max(0, math.ceil(math.log2(size / unit)))


def _bytes(
    taps: Taps, rows: int, lanes: int, batch: int, *, itemsize: int, arrays: int, segments: bool
) -> int:
    """VMEM of a step: blocks twice, rows in float32, what is carried, masks."""
    halo = up(taps.before, 8) + up(taps.after, 8)
    masks = len(taps.shift) * rows * LANES * 4 if segments else 0
    blocks = 2 * arrays * batch * rows * lanes * itemsize
    halos = halo * lanes * 4 + 2 * 2 * taps.after * batch * lanes * itemsize
    columns = (halo + rows) * min(MOST_COLUMNS, max(1, COLUMN_ROWS // rows)) * LANES * 4
    return blocks + columns + halos + masks + len(taps.shift) * lanes * 64


def _block_bytes(total: int, chip: Chip) -> float:
    """Bytes of a block for which steps and what is not overlapped cost least, together."""
    total, bandwidth = total / chip.cores, chip.hbm_bytes_per_s / chip.cores
    return min(6 * MIB, max(MIB / 4, math.sqrt(STEP_S * total * bandwidth / 2)))


def _largest(fits: Any, size: int, most: int | None = None) -> int:
    """Returns the part, up to `most`, of `size` cut evenly that fits and wastes least; or 1."""
    for parts in range(-(-size // (most or size)), size + 1):
        if fits(-(-size // parts)):
            # Up to twice as many parts may be what divides the size.
            best = min(range(parts, 2 * parts + 1), key=lambda n: -(-size // n) * n)
            return -(-size // best)
    return 1

"""Which tiles and blocks a depthwise kernel takes: those that should take least time and fit VMEM.

Legend: B batch, C channels, R S rows and columns of a tile, M rows of a product.
"""

import dataclasses
import itertools
import math

import jax.numpy as jnp

from pallas_kernels.chip import Chip
from pallas_kernels.conv.arguments import ConvBlockSizes
from pallas_kernels.conv.tpu import layout
from pallas_kernels.conv.tpu.depthwise_plan import Axis, Plan
from pallas_kernels.conv.tpu.layout import LANES

TILES = ((2, 16), (4, 8), (2, 8), (1, 16), (1, 32), (4, 16), (8, 8))  # R, S
MOST_TILES = 32  # of a block of channels: their registers trade lanes at once
VMEM_SHARE = 0.85  # of what a kernel may take; the rest is the compiler's
PUSH = 112  # rows of a product that take as long as its matrix takes to be read
ADDRESS = 7  # cycles in which scalar units find an address
LATENCY = 60  # cycles of a product
AT_ONCE = 1900  # cycles of the matrix unit that instructions are laid out for
AT_ONCE_WEIGHT = 1000  # the same of the kernel's gradient, whose products hold more registers
MOST_AT_ONCE = 8
STEP_S = 0.35e-6  # of a grid step


def plan(
    axes: tuple[Axis, Axis],
    sizes: tuple[int, int],
    dtype,
    chip: Chip,
    given: ConvBlockSizes | None,
    arrays: int,
) -> Plan:
    """Returns the plan that should take least time; `given` sizes are taken as they are.

    Args:
      axes: rows and columns.
      sizes: B and C, padded to whole registers.
      dtype: of inputs and outputs.
      chip: what to plan for.
      given: rows, columns and images of a block of outputs, rounded to whole tiles.
      arrays: arrays like the output that a kernel reads or writes.
    """
    given = given or ConvBlockSizes()
    best = None
    for tile in TILES:
        pixels = tile[0] * tile[1]
        if pixels > chip.mxu or LANES * pixels > MOST_TILES * chip.mxu or axes[1].up > tile[1]:
            continue
        start = _tiled(axes, sizes, chip, tile, 4 // jnp.dtype(dtype).itemsize)
        options = itertools.product(*_options(start, given, dtype))
        for row_tiles, col_tiles, batch in options:
            one = dataclasses.replace(start, row_tiles=row_tiles, col_tiles=col_tiles, batch=batch)
            score = _fits(one, dtype, chip, arrays), _seconds(one, dtype, chip, arrays)
            if best is None or score < best[0]:
                best = score, one
    return best[1]


def laid_out(plan: Plan, most: int = AT_ONCE) -> Plan:
    """Returns the plan with as many tiles at once as take the matrix unit about `most` cycles."""
    M = plan.col_tiles * plan.row_tiles * plan.batch
    cycles = max(M, PUSH) // 4 * math.prod(plan.bands) + LATENCY
    at_once = 1
    while at_once < min(plan.n, MOST_AT_ONCE) and at_once * cycles < most:
        at_once *= 2
    return dataclasses.replace(plan, at_once=at_once)


def _tiled(axes, sizes, chip: Chip, tile, packed: int) -> Plan:
    """The plan of one shape of tiles, with blocks of a single one."""
    rows, cols = axes
    R, S = tile
    seen = [rows.reach(range(phase, phase + rows.up * R, rows.up)) for phase in range(rows.up)]
    low = min(first for first, _ in seen)
    T = (max(last for _, last in seen) - low) // R + 1
    best = None
    for Q in range(cols.up, S + 1, cols.up):
        first, last = cols.reach(range(Q))
        if cols.outputs <= Q:  # a single tile: what is padding needs no place
            first, last = max(first, 0), max(min(last, cols.inputs - 1), max(first, 0))
        U = (last - first) // S + 1
        cost = -(-cols.outputs // Q) * U, cols.outputs % Q > 0, Q
        if best is None or cost < best[0]:
            best = cost, Q, first, U
    _, Q, col_low, U = best
    blocks = 1, 1, 8 * packed
    return Plan(
        rows, cols, chip.mxu, tile, low, T, Q, col_low, U, *blocks, sizes, packed, chip.cores
    )  # fmt: skip


def _options(start: Plan, given: ConvBlockSizes, dtype) -> tuple[list[int], ...]:
    """Row tiles, column tiles and images to try."""
    per_tile = start.phases * start.tile[0]
    most = -(-start.rows.outputs // per_tile)
    rows = sorted({-(-most // parts) for parts in range(1, most + 1)})
    if given.rows:
        rows = [min(most, -(-given.rows // per_tile))]
    most = -(-start.cols.outputs // start.Q)
    cols = sorted({-(-most // parts) for parts in (1, 2, 4, 8, 16, 32, 64, 128) if parts <= most})
    if given.cols:
        cols = [min(most, -(-given.cols // start.Q))]
    unit, B = layout.sublanes(dtype), start.sizes[0]
    batch = [b for b in range(unit, B + 1, unit) if B % b == 0 and b <= 256]
    if given.batch:
        batch = [max((b for b in batch if b <= given.batch), default=batch[0])]
    return rows, cols, batch


def _fits(plan: Plan, dtype, chip: Chip, arrays: int) -> int:
    """Bytes of VMEM beyond what there is."""
    return max(0, round(vmem_bytes(plan, dtype, arrays) - VMEM_SHARE * chip.vmem_limit))


def vmem_bytes(plan: Plan, dtype, arrays: int) -> int:
    """Returns about how much VMEM a forward kernel takes."""
    item = jnp.dtype(dtype).itemsize
    streamed = math.prod(plan.in_block) + arrays * math.prod(plan.out_block)
    tiles = math.prod(plan.tiles_in) + arrays * math.prod(plan.tiles_out)
    bands = plan.n * math.prod(plan.bands) * plan.side * plan.side
    sums = math.prod(plan.tiles_out) // plan.n * 8
    return (2 * streamed + 2 * tiles + bands) * item + sums


def _seconds(plan: Plan, dtype, chip: Chip, arrays: int) -> float:
    """About how long a forward kernel takes."""
    item, M = jnp.dtype(dtype).itemsize, plan.col_tiles * plan.row_tiles * plan.batch
    streamed = (math.prod(plan.in_block) + arrays * math.prod(plan.out_block)) * item
    memory = streamed / chip.hbm_bytes_per_s * chip.cores
    passes = 6 if item == 4 else 1
    matmul = plan.n * math.prod(plan.bands) * passes * max(M, PUSH) / 4
    registers = plan.n * plan.registers * (2 + math.log2(plan.n)) / 3
    filled = math.prod(plan.tiles_in[1:4]) * len(plan.filled)
    parts = filled, math.prod(plan.tiles_out[1:4])
    runs = (3 * plan.tile[0], plan.tile[0])  # of pixels that are read or written at once
    # Each of n tiles' products has as many parts beside it: what is over is done in vain.
    shares = [plan.n * -(-plan.batch_registers * count // plan.n) for count in parts]
    moves = sum(
        share * times * max(registers, ADDRESS * run)
        for share, times, run in zip(shares, (1, arrays), runs, strict=True)
    )
    products = plan.n * math.prod(plan.bands) * plan.registers * 2
    expand = products * len(plan.cols.offsets) * plan.side / (8 * plan.packed) / 2
    rare = expand * plan.grid[0] / math.prod(plan.grid)
    busy = (max(matmul, moves) + min(matmul, moves) / 2 + 200) / chip.clock_hz
    step = max(busy, memory) + min(busy, memory) / 4 + STEP_S
    return (plan.per_core + 1) * step + plan.per_core * rare / chip.clock_hz + memory

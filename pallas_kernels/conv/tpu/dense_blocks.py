"""The blocks of a dense convolution's grid, chosen by a rough estimate of their time."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from pallas_kernels.chip import Chip
from pallas_kernels.conv.arguments import ConvBlockSizes
from pallas_kernels.conv.tpu import layout
from pallas_kernels.conv.tpu.dense_plan import Plan

MXU_ROWS = 256  # of a product: enough to hide loading the kernel, few enough for registers
SUMMED = 1024  # outputs that a product of the kernel's gradient sums: their sums are rarely moved
UNROLLED = 8192  # cycles of the matrix unit in a basic block; compiling takes a second per thousand
MOVED = 1.4  # time where lanes are moved, to that of the products alone
STEP_S = 0.2e-6  # seconds that a turn of the grid costs


def choose(
    plan: Plan, dtype: Any, chip: Chip, block_sizes: ConvBlockSizes | None = None
) -> Plan | None:
    """Returns a plan with the blocks that should take the least time, None if none fit into VMEM.

    Args:
      plan: all but the blocks, and with the batch not yet padded.
      dtype: of all arrays.
      chip: whose VMEM and matrix unit.
      block_sizes: what is given; None chooses.
    """
    given = block_sizes or ConvBlockSizes()
    # libtpu 0.0.52 does not end compiling for v7x what sums more in its matrix unit.
    rows = SUMMED if plan.weights and chip.name != 'v7x' else MXU_ROWS
    together = max(1, chip.mxu // plan.C) if plan.C % layout.LANES == 0 else 1
    found = []
    for features in [plan.O] if plan.packing else _features(plan.O, given.features):
        for batch in _batches(plan.B, layout.sublanes(dtype), rows, given.batch):
            for units in _units(plan, given.rows):
                one = dataclasses.replace(
                    plan,
                    B=layout.up(plan.B, batch),
                    batch=batch,
                    units=units,
                    features=features,
                    places=max(1, rows // batch),
                    together=together,
                )
                if vmem_bytes(one, dtype) <= chip.vmem_limit * 7 // 8:
                    found.append((_seconds(one, dtype, chip), len(found), one))
    if not found:
        return None
    best = min(found)[2]
    return dataclasses.replace(best, group=_group(best, chip))


def block_bytes(plan: Plan, dtype) -> tuple[int, int, int]:
    """Bytes of a step's blocks: of inputs, of the kernel, of outputs and what lies like them."""
    x = layout.tile_bytes(plan.x_block, dtype)
    w = layout.tile_bytes(plan.w_block, jnp.float32 if plan.weights else dtype)
    y = layout.tile_bytes(plan.y_block, dtype)
    return x, w, y * (1 + plan.keep + plan.residual)


def vmem_bytes(plan: Plan, dtype) -> int:
    """Bytes of VMEM: blocks are held twice, so that copies run beside the arithmetic."""
    own = [
        layout.tile_bytes(shape, jnp.float32 if name == 'dw' else dtype)
        for name, shape in plan.scratch.items()
    ]
    return 2 * sum(block_bytes(plan, dtype)) + sum(own)


def keeps_kernel(plan: Plan, dtype, chip: Chip) -> bool:
    """Whether XLA fetches the kernel into VMEM, beside what runs before, so that no step waits."""
    _, w, _ = block_bytes(plan, dtype)
    spare = (chip.vmem_bytes - chip.vmem_limit) // 8  # each core of a v5p has a VMEM of its own
    return not plan.weights and chip.cores == 1 and plan.features == plan.O and w <= spare


def _features(O: int, given: int | None) -> list[int]:  # noqa: E741
    if given is not None:
        return [given if O % given == 0 and given % layout.LANES == 0 else O]
    parts = [n for n in range(layout.LANES, O, layout.LANES) if O % n == 0]
    return [O, *reversed(parts)]


def _batches(B: int, tile: int, most: int, given: int | None) -> list[int]:
    if given is not None:
        return [min(most, layout.up(given, tile))]
    whole = layout.up(B, tile)
    found = [tile << n for n in range(6) if tile << n <= min(whole, most)]
    return [n for n in found if layout.up(B, n) == whole]


def _units(plan: Plan, given: int | None) -> list[int]:
    rows = plan.rows
    if given is not None:
        return [min(rows.units, -(-given // (rows.step_out * plan.spread)))]
    # Every number of blocks up to 16, and then every half of a power of two.
    counts = [*range(1, 17), *(n << e for e in range(3, 15) for n in (2, 3))]
    return sorted({-(-rows.units // n) for n in counts}, reverse=True)


def cycles(plan: Plan, chip: Chip, units: float) -> float:
    """Cycles of the matrix unit for units of rows of a block of the batch and of the features."""
    pairs = sum(map(len, plan.rows.taps)) * sum(map(len, plan.cols.taps))
    passes = -(-pairs // plan.together) * -(-plan.together * plan.C // chip.mxu)
    lanes = layout.up(plan.features, chip.mxu)
    return units * plan.cols.units * plan.batch * passes * lanes / (4 * chip.mxu)


def _group(plan: Plan, chip: Chip) -> int:
    """Units of rows in a turn of the loop, 0 if no loop is needed."""
    one = cycles(plan, chip, 1)
    first, last = plan.rows.inner
    if one * plan.rows.units <= 1.5 * UNROLLED or first == last:
        return 0
    most = max(1, min(max(plan.whole_units), int(UNROLLED / max(one, 1))))

    # Some 200 cycles of a turn fill the matrix unit and empty it.
    def turns(n):
        rest = dataclasses.replace(plan, group=n).rest
        return sum(w // n + (w % n // rest if rest else 0) for w in plan.whole_units), n

    return min(range(1, most + 1), key=turns)


def _seconds(plan: Plan, dtype, chip: Chip) -> float:
    """A rough estimate of a kernel's time, to choose blocks by."""
    bandwidth = chip.hbm_bytes_per_s / chip.cores
    x, w, y = (size / bandwidth for size in block_bytes(plan, dtype))
    n_o, n_b = plan.O // plan.features, plan.B // plan.batch
    steps = -(-n_o * n_b * plan.n_rows // chip.cores)
    work = cycles(plan, chip, plan.rows.units) / plan.n_rows / chip.clock_hz
    work *= MOVED if plan.packed else 1
    ends = x + y + (0 if keeps_kernel(plan, dtype, chip) else w)
    if steps == 1:
        return ends + work + STEP_S
    # Only inputs are copied beside the first step, only outputs beside the last.
    inputs, outputs = (x + y, 0) if plan.weights else (x, y)
    first, last = max(work, inputs), max(work, outputs)
    between = max(work, x + y) * (steps - 2)
    return ends + first + between + last + (n_o - 1) * w + (steps + 2) * STEP_S

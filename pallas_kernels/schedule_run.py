"""Runs a kernel's scalar instructions: which bundles execute, which copies start, who waits.

Time goes by in cycles: a bundle takes one, a wait lasts until the copies it waits for are done,
and copies between HBM and VMEM share the memory's bandwidth in the order they were started.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from pallas_kernels.chip import Chip
from pallas_kernels.schedule_program import Block, Program
from pallas_kernels.schedule_translate import OPERAND_SHIFT

GRANULE = 32  # bytes that the compiler counts a copy in
MXU = 0  # its column of the utilisation


@dataclasses.dataclass(frozen=True)
class Costs:
    """What the bundles do not show, fitted to published timings (see schedule_calibration.py).

    Attributes:
      memory_share: share of the memory's peak bandwidth that copies reach.
      step_s: seconds that a turn of a kernel's grid takes beyond its bundles.
      latency_s: seconds from a copy's start to its first byte.
      launch_s: seconds from the end of a module's instruction to the start of the next.
    """

    memory_share: float
    step_s: float
    latency_s: float = 0.6e-6
    launch_s: float = 1.0e-6


# v5e was published no timings for: it takes v5p's, its unit's.
COSTS = {
    'v5e': Costs(0.90, 0.0),
    'v5p': Costs(0.90, 0.0),
    'v6e': Costs(0.97, 0.22e-6),
    'v7x': Costs(0.60, 0.07e-6),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What happened when a kernel ran.

    Attributes:
      cycles: from the first bundle to the last copy's end.
      bundles: bundles that executed.
      stalls: cycles spent waiting for copies.
      iterations: times the grid's loop went round.
      steps: iterations that fed the MXU.
      busy: bundle-slots of each unit in use over all bundles that executed.
      hbm_bytes: bytes copied from and to HBM.
      skipped: (first bundle, bundles) of regions that depend on data and were left out.
      assumed: operands in scalar memory whose values were not known and counted as zero.
      profile: how often each block ran, as (first bundle, bundles, times).
    """

    cycles: float
    bundles: int
    stalls: float
    iterations: int
    steps: int
    busy: tuple[int, ...]
    hbm_bytes: int
    skipped: tuple[tuple[int, int], ...]
    assumed: tuple[int, ...]
    profile: tuple[tuple[int, int, int], ...]


class Machine:
    """The scalar core's registers and memory, and the copies under way."""

    def __init__(self, program: Program, chip: Chip, values: Mapping[int, Sequence[int]]):
        self.registers = [None] * program.registers
        self.memory: dict[int, int | None] = {}
        self.values = values
        self.assumed: set[int] = set()
        self.hbm_bytes = 0
        self.stalls = 0.0
        self.clock = 0.0  # cycle at which the running block's first bundle issued
        self.start = 0
        self._stamps = [0] * program.registers
        self._count = 0
        self._free = 0.0  # cycle at which the memory has served all copies so far
        self._flags: dict[int, list[tuple[float, int]]] = {}
        costs = COSTS[chip.name]
        bandwidth = costs.memory_share * chip.hbm_bytes_per_s / chip.cores
        self._bytes_per_cycle = bandwidth / chip.clock_hz
        self._latency = costs.latency_s * chip.clock_hz

    def stamp(self, register: int) -> None:
        self._count += 1
        self._stamps[register] = self._count

    def latest(self, *registers: int) -> int | None:
        """A phi: its operands share one physical register, so the last one written is in it."""
        return self.registers[max(registers, key=self._stamps.__getitem__)]

    def scalar(self, index: int) -> int:
        """A scalar operand's value."""
        if index not in self.values:
            self.assumed.add(index)
            return 0
        return self.values[index][0]

    def load(self, address: int | None) -> int | None:
        return None if address is None else self.memory.get(address, 0)

    def store(self, address: int | None, value: int | None) -> None:
        if address is not None:
            self.memory[address] = value

    def copy(self, at: int, kind: str, size, flag, source, dest) -> None:
        """Starts a copy of `size` granules that will raise `flag`."""
        now = self.clock + at - self.start
        if size is None:
            return
        if kind.endswith('_to_smem'):
            # A VMEM address is an operand's shifted by four, an HBM address is not.
            self._prefetch(source, dest, OPERAND_SHIFT + 4 * kind.startswith('vmem'))
            done = now
        elif 'hbm' in kind or kind == 'general':
            self.hbm_bytes += size * GRANULE
            self._free = max(self._free, now) + size * GRANULE / self._bytes_per_cycle
            done = self._free + self._latency
        else:
            done = now
        self._flags.setdefault(flag, []).append((done, size))

    def wait(self, at: int, flag, size) -> None:
        """Waits until copies of `size` granules have raised `flag`."""
        now = self.clock + at - self.start
        queue = self._flags.get(flag, [])
        while size and size > 0 and queue:
            done, amount = queue.pop(0)
            size -= amount
            if done > now:
                self.stalls += done - now
                self.clock += done - now
                now = done

    def finish(self) -> float:
        """The cycle at which all copies are done."""
        return max([self.clock, *(done for queue in self._flags.values() for done, _ in queue)])

    def _prefetch(self, source, dest, shift: int) -> None:
        """Fills scalar memory with an operand's values."""
        index, offset = divmod(source or 0, 1 << shift)
        index -= 1
        values = self.values.get(index)
        if values is None or dest is None or offset:
            self.assumed.add(index)
            return
        for k, value in enumerate(values):
            self.memory[dest + k] = value


def run(
    program: Program,
    chip: Chip,
    values: Mapping[int, Sequence[int]],
    *,
    slow_paths: bool = False,
    most_blocks: int = 20_000_000,
) -> Run:
    """Runs `program` on one core of `chip`, with `values` for operands in scalar memory.

    A branch on a value that depends on data skips forward (a kernel guards its slow paths so; with
    `slow_paths` it goes through every one of them) and does not loop.

    Raises:
      ValueError: if it does not end within `most_blocks` basic blocks.
    """
    machine = Machine(program, chip, values)
    blocks, feeds = program.blocks, _feeds(program)
    grid = min((at for at, block in blocks.items() if block.header), default=-1)
    visits: dict[int, int] = dict.fromkeys(sorted(blocks), 0)
    skipped: set[tuple[int, int]] = set()
    steps, fed, at = 0, False, 0
    for _ in range(most_blocks):
        if at >= program.size:
            break
        block = blocks[at]
        if at == grid:
            steps += fed
            fed = False
        fed = fed or feeds[at]
        visits[at] += 1
        machine.start = at
        block.run(machine)
        machine.clock += block.stop - block.start
        at = _next(block, machine.registers, skipped, slow_paths)
    else:
        raise ValueError(f'the kernel did not end within {most_blocks} basic blocks')
    profile = tuple((at, blocks[at].stop - at, times) for at, times in visits.items() if times)
    return Run(
        cycles=machine.finish(),
        bundles=sum(size * times for _, size, times in profile),
        stalls=machine.stalls,
        iterations=visits.get(grid, 0),
        steps=steps + fed,
        busy=_busy(program, profile),
        hbm_bytes=machine.hbm_bytes,
        skipped=tuple(sorted(skipped)),
        assumed=tuple(sorted(machine.assumed)),
        profile=profile,
    )


def _next(block: Block, registers: list, skipped: set[tuple[int, int]], slow_paths: bool) -> int:
    """The bundle after a block; notes a region that is left out because data decides about it."""
    if block.branch is None:
        return block.stop
    predicate = True if block.branch < 0 else registers[block.branch]
    if predicate is None:
        forward = block.target > block.start and not slow_paths
        if forward:
            skipped.add((block.stop, block.target - block.stop))
        return block.target if forward else block.stop
    return block.target if bool(predicate) != block.negated else block.stop


def _busy(program: Program, profile) -> tuple[int, ...]:
    """Slots of every unit in use over all bundles that executed."""
    busy = [0] * len(program.utilization[0])
    for at, size, times in profile:
        for row in program.utilization[at : at + size]:
            for unit, used in enumerate(row):
                busy[unit] += used * times
    return tuple(busy)


def _feeds(program: Program) -> dict[int, bool]:
    """Whether a block uses the MXU."""
    return {
        at: any(row[MXU] for row in program.utilization[at : block.stop])
        for at, block in program.blocks.items()
    }

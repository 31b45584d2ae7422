"""Predicts a compiled module's time from its bundles, copies and the MXU's arithmetic."""

import dataclasses
import pathlib
from typing import Any

from pallas_kernels import schedule_compile, schedule_hlo, schedule_program, schedule_run
from pallas_kernels.chip import Chip
from pallas_kernels.schedule_ops import Case, Work, work


@dataclasses.dataclass(frozen=True)
class Part:
    """One instruction of the module: a kernel, or what stands around it.

    Attributes:
      name: of the instruction.
      kernel: whether it is a Pallas kernel.
      seconds: predicted.
      hbm_bytes: copied from and to HBM.
      vmem_bytes: of VMEM in use.
      run: what its bundles did, None if they could not be followed (time is then from the bytes).
      utilization: used share of every unit's slots.
      spills: bundles' slots that stored registers for want of them, in the program's text.
      note: what could not be followed.
    """

    name: str
    kernel: bool
    seconds: float
    hbm_bytes: int
    vmem_bytes: int
    run: schedule_run.Run | None
    utilization: dict[str, float]
    spills: int
    note: str = ''


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a module is predicted to take; see `as_json` for what each figure means."""

    case: Case
    chip: Chip
    work: Work
    parts: tuple[Part, ...]
    temp_bytes: int
    compile_seconds: float
    notes: dict[str, Any]

    @property
    def kernels(self) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.kernel)

    @property
    def floor_seconds(self) -> float:
        """Time that the MXU needs for the arithmetic, contractions padded to its side."""
        return self.work.mxu_flops / self.chip.peak_flops

    @property
    def kernel_seconds(self) -> float:
        """Time of the kernels, not below the MXU's floor."""
        return max(sum(part.seconds for part in self.kernels), self.floor_seconds)

    @property
    def around_seconds(self) -> float:
        """Time of what stands around the kernels: transposes, sums, conversions."""
        return sum(part.seconds for part in self.parts if not part.kernel)

    @property
    def seconds(self) -> float:
        return self.kernel_seconds + self.around_seconds

    @property
    def roofline_seconds(self) -> float:
        return max(
            self.work.flops / self.chip.peak_flops, self.work.hbm_bytes / self.chip.hbm_bytes_per_s
        )

    def as_json(self) -> dict[str, Any]:
        """The figures as a dictionary (bytes, seconds; bundles are those of a step that runs)."""
        runs = [part.run for part in self.kernels if part.run]
        steps = sum(run.steps for run in runs)
        total = sum(run.bundles for run in runs)
        return {
            'predicted_seconds': self.seconds,
            'kernel_seconds': self.kernel_seconds,
            'around_seconds': self.around_seconds,
            'mxu_floor_seconds': self.floor_seconds,
            'bundles': total / steps if steps else 0.0,
            'total_bundles': total,
            'steps': steps,
            'iterations': sum(run.iterations for run in runs),
            'stall_cycles': sum(run.stalls for run in runs),
            'spills': sum(part.spills for part in self.kernels),
            'vmem_bytes': max((part.vmem_bytes for part in self.kernels), default=0),
            'vmem_limit': self.chip.vmem_limit,
            'hbm_bytes': sum(part.hbm_bytes for part in self.parts),
            'temp_bytes': self.temp_bytes,
            'fraction_of_peak': self.work.flops / self.seconds / self.chip.peak_flops,
            'times_roofline': self.seconds / self.roofline_seconds,
            'utilization': _mean(self.kernels),
            'kernels': [_kernel_json(part) for part in self.kernels],
            'around': {part.name: part.seconds for part in self.parts if not part.kernel},
            'notes': [part.note for part in self.parts if part.note],
            'block_sizes': self.notes,
            'compile_seconds': self.compile_seconds,
        }


def predict(
    request: dict[str, Any],
    chip: Chip,
    cache: pathlib.Path | None = None,
    cached: bool = False,
) -> Prediction:
    """Compiles `request`, unless `cache` has its dumps, and follows its bundles.

    `cached` raises rather than compile.

    Raises:
      schedule_compile.CompileError: if it does not compile or leaves no dumps.
    """
    result = schedule_compile.compiled(request, cache, cached)
    case = Case(**request['case'])
    found = schedule_hlo.instructions(result.module)
    parts = []
    for name, instruction in found.items():
        if schedule_hlo.waits(instruction.opcode) or instruction.opcode.endswith('-start'):
            continue
        parts.append(_part(instruction, found, result.dumps.get(name), chip))
    # Copies that run beside other work still take their share of the memory's time.
    beside = sum(i.hbm_bytes for i in found.values() if i.opcode.endswith('-start'))
    if beside:
        share = schedule_run.COSTS[chip.name].memory_share
        seconds = beside / chip.hbm_bytes_per_s / share
        parts.append(Part('copies beside', False, seconds, beside, 0, None, {}, 0))
    if not any(part.kernel for part in parts):
        raise schedule_compile.CompileError('the module has no Pallas kernel')
    return Prediction(
        case, chip, work(case, chip), tuple(parts), result.temp_bytes, result.seconds, result.notes
    )


def _part(instruction, found, dumps, chip: Chip) -> Part:
    costs = schedule_run.COSTS[chip.name]
    by_bytes = instruction.hbm_bytes / chip.hbm_bytes_per_s / costs.memory_share
    blank = Part(
        instruction.name, instruction.kernel, by_bytes + costs.launch_s, instruction.hbm_bytes,
        instruction.vmem_bytes, None, {}, 0,
    )  # fmt: skip
    if not dumps:
        if instruction.kernel:
            raise schedule_compile.CompileError(f'{instruction.name}: no bundles were dumped')
        return dataclasses.replace(blank, seconds=by_bytes)
    values = schedule_hlo.values(found, instruction)
    try:
        program = schedule_program.parse(*dumps)
        run = schedule_run.run(program, chip, values)
    except ValueError as error:
        if instruction.kernel:
            raise schedule_compile.CompileError(f'{instruction.name}: {error}') from error
        return dataclasses.replace(blank, note=f'{instruction.name}: {error}; time from its bytes')
    seconds = run.cycles / chip.clock_hz + costs.launch_s
    if instruction.kernel:
        seconds += costs.step_s * run.iterations
    # The second core of a chip that joins two shares the work and the memory.
    hbm_bytes = run.hbm_bytes * chip.cores
    capacity = program.utilization[-1]
    utilization = {
        unit: used / slots / max(run.bundles, 1)
        for unit, used, slots in zip(schedule_program.UNITS, run.busy, capacity, strict=True)
    }
    spill = schedule_program.UNITS.index('VSTORE:SPILL')
    spills = sum(row[spill] for row in program.utilization[:-1])
    note = ''
    if instruction.kernel and run.assumed:
        note = f'{instruction.name}: operands {list(run.assumed)} in scalar memory count as zeros'
    return Part(
        instruction.name, instruction.kernel, seconds, hbm_bytes,
        instruction.vmem_bytes, run, utilization, spills, note,
    )  # fmt: skip


def _mean(parts) -> dict[str, float]:
    """Utilisation over all bundles of the kernels."""
    weights = [part.run.bundles if part.run else 0 for part in parts]
    total = sum(weights)
    if not total:
        return {}
    return {
        unit: sum(w * part.utilization[unit] for w, part in zip(weights, parts, strict=True))
        / total
        for unit in schedule_program.UNITS
    }


def _kernel_json(part: Part) -> dict[str, Any]:
    run = part.run
    if run is None:
        return {'name': part.name, 'seconds': part.seconds}
    return {
        'name': part.name,
        'seconds': part.seconds,
        'bundles': run.bundles / max(run.steps, 1),
        'steps': run.steps,
        'spills': part.spills,
        'vmem_bytes': part.vmem_bytes,
        'utilization': part.utilization,
        'regions': [
            {'start': start, 'bundles': size, 'times': times} for start, size, times in run.profile
        ],
        'depends_on_data': [{'start': start, 'bundles': size} for start, size in run.skipped],
    }

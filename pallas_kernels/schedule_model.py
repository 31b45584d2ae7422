"""Predicts a compiled module's time from its bundles, copies and the MXU's arithmetic."""

import dataclasses
import pathlib
from typing import Any

from pallas_kernels import (
    schedule_compile,
    schedule_hlo,
    schedule_ops,
    schedule_program,
    schedule_run,
)
from pallas_kernels.chip import Chip
from pallas_kernels.schedule_work import OURS, Work

BESIDE = 'copies beside'  # stands for the copies that run while something else does


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
      estimate_seconds: what the compiler estimates; None where it says nothing.
      times: how often it runs; seconds and bytes are of all of them, `run` is of one.
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
    estimate_seconds: float | None = None
    times: int = 1

    def repeated(self, times: int) -> 'Part':
        """The part in a loop."""
        estimate = None if self.estimate_seconds is None else times * self.estimate_seconds
        return dataclasses.replace(
            self, seconds=times * self.seconds, hbm_bytes=times * self.hbm_bytes,
            estimate_seconds=estimate, times=times * self.times,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a module is predicted to take; see `as_json` for what each figure means."""

    case: Any
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
        """Time of the kernels, not below the MXU's floor; 0 without one (XLA's own)."""
        if not self.kernels:
            return 0.0
        return max(sum(part.seconds for part in self.kernels), self.floor_seconds)

    @property
    def around_seconds(self) -> float:
        """Time of what stands around the kernels: transposes, sums, conversions.

        A convolution's operand may be fetched while the layer before is at work: such copies only
        count as traffic. Attention was calibrated with them.
        """
        hidden = BESIDE if self.case.op != 'attention' else ''
        return sum(p.seconds for p in self.parts if not p.kernel and p.name != hidden)

    @property
    def model_seconds(self) -> float:
        """Time by the bundles and copies, not below the MXU's floor or the traffic's time."""
        share = schedule_run.COSTS[self.chip.name].memory_share
        traffic = sum(p.hbm_bytes for p in self.parts) / self.chip.hbm_bytes_per_s / share
        least = self.floor_seconds if self.case.op == 'attention' else traffic
        return max(self.kernel_seconds + self.around_seconds, self.floor_seconds, least)

    @property
    def estimate_seconds(self) -> float:
        """Time by the compiler's estimates, and by the bundles for kernels, which have none."""
        around = sum(part.estimate_seconds or 0.0 for part in self.parts if not part.kernel)
        return self.kernel_seconds + around

    @property
    def seconds(self) -> float:
        """Attention's is calibrated by the model alone; a convolution's is the larger figure."""
        if self.case.op == 'attention':
            return self.model_seconds
        return max(self.model_seconds, self.estimate_seconds)

    @property
    def roofline_seconds(self) -> float:
        return self.work.roofline_seconds(self.chip)

    def as_json(self) -> dict[str, Any]:
        """The figures as a dictionary (bytes, seconds; bundles are those of a step that runs)."""
        runs = [(part.run, part.times) for part in self.kernels if part.run]
        steps = sum(times * _steps(run) for run, times in runs)
        total = sum(times * run.bundles for run, times in runs)
        return {
            'predicted_seconds': self.seconds,
            'model_seconds': self.model_seconds,
            'estimate_seconds': self.estimate_seconds,
            'roofline_seconds': self.roofline_seconds,
            'kernel_seconds': self.kernel_seconds,
            'around_seconds': self.around_seconds,
            'mxu_floor_seconds': self.floor_seconds,
            'bundles': total / steps if steps else 0.0,
            'total_bundles': total,
            'steps': steps,
            'iterations': sum(times * run.iterations for run, times in runs),
            'stall_cycles': sum(times * run.stalls for run, times in runs),
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
            'estimates': {
                part.name: part.estimate_seconds for part in self.parts if part.estimate_seconds
            },
            'notes': [part.note for part in self.parts if part.note],
            'block_sizes': self.notes,
            'compile_seconds': self.compile_seconds,
        }


def predict(
    request: dict[str, Any],
    chip: Chip,
    cache: pathlib.Path | None = None,
    cached: bool = False,
    slow_paths: bool = False,
) -> Prediction:
    """Compiles `request`, unless `cache` has its dumps, and follows its bundles.

    `cached` raises rather than compile; `slow_paths` goes through every path that depends on data.

    Raises:
      schedule_compile.CompileError: if it does not compile or leaves no dumps.
    """
    result = schedule_compile.compiled(request, cache, cached)
    op = schedule_ops.module(request['op'])
    case = op.Case(**request['case'])
    parts = parts_of(result, chip, slow_paths)
    if request['side'] == OURS and not any(part.kernel for part in parts):
        raise schedule_compile.CompileError('the module has no Pallas kernel')
    return Prediction(
        case,
        chip,
        op.work(case, chip),
        tuple(parts),
        result.temp_bytes,
        result.seconds,
        result.notes,
    )


def parts_of(
    compiled: schedule_compile.Compiled,
    chip: Chip,
    slow_paths: bool = False,
    computation: str = '',
) -> list[Part]:
    """What every instruction of a module's computation (its entry) is predicted to take.

    Raises:
      schedule_compile.CompileError: if a kernel left no dumps, or ones that cannot be followed.
    """
    found = schedule_hlo.instructions(compiled.module, computation)
    parts: list[Part] = []
    for instruction in found.values():
        if instruction.body:
            inside = parts_of(compiled, chip, slow_paths, instruction.body)
            parts += [part.repeated(instruction.trips) for part in inside]
        elif not (schedule_hlo.waits(instruction.opcode) or instruction.opcode.endswith('-start')):
            dumps = compiled.dumps.get(schedule_hlo.dumped_as(instruction, found, compiled.dumps))
            parts.append(_part(instruction, found, dumps, chip, slow_paths))
    # Copies that run beside other work still take their share of the memory's time.
    beside = sum(i.hbm_bytes for i in found.values() if i.opcode.endswith('-start'))
    if beside:
        share = schedule_run.COSTS[chip.name].memory_share
        seconds = beside / chip.hbm_bytes_per_s / share
        parts.append(Part(BESIDE, False, seconds, beside, 0, None, {}, 0))
    return parts


def _part(instruction, found, dumps, chip: Chip, slow_paths: bool) -> Part:
    costs = schedule_run.COSTS[chip.name]
    by_bytes = instruction.hbm_bytes / chip.hbm_bytes_per_s / costs.memory_share
    estimate = None if instruction.cycles is None else instruction.cycles / chip.clock_hz
    blank = Part(
        instruction.name, instruction.kernel, by_bytes + costs.launch_s, instruction.hbm_bytes,
        instruction.vmem_bytes, None, {}, 0, '', estimate,
    )  # fmt: skip
    if not dumps:
        if instruction.kernel:
            raise schedule_compile.CompileError(f'{instruction.name}: no bundles were dumped')
        return dataclasses.replace(blank, seconds=by_bytes)
    values = schedule_hlo.values(found, instruction)
    try:
        program = schedule_program.parse(*dumps)
        run = schedule_run.run(program, chip, values, slow_paths=slow_paths)
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
        instruction.vmem_bytes, run, utilization, spills, note, estimate,
    )  # fmt: skip


def _steps(run: schedule_run.Run) -> int:
    """Iterations that computed: that fed the MXU, or all of a kernel that has no use for it."""
    return run.steps or run.iterations


def _mean(parts) -> dict[str, float]:
    """Utilisation over all bundles of the kernels."""
    weights = [part.times * part.run.bundles if part.run else 0 for part in parts]
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
        'bundles': run.bundles / max(_steps(run), 1),
        'steps': _steps(run),
        'spills': part.spills,
        'vmem_bytes': part.vmem_bytes,
        'utilization': part.utilization,
        'regions': [
            {'start': start, 'bundles': size, 'times': times} for start, size, times in run.profile
        ],
        'depends_on_data': [{'start': start, 'bundles': size} for start, size in run.skipped],
    }

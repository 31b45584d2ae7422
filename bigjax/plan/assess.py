"""One configuration on one machine: what arithmetic, and then the compiler, say of it."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigjax.experiment import Experiment
from bigjax.models.decoder import DecoderLM
from bigjax.plan.arithmetic.closed_form import closed_form, shapes_on
from bigjax.plan.options import PlanOptions
from bigjax.plan.program.compiled import (
    Compiled,
    CompileError,
    Request,
    compile_step,
    libtpu_missing,
    without_data,
)
from bigjax.plan.program.hlo import parse as parse_program
from bigjax.plan.program.kernels import from_table
from bigjax.plan.program.memory import account
from bigjax.plan.program.timeline import walk
from bigjax.plan.records import ClosedForm, Memory, Walk
from bigjax.plan.topology import Topology
from bigjax.plan.trust import UNKNOWN, closed_error
from bigjax.run import UsageError
from bigjax.state import TrainState

# Knobs of which neither the arrays of a state depend nor what a model refuses on a mesh.
UNTRACED = ('batch', 'remat', 'accumulate', 'offload')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assessment:
    """What is known of one configuration.

    Attributes:
      experiment: its parts, without its data.
      values: its knobs that are given.
      topology: the machine.
      closed: what arithmetic says.
      compiled: what the compiler made; None where nothing was compiled.
      walk: what the program says of its step; None where there is none.
      memory: by category; of a program that does not fit, as far as that is known.
      notes: what a reader must know.
    """

    experiment: Experiment
    values: Mapping[str, Any]
    topology: Topology
    closed: ClosedForm
    compiled: Compiled | None = None
    walk: Walk | None = None
    memory: Memory
    notes: tuple[str, ...] = ()

    @property
    def decoder(self) -> bool:
        """Whether it is of the kind that the closed form knows in full."""
        return isinstance(self.experiment.model, DecoderLM)

    @property
    def fits(self) -> bool:
        """Whether HBM holds it: the compiler's word, else the sum of the closed form."""
        if self.compiled:
            return self.compiled.fits
        return self.memory.total <= self.topology.hardware.hbm_bytes

    @property
    def step_seconds(self) -> tuple[float, float] | None:
        """The predicted step, low and high; None where it does not fit."""
        if not self.fits:
            return None
        if self.walk:
            low, high = self.walk.low.seconds, self.walk.high.seconds
            return min(low, high), max(low, high)
        error = closed_error(self.topology.hardware.name) if self.decoder else UNKNOWN
        seconds = self.closed.predicted_seconds
        return max(seconds * (1 - error), self.closed.roofline_seconds), seconds * (1 + error)

    @property
    def middle_seconds(self) -> float | None:
        """The predicted step's geometric mean of low and high."""
        return math.sqrt(math.prod(self.step_seconds)) if self.step_seconds else None

    @property
    def tokens_per_second(self) -> float | None:
        """Of all devices, in the middle of the range."""
        return self.tokens_per_step / self.middle_seconds if self.middle_seconds else None

    @property
    def tokens_per_step(self) -> int:
        """Tokens (images, rows) of all devices."""
        return self.experiment.run.batch * self.experiment.task.units_per_example


def by_closed_form(name: str, values: Mapping[str, Any], topology: Topology) -> Assessment:
    """Returns what arithmetic says of a configuration.

    Args:
      name: of the experiment.
      values: its knobs.
      topology: the machine.

    Raises:
      UsageError: it does not fit the machine.
    """
    _check_kernels(values, topology)
    experiment = without_data(name, values)
    traced = frozenset((k, v) for k, v in values.items() if k not in UNTRACED)
    closed = closed_form(experiment, topology, _shapes(name, traced, topology))
    return Assessment(
        experiment=experiment,
        values=values,
        topology=topology,
        closed=closed,
        memory=closed.memory,
        notes=closed.notes,
    )


@functools.lru_cache(maxsize=64)
def _shapes(name: str, values: frozenset[tuple[str, Any]], topology: Topology) -> TrainState:
    """Shapes of the state, which is most of what arithmetic costs: the same for many candidates."""
    return shapes_on(without_data(name, dict(values)), topology)


def _check_kernels(values: Mapping[str, Any], topology: Topology) -> None:
    """Raises UsageError where a kernel is asked for that the machine cannot run."""
    other, chips = ('gpu', 'GPUs') if topology.hardware.is_tpu else ('tpu', 'TPUs')
    for knob in ('attention', 'conv'):
        if values.get(knob) == other:
            raise UsageError(
                f'--{knob}={other}: is a kernel for {chips}, and --topology={topology.name} has '
                f'none; try --{knob}=auto'
            )


def assess(
    name: str, values: Mapping[str, Any], topology: Topology, options: PlanOptions, kept: Path
) -> Assessment:
    """Returns all that can be known of a configuration: compiled where that can be done.

    Args:
      name: of the experiment.
      values: its knobs.
      topology: the machine.
      options: how far to go, and with which flags.
      kept: folder of what was compiled before.

    Raises:
      UsageError: it does not fit the machine.
    """
    known = by_closed_form(name, values, topology)
    reason = why_closed(topology, options)
    if not reason:
        request = Request(name, values, topology.name, options.libtpu_flags)
        try:
            compiled = compile_step(request, kept, options.compile_timeout)
        except CompileError as error:
            reason = f'the compiler gave no program, this is the closed form: {error}'
        else:
            return _with_program(known, compiled)
    return dataclasses.replace(known, notes=(reason, *known.notes))


def why_closed(topology: Topology, options: PlanOptions) -> str:
    """Returns why nothing can be compiled; '' if it can."""
    if not topology.hardware.is_tpu:
        return (
            f'{topology.hardware.name}: the compiler for GPUs says neither cycles nor cost without '
            'a device, so this is the closed form'
        )
    if options.fast:
        return 'closed form, by --fast: nothing was compiled; leave it out to compile'
    return libtpu_missing()


def _with_program(known: Assessment, compiled: Compiled) -> Assessment:
    """Adds what the compiler says."""
    topology = known.topology
    notes = tuple(f'of the closed form: {note}' for note in known.notes)
    if not compiled.fits:
        return dataclasses.replace(
            known,
            compiled=compiled,
            memory=_too_large(known, compiled),
            notes=(f'the compiler: {compiled.meta["message"]}', *notes),
        )
    coordinates = [tuple(at) for at in compiled.meta['coordinates']]
    # Devices of a flat torus have a third coordinate, too, which is always 0.
    flat = len(coordinates[0]) - len(topology.wrap)
    walked = walk(
        compiled.text,
        chip=topology.hardware,
        mesh_shape=compiled.meta['mesh'],
        kernels=from_table(topology.hardware),
        dcn_axes=compiled.meta['dcn'],
        coordinates=coordinates,
        wrap=(*topology.wrap, *(False,) * flat),
    )
    memory = account(parse_program(compiled.text), compiled.memory)
    notes = (*walked.notes, *notes)
    return dataclasses.replace(known, compiled=compiled, walk=walked, memory=memory, notes=notes)


def _too_large(known: Assessment, compiled: Compiled) -> Memory:
    """What the compiler needed in all; of its parts, the state is known and the rest is not."""
    state, needed = compiled.memory['state'], compiled.memory['needed_bytes']
    found = dict.fromkeys(known.memory.bytes, 0)
    found |= {'parameters': state['parameters'], 'optimizer': state['optimizer']}
    # The compiler names temporaries alone, or all that it needs.
    total = max(needed, sum(state.values()))
    closed = known.memory.bytes
    rest = {name: closed[name] for name in ('gradients', 'activations', 'collectives')}
    whole, left = sum(rest.values()) or 1, total - sum(found.values())
    found |= {name: int(left * size / whole) for name, size in rest.items()}
    found['other'] = total - sum(found.values())
    return Memory(found, total, known.memory.host_bytes)

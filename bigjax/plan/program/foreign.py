"""Walks the compiled step of any JAX program, whoever wrote it, as a plan walks ours.

    python -m bigjax.plan.program.foreign PROGRAM --topology=v5p:8x8x8 --mesh=fsdp=512

PROGRAM is a file with the text `jax.stages.Compiled.as_text()` of what libtpu compiled. `--mesh`
has the program's own axes in the order of its mesh, of one device or not, under any names. Devices
are taken to stand in the torus in that order, as JAX places a mesh whose axes are whole sides.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from bigjax.plan.program.kernels import from_table
from bigjax.plan.program.timeline import walk
from bigjax.plan.records import Walk
from bigjax.plan.report.forms import axes, between, seconds
from bigjax.plan.topology import EXAMPLE, parse
from bigjax.run import UsageError


def read(program: str, topology: str, mesh: str) -> Walk:
    """Returns what a program's text says of its step; attention is taken to be causal.

    Args:
      program: path of the text.
      topology: the one slice of TPUs that it was compiled for.
      mesh: sizes of its axes, 'fsdp=64,tensor=8'; '' is one axis of all devices.

    Raises:
      UsageError: no such file or machine, or another number of devices.
    """
    machine = parse(topology)
    if not machine.hardware.is_tpu or machine.devices > math.prod(machine.shape):
        raise UsageError(
            f'--topology={topology}: must be one slice, a chip a device; try --topology={EXAMPLE}'
        )
    good = f'fsdp={machine.devices}'
    pairs = [part.partition('=')[::2] for part in (mesh or good).split(',')]
    sizes = {name: int(size) for name, size in pairs if size.isdecimal()}
    if len(sizes) < len(pairs) or math.prod(sizes.values()) != machine.devices:
        raise UsageError(
            f'--mesh={mesh}: must be axis=size,… of {machine.devices} devices; try --mesh={good}'
        )
    if not Path(program).is_file():
        raise UsageError(f'PROGRAM={program}: no such file; try the one that as_text() went to')
    return walk(
        Path(program).read_text('utf-8'), chip=machine.hardware, mesh_shape=sizes,
        kernels=from_table(machine.hardware), wrap=machine.wrap,
        coordinates=list(itertools.product(*map(range, machine.shape))),
    )  # fmt: skip


def told(found: Walk) -> str:
    """Returns a walk in words: the step, where its seconds go, what is exchanged."""
    step = found.low.seconds, found.high.seconds
    middle = seconds(math.sqrt(math.prod(step)))
    lines = [
        f'{"step (predicted)":<18}{between(step, seconds)}, middle {middle}',
        f'{"FLOPs a device":<18}{found.flops:.4g}, of kernels {found.kernel_flops:.4g}',
    ]
    for name in ('matmul', 'kernels', 'other', 'exposed', 'hidden'):
        # What is hidden is a difference, and may be a rounding error.
        ends = [round(getattr(end, name), 9) for end in (found.low, found.high)]
        lines.append(f'{name:<18}{between(ends, seconds)}')
    for row in found.collectives:
        lines.append(
            f'{row.kind:<18}{axes(row.axes)} over {row.network}: {row.bytes / 1e9:.4g} GB in '
            f'{row.count:.0f}, {seconds(row.seconds)}, exposed {seconds(row.exposed_seconds)}'
        )
    return '\n'.join([*lines, *(f'note: {note}' for note in found.notes)])


def main(arguments: Sequence[str]) -> None:
    """Prints what a program says."""
    flags = argparse.ArgumentParser(prog='python -m bigjax.plan.program.foreign')
    flags.add_argument('program', help='text of the compiled program')
    flags.add_argument('--topology', default=EXAMPLE, help='machine it is compiled for')
    flags.add_argument('--mesh', default='', help='its axes in order, as fsdp=64,tensor=8')
    asked = flags.parse_args(arguments)
    try:
        print(told(read(asked.program, asked.topology, asked.mesh)))
    except (UsageError, ValueError) as error:
        raise SystemExit(str(error)) from None


if __name__ == '__main__':
    main(sys.argv[1:])

"""Compiles the train step of an experiment for chips that are not there, in a process of its own.

    python -m bigjax.plan.program.compile REQUEST.json FOLDER

writes FOLDER/module.hlo.txt (the scheduled program), memory.json and meta.json. No weight and no
batch exists: the arrays are abstract. The environment is `bigjax.plan.program.compiled`'s.
"""

import json
import math
import re
import resource
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from bigjax import sharding
from bigjax.experiment import Experiment
from bigjax.mesh import parse_dcn
from bigjax.offload import HOST
from bigjax.plan.arithmetic.traced import batch_shapes
from bigjax.plan.program.compiled import without_data
from bigjax.plan.topology import Topology, parse
from bigjax.run import UsageError
from bigjax.state import Setup, setup
from bigjax.train import jit_train_step

_UNITS = {'': 1, 'B': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


def devices(topology: Topology) -> list[Any]:
    """Returns the compile-only devices of a TPU topology, in slices where there are several."""
    hardware = topology.hardware
    # Of a slice whose rings are not named, the compiler takes none for closed: it then gathers by
    # sums, which send twice the bytes.
    options: dict[str, Any] = {'wrap': (*topology.wrap, False)[:3]}
    if hardware.chip_config:
        options['chip_config_name'] = hardware.chip_config
    if topology.slices > 1:
        options['num_slices'] = topology.slices
    if hardware.dimensions == 2 and topology.hosts_per_slice == 1:
        options['chips_per_host_bounds'] = (*topology.shape, 1)
    sides = 'x'.join(map(str, topology.shape))
    name = f'{hardware.topology}:{sides}'
    return topologies.get_topology_desc(platform='tpu', topology_name=name, **options).devices


def batches(experiment: Experiment, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Returns abstract arrays of one call's batches."""
    placed = sharding.batch_sharding(mesh, stacked=True)
    return {
        name: jax.ShapeDtypeStruct(
            (experiment.run.steps_per_call, *row.shape), row.dtype, sharding=placed
        )
        for name, row in batch_shapes(experiment).items()
    }


def lowered(experiment: Experiment, plan: Setup) -> Any:
    """Returns the step as `bigjax.train.train` jits it, lowered for TPUs."""
    state = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        plan.abstract,
        plan.shardings,
    )
    step = jit_train_step(experiment, plan)
    with jax.set_mesh(plan.mesh):
        traced = step.trace(state, batches(experiment, plan.mesh))
        return traced.lower(lowering_platforms=('tpu',))


def held(plan: Setup) -> dict[str, int]:
    """Returns the bytes of parameters, optimizer and the rest of the state in a device's HBM."""

    def size(part: str) -> int:
        leaves = jax.tree.leaves(getattr(plan.abstract, part))
        places = jax.tree.leaves(getattr(plan.shardings, part))
        here = [(x, s) for x, s in zip(leaves, places, strict=True) if s.memory_kind != HOST]
        return sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in here)

    return {'parameters': size('params'), 'optimizer': size('opt_state'), 'other': size('extra')}


def shapes(plan: Setup) -> list[list[int]]:
    """Returns the different shapes of what one device holds of the parameters."""
    pairs = zip(
        jax.tree.leaves(plan.abstract.params), jax.tree.leaves(plan.shardings.params), strict=True
    )
    return [list(shape) for shape in sorted({where.shard_shape(x.shape) for x, where in pairs})]


def place(plan: Setup, topology: Topology, dcn: str) -> dict[str, Any]:
    """Returns the mesh, its part between slices, and where in the torus its devices stand."""
    sizes = dict(plan.mesh.shape)
    between = parse_dcn(dcn, sizes, topology.slices) if topology.slices > 1 else {}
    coordinates = [list(device.coords) for device in plan.mesh.devices.flat]
    return {'mesh': sizes, 'dcn': between, 'coordinates': coordinates}


def out_of_memory(message: str) -> dict[str, int] | None:
    """Returns what the compiler says that a program needs and can have; None for other errors."""
    if 'Ran out of memory' not in message or 'hbm' not in message.lower() or 'Vmem' in message:
        return None
    number = r'(\d+(?:\.\d+)?)([KMGTB]?)'
    for pattern in (
        rf'Used {number} of {number} hbm',
        rf'\({number}\) exceeds available \w+ \({number}\)',
    ):
        if found := re.search(pattern, message):
            used, used_unit, room, room_unit = found.groups()
            return {
                'needed_bytes': math.ceil(float(used) * _UNITS[used_unit]),
                'hbm_bytes': math.floor(float(room) * _UNITS[room_unit]),
            }
    return None


def compiled(request: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Compiles and writes the program and its memory; returns what meta.json says beside costs."""
    experiment = without_data(request['experiment'], request['values'])
    topology = parse(request['topology'])
    plan = setup(experiment, devices(topology))
    about = place(plan, topology, experiment.run.dcn)
    start = time.monotonic()
    step = lowered(experiment, plan)
    try:
        program = step.compile()
    except jax.errors.JaxRuntimeError as error:
        short = out_of_memory(str(error))
        if short is None:
            return {'error': str(error)}
        memory = {**short, 'state': held(plan)}
        (folder / 'memory.json').write_text(json.dumps(memory), 'utf-8')
        return {**about, 'fits': False, 'message': str(error).partition('\n')[0]}
    seconds = time.monotonic() - start
    analysis = program.memory_analysis()
    memory = {
        field.removesuffix('_in_bytes'): getattr(analysis, field)
        for field in dir(analysis)
        if field.endswith('_in_bytes')
    }
    memory |= {'state': held(plan), 'shapes': shapes(plan)}
    (folder / 'memory.json').write_text(json.dumps(memory), 'utf-8')
    (folder / 'module.hlo.txt').write_text(program.as_text(), 'utf-8')
    return {**about, 'fits': True, 'seconds': seconds}


def main(request: str, folder: str) -> None:
    """Does what the file `request` asks; whatever goes wrong is said in meta.json."""
    try:
        meta = compiled(json.loads(Path(request).read_text('utf-8')), Path(folder))
    except UsageError as error:
        meta = {'usage': str(error)}
    used = resource.getrusage(resource.RUSAGE_SELF)
    meta['cpu_seconds'] = used.ru_utime + used.ru_stime
    meta['peak_rss_bytes'] = used.ru_maxrss * 1024
    meta['libtpu'] = metadata.version('libtpu')
    (Path(folder) / 'meta.json').write_text(json.dumps(meta), 'utf-8')


if __name__ == '__main__':
    main(*sys.argv[1:])

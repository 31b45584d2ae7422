"""Other ways to run an experiment on the same machine: meshes, what is kept, batches."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bigjax import experiment as experiments
from bigjax.mesh import mesh_text, parse_mesh
from bigjax.plan.assess import Assessment, by_closed_form
from bigjax.plan.topology import Topology
from bigjax.run import UsageError
from bigjax.sharding import BATCH_AXES

Change = dict[str, Any]

# What blocks keep for the gradient, the most first.
REMATS = ('none', 'minimal', 'save_out', 'save_qkv', 'save_attention', 'full')
TENSOR = (1, 2, 4, 8, 16)
EXPERT = (2, 4, 8)
MOST_ACCUMULATED = 64


def closed(
    name: str, found: Assessment, change: Change, topology: Topology | None = None
) -> Assessment | None:
    """Returns what arithmetic says of some knobs changed, or None if they do not fit together."""
    values = {**found.values, **change}
    try:
        return by_closed_form(name, values, topology or found.topology)
    except UsageError:
        return None


def meshes(found: Assessment) -> list[str]:
    """Returns meshes of all devices: FSDP alone, with tensor, with experts, with data; data."""
    topology = found.topology
    slices = topology.slices if topology.hardware.is_tpu else 1
    inside = topology.devices // slices
    texts = []
    for tensor in TENSOR:
        if inside % tensor == 0 and tensor <= inside:
            sizes = {'data': slices, 'fsdp': inside // tensor, 'tensor': tensor}
            texts.append(mesh_text(sizes) or 'data=1')
    experts = getattr(getattr(found.experiment.model, 'routing', None), 'experts', 0)
    for expert in EXPERT:
        if experts and experts % expert == 0 == inside % expert:
            sizes = {'data': slices, 'fsdp': inside // expert, 'expert': expert}
            texts.append(mesh_text(sizes))
    for data in (2, 8):
        if inside % data == 0 and inside > data:
            texts.append(mesh_text({'data': slices * data, 'fsdp': inside // data}))
    return list(dict.fromkeys([*texts, mesh_text({'data': topology.devices}) or 'data=1']))


def shards(mesh: str, topology: Topology) -> int:
    """Returns into how many parts a mesh cuts the batch."""
    sizes = parse_mesh(mesh, topology.devices)
    return math.prod(sizes[axis] for axis in BATCH_AXES)


def on_mesh(mesh: str, found: Assessment, topology: Topology | None = None) -> Change:
    """Returns the change to a mesh, and of knobs that would do nothing on it to their defaults."""
    strategy = found.experiment.strategy
    sizes = parse_mesh(mesh, (topology or found.topology).devices)
    return {'mesh': mesh, **(strategy.idle(sizes) if strategy else {})}


def knobs_of(name: str) -> set[str]:
    """Returns the names of an experiment's knobs."""
    return set(experiments.knobs(experiments.find(name)))


def smaller(name: str, found: Assessment) -> Iterator[Change]:
    """Yields changes that take less memory, those of one knob first, then of several."""
    run, known = found.experiment.run, knobs_of(name)
    mesh_now, remat_now = run.mesh, found.values.get('remat', 'none')
    parts = shards(mesh_now, found.topology)
    remats: list[Change] = []
    if 'remat' in known:
        below = REMATS[REMATS.index(remat_now) + 1 :] if remat_now in REMATS else ('full',)
        remats = [{'remat': remat} for remat in below]
    sizes = parse_mesh(mesh_now, found.topology.devices)
    others = [on_mesh(m, found) for m in meshes(found) if _differs(m, sizes, found.topology)]
    accumulated = [
        {'accumulate': times}
        for times in _doubled(run.accumulate)
        if run.batch % (parts * times) == 0
    ]
    batches = [
        {'batch': run.batch // times}
        for times in _doubled(1)
        if run.batch % (parts * run.accumulate * times) == 0
    ]
    singles = [*remats, *accumulated, *others, *batches]
    if run.offload == 'none' and found.topology.hardware.is_tpu:
        singles.append({'offload': 'optimizer'})
    yield from singles
    full = remats[-1:]
    for mesh in others:
        rows = shards(mesh['mesh'], found.topology)
        split = [
            {'accumulate': times}
            for times in _doubled(run.accumulate)
            if run.batch % (rows * times) == 0
        ]
        for remat in full:
            yield {**mesh, **remat}
        for part in split:
            yield {**mesh, **part}
        for remat in full:
            for part in split:
                yield {**mesh, **remat, **part}
            # A batch that the mesh can cut at all.
            if run.batch % rows:
                yield {**mesh, **remat, 'batch': max(1, run.batch // rows) * rows}
    for remat in full:
        for part in accumulated:
            yield {**remat, **part}


def _differs(mesh: str, sizes: Mapping[str, int], topology: Topology) -> bool:
    return parse_mesh(mesh, topology.devices) != dict(sizes)


def _doubled(first: int) -> Sequence[int]:
    """Twice a number, four times it, and so on."""
    found = []
    while (first := first * 2) <= MOST_ACCUMULATED:
        found.append(first)
    return found


def every(name: str, found: Assessment) -> Iterator[Change]:
    """Yields what a search looks at: meshes by remat policies by batches."""
    run, known = found.experiment.run, knobs_of(name)
    remats = REMATS if 'remat' in known else ('',)
    own = found.values.get('remat', 'none')
    remats = remats if own in remats or own == 'none' or not remats[0] else (own, *remats)
    for mesh in dict.fromkeys([run.mesh, *meshes(found)]):
        rows = shards(mesh, found.topology) * run.accumulate
        sizes = {run.batch, run.batch // 2, run.batch * 2}
        batches = sorted({max(1, round(size / rows)) * rows for size in sizes}, reverse=True)
        change = on_mesh(mesh, found)
        for batch in batches:
            for remat in remats:
                yield {**change, 'batch': batch, **({'remat': remat} if remat else {})}

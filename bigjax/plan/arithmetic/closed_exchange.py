"""One exchange between devices, by arithmetic: its bytes, its network, its time at links' speed.

Bytes are those one device sends: see `bigjax.plan.records`.
"""

import math

from bigjax.plan.arithmetic.shape import Shape, Step
from bigjax.plan.records import Collective
from bigjax.plan.topology import Topology
from bigjax.sharding import AXES

GATHER, SCATTER, REDUCE = 'all-gather', 'reduce-scatter', 'all-reduce'
SWAP, PASS = 'all-to-all', 'collective-permute'
SHARE = {GATHER: 1, SCATTER: 1, REDUCE: 2, SWAP: 1}


def rings(size: int, topology: Topology) -> int:
    """Returns the sides of a torus that a group of devices spreads over, at least one.

    Taken to be the fewest whose lengths multiply to the group's size.
    """
    sides, found = sorted(topology.shape, reverse=True), 1
    reached = sides[0] * topology.hardware.devices_per_chip
    for side in sides[1:]:
        if reached >= size:
            break
        reached *= side
        found += 1
    return found


def bandwidth(kind: str, size: int, network: str, topology: Topology) -> float:
    """Returns the bytes per second that one device sends with to a group of `size`."""
    hardware = topology.hardware
    if network == 'dcn':
        return hardware.dcn_bytes_per_s
    if kind == PASS or not hardware.dimensions:
        return hardware.ici_bytes_per_s
    return hardware.ring_bytes_per_s * rings(size, topology)


def exchange(
    step: Step, kind: str, axes: tuple[str, ...], whole: float, count: float, what: str
) -> list[Collective]:
    """Executions over some axes of exchanges of `whole` bytes each, those of size 1 left out.

    An axis that crosses slices does so first where it reduces: parts meet within a slice before
    they cross, so that the slow network has only their shards to carry.
    """
    axes = tuple(axis for axis in AXES if axis in axes and step.size(axis) > 1)
    if not axes or not count or not whole:
        return []
    size = step.size(*axes)
    far = math.prod(step.dcn.get(axis, 1) for axis in axes)
    if not step.topology.hardware.dimensions:
        far = _hosts(step, axes)
    if kind == PASS:
        network = 'dcn' if far > 1 else 'ici'
        seconds = whole / bandwidth(kind, size, network, step.topology)
        return [Collective(kind, axes, whole * count, count, network, seconds * count,
                           seconds * count, what)]  # fmt: skip
    parts = [('ici', size // far, whole), ('dcn', far, whole / (size // far))]
    found = []
    for network, members, amount in parts:
        if members > 1:
            sent = SHARE[kind] * (members - 1) / members * amount * count
            seconds = sent / bandwidth(kind, members, network, step.topology)
            found += [Collective(kind, axes, sent, count, network, seconds, seconds, what)]
    return found


def _hosts(step: Step, axes: tuple[str, ...]) -> int:
    """Over how many hosts of GPUs a group goes: the innermost axes of a mesh share a host."""
    inner = math.prod(step.size(axis) for axis in AXES[AXES.index(axes[-1]) + 1 :])
    within = max(1, min(step.size(*axes), step.topology.shape[0] // inner))
    return step.size(*axes) // within


def visits(shape: Shape, step: Step) -> float:
    """How often a device computes a layer in a step, for one microbatch of a pipeline at a time."""
    layers = shape.layers / step.stages
    return layers * step.parts * step.bubble(shape.layers) * step.accumulate

"""The mesh: its axes, their sizes, and which of them cross slices.

A slice is a group of devices within which the network is fast (ICI on TPUs); between slices lies
the data centre's network (DCN).
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from bigjax.run import UsageError

# Outermost first: what speaks most has the shortest way. Every mesh has all of them.
AXES = ('stage', 'data', 'fsdp', 'context', 'expert', 'tensor')
# The batch is split over every axis that holds different examples.
BATCH_AXES = ('data', 'fsdp', 'expert')


def parse_sizes(text: str, flag: str, works: str) -> dict[str, int]:
    """Returns the sizes that a text such as `'data=2,fsdp=-1'` gives, -1 standing for the rest.

    Args:
      text: comma-separated `axis=size`.
      flag: name of the flag that gave it, for messages.
      works: a text that they recommend.

    Raises:
      UsageError: an unknown or repeated axis, a size that is none, or -1 twice.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, text.split(',')):
        axis, _, size = part.partition('=')
        if axis not in AXES or not re.fullmatch(r'-1|[1-9]\d*', size):
            raise UsageError(
                f'--{flag}={text}: {part!r} is not axis=size with an axis of {", ".join(AXES)} and '
                f'a positive size or -1; try --{flag}={works}'
            )
        if axis in sizes:
            raise UsageError(f'--{flag}={text}: axis {axis!r} is given twice; try --{flag}={works}')
        sizes[axis] = int(size)
    if list(sizes.values()).count(-1) > 1:
        raise UsageError(f'--{flag}={text}: only one axis may be -1; try --{flag}={works}')
    return sizes


def parse_mesh(text: str, devices: int) -> dict[str, int]:
    """Returns the size of every axis in `AXES` for `text` such as `'data=2,fsdp=-1'`.

    Args:
      text: comma-separated `axis=size`; one size may be -1 (what is left); absent axes are 1.
      devices: number of devices the sizes must multiply to.

    Raises:
      UsageError: an unknown or repeated axis, or sizes that do not multiply to `devices`.
    """
    sizes = parse_sizes(text, 'mesh', 'data=-1')
    known = math.prod(size for size in sizes.values() if size != -1)
    free = [axis for axis, size in sizes.items() if size == -1]
    if devices % known if free else devices != known:
        raise UsageError(
            f'--mesh={text}: the sizes multiply to {known}, which '
            f'{"does not divide" if free else "is not"} the number of devices, {devices}; '
            f'try --mesh={_nearest(sizes, devices)}'
        )
    sizes |= dict.fromkeys(free, devices // known)
    return {axis: sizes.get(axis, 1) for axis in AXES}


def _nearest(sizes: Mapping[str, int], devices: int) -> str:
    """Returns the mesh whose axes are as large as these, or the next size down that divides."""
    found, left = dict(sizes), devices
    for axis, size in sizes.items():
        if size != -1:
            found[axis] = max(n for n in range(1, min(size, left) + 1) if left % n == 0)
            left //= found[axis]
    return mesh_text(found if -1 in found.values() else {**found, 'data': -1})


def parse_dcn(text: str, sizes: Mapping[str, int], slices: int) -> dict[str, int]:
    """Returns how many parts of every axis in `AXES` lie in different slices.

    Args:
      text: comma-separated `axis=size`, such as `'data=2'`; empty puts all slices on data.
      sizes: of the whole mesh, by axis.
      slices: groups of devices within which the network is fast.

    Raises:
      UsageError: an unknown or repeated axis, sizes that do not multiply to `slices`, or one that
        does not divide its axis of the mesh.
    """
    # The outermost axes speak least; one of them that takes all slices is best.
    whole = [axis for axis in AXES if sizes[axis] % slices == 0]
    works, left = {'data' if 'data' in whole else axis: slices for axis in whole[:1]}, slices
    if not works:
        for axis in AXES:
            works[axis] = math.gcd(sizes[axis], left)
            left //= works[axis]
    mesh = mesh_text(sizes)
    good = f'--dcn={mesh_text(works)}' if whole or left == 1 else '--mesh=data=-1'
    parts = parse_sizes(text, 'dcn', mesh_text(works)) if text else {'data': slices}
    shown = f'--dcn={text}' if text else f'--mesh={mesh}'
    if -1 in parts.values() or math.prod(parts.values()) != slices:
        raise UsageError(
            f'{shown}: the sizes must multiply to the number of slices, {slices}; try {good}'
        )
    for axis, size in parts.items():
        if sizes[axis] % size:
            raise UsageError(
                f'{shown}: {size} slices do not divide {axis}={sizes[axis]} of the mesh; try {good}'
            )
    return {axis: parts.get(axis, 1) for axis in AXES}


def make_mesh(text: str, dcn: str = '', devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh over all devices of all processes, every axis of `AXES` in it.

    Axis types are Auto: Linen layers take no output shardings, so the compiler propagates them.

    Args:
      text: sizes, see `parse_mesh`.
      dcn: the part of each axis between slices, see `parse_dcn`. Where devices know of no slices,
        as only TPUs surely do, and `dcn` is given, each process is one.
      devices: what the mesh is made of, such as a topology's; None takes all there are.

    Raises:
      UsageError: sizes do not fit the devices or their slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = parse_mesh(text, len(devices))
    slices = {getattr(device, 'slice_index', 0) for device in devices}
    processes = {device.process_index for device in devices}
    by_process = bool(dcn) and len(slices) == 1 and devices[0].platform != 'tpu'
    between = parse_dcn(dcn, sizes, len(processes if by_process else slices))
    if len(slices) > 1 or by_process:
        array = mesh_utils.create_hybrid_device_mesh(
            [sizes[axis] // between[axis] for axis in AXES],
            list(between.values()),
            devices,
            process_is_granule=by_process,
            allow_split_physical_axes=True,
        )
    else:
        array = mesh_utils.create_device_mesh(
            list(sizes.values()), devices, allow_split_physical_axes=True
        )
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_text(sizes: Mapping[str, int]) -> str:
    """Returns the text that `parse_mesh` reads as these sizes."""
    return ','.join(f'{axis}={size}' for axis, size in sizes.items() if size != 1)

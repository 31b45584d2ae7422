"""Where the devices of a mesh stand: along which of its axes a group lies, and over which links."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from bigjax.plan.hardware import Hardware

Groups = list[list[int]]


@dataclasses.dataclass(frozen=True)
class Fabric:
    """Devices in a mesh, and the networks between them.

    Attributes:
      hardware: generation of the devices.
      mesh_shape: sizes of the mesh's axes, outermost first.
      device_ids: at each place of the mesh, in row-major order, the number that replica groups
        call the device there; a program for several slices counts anew in each of them.
      slices: at each place, the slice of the device.
      coordinates: at each place, where in its slice's torus the device stands; empty where that is
        not known: every axis of the mesh is then taken to be one side of the torus.
      wrap: which sides of the torus are rings.
      dcn_axes: axes that cross slices, and in how many parts.
    """

    hardware: Hardware
    mesh_shape: Mapping[str, int]
    device_ids: Sequence[int]
    slices: Sequence[int]
    coordinates: Sequence[tuple[int, ...]] = ()
    wrap: Sequence[bool] = ()
    dcn_axes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def size(self) -> int:
        """Devices that a program counts: those of one slice, where it counts anew in each."""
        return len(set(self.device_ids))

    @functools.cached_property
    def _place(self) -> dict[int, int]:
        """The place of each device, by its number; of several, the first."""
        every = [*enumerate(self.device_ids)]
        return {number: place for place, number in reversed(every)}

    def places(self, group: Sequence[int]) -> list[int]:
        """Returns where in the mesh some devices stand; of no numbers, all of them."""
        return [self._place[number] for number in group or range(self.size)]

    def axes(self, groups: Groups) -> tuple[str, ...]:
        """Returns the mesh's axes along which some group's devices differ, outermost first."""
        shape = tuple(self.mesh_shape.values())
        varies = np.zeros(len(shape), bool)
        for group in groups:
            index = np.stack(np.unravel_index(self.places(group), shape))
            varies |= np.any(index != index[:, :1], axis=1)
        return tuple(name for name, different in zip(self.mesh_shape, varies, strict=True)
                     if different)  # fmt: skip

    def across(self, group: Sequence[int]) -> int:
        """Returns the number of slices that a group's devices are in."""
        return len({self.slices[place] for place in self.places(group)})

    def links(self, group: Sequence[int]) -> int:
        """Returns how many links a device sends on at once in an exchange of a whole group.

        Two for each side of the torus that the group goes along, one where that is no ring.
        """
        if not self.hardware.dimensions:
            return 1  # a switch
        if not self.coordinates:
            return 2
        at = np.array([self.coordinates[place] for place in self.places(group)])
        first = self.slices[self.places(group)[0]]
        at = at[[self.slices[place] == first for place in self.places(group)]]
        found = 0
        for side in range(at.shape[1]):
            extent = len(set(at[:, side].tolist()))
            ring = extent > 2 and extent == self._sides[side] and self._wraps(side)
            found += 0 if extent == 1 else 2 if ring else 1
        return max(found, 1)

    def rate(self, group: Sequence[int]) -> float:
        """Returns the bytes per second that a device sends in an exchange of a whole group."""
        return self._within(group) or self.links(group) * self.hardware.ici_bytes_per_s

    def permute_rate(self, pairs: Groups) -> float:
        """Returns the bytes per second from one device to another, at the median of the pairs."""
        moved = [pair for pair in pairs if pair[0] != pair[1]]
        inside = [pair for pair in moved if self._within(pair)]
        if 2 * len(inside) > len(moved):
            return self.hardware.chip_bytes_per_s
        return self.hardware.ici_bytes_per_s / self.hops(pairs)

    def _within(self, group: Sequence[int]) -> float:
        """The rate within a chip if all of a group are on one, else 0."""
        if not self.coordinates or not self.hardware.chip_bytes_per_s:
            return 0.0
        at = {(self.slices[place], self.coordinates[place]) for place in self.places(group)}
        return self.hardware.chip_bytes_per_s if len(at) == 1 else 0.0

    def hops(self, pairs: Groups) -> float:
        """Returns how many links what is sent from one device to another passes, at the median."""
        moved = [pair for pair in pairs if pair[0] != pair[1]]
        if not self.coordinates or not moved:
            return 1.0
        counts = [self._distance(*self.places(pair)) for pair in moved]
        return max(1.0, float(np.median(counts)))

    @functools.cached_property
    def _sides(self) -> tuple[int, ...]:
        return tuple(max(side) + 1 for side in zip(*self.coordinates, strict=True))

    def _wraps(self, side: int) -> bool:
        if not self.wrap:
            return True
        # JAX gives three coordinates on a torus of two sides, too.
        return side < len(self.wrap) and bool(self.wrap[side])

    def _distance(self, start: int, end: int) -> int:
        total = 0
        for side, (a, b) in enumerate(
            zip(self.coordinates[start], self.coordinates[end], strict=True)
        ):
            straight = abs(a - b)
            around = self._sides[side] - straight if self._wraps(side) else straight
            total += min(straight, around)
        return total


def make_fabric(
    hardware: Hardware,
    mesh_shape: Mapping[str, int],
    *,
    device_ids: Sequence[int] | None = None,
    dcn_axes: Mapping[str, int] | None = None,
    coordinates: Sequence[tuple[int, ...]] = (),
    wrap: Sequence[bool] = (),
    partitions: int = 0,
) -> Fabric:
    """Returns the fabric of a mesh.

    Args:
      hardware: generation of the devices.
      mesh_shape: sizes of the axes, outermost first.
      device_ids: numbers of the devices, as in `Fabric`; None counts them in the mesh's order.
      dcn_axes: the outer parts of axes that cross slices, such as {'data': 2}.
      coordinates: as in `Fabric`.
      wrap: as in `Fabric`.
      partitions: devices that a program counts; fewer than there are if it counts in each slice.
    """
    shape = tuple(mesh_shape.values())
    count = math.prod(shape)
    index = np.stack(np.unravel_index(np.arange(count), shape)) if shape else np.zeros((0, 1), int)
    slices = np.zeros(count, int)
    for row, (name, size) in enumerate(mesh_shape.items()):
        parts = (dcn_axes or {}).get(name, 1)
        slices = slices * parts + index[row] // (size // parts)
    numbers = list(range(count) if device_ids is None else device_ids)
    if 0 < partitions < count:
        seen = [0] * (int(slices.max()) + 1)
        for place, slice_ in enumerate(slices.tolist()):
            numbers[place] = seen[slice_]
            seen[slice_] += 1
    return Fabric(
        hardware, dict(mesh_shape), numbers, slices.tolist(),
        [tuple(at) for at in coordinates], list(wrap), dict(dcn_axes or {}),
    )  # fmt: skip

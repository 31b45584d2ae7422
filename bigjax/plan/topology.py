"""The machine a plan is made for, from its name: `v5p:8x8x8`, `4*v5e:16x16`, `h100:64`, `v5p-1024`.

A slice is what the fast network joins: a torus of chips, or a host of GPUs.
"""

import dataclasses
import difflib
import functools
import itertools
import math
import re
from collections.abc import Mapping

from bigjax.mesh import parse_dcn
from bigjax.plan.hardware import HARDWARE, Hardware
from bigjax.run import UsageError

# Slices of less than a cube of 4 x 4 x 4, and those of two dimensions, that can be rented.
SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
CUBE = 4
LONGEST = 32  # chips along a side of a slice of cubes
ALIASES = {'tpu7x': 'v7x', 'v5litepod': 'v5e', 'ironwood': 'v7x', 'trillium': 'v6e'}
EXAMPLE = 'v5p:8x8x8'


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one generation in equal slices.

    Attributes:
      hardware: the generation.
      shape: chips along each side of a slice; of GPUs, those of a host.
      slices: how many; of GPUs, hosts.
    """

    hardware: Hardware
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """JAX devices of all slices."""
        return self.chips * self.hardware.devices_per_chip

    @property
    def hosts_per_slice(self) -> int:
        """Machines of a slice."""
        # Eight chips of a flat torus can be had as one machine.
        flat = self.hardware.dimensions == 2 and math.prod(self.shape) <= 8
        per_host = 8 if flat else self.hardware.chips_per_host
        return max(1, math.prod(self.shape) // per_host)

    @property
    def hosts(self) -> int:
        """Machines of all slices."""
        return self.hosts_per_slice * self.slices

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Which sides of a slice are rings: all of cubes, the full ones of a flat torus."""
        if self.hardware.dimensions == 3:
            return (all(side % CUBE == 0 for side in self.shape),) * 3
        return tuple(side == 16 for side in self.shape)

    def between(self, dcn: str, sizes: Mapping[str, int]) -> dict[str, int]:
        """Returns what --dcn says of a mesh of these sizes, see `bigjax.mesh.parse_dcn`.

        Which hosts of GPUs an axis spans is in the order of the mesh: of them it is only checked.
        """
        parts = parse_dcn(dcn, sizes, self.slices) if self.hardware.is_tpu or dcn else {}
        return parts if self.hardware.is_tpu else {}

    @property
    def name(self) -> str:
        """As `parse` reads it, such as '4*v5e:16x16' or 'h100:64'."""
        if not self.hardware.is_tpu:
            return f'{self.hardware.name}:{self.chips}'
        sides = 'x'.join(map(str, self.shape))
        return f'{f"{self.slices}*" if self.slices > 1 else ""}{self.hardware.name}:{sides}'


def parse(text: str) -> Topology:
    """Returns the machine that --topology names.

    Args:
      text: 'v5p:8x8x8' (chips along each side), '4*v5e:16x16' (slices), 'h100:64' (GPUs), or the
        name it is rented by, 'v5p-1024' (TensorCores, two a chip) or 'v5e-256'.

    Raises:
      UsageError: no such generation or slice; the message names the nearest there is.
    """
    if not text:
        raise UsageError(
            f'--topology=: is empty; name the chips to plan for; try --topology={EXAMPLE}'
        )
    match = re.fullmatch(r'(?:([1-9]\d*)\*)?([a-z]\w*)(?::(\d+(?:x\d+)*)|-(\d+))', text)
    if not match:
        raise UsageError(
            f'--topology={text}: must be GENERATION:SIDExSIDE…, SLICES*GENERATION:…, gpu:COUNT or '
            f'a product name such as v5p-1024; try --topology={_guess(text)}'
        )
    slices, name, sides, cores = match.groups()
    hardware = HARDWARE.get(ALIASES.get(name, name))
    if hardware is None:
        near = difflib.get_close_matches(name, HARDWARE, n=1, cutoff=0)[0]
        rest = text[match.end(2) :]
        raise UsageError(
            f'--topology={text}: no generation {name}; there are {", ".join(HARDWARE)}; '
            f'try --topology={_fitting(HARDWARE[near], rest).name}'
        )
    count = int(slices or 1)
    if not hardware.is_tpu:
        return _gpus(text, hardware, int(cores or 0) or _numbers(sides)[0], sides, count)
    if cores:
        return _product(text, hardware, int(cores), count)
    shape = _numbers(sides)
    if shape not in shapes(hardware):
        raise UsageError(
            f'--topology={text}: {_rule(hardware)}; '
            f'try --topology={_nearest(hardware, shape, count).name}'
        )
    return Topology(hardware, shape, count)


@functools.cache
def shapes(hardware: Hardware) -> tuple[tuple[int, ...], ...]:
    """Returns every slice of a TPU generation that can be had, small ones first."""
    if hardware.dimensions == 2:
        return FLAT
    sides = range(CUBE, LONGEST + 1, CUBE)
    cubes = itertools.combinations_with_replacement(sides, 3)
    large = [shape for shape in cubes if math.prod(shape) <= hardware.largest]
    return SMALL + tuple(sorted(large, key=math.prod))


def _numbers(sides: str) -> tuple[int, ...]:
    return tuple(int(side) for side in sides.split('x'))


def _rule(hardware: Hardware) -> str:
    if hardware.dimensions == 2:
        return f'a slice of {hardware.name} is one of {", ".join(map(_text, FLAT))}'
    return (
        f'a slice of {hardware.name} is {", ".join(map(_text, SMALL))} or has three sides that are '
        f'multiples of {CUBE}, the shorter first, and at most {hardware.largest} chips'
    )


def _text(shape: tuple[int, ...]) -> str:
    return 'x'.join(map(str, shape))


def _nearest(hardware: Hardware, shape: tuple[int, ...], slices: int) -> Topology:
    """The slice most like one that there is not; several of the largest for one too large."""
    chips = max(1, math.prod(shape))
    largest = max(map(math.prod, shapes(hardware)))
    if chips > largest:
        slices *= -(-chips // largest)
        return Topology(hardware, _of_size(hardware, largest), slices)
    if len(shape) != hardware.dimensions or 0 in shape:
        return Topology(hardware, _of_size(hardware, chips), slices)

    def distance(other: tuple[int, ...]) -> float:
        pairs = zip(sorted(shape), sorted(other), strict=True)
        return sum(abs(math.log(a / b)) for a, b in pairs)

    return Topology(hardware, min(shapes(hardware), key=distance), slices)


def _of_size(hardware: Hardware, chips: int) -> tuple[int, ...]:
    """The slice nearest to a number of chips, of these the one most like a cube."""

    def distance(shape: tuple[int, ...]) -> tuple[float, float]:
        return abs(math.log(math.prod(shape) / chips)), max(shape) / min(shape)

    return min(shapes(hardware), key=distance)


def _fitting(hardware: Hardware, rest: str) -> Topology:
    """What another generation has most like ':8x8x8' or '-256'."""
    numbers = tuple(int(number) for number in re.findall(r'\d+', rest)) or (256,)
    if not hardware.is_tpu:
        return Topology(hardware, (8,), max(1, math.prod(numbers) // 8))
    return _nearest(hardware, numbers, 1)


def _guess(text: str) -> str:
    """What was meant by a text that is no name at all: its generation, if it has one."""
    found = next((h for name, h in HARDWARE.items() if name in text), None)
    if found is None:
        return EXAMPLE
    numbers = re.findall(r'\d+', text.partition(found.name)[2])
    return _fitting(found, 'x'.join(numbers)).name


def _product(text: str, hardware: Hardware, cores: int, slices: int) -> Topology:
    """The slice of a product name, the one most like a cube where there are several."""
    chips, rest = divmod(cores, hardware.cores_in_name)
    found = _of_size(hardware, max(1, chips))
    if rest or math.prod(found) != chips:
        good = Topology(hardware, found, slices)
        each = 'TensorCores, two a chip' if hardware.cores_in_name == 2 else 'chips'
        raise UsageError(
            f'--topology={text}: no slice of {hardware.name} has {cores} {each}; '
            f'try --topology={good.name}'
        )
    return Topology(hardware, found, slices)


def _gpus(text: str, hardware: Hardware, count: int, sides: str | None, times: int) -> Topology:
    """GPUs in hosts: whole hosts, or a power of two of one."""
    host = hardware.chips_per_host
    whole = count >= host and count % host == 0
    if (sides and 'x' in sides) or not (whole or count in (1, 2, 4)):
        good = host * max(1, round((math.prod(_numbers(sides)) if sides else count) / host))
        raise UsageError(
            f'--topology={text}: {hardware.name} comes as 1, 2, 4 or a multiple of {host} GPUs, '
            f'{host} a host; try --topology={hardware.name}:{good}'
        )
    return Topology(hardware, (min(count, host),), max(1, count // host) * times)

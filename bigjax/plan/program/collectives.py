"""What the devices of a compiled program exchange: how many bytes, with whom, over which links."""

import dataclasses
import math
import re

import numpy as np

from bigjax.plan.program.fabric import Fabric, Groups
from bigjax.plan.program.hlo import Array, Computation, Instruction

KINDS = (
    'all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all', 'ragged-all-to-all',
    'collective-permute', 'collective-broadcast',
)  # fmt: skip
_MESH = re.compile(r'mesh\[(.*?)\](?:,\s*device_ids=\((.*?)\))?\s*\{(.*)\}$', re.DOTALL)
_IOTA = re.compile(r'\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?')
_AXIS = re.compile(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?")


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One execution of a collective.

    Attributes:
      kind: as in `bigjax.plan.records.Collective`.
      axes: of the mesh.
      bytes: what one device sends.
      network: 'ici' or 'dcn'.
      seconds: at the links' speed, with nothing else on them.
      lanes: what it occupies meanwhile: an axis, and of a permute a direction along it.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: float
    network: str
    seconds: float
    lanes: tuple[tuple[str, str], ...]


def kind_of(instruction: Instruction) -> str:
    """Returns the kind of collective that an instruction is or starts, '' for none."""
    kind = instruction.opcode.removesuffix('-start')
    return kind if kind in KINDS else ''


def exchange(
    computation: Computation, instruction: Instruction, fabric: Fabric, *, fused: bool = False
) -> Exchange | None:
    """Returns what a collective moves, None where every device is alone in its group.

    Args:
      computation: where it stands.
      instruction: the collective.
      fabric: devices and networks.
      fused: whether the computation is a fusion's.

    Raises:
      ValueError: its replica groups cannot be read.
    """
    kind = kind_of(instruction)
    inputs = [array for operand in computation.operands(instruction) for array in operand.arrays]
    if kind == 'collective-permute':
        return _permute(instruction, inputs[0], fabric)
    groups = read_groups(instruction.attributes.get('replica_groups', ''), fabric)
    members = groups[0]
    n = len(members) or fabric.size
    if n == 1:
        return None
    sent = float(sum(array.bytes for array in inputs))
    if not instruction.opcode.endswith('-start'):
        # What is sent may be narrower than the operand: a conversion is a part of the exchange.
        ratio = {'all-gather': n, 'reduce-scatter': 1 / n}.get(kind, 1)
        sent = min(sent, instruction.bytes / ratio)
    if fused and kind == 'all-reduce' and _is_scatter(computation, instruction, n):
        kind = 'reduce-scatter'
    return _grouped('all-to-all' if 'all-to-all' in kind else kind, groups, sent, n, fabric)


def across_slices(
    computation: Computation, instruction: Instruction, fabric: Fabric
) -> Exchange | None:
    """Returns what a `send` moves that hands a collective to the runtime between slices.

    Such a program is compiled for one slice; what it says of the others is how many there are.
    """
    said = instruction.attributes.get('frontend_attributes', '')
    kind = re.search(r'_transfer_type="(\w+)"', said)
    target = re.search(r'_megascale_target="\{([\d,:]*)\}', said)
    slices = len(_expand(target[1])) if target else len(set(fabric.slices))
    sent = float(computation.operands(instruction)[0].arrays[0].bytes)
    name = kind[1].lower().replace('_', '-') if kind else 'collective-permute'
    name = name if name in KINDS else 'collective-permute'
    if slices == 1:
        return None
    share = {'all-gather': slices - 1, 'all-reduce': 2 * (slices - 1) / slices,
             'collective-permute': 1}.get(name, (slices - 1) / slices)  # fmt: skip
    axes = _crossing(slices, fabric)
    return Exchange(
        name, axes, sent * share, 'dcn', sent * share / fabric.hardware.dcn_bytes_per_s,
        (('dcn', '+'), ('dcn', '-')),
    )  # fmt: skip


def _expand(text: str) -> list[int]:
    """Reads '0,2:4' as 0, 2, 3, 4."""
    found: list[int] = []
    for part in filter(None, text.split(',')):
        first, _, last = part.partition(':')
        found += range(int(first), int(last or first) + 1)
    return found


def _crossing(slices: int, fabric: Fabric) -> tuple[str, ...]:
    """The axes that cross so many slices: one of that many parts, else all that cross."""
    parts = {axis: count for axis, count in fabric.dcn_axes.items() if count > 1}
    one = [axis for axis, count in parts.items() if count == slices]
    chosen = one[:1] if one and math.prod(parts.values()) != slices else parts
    return tuple(axis for axis in fabric.mesh_shape if axis in chosen)


def _grouped(kind: str, groups: Groups, sent: float, n: int, fabric: Fabric) -> Exchange:
    """An exchange of groups of n devices that hand in `sent` bytes each."""
    share = {'all-gather': n - 1, 'all-reduce': 2 * (n - 1) / n}.get(kind, (n - 1) / n)
    axes, slices = fabric.axes(groups), fabric.across(groups[0])
    lanes = tuple((axis, way) for axis in axes for way in '+-')
    inside = n // slices
    seconds = 0.0
    if inside > 1:
        rounds = {'all-gather': slices * (inside - 1), 'all-reduce': 2 * (inside - 1) / inside}
        rate = fabric.rate(groups[0])
        # On a ring of n, a part of an all-to-all passes n / 4 links, and a link carries them all.
        far = max(1.0, inside / 4) if kind == 'all-to-all' and fabric.hardware.dimensions else 1.0
        seconds += sent * rounds.get(kind, (inside - 1) / inside) * far / rate
    if slices > 1:
        # Of what a slice's devices have in common, each sends its part to the other slices.
        between = {'all-gather': slices - 1, 'all-reduce': 2 * (slices - 1) / slices / inside,
                   'all-to-all': (slices - 1) / slices}  # fmt: skip
        each = between.get(kind, (slices - 1) / slices / inside)
        seconds += sent * each / fabric.hardware.dcn_bytes_per_s
    return Exchange(kind, axes, sent * share, 'dcn' if slices > 1 else 'ici', seconds, lanes)


def _permute(instruction: Instruction, sent: Array, fabric: Fabric) -> Exchange | None:
    numbers = [int(n) for n in re.findall(r'\d+', instruction.attributes['source_target_pairs'])]
    pairs = [list(pair) for pair in zip(numbers[::2], numbers[1::2], strict=True)]
    moved = [pair for pair in pairs if pair[0] != pair[1]]
    if not moved:
        return None
    far = any(fabric.across(pair) > 1 for pair in moved)
    axes = fabric.axes(moved)
    # Most devices tell the direction: one that sends around the end goes the same way.
    steps = [b - a for a, b in (fabric.places(pair) for pair in moved)]
    way = '+' if float(np.median(steps)) > 0 else '-'
    hardware = fabric.hardware
    rate = hardware.dcn_bytes_per_s if far else fabric.permute_rate(moved)
    return Exchange(
        'collective-permute', axes, float(sent.bytes), 'dcn' if far else 'ici', sent.bytes / rate,
        tuple((axis, way) for axis in axes),
    )  # fmt: skip


def _is_scatter(computation: Computation, instruction: Instruction, n: int) -> bool:
    """Whether only a device's own part of an all-reduce leaves the fusion that it stands in.

    The compiler writes a reduce-scatter so, with no sum that every device holds.
    """
    cuts = any(
        found.opcode == 'dynamic-slice' and instruction.name in _sources(computation, found)
        for found in computation.instructions.values()
    )
    whole = sum(array.size for array in instruction.arrays)
    part = sum(array.size for array in computation.root.arrays)
    return cuts and part * n <= 1.5 * whole  # there may be padding


def _sources(computation: Computation, instruction: Instruction) -> set[str]:
    """Names of what an instruction reads, through what only names it anew."""
    found, todo = set(), list(instruction.operands[:1])
    while todo:
        name = todo.pop()
        found.add(name)
        source = computation.instructions.get(name)
        if source and source.opcode in ('bitcast', 'get-tuple-element', 'reshape', 'copy'):
            todo += source.operands
    return found


def read_groups(text: str, fabric: Fabric) -> Groups:
    """Returns the groups of devices that replica groups name, in any of their three forms.

    Args:
      text: `{{0,1},{2,3}}`, `[2,2]<=[2,2]T(1,0)`, `mesh['a'=2,'b'=2] {'b'}`, or `{}` for all.
      fabric: gives the number of devices.

    Raises:
      ValueError: another form.
    """
    if match := _MESH.match(text):
        return _of_mesh(*match.groups())
    if match := _IOTA.match(text):
        shape, order = _iota(*match.groups())
        return order.reshape(shape).tolist()
    if text in ('', '{}', '{{}}'):
        return [list(range(fabric.size))]
    if text.startswith('{{'):
        return [[int(n) for n in re.findall(r'\d+', part)] for part in text.split('},{')]
    raise ValueError(f'replica groups of an unknown form: {text[:200]}')


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r'\d+', text)]


def _iota(shape: str, dims: str, permutation: str | None) -> tuple[list[int], np.ndarray]:
    """Reads `[2,2]<=[2,2]T(1,0)`: counted in one shape, transposed, read in another."""
    order = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    if permutation:
        order = order.transpose(_numbers(permutation))
    return _numbers(shape), order.reshape(-1)


def _of_mesh(sizes: str, ids: str | None, grouped: str) -> Groups:
    """Groups along axes of a mesh, which may be a part of one: 'a':(2)4 is 4 after 2 of 'a'."""
    pairs = [part.rpartition('=') for part in sizes.split(',')]
    names = [name.strip(" '") for name, _, _ in pairs]
    shape = [int(size) for _, _, size in pairs]
    order = np.arange(math.prod(shape))
    if ids:
        match = _IOTA.search(ids)
        order = _iota(*match.groups())[1] if match else np.array(_numbers(ids))
    chosen: dict[str, tuple[int, int]] = {}
    for part in filter(str.strip, grouped.split(',')):
        match = _AXIS.fullmatch(part.strip())
        if not match:
            raise ValueError(f'replica groups along an axis of an unknown form: {part}')
        chosen[match[1]] = (int(match[2] or 1), int(match[3] or shape[names.index(match[1])]))
    parts, keep = [], []
    for name, size in zip(names, shape, strict=True):
        before, wanted = chosen.get(name, (1, 1))
        parts += [before, wanted, size // before // wanted]
        keep += [False, name in chosen, False]
    order = order.reshape(parts)
    rest = [i for i, kept in enumerate(keep) if not kept]
    group = [i for i, kept in enumerate(keep) if kept]
    members = math.prod(parts[i] for i in group)
    return order.transpose(rest + group).reshape(-1, members).tolist()

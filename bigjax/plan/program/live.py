"""Which values of a compiled program live at the same time, and in which buffers.

A value lives from the instruction that makes it to the last one that reads it; loops, tuples, views
and updates in place share their buffers, as the compiler has them share.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from bigjax.plan.program.hlo import Array, Computation, Instruction, Module

_HBM = 0
_VIEWS = ('get-tuple-element', 'bitcast', 'optimization-barrier', 'tuple', 'while', 'parameter')
_EXCHANGES = re.compile(
    r'all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast'
)
_ALIASED = re.compile(r'\{(\d*)\}: \((\d+), \{([\d, ]*)\}')
_ELEMENTWISE = {
    'add',
    'subtract',
    'multiply',
    'divide',
    'convert',
    'select',
    'negate',
    'exponential',
}
# A result of these is not written where it is read.
_MIXING = {'convolution', 'dot', 'transpose', 'gather', 'sort', 'custom-call', 'dynamic-slice'}
_IN_PLACE = ('dynamic-update-slice', 'scatter')


@dataclasses.dataclass(frozen=True, eq=False)
class Buffer:
    """What one array lies in; two values may share it.

    Attributes:
      array: its type.
      category: one of `CATEGORIES`.
    """

    array: Array
    category: str

    @property
    def bytes(self) -> int:
        """Of HBM."""
        return self.array.bytes if self.array.space == _HBM else 0


Leaves = tuple[Buffer | None, ...]


def live_at_peak(module: Module, shapes: set[tuple[int, ...]]) -> list[Buffer]:
    """Returns the buffers that live, beside the arguments, when most bytes of HBM do.

    Args:
      module: the program, in the order of its schedule.
      shapes: what one device holds of each parameter; equal float32 values are gradients.
    """
    return _Walk(module, shapes).peak()


class _Walk:
    """Follows a program in the order of its schedule."""

    def __init__(self, module: Module, shapes: set[tuple[int, ...]]):
        self.module, self.shapes = module, shapes
        self.largest: dict[str, list[Buffer]] = {}

    def peak(self) -> list[Buffer]:
        """Returns the buffers that live, beside the arguments, when most bytes do."""
        entry = self.module.entry
        given = {i: (None,) * len(p.arrays) for i, p in entry.parameters.items()}
        # What is returned lies in what was donated.
        returned = [None] * len(entry.root.arrays)
        return self._run(entry, given, tuple(returned))

    def _run(
        self, computation: Computation, given: Mapping[int, Leaves], returned: Leaves
    ) -> list[Buffer]:
        """Returns the most that lives of what a computation makes.

        Args:
          computation: what runs.
          given: buffers of its parameters, None where somebody else accounts for them.
          returned: buffers of its result, likewise.
        """
        order = list(computation.instructions.values())
        fixed = self._placed(computation, returned)
        ends = _last_reads(order)
        leaves: dict[str, Leaves] = {}
        born: dict[Buffer, int] = {}
        last: dict[Buffer, int] = {}
        inner: dict[int, list[Buffer]] = {}
        outside = {id(b) for group in (*given.values(), returned) for b in group if b}
        for at, instruction in enumerate(order):
            for name in instruction.operands:
                for buffer in leaves.get(name, ()):
                    if buffer:
                        last[buffer] = at
            leaves[instruction.name] = made = self._made(
                computation, instruction, leaves, given, fixed, ends, born
            )
            for buffer in made:
                if buffer and id(buffer) not in outside:
                    born.setdefault(buffer, at)
                    last[buffer] = max(at, last.get(buffer, at))
            inner[at] = self._inside(computation, instruction, leaves)
        for buffer in leaves[computation.root.name]:
            if buffer in born:
                last[buffer] = len(order)
        return _most(born, last, inner)

    def _placed(self, computation: Computation, returned: Leaves) -> dict[tuple[str, int], Any]:
        """Where the values must be put that a computation returns, by instruction and leaf."""
        found: dict[tuple[str, int], Any] = {}

        def place(instruction: Instruction, leaf: int, buffer: Buffer | None) -> None:
            operands = computation.operands(instruction)
            if instruction.opcode == 'tuple':
                for operand in operands:
                    if leaf < len(operand.arrays):
                        return place(operand, leaf, buffer)
                    leaf -= len(operand.arrays)
                return None
            found.setdefault((instruction.name, leaf), (buffer,))
            if instruction.opcode == 'get-tuple-element' and len(operands) == 1:
                index = int(instruction.attributes['index'])
                if len(operands[0].arrays) > index and len(instruction.arrays) == 1:
                    place(operands[0], index, buffer)
            elif instruction.opcode in ('bitcast', 'while', 'optimization-barrier') and operands:
                place(operands[0], leaf, buffer)
            elif instruction.opcode.endswith('-done') and operands:
                place(operands[0], _handed(computation, operands[0]) + leaf, buffer)
            return None

        for leaf, buffer in enumerate(returned):
            place(computation.root, leaf, buffer)
        return found

    def _made(self, computation, instruction, leaves, given, fixed, ends, born) -> Leaves:
        """The buffers of an instruction's result: new ones, or those of its operands."""
        operands = [leaves.get(name, ()) for name in instruction.operands]
        opcode = instruction.opcode
        if opcode == 'parameter':
            return given.get(int(instruction.literal), (None,) * len(instruction.arrays))
        if opcode == 'tuple':
            return tuple(buffer for operand in operands for buffer in operand)
        if opcode == 'get-tuple-element':
            index = int(instruction.attributes['index'])
            if len(instruction.arrays) == 1 and index < len(operands[0]):
                return (operands[0][index],)
            return (None,) * len(instruction.arrays)
        if opcode in _VIEWS and operands:
            return operands[0]
        if opcode.endswith('-done') and operands:
            first = _handed(computation, computation.operands(instruction)[0])
            found = operands[0][first : first + len(instruction.arrays)]
            return found + (None,) * (len(instruction.arrays) - len(found))
        if opcode == 'constant':
            return (None,) * len(instruction.arrays)
        shared = self._shared(instruction, leaves, ends, born)
        category = self._category(instruction)
        flat = [buffer for operand in operands for buffer in operand]
        count = _handed(computation, instruction)
        handed = flat[len(flat) - count :] if count else []
        made: list[Buffer | None] = []
        for leaf, array in enumerate(instruction.arrays):
            if (instruction.name, leaf) in fixed:
                made.append(fixed[instruction.name, leaf][0])
            elif leaf in shared:
                made.append(shared[leaf])
            elif leaf < len(handed):
                made.append(handed[leaf])
            elif opcode == 'copy-start' and leaf:
                made.append(None)
            else:
                made.append(Buffer(array, self._gradient(array, category)))
        return tuple(made)

    def _shared(self, instruction, leaves, ends, born) -> dict[int, Buffer | None]:
        """Leaves of a result that lie in an operand's buffer."""
        operands = [leaves.get(name, ()) for name in instruction.operands]
        found: dict[int, Buffer | None] = {}
        alias = instruction.attributes.get('output_to_operand_aliasing', '')
        for out, operand, _ in _ALIASED.findall(alias):
            if int(operand) < len(operands) and operands[int(operand)]:
                found[int(out or 0)] = operands[int(operand)][0]
        root, elementwise = instruction, instruction.opcode in _ELEMENTWISE
        if instruction.opcode == 'fusion':
            root = self.module.called(instruction)[0].root
            inside = {inner.opcode for _, inner in self.module.inside(instruction)}
            elementwise = not any(_EXCHANGES.match(opcode) for opcode in inside)
            elementwise = elementwise and not inside & _MIXING
        updates = root.opcode in _IN_PLACE
        if not updates and not elementwise:
            return found
        for leaf, array in enumerate(instruction.arrays):
            for name, operand in zip(instruction.operands, operands, strict=True):
                if leaf in found or len(operand) != 1 or operand[0] is None:
                    continue
                dies = operand[0] in born and ends[name] == ends['', instruction.name]
                taken = operand[0] in found.values() or operand[0].array != array
                if not taken and (updates or dies):
                    found[leaf] = operand[0]
        return found

    def _inside(self, computation, instruction, leaves) -> list[Buffer]:
        """The most that lives within a loop or a branch, while everything around it does."""
        if instruction.opcode == 'while':
            body = self.module.computations[instruction.attributes['body'].lstrip('%')]
            if body.name not in self.largest:
                carried = leaves[instruction.name]
                self.largest[body.name] = self._run(body, {0: carried}, carried)
            return self.largest[body.name]
        if instruction.opcode in ('call', 'conditional'):
            found = [
                self._run(called, {}, (None,) * len(called.root.arrays))
                for called in self.module.called(instruction)
            ]
            return max(found, key=_total, default=[])
        return []

    def _category(self, instruction: Instruction) -> str:
        if _EXCHANGES.match(instruction.opcode) or 'AsyncCollective' in instruction.target:
            return 'collectives'
        if instruction.opcode in ('fusion', 'async-start') and any(
            _EXCHANGES.match(inner.opcode) for _, inner in self.module.inside(instruction)
        ):
            return 'collectives'
        return 'activations'

    def _gradient(self, array: Array, category: str) -> str:
        """Float32 values that are shaped like what a device holds of a parameter."""
        same = array.dtype == 'f32' and len(array.dims) > 1 and array.dims in self.shapes
        return 'gradients' if same else category


def _last_reads(order: list[Instruction]) -> dict[Any, int]:
    """Where each value is read last, by its name; under ('', name), where it is made."""
    found: dict[Any, int] = {}
    for at in range(len(order) - 1, -1, -1):
        instruction = order[at]
        found['', instruction.name] = at
        until = at
        if instruction.opcode in _VIEWS:
            until = max(at, found.get(instruction.name, at))
        for name in instruction.operands:
            found[name] = max(found.get(name, until), until)
    return found


def _handed(computation: Computation, instruction: Instruction) -> int:
    """How many arrays that an asynchronous operation shows first are its operands."""
    if not instruction.opcode.endswith(('-start', '-update')) or instruction.opcode == 'copy-start':
        return 0
    operands = computation.operands(instruction)[instruction.opcode.endswith('-update') :]
    given = tuple(array for operand in operands for array in operand.arrays)
    more = len(instruction.arrays) > len(given)
    return len(given) if more and instruction.arrays[: len(given)] == given else 0


def _total(buffers: Iterable[Buffer]) -> int:
    return sum(buffer.bytes for buffer in buffers)


def _most(born: dict[Buffer, int], last: dict[Buffer, int], inner: dict) -> list[Buffer]:
    """What lives when most does."""
    ends: dict[int, list[Buffer]] = {}
    begins: dict[int, list[Buffer]] = {}
    for buffer, at in born.items():
        begins.setdefault(at, []).append(buffer)
        ends.setdefault(last[buffer], []).append(buffer)
    live: dict[Buffer, None] = {}
    now, most, best = 0, -1, []
    for at in range(max(inner, default=0) + 1):
        for buffer in begins.get(at, ()):
            live[buffer] = None
            now += buffer.bytes
        within = inner.get(at, [])
        if (size := now + _total(within)) > most:
            most, best = size, [*live, *within]
        for buffer in ends.get(at, ()):
            del live[buffer]
            now -= buffer.bytes
    return best

"""Reads the text of a compiled program: its computations, their instructions in schedule order.

The text is what `jax.stages.Compiled.as_text` returns. Nothing is interpreted here but its form.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

# All that nests, separates or hides what nests: strings, brackets, commas.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[()\[\]{},]', re.DOTALL)
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_HEAD = re.compile(r'(ENTRY )?%?([\w.\-]+) \(.*\{$')
_FIRST = re.compile(r'\s+(ROOT )?%([\w.\-]+) = ')
_ARRAY = re.compile(r'([a-z]\w*)\[([^\]]*)\](?:\{([^{}]*)\})?')
_SPACE = re.compile(r'S\((\d+)\)')
_OPERAND = re.compile(r'%([\w.\-]+)$')
_NAMES = re.compile(r'%([\w.\-]+)')
_OPCODE = re.compile(r'\s*([\w\-]+)\(')
_PARTITIONS = re.compile(r'\bnum_partitions=(\d+)')
_FIGURE = re.compile(r'(\d+)')


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a type.

    Attributes:
      dtype: such as 'bf16'.
      dims: its shape.
      space: memory that it lies in: 0 is HBM, 1 VMEM, 5 the host's; others hold scalars and flags.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes without padding; tokens and the like have none."""
        bits = _FIGURE.search(self.dtype)
        return self.size * (8 if self.dtype == 'pred' else int(bits[1]) if bits else 0) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name: unique in the program.
      opcode: such as 'fusion' or 'all-gather'.
      arrays: of the result, tuples flattened.
      operands: names, in order.
      literal: what stands between the parentheses, of a constant or a parameter.
      attributes: what follows, by name, unread.
      is_root: whether it is its computation's result.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: dict[str, str]
    is_root: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of the result."""
        return sum(array.bytes for array in self.arrays)

    @property
    def calls(self) -> tuple[str, ...]:
        """Computations that run when it does, but for a loop's and what combines two scalars."""
        found = [self.attributes.get('calls', ''), self.attributes.get('branch_computations', '')]
        found.append(self.attributes.get('called_computations', ''))
        if self.opcode == 'call':
            found.append(self.attributes.get('to_apply', ''))
        found += [self.attributes.get(f'{which}_computation', '') for which in ('true', 'false')]
        return tuple(name for text in found for name in _NAMES.findall(text))

    @property
    def cycles(self) -> int | None:
        """What the compiler estimates that it takes; None where it says nothing."""
        found = re.search(
            r'"estimated_cycles":"(-?\d+)"', self.attributes.get('backend_config', '')
        )
        return int(found[1]) if found and int(found[1]) >= 0 else None

    @property
    def op_name(self) -> str:
        """What of the traced program it came from."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes.get('metadata', ''))
        return found[1] if found else ''

    @property
    def target(self) -> str:
        """Of a custom call, what it calls."""
        return self.attributes.get('custom_call_target', '').strip('"')

    @property
    def channel(self) -> str:
        """Number of the exchange between devices that it is a part of; '' if it is none."""
        return self.attributes.get('channel_id', '')


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order that they run in."""

    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        """Its result."""
        every = list(self.instructions.values())
        return next((found for found in every if found.is_root), every[-1])

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """By number."""
        found = (i for i in self.instructions.values() if i.opcode == 'parameter')
        return {int(i.literal): i for i in found}

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """Returns the instructions that one reads."""
        every = self.instructions
        return [every[name] for name in instruction.operands if name in every]


@dataclasses.dataclass(frozen=True)
class Module:
    """A program.

    Attributes:
      computations: by name.
      entry: which of them is run.
      partitions: devices that it is compiled for; of several slices, those of one. 0 is not told.
    """

    computations: dict[str, Computation]
    entry: Computation
    partitions: int = 0

    def called(self, instruction: Instruction) -> list[Computation]:
        """Returns the computations that run when an instruction does, but for a loop's."""
        return [self.computations[n] for n in instruction.calls if n in self.computations]

    def inside(self, instruction: Instruction) -> Iterator[tuple[Computation, Instruction]]:
        """Yields the instructions of what one calls, and of what those call."""
        for computation in self.called(instruction):
            for inner in computation.instructions.values():
                yield computation, inner
                yield from self.inside(inner)


def parse(text: str) -> Module:
    """Returns the program that a text holds.

    Raises:
      ValueError: the text has no ENTRY computation, or has lines that cannot be read, which are
        named: none is left out silently.
    """
    computations: dict[str, Computation] = {}
    entry = name = ''
    instructions: dict[str, Instruction] = {}
    statement: list[str] = []
    for line in text.splitlines():
        if not name:
            if head := _HEAD.match(line):
                name, instructions = head[2], {}
                entry = name if head[1] else entry
            continue
        # A kernel's metadata goes on over several lines, some of which are braces alone.
        if not statement and line.startswith('}'):
            computations[name], name = Computation(name, instructions), ''
            continue
        statement.append(line)
        joined = '\n'.join(statement)
        if joined.strip() and _is_whole(joined):
            found = _instruction(joined)
            instructions[found.name] = found
        elif joined.strip():
            continue
        statement = []
    if name or not entry:
        raise ValueError(
            f'the compiled text ends inside of computation {name}, near {" ".join(statement)[:200]}'
            if name
            else 'the compiled text has no ENTRY computation'
        )
    partitions = _PARTITIONS.search(text, 0, max(text.find('\n'), 0))
    return Module(computations, computations[entry], int(partitions[1]) if partitions else 0)


def _is_whole(text: str) -> bool:
    """Whether all brackets and strings of a statement are closed."""
    bare = _STRING.sub('', text)
    if '"' in bare:
        return False
    return all(bare.count(a) == bare.count(b) for a, b in ('()', '[]', '{}'))


def _instruction(text: str) -> Instruction:
    first = _FIRST.match(text)
    if not first:
        raise ValueError(f'no instruction of a compiled program: {text.strip()[:200]}')
    at = _type_end(text, first.end())
    opcode = _OPCODE.match(text, at)
    if not opcode:
        raise ValueError(f'no operation in an instruction of a program: {text.strip()[:200]}')
    inside, end = _list(text, opcode.end())
    rest, _ = _list(text, end)
    # An attribute without a name, if there is one, is named by itself.
    pairs = (attribute.strip().partition('=') for attribute in rest if attribute.strip())
    named = [_OPERAND.search(part.strip()) for part in inside]
    return Instruction(
        name=first[2],
        opcode=opcode[1],
        arrays=_arrays(text[first.end() : at]),
        operands=tuple(found[1] for found in named if found),
        literal=','.join(inside).strip(),
        attributes={key: value for key, _, value in pairs},
        is_root=bool(first[1]),
    )


def _type_end(text: str, start: int) -> int:
    """Where a type ends: a tuple at its parenthesis, an array at the space behind its layout."""
    if text[start] == '(':
        return _list(text, start + 1)[1]
    space = text.find(' ', start)
    return len(text) if space < 0 else space


def _list(text: str, start: int) -> tuple[list[str], int]:
    """Splits at the commas from `start` to the closing bracket; returns where it has ended."""
    parts: list[str] = []
    depth, begun = 0, start
    for token in _TOKEN.finditer(text, start):
        letter = token[0]
        if letter in '([{':
            depth += 1
        elif letter in ')]}':
            depth -= 1
            if depth < 0:
                return [*parts, text[begun : token.start()]], token.end()
        elif letter == ',' and depth == 0:
            parts.append(text[begun : token.start()])
            begun = token.end()
    return [*parts, text[begun:]], len(text)


@functools.cache
def _arrays(text: str) -> tuple[Array, ...]:
    found = []
    for dtype, dims, layout in _ARRAY.findall(text):
        space = _SPACE.search(layout)
        # A dimension of unknown size counts with its bound, '<=8'.
        shape = tuple(int(dim.strip('<=')) for dim in dims.split(',') if dim.strip())
        found.append(Array(dtype, shape, int(space[1]) if space else 0))
    return tuple(found)

"""Reads a compiled module: its instructions, the bytes each moves, and the constants it passes."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

_LINE = re.compile(r'^\s+(?:ROOT )?%(?P<name>[^ ]+) = (?P<rest>.*)$')
_ARRAY = re.compile(r'\b(pred|[a-z]\w*?\d+\w*)\[([\d,]*)\](\{[^{}]*\})?')
_NAME = re.compile(r'%([\w.\-]+)')
_VMEM = re.compile(
    r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"'
)
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_BODY = re.compile(r'\bbody=%([\w.\-]+)')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BITS = re.compile(r'(\d+)')
# Instructions that name values, or only wait.
FREE = frozenset(
    ['parameter', 'constant', 'bitcast', 'get-tuple-element', 'tuple', 'after-all', 'partition-id']
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name: its name, which names its dumps, too.
      opcode: such as 'fusion' or 'custom-call'.
      operands: names of its operands.
      kernel: whether it is a Pallas kernel.
      vmem_bytes: VMEM that it uses.
      hbm_bytes: bytes of its operands and results that lie in HBM.
      constant: a constant's values (integers only), or None.
      size: elements of the (first) result.
      result: its type, as in 's8[1,2,2]'.
      cycles: what the compiler estimates that it takes, None where it says nothing.
      body: of a loop, the computation that is repeated.
      trips: how often, 1 where the module does not say.
    """

    name: str
    opcode: str
    operands: tuple[str, ...]
    kernel: bool
    vmem_bytes: int
    hbm_bytes: int
    constant: tuple[int, ...] | None
    size: int
    result: str = ''
    cycles: int | None = None
    body: str = ''
    trips: int = 1


def instructions(text: str, computation: str = '') -> dict[str, Instruction]:
    """A computation's instructions by name, in order; '' is the entry.

    Raises:
      ValueError: if the text has no such computation.
    """
    start = text.find(f'\n%{computation} (' if computation else '\nENTRY ')
    if start < 0:
        raise ValueError(f'the compiled module has no {computation or "ENTRY"} computation')
    # An instruction may go on over several lines (the metadata of a kernel does).
    entry: list[str] = []
    for line in text[start:].splitlines()[2:]:
        if line == '}':
            break
        if _LINE.match(line):
            entry.append(line)
        elif entry:
            entry[-1] += line
    found: dict[str, Instruction] = {}
    bytes_of: dict[str, int] = {}
    for line in entry:
        instruction = _instruction(_LINE.match(line), bytes_of)
        found[instruction.name] = instruction
    return found


def _instruction(match: re.Match, bytes_of: dict[str, int]) -> Instruction:
    name, rest = match['name'], match['rest']
    result, rest = _type_and_rest(rest)
    opcode, _, rest = rest.partition('(')
    arguments, _, attributes = _balanced(rest)
    operands = tuple(_NAME.findall(re.sub(r'/\*.*?\*/', '', arguments)))
    bytes_of[name] = _hbm(result)
    kernel = 'custom_call_target="tpu_custom_call"' in attributes
    vmem = _VMEM.search(attributes)
    moved = 0
    if opcode.endswith('-start'):  # its result names source, destination and a flag
        moved = min((_size(array) for array in _arrays(result) if ':S(2)' not in array), default=0)
    elif not waits(opcode):
        moved = bytes_of[name] + sum(bytes_of.get(operand, 0) for operand in operands)
    constant = _words(result, arguments) if opcode == 'constant' else None
    dims = _ARRAY.search(result)
    size = math.prod(int(d) for d in dims[2].split(',') if d) if dims else 0
    cycles, body, trips = (pattern.search(attributes) for pattern in (_CYCLES, _BODY, _TRIPS))
    return Instruction(
        name, opcode, operands, kernel, int(vmem[1]) if vmem else 0, moved, constant, size,
        dims[0] if dims else '', int(cycles[1]) if cycles else None,
        body[1] if body and opcode == 'while' else '', int(trips[1]) if trips else 1,
    )  # fmt: skip


def dumped_as(
    instruction: Instruction, found: Mapping[str, Instruction], dumped: Iterable[str]
) -> str:
    """The name that an instruction's dumps have: of equal kernels the compiler dumps one.

    Args:
      instruction: of `found`.
      found: what `instructions` gave.
      dumped: names of the instructions that have dumps.
    """
    if not instruction.kernel or instruction.name in dumped:
        return instruction.name

    def likeness(one: Instruction) -> tuple[object, ...]:
        return one.kernel, one.name.rpartition('.')[0], one.vmem_bytes, one.hbm_bytes, one.size

    twins = (n for n in dumped if n in found and likeness(found[n]) == likeness(instruction))
    return next(twins, instruction.name)


def values(found: dict[str, Instruction], kernel: Instruction) -> dict[int, tuple[int, ...]]:
    """Integers passed to `kernel` that the module states, by operand."""
    result = {}
    for index, name in enumerate(kernel.operands):
        constant = _constant(found, name)
        if constant:
            result[index] = constant
    return result


def _constant(found, name: str) -> tuple[int, ...] | None:
    instruction = found.get(name)
    if instruction is None:
        return None
    if instruction.opcode == 'constant':
        return instruction.constant
    if instruction.opcode in ('copy', 'copy-start', 'copy-done', 'bitcast', 'reshape'):
        return _constant(found, instruction.operands[0])
    if instruction.opcode == 'broadcast':
        values = _constant(found, instruction.operands[0])
        if not values or len(values) > 1:
            return None
        # A narrow one fills its words as a constant that is written out does.
        return _words(instruction.result, f'{values[0]} ' * instruction.size)
    return None


def _type_and_rest(rest: str) -> tuple[str, str]:
    """Splits '(f32[8]{0}, s32[]) fusion(%x)' after the type."""
    if rest.startswith('('):
        inside, _, rest = _balanced(rest[1:])
        return inside, rest.lstrip()
    result, _, rest = rest.partition(' ')
    return result, rest


def _balanced(text: str) -> tuple[str, str, str]:
    """Splits at the parenthesis that closes one opened just before `text`."""
    depth = 1
    for at, letter in enumerate(text):
        depth += (letter == '(') - (letter == ')')
        if depth == 0:
            return text[:at], ')', text[at + 1 :]
    return text, '', ''


def _arrays(types: str) -> list[str]:
    return [match[0] for match in _ARRAY.finditer(types)]


def waits(opcode: str) -> bool:
    """Whether an instruction only names values or waits for one that runs beside others."""
    return opcode in FREE or opcode.endswith('-done')


def _hbm(types: str) -> int:
    """Bytes of the arrays of a type that lie in HBM (S(1) is VMEM, S(2) a flag), unpadded."""
    return sum(_size(array) for array in _arrays(types) if 'S(' not in array)


def _size(array: str) -> int:
    dtype, dims, _ = _ARRAY.match(array).groups()
    bits = 8 if dtype == 'pred' else int(_BITS.search(dtype)[1])
    return math.prod(int(dim) for dim in dims.split(',') if dim) * bits // 8


def _words(result: str, text: str) -> tuple[int, ...] | None:
    """An integer constant as the 32-bit words that it fills in scalar memory."""
    dtype, dims, _ = _ARRAY.match(result).groups()
    if dtype not in ('s32', 'u32', 's16', 's8', 'pred') or '...' in text:
        return None
    text = text.replace('true', '1').replace('false', '0')
    numbers = [int(n) for n in re.findall(r'-?\d+', text)]
    if dtype in ('s32', 'u32'):
        return tuple(numbers)
    # Narrow integers lie in tiles of 128 columns, and the rows of a tile share its words: row r
    # has the bytes r % packed of them.
    packed = 4 if dtype != 's16' else 2
    shape = [int(dim) for dim in dims.split(',') if dim] or [1]
    columns = shape[-1] if len(shape) > 1 else 128
    rows = shape[-2] if len(shape) > 1 else len(numbers)
    tiles = -(-columns // 128)
    words: dict[int, int] = {}
    for at, number in enumerate(numbers):
        slab, row = divmod(at // columns, rows)
        tile = (slab * -(-rows // packed) + row // packed) * tiles + at % columns // 128
        word = tile * 128 + at % columns % 128
        mask = (1 << (32 // packed)) - 1
        words[word] = words.get(word, 0) | (number & mask) << (row % packed) * (32 // packed)
    return tuple(words.get(word, 0) for word in range(max(words, default=-1) + 1))

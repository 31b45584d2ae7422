"""How often the loops of a compiled program run: their scalars are followed until they stop.

A TPU's compiler does not write trip counts down, and unrolls loops so that one trip is several.
"""

import re
from collections.abc import Callable

from bigjax.plan.program.hlo import Computation, Instruction, Module

MOST = 1_000_000  # trips that are followed
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_INTEGERS = re.compile(r'[su](8|16|32|64)|pred')
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    'LT': lambda a, b: a < b,
    'LE': lambda a, b: a <= b,
    'GT': lambda a, b: a > b,
    'GE': lambda a, b: a >= b,
    'EQ': lambda a, b: a == b,
    'NE': lambda a, b: a != b,
}
_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    'add': lambda a, b: a + b,
    'subtract': lambda a, b: a - b,
    'multiply': lambda a, b: a * b,
    'minimum': min,
    'maximum': max,
    'and': lambda a, b: a & b,
    'or': lambda a, b: a | b,
}
_SAME = ('copy', 'bitcast', 'convert', 'reshape', 'copy-done', 'copy-start', 'broadcast')

# What an element of the tuple that a loop carries is worth, None where that is not known.
Carried = Callable[[int], int | None]


def _nothing(_: int) -> int | None:
    return None


def trips(
    module: Module, computation: Computation, loop: Instruction, carried: Carried = _nothing
) -> int | None:
    """Returns how often the body of a `while` runs, or None if that cannot be told.

    Args:
      module: the program.
      computation: where the loop stands.
      loop: the `while`.
      carried: of the loop around it, if there is one.
    """
    condition, body = _parts(module, loop)
    first = initial(module, computation, loop, carried)
    # Elements that change are followed, from those that the condition reads on.
    known: dict[int, int | None] = {}

    def value(index: int) -> int | None:
        if index not in known:
            known[index] = first(index)
        return known[index]

    for count in range(MOST):
        goes_on = _value(module, condition, condition.root, value)
        if goes_on is None:
            break
        if not goes_on:
            return count
        before = dict(known)
        following: dict[int, int | None] = {}
        seen = -1
        while len(known) > seen:  # a carried element may be computed from another one
            seen = len(known)
            for index in list(known):
                following[index] = _element(module, body, body.root, index, value)
        if following == before:
            break
        known.update(following)
    stated = _TRIPS.search(loop.attributes.get('backend_config', ''))
    return int(stated[1]) if stated else None


def initial(
    module: Module, computation: Computation, loop: Instruction, carried: Carried
) -> Carried:
    """Returns what the elements of a loop's tuple are worth at first."""
    given = computation.operands(loop)[0]
    return lambda index: _element(module, computation, given, index, carried)


def invariant(module: Module, loop: Instruction, first: Carried) -> Carried:
    """Returns what the elements of a loop's tuple are worth that never change."""
    body = _parts(module, loop)[1]

    def value(index: int) -> int | None:
        """An element is the same if the body hands it on."""
        made = body.operands(body.root)
        if body.root.opcode != 'tuple' or index >= len(made):
            return None
        source = made[index]
        while source.opcode in _SAME and body.operands(source):
            source = body.operands(source)[0]
        handed = source.opcode == 'get-tuple-element' and _index(source) == index
        return first(index) if handed else None

    return value


def _parts(module: Module, loop: Instruction) -> tuple[Computation, Computation]:
    named = (loop.attributes[key].lstrip('%') for key in ('condition', 'body'))
    condition, body = (module.computations[name] for name in named)
    return condition, body


def _index(instruction: Instruction) -> int:
    return int(instruction.attributes['index'])


def _element(
    module: Module, where: Computation, tuple_: Instruction, index: int, carried: Carried
) -> int | None:
    """An element of what an instruction makes."""
    if tuple_.opcode == 'parameter':
        return carried(index)
    operands = where.operands(tuple_)
    if tuple_.opcode == 'tuple':
        return _value(module, where, operands[index], carried) if index < len(operands) else None
    if tuple_.opcode in ('copy', 'optimization-barrier'):
        return _element(module, where, operands[0], index, carried)
    if tuple_.opcode == 'while':
        return invariant(module, tuple_, initial(module, where, tuple_, carried))(index)
    if tuple_.opcode in ('fusion', 'call'):
        called = module.called(tuple_)[0]
        arguments = _arguments(module, where, tuple_, carried)
        return _element(module, called, called.root, index, arguments)
    return None


def _arguments(
    module: Module, where: Computation, caller: Instruction, carried: Carried
) -> Carried:
    """What the parameters of a called computation are worth."""
    operands = where.operands(caller)

    def value(number: int) -> int | None:
        return _value(module, where, operands[number], carried) if number < len(operands) else None

    return value


def _value(
    module: Module, where: Computation, instruction: Instruction, carried: Carried
) -> int | None:
    """An integer scalar, None for all else and what depends on data."""
    array = instruction.arrays[0] if instruction.arrays else None
    if array is None or array.size != 1 or not _INTEGERS.fullmatch(array.dtype):
        return None
    operands = where.operands(instruction)
    opcode = instruction.opcode
    if opcode == 'constant':
        return _constant(instruction.literal)
    if opcode == 'parameter':  # of a fusion, whose parameters are scalars
        return carried(int(instruction.literal))
    if opcode == 'get-tuple-element':
        return _element(module, where, operands[0], _index(instruction), carried)
    if opcode in _SAME:
        return _value(module, where, operands[0], carried)
    if opcode in ('fusion', 'call'):
        called = module.called(instruction)[0]
        arguments = _arguments(module, where, instruction, carried)
        return _value(module, called, called.root, arguments)
    values = [_value(module, where, operand, carried) for operand in operands]
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not values:
        return None
    if opcode == 'compare':
        return int(_COMPARE[instruction.attributes['direction']](known[0], known[1]))
    if opcode in _ARITHMETIC:
        return _ARITHMETIC[opcode](known[0], known[1])
    if opcode == 'select':
        return known[1] if known[0] else known[2]
    if opcode == 'not' and array.dtype == 'pred':
        return int(not known[0])
    return None


def _constant(literal: str) -> int | None:
    text = literal.strip('{} ')
    words = {'true': 1, 'false': 0}
    return words.get(text, int(text) if re.fullmatch(r'-?\d+', text) else None)

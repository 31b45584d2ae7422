"""Bytes that the instructions of a compiled program read from and write to HBM."""

from bigjax.plan.program.hlo import Array, Computation, Instruction, Module

# What only names values, or waits.
FREE = frozenset(
    [
        'parameter', 'constant', 'bitcast', 'get-tuple-element', 'tuple', 'after-all', 'while',
        'partition-id', 'replica-id', 'conditional', 'call', 'optimization-barrier',
        'add-dependency',
    ]
)  # fmt: skip
_UPDATE = 'dynamic-update-slice-start'
_HOST = 5  # what the compiler calls the host's memory
_CUTS = ('dynamic-slice', 'slice', 'gather')


def traffic(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Returns the bytes that one instruction moves, itself or as a fusion, without padding.

    Of an array that only a slice is cut from, or written into, the slice counts.
    """
    if instruction.opcode in FREE or instruction.opcode.endswith(('-done', '-update')):
        return 0
    if instruction.opcode.endswith('-start'):
        return moved_beside(computation, instruction)
    operands = computation.operands(instruction)
    called = module.called(instruction)
    if instruction.opcode != 'fusion' or not called:
        return _plain(computation, instruction)
    body = called[0]
    read = sum(
        _read(module, body, body.parameters[number])
        for number, operand in enumerate(operands)
        if number in body.parameters and _bytes(operand.arrays)
    )
    return read + _written(body, instruction)


def moved_beside(computation: Computation, instruction: Instruction) -> int:
    """Returns the bytes of HBM that are read and written by what is started here."""
    operands = computation.operands(instruction)
    sources = [a for o in operands if not o.opcode.endswith('-start') for a in o.arrays]
    arrays = instruction.arrays
    if instruction.opcode == 'copy-start':  # (target, source, flag)
        return _bytes(tuple(sources)) + _bytes(arrays[:1])
    # ((sources), target, flags)
    target = arrays[len(sources) : len(sources) + 1]
    if instruction.opcode == _UPDATE:
        return _bytes(tuple(sources[1:2])) + (target[0].space == 0) * sources[1].bytes
    if 'slice' in instruction.opcode:
        from_hbm = _bytes(tuple(sources)) > 0
        return from_hbm * sum(array.bytes for array in target) + _bytes(target)
    return _bytes(tuple(sources)) + _bytes(target)


def host_bytes(computation: Computation, instruction: Instruction) -> int:
    """Returns the bytes that a copy moves to or from the host's memory."""
    if not instruction.opcode.endswith('-start') and instruction.opcode != 'copy':
        return 0
    sources = [array for found in computation.operands(instruction) for array in found.arrays]
    if not any(array.space == _HOST for array in (*sources, *instruction.arrays)):
        return 0
    # Of what a slice is cut from, or written into, only that travels.
    if instruction.opcode == _UPDATE:
        return sources[1].bytes
    if 'slice' in instruction.opcode:
        return instruction.arrays[len(sources)].bytes
    return sum(array.bytes for array in sources)


def _bytes(arrays: tuple[Array, ...]) -> int:
    return sum(array.bytes for array in arrays if array.space == 0)


def _plain(computation: Computation, instruction: Instruction) -> int:
    """Of an instruction that is no fusion."""
    operands = computation.operands(instruction)
    if instruction.opcode in _CUTS:
        return _bytes(instruction.arrays) + _bytes(operands[0].arrays[:1] and instruction.arrays)
    if instruction.opcode == 'dynamic-update-slice':
        return 2 * _bytes(operands[1].arrays)
    return _bytes(instruction.arrays) + sum(_bytes(operand.arrays) for operand in operands)


def _read(module: Module, body: Computation, source: Instruction) -> int:
    """What a fusion reads of a parameter: all of it, or the slices that are cut from it."""
    whole, found = source.bytes, 0
    for user in body.instructions.values():
        if source.name not in user.operands:
            continue
        first = user.operands[0] == source.name
        if user.opcode in _CUTS and first:
            found += user.bytes
        elif user.opcode == 'dynamic-update-slice' and first:
            continue  # it is written in place
        elif user.opcode == 'bitcast':
            found += _read(module, body, user)
        elif user.opcode == 'fusion' and module.called(user):
            inner = module.called(user)[0]
            numbers = [n for n, name in enumerate(user.operands) if name == source.name]
            found += sum(_read(module, inner, inner.parameters[n]) for n in numbers)
        else:
            return whole
    return min(found, whole)


def _written(body: Computation, fusion: Instruction) -> int:
    """What a fusion writes: its results, or the slices that it puts into operands in place."""
    made = body.operands(body.root) if body.root.opcode == 'tuple' else [body.root]
    if len(made) != len(fusion.arrays):
        return _bytes(fusion.arrays)
    total = 0
    for result, array in zip(made, fusion.arrays, strict=True):
        while result.opcode == 'bitcast' and body.operands(result):
            result = body.operands(result)[0]
        if array.space == 0:
            in_place = result.opcode == 'dynamic-update-slice'
            total += body.operands(result)[1].bytes if in_place else array.bytes
    return total

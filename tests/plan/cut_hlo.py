"""Cuts a compiled program's text to what a plan reads, for tests.

  python cut_hlo.py IN OUT NOTE [INSTRUCTION]

Gone are source locations, bodies of kernels, layouts but for the memory they name, settings but for
estimated cycles, flags of copies, computations without products, exchanges or slices, and, where an
instruction of the entry is named, all that it does not need. Names are short.
"""

import dataclasses
import re
import sys
from pathlib import Path

from bigjax.plan.program import hlo

KEPT = (
    'condition', 'body', 'calls', 'called_computations', 'branch_computations', 'channel_id',
    'replica_groups', 'source_target_pairs', 'dim_labels', 'window', 'custom_call_target', 'index',
    'direction', 'operand_precision', 'lhs_contracting_dims', 'rhs_contracting_dims',
)  # fmt: skip
WORTH = re.compile(r'convolution|dot|all-|reduce-scatter|collective|dynamic-|compare|custom-call')


def type_text(arrays: tuple[hlo.Array, ...]) -> str:
    parts = [
        f'{a.dtype}[{",".join(map(str, a.dims))}]' + (f'{{:S({a.space})}}' if a.space else '')
        for a in arrays
        if a.space not in (2, 4)
    ]
    return parts[0] if len(parts) == 1 else f'({", ".join(parts)})'


def instruction_text(found: hlo.Instruction) -> str:
    inside = ', '.join(f'%{name}' for name in found.operands) or found.literal
    rest = [f'{key}={found.attributes[key]}' for key in KEPT if key in found.attributes]
    if found.opcode in ('send', 'recv'):
        rest.append(f'frontend_attributes={found.attributes["frontend_attributes"]}')
    if found.target and found.op_name:
        rest.append(f'metadata={{op_name="{found.op_name}"}}')
    if found.cycles is not None:
        rest.append(f'backend_config={{"estimated_cycles":"{found.cycles}"}}')
    line = f'%{found.name} = {type_text(found.arrays)} {found.opcode}({inside})'
    return ('  ROOT ' if found.is_root else '  ') + ', '.join([line, *rest])


def reached(module: hlo.Module, computation: hlo.Computation) -> list[hlo.Computation]:
    """The computation and those that it needs."""
    found = [computation]
    for instruction in computation.instructions.values():
        names = [instruction.attributes.get(key, '').lstrip('%') for key in ('condition', 'body')]
        called = module.called(instruction) + [module.computations[n] for n in names if n]
        for inner in called:
            below = reached(module, inner)
            if any(WORTH.match(i.opcode) for c in below for i in c.instructions.values()):
                found += below
    return found


def needed(computation: hlo.Computation, name: str) -> hlo.Computation:
    """The part of a computation that one of its instructions needs."""
    wanted, todo = set(), [name]
    while todo:
        wanted.add(found := todo.pop())
        todo += computation.instructions[found].operands
    kept = {n: found for n, found in computation.instructions.items() if n in wanted}
    return dataclasses.replace(computation, instructions=kept)


def shorter(text: str) -> str:
    """The text with short names; of a kernel and of what is computed again, the start stays."""
    names: dict[str, str] = {}

    def short(match: re.Match) -> str:
        stem = re.sub(r'(?<=\w)[a-z]*[-_]?', '', match[1].split('.')[0])
        again = '.remat' if '.remat' in match[1] else ''
        return '%' + names.setdefault(match[1], f'{stem}{again}.{len(names)}')

    return re.sub(r'%([\w.\-]+)', short, text)


def main(source: str, target: str, note: str, root: str = '') -> None:
    module = hlo.parse(Path(source).read_text())
    if root:
        entry = needed(module.entry, root)
        module = dataclasses.replace(module, entry=entry)
    lines = [f'HloModule cut, is_scheduled=true, num_partitions={module.partitions}', f'// {note}']
    kept = {computation.name: computation for computation in reached(module, module.entry)}
    for computation in kept.values():
        start = 'ENTRY ' if computation is module.entry else ''
        lines += ['', f'{start}%{computation.name} () -> () {{']
        lines += map(instruction_text, computation.instructions.values())
        lines.append('}')
    Path(target).write_text(shorter('\n'.join(lines)) + '\n')


if __name__ == '__main__':
    main(*sys.argv[1:])

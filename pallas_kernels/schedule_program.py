"""Reads the bundles that the TPU compiler scheduled into a program whose scalar half can be run.

The vector half of a bundle only costs its cycle; the scalar half decides which bundles run and
which copies start, so it is translated into Python, one function for each basic block.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from pallas_kernels import schedule_arithmetic
from pallas_kernels.schedule_translate import EFFECT, RESULT, Operand, Translator

# The columns of the utilisation dump, in its order.
UNITS = ('MATMUL', 'MATPUSH', 'XLU', 'VALU', 'VPOP', 'EUP')
UNITS += ('VLOAD', 'VLOAD:FILL', 'VSTORE', 'VSTORE:SPILL', 'SALU')

LAST = -1
MOST_SLOTS = 10  # more delay slots than a branch has

_BUNDLE = re.compile(r'^ *(0x[0-9a-f]+|0) +([A-Z ]*?) *: *((?:> *)*)\{(.*)\}(.*)$')
_COMMENT = re.compile(r'/\*(.*?)\*/', re.DOTALL)
_REGION = re.compile(r'Start(?:/End empty)? region (\d+)')
_TARGET = re.compile(r'target = \$region(\d+)')


@dataclasses.dataclass(frozen=True)
class Block:
    """Bundles that run one after another.

    Attributes:
      start, stop: its bundles' range.
      run: runs its scalar instructions against a `Machine` (see schedule_run.py).
      branch: register index of the branch's predicate; None where nothing branches, -1 where the
        branch is always taken.
      negated: the branch is taken if the predicate is false.
      target: bundle that the branch goes to.
      header: whether a loop starts here.
    """

    start: int
    stop: int
    run: Callable[[Any], None]
    branch: int | None
    negated: bool
    target: int
    header: bool


@dataclasses.dataclass(frozen=True)
class Program:
    """One kernel's bundles.

    Attributes:
      blocks: basic blocks by their first bundle.
      registers: number of scalar registers (in the single-assignment form).
      size: number of bundles.
      operands: the kernel's operands.
      unknown: scalar instructions that were not understood; their results count as unknown.
      utilization: for every bundle, the slots of each unit in use; the last row is the capacity.
    """

    blocks: dict[int, Block]
    registers: int
    size: int
    operands: tuple[Operand, ...]
    unknown: tuple[str, ...]
    utilization: tuple[tuple[int, ...], ...]


def parse(bundles: str, utilization: str) -> Program:
    """The program of a `*final_bundles.txt` and its `*final_hlo-static-per-bundle-utilization.txt`.

    Raises:
      ValueError: if the text is not of the form that this reader was written for.
    """
    rows, regions, headers, slots = _rows(bundles)
    translator = Translator(rows)
    code: list[list[str]] = []
    branches: dict[int, tuple[int, bool, int]] = {}
    for at, ops in enumerate(rows):
        for op in ops:
            if _is_branch(op):
                target = _TARGET.search(op)
                if not target:
                    raise ValueError(f'a branch without a target: {op}')
                goal = regions.get(int(target[1]), regions[LAST])
                branches[at] = *translator.predicate(op), goal
        code.append(translator.bundle([op for op in ops if not _is_branch(op)], at))
    blocks = _blocks(code, branches, headers, regions, slots)
    table = _utilization(utilization)
    if len(table) - 1 < len(rows):
        raise ValueError(f'utilisation of {len(table) - 1} bundles, but {len(rows)} bundles')
    return Program(
        blocks,
        len(translator.names),
        len(rows),
        tuple(translator.operands),
        tuple(sorted(translator.unknown)),
        tuple(table),
    )


def _rows(text: str):
    """Every bundle's scalar instructions, and the regions' starts, loop headers, branch delay."""
    text = _COMMENT.sub(
        lambda m: f'/*{m[1]}*/' if 'region ' in m[1] and '\n' not in m[1] else '', text
    )
    rows: list[list[str]] = []
    regions: dict[int, int] = {}
    headers: set[int] = set()
    starts, ends = set(), set()
    pending, last = '', 0
    for line in text.splitlines():
        pending = f'{pending} {line}' if pending else line
        if pending.count('{') > pending.count('}'):
            continue
        match = _BUNDLE.match(pending)
        pending = ''
        if not match:
            continue
        at = int(match[1], 16)
        if at != len(rows):
            raise ValueError(f'bundle {at} follows bundle {len(rows) - 1}')
        if 'LB' in match[2] or 'LH' in match[2]:
            headers.add(at)
        body = match[4]
        for region in _REGION.findall(line):
            # A region may open on the bundle before the block it names; the first one counts.
            regions.setdefault(int(region), at)
        if 'PF' in match[2]:
            last = at
        if match[2] or 'Start region' in line or 'Start/End' in line:
            starts.add(at)
        if 'End region' in line:
            ends.add(at)
        ops = [' '.join(_COMMENT.sub('', op).split()) for op in body.split(';;')]
        rows.append([op for op in ops if RESULT.match(op) or EFFECT.match(op)])
    if not rows:
        raise ValueError('no bundles in the dump')
    slots = {
        at: _last_slot(at, starts, ends, len(rows))
        for at, ops in enumerate(rows)
        if any(map(_is_branch, ops))
    }
    regions[LAST] = last  # the end of the program has no region of its own
    return rows, regions, headers, slots


def _last_slot(at: int, starts, ends, size: int) -> int:
    """The last bundle that still runs when the branch at `at` is taken (its delay slots do)."""
    for slot in range(at, min(at + MOST_SLOTS, size - 1)):
        if slot + 1 in starts or (slot in ends and slot + 1 not in ends):
            return slot
    return min(at + 4, size - 1)


def _is_branch(op: str) -> bool:
    return op.split(' = ', 1)[-1].startswith(('sbr.rel', 'sbr.abs'))


def _blocks(code, branches, headers, regions, slots) -> dict[int, Block]:
    """Cuts the bundles into basic blocks and compiles each block's scalar instructions."""
    size = len(code)
    cuts = {0, *headers, *(target for _, _, target in branches.values())}
    cuts |= {slots[at] + 1 for at in branches}
    cuts = sorted(cut for cut in cuts if cut < size)
    where = {slots[at]: at for at in branches}
    blocks = {}
    for start, stop in zip(cuts, [*cuts[1:], size], strict=True):
        lines = [f'  {line}' for ops in code[start:stop] for line in ops]
        branch, negated, target = None, False, stop
        if stop - 1 in where:
            branch, negated, target = branches[where[stop - 1]]
        blocks[start] = Block(
            start, stop, _compile(lines, start), branch, negated, target, start in headers
        )
    return blocks


def _compile(lines: list[str], start: int) -> Callable[[Any], None]:
    source = '\n'.join(['def block(m):', '  r = m.registers', *lines])
    scope = dict(schedule_arithmetic.FUNCTIONS)
    exec(compile(source, f'<bundles from {start:#x}>', 'exec'), scope)
    return scope['block']


def _utilization(text: str) -> list[tuple[int, ...]]:
    """Rows of used slots for each bundle; the last row is the capacity."""
    head, _, body = text.partition('== UTILIZATION:')
    numbers = [tuple(map(int, line.split())) for line in body.splitlines() if line.strip()]
    capacity = [tuple(map(int, line.split())) for line in head.splitlines()[2:] if line.strip()]
    if not numbers or not capacity or len(capacity[0]) != len(UNITS):
        raise ValueError('the utilisation dump has another form than expected')
    return numbers + capacity[:1]

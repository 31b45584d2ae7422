"""Translates the scalar instructions of a bundle into Python statements.

A statement works on `m`, a `Machine` (schedule_run.py), and `r`, its registers in the
single-assignment form that the compiler prints: '%s45365_s3' is value 45365 in register s3.
"""

import dataclasses
import re

RESULT = re.compile(r'^%([sp]\d+_[sp]\d+) = ([\w.]+) ?(.*)$')
EFFECT = re.compile(r'^(?:%?\d+ = )?(sst|sbr\.rel|sbr\.abs|dma\.[\w.]+|vsyncadd) ?(.*)$')
_NAME = re.compile(r'%([sp]\d+_[sp]\d+)')
_NOTE = re.compile(r' \[#\w+\]$')  # the allocation that a bare number lies in
_PREDICATE = re.compile(r'\((!?)%([\w]+)\)')
_SELECT_OLD = re.compile(r'\((!?)%(\w+), %(\w+)\)')
OPERAND_SHIFT = 40  # operands lie so far apart in the addresses of this model


@dataclasses.dataclass(frozen=True)
class Operand:
    """An operand of the kernel: where it lives, its element type and its shape."""

    index: int
    space: str
    dtype: str
    shape: tuple[int, ...]


class Translator:
    """Turns instructions into statements, numbering registers as they come up.

    Attributes:
      names: the number of every register met.
      unknown: opcodes that were not understood; their results count as unknown.
      operands: the kernel's operands.
    """

    def __init__(self, rows: list[list[str]]):
        self.names: dict[str, int] = {}
        self.unknown: set[str] = set()
        self.operands: list[Operand] = []
        # A phi takes the operand written last, so those writes are stamped.
        self._merged = {
            name for ops in rows for op in ops if ' = sphi ' in op for name in _NAME.findall(op)
        }

    def bundle(self, ops: list[str], at: int) -> list[str]:
        """The statements of a bundle; a bundle's phis come first."""
        first, rest = [], []
        for op in ops:
            if op.split(' = ', 1)[-1].startswith('inlined_call_operand'):
                first.append(self._operand(op))
                continue
            line = self.statement(op, at)
            name = op[1:].split(' ')[0]
            if line and name in self._merged:
                line += f'; m.stamp({self.register(name)})'
            if line:
                (first if ' = sphi ' in op else rest).append(line)
        return first + rest

    def predicate(self, op: str) -> tuple[int, bool]:
        """A branch's predicate register (-1: always taken) and whether it is negated."""
        predicate = _PREDICATE.search(op)
        return (self.register(predicate[2]), bool(predicate[1])) if predicate else (-1, False)

    def register(self, name: str) -> int:
        return self.names.setdefault(name, len(self.names))

    def _operand(self, op: str) -> str:
        space = re.search(r'inlined_call_operand\.(<no memory space>|\w+)', op)[1]
        shape = re.search(r'\[shape: (\w+)\[([\d,]*)\]', op)
        index = int(re.search(r'index: (\d+), kind', op)[1])
        dims = tuple(int(d) for d in shape[2].split(',') if d)
        self.operands.append(Operand(index, space, shape[1], dims))
        # An address stands for the operand; a scalar is passed by value.
        value = f'm.scalar({index})' if space.startswith('<') else (index + 1) << OPERAND_SHIFT
        return f'r[{self.register(op[1:].split(" ")[0])}] = {value}'

    def value(self, text: str) -> str:
        """A Python expression for an operand of an instruction."""
        text = _NOTE.sub('', text.strip())
        if text.startswith('['):
            text = text[1:-1]
        if ' + ' in text:
            return f'add({", ".join(self.value(part) for part in text.split(" + ", 1))})'
        if text.startswith('%'):
            return f'r[{self.register(text[1:])}]'
        if text.startswith('#allocation'):
            number, _, spill = text[len('#allocation') :].partition('_')
            return str((int(number) << 56) + (bool(spill) << 55))
        if text.startswith('$'):
            return str(int(text[1:], 0))
        value = int(text, 0)
        # 32-bit constants are printed unsigned.
        return str(value - (1 << 32) if value >= 1 << 31 else value)

    def statement(self, op: str, at: int) -> str:
        """The Python statement of one scalar instruction; '' for one without a visible effect."""
        effect = EFFECT.match(op)
        if effect:
            return self._effect(effect[1], effect[2], at)
        name, opcode, rest = RESULT.match(op).groups()
        dest = f'r[{self.register(name)}]'
        old = _SELECT_OLD.search(rest)
        if old:
            new = self.value(rest.split(',', 2)[2])
            keep = f'r[{self.register(old[3])}]'
            flag = f'r[{self.register(old[2])}]'
            order = (keep, new) if old[1] else (new, keep)
            return f'{dest} = select({flag}, {order[0]}, {order[1]})'
        rest = _PREDICATE.sub('', rest, count=1) if rest.startswith('(') else rest
        rest = re.sub(r' \(!?%\w+\)$', '', rest).strip().lstrip(',')
        if opcode == 'sphi':
            choices = ', '.join(str(self.register(p.strip()[1:])) for p in rest.split(','))
            return f'{dest} = m.latest({choices})'
        if opcode == 'sld':
            address = self.value(rest[len('[smem:') : -1])
            return f'{dest} = m.load({address})'
        if opcode.startswith('int_to_ptr'):
            rest = rest.split('] ')[-1]
            return f'{dest} = {self.value(rest)}'
        function = _FUNCTIONS.get(opcode)
        if function is None:
            self.unknown.add(opcode)
            return f'{dest} = None'
        args = ', '.join(self.value(part) for part in rest.split(','))
        return f'{dest} = {function}({args})'

    def _effect(self, opcode: str, rest: str, at: int) -> str:
        """The statement of a store, a copy or a wait."""
        guard = ''
        predicate = _PREDICATE.search(rest)
        if predicate:
            flag = f'r[{self.register(predicate[2])}]'
            guard = f'if {"not " if predicate[1] else ""}{flag}: '
            rest = _PREDICATE.sub('', rest, count=1)
        rest = re.sub(r'\[thread:\$\d+\]', '', rest)
        if opcode == 'sst':
            address, _, value = rest.partition(']]')
            address = self.value(address.strip()[len('[smem:') :] + ']')
            value = value.replace(',', ' ')
            return f'{guard}m.store({address}, {self.value(value)})'
        parts = [part.strip() for part in rest.split(',') if part.strip()]
        if opcode == 'dma.done.wait':
            flag, size = (self.value(part) for part in parts[:2])
            return f'{guard}m.wait({at}, {flag}, {size})'
        if opcode.startswith('dma.') and len(parts) >= 4:
            source, size, dest, flag = (self.value(part) for part in parts[:4])
            if opcode == 'dma.general':
                return f'{guard}m.copy({at}, "general", {size}, {flag}, {source}, {dest})'
            return f'{guard}m.copy({at}, "{opcode[4:]}", {size}, {flag}, {source}, {dest})'
        return ''


_FUNCTIONS = {
    'smov.u32': 'same',
    'sadd.s32': 'add',
    'ssub.s32': 'sub',
    'smul.u32': 'mul',
    'smulhi.u32': 'mulhi',
    'sand.u32': 'band',
    'sor.u32': 'bor',
    'sxor.u32': 'bxor',
    'sshll.u32': 'shl',
    'sshrl.u32': 'shr',
    'sshra.s32': 'sar',
    'smax.s32': 'larger',
    'smin.s32': 'smaller',
    'scalar_lea.vmem': 'add',
    'scalar_lea.smem': 'add',
    'scalar_lea.sflag': 'add',
    'scalar_lea.hbm': 'add',
    'scalar_select': 'select',
    'pnand': 'nand',
    'pand': 'conj',
    'por': 'disj',
    'pnor': 'nor',
    'pxor': 'differ',
    'pneg': 'neg',
    'pmov': 'same',
    'scmp.eq.s32.totalorder': 'eq',
    'scmp.ne.s32.totalorder': 'ne',
    'scmp.lt.s32.totalorder': 'lt',
    'scmp.le.s32.totalorder': 'le',
    'scmp.gt.s32.totalorder': 'gt',
    'scmp.ge.s32.totalorder': 'ge',
    'scmp.lt.u32.totalorder': 'ltu',
    'scmp.ge.u32.totalorder': 'geu',
}

"""Writes the README's table: predicted times here and of published kernels, on every chip.

  python -m pallas_kernels.schedule_table [--op=conv] [--chip=v6e] [--rows=causal] [--cached]
      [--write]

It compiles hundreds of kernels, which takes hours, but keeps what the compiler wrote, so that it
can be stopped and goes on where it was; --cached leaves out what is not there yet. --write replaces
the op's table between its marks in README.md; without it, the table is printed.
"""

import argparse
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from pallas_kernels import schedule, schedule_calibration, schedule_compile, schedule_table_conv
from pallas_kernels.chip import TPUS
from pallas_kernels.schedule_attention import RIVALS, Case
from pallas_kernels.schedule_compile import CompileError
from pallas_kernels.schedule_conv import LAYOUTS
from pallas_kernels.schedule_work import OURS

README = pathlib.Path(__file__).with_name('README.md')
MARKS = {
    'attention': ('<!-- schedule table: begin -->', '<!-- schedule table: end -->'),
    'conv': ('<!-- convolution table: begin -->', '<!-- convolution table: end -->'),
}

# (length, heads, head_dim, causal), with 16384 tokens and 2048 features.
_SHAPES = (
    *((length, 16, 128, causal) for causal in (False, True) for length in (4096, 16384)),
    *((length, 32, 64, causal) for causal in (False, True) for length in (4096, 16384)),
    *((length, 8, 256, causal) for causal in (False, True) for length in (4096, 16384)),
    *((length, 16, 128, True) for length in (512, 1024, 2048)),
    (2048, 32, 64, True),
)


def cases() -> list[Case]:
    """The table's rows, forward first."""
    forward = [
        Case(16384 // length, length, heads, heads, dim, causal)
        for length, heads, dim, causal in _SHAPES
    ]
    forward.append(Case(8, 4096, 32, 8, 128, True))
    return [*forward, *(Case(**{**vars(case), 'backward': True}) for case in forward)]


def goal(case: Case, chip: str) -> float | None:
    """The ratio aimed at, None if there is none."""
    wide = chip in ('v6e', 'v7x')
    if case.causal and case.length <= 2048:
        return 0.55
    if case.kv_heads != case.heads:
        return 0.70 if wide else None
    if case.head_dim == 64:
        return 0.65 if wide else 0.75 if chip == 'v5p' else None
    if case.head_dim == 256:
        return 0.80 if wide else 1.00 if chip == 'v5p' else None
    if wide:
        return 0.75 if case.backward else 0.70
    return 1.00


def row(case: Case, chip: str, result: dict[str, Any]) -> str:
    """One line of the table."""
    rivals = {name: rival for name, rival in result['rivals'].items() if 'error' not in rival}
    name = best(result)
    aim = goal(case, chip)
    cells = [
        chip,
        f'{case.batch}×{case.length}×{case.heads}/{case.kv_heads}×{case.head_dim}',
        'causal' if case.causal else 'full',
        'fwd + bwd' if case.backward else 'fwd',
        f'{1e6 * result["predicted_seconds"]:.0f} ({100 * result["fraction_of_peak"]:.0f} %)',
    ]
    for rival in RIVALS:
        found = rivals.get(rival)
        cells.append(
            f'{1e6 * found["predicted_seconds"]:.0f} ({1e6 * found["kernel_seconds"]:.0f})'
            if found
            else '–'
        )
    if name is None:
        cells += ['–', '–']
    else:
        cells += [f'**{rivals[name]["ratio"]:.2f}**', f'{_kernels(result):.2f}']
    cells.append('–' if aim is None else f'{aim:.2f}')
    return '| ' + ' | '.join(cells) + ' |'


def best(result: dict[str, Any]) -> str | None:
    """The fastest rival that compiled."""
    found = {name: r for name, r in result['rivals'].items() if 'error' not in r}
    if not found:
        return None
    return min(found, key=lambda name: found[name]['predicted_seconds'])


def _kernels(result: dict[str, Any]) -> float:
    """Ratio of the kernels' time alone to that of the rival whose kernels are fastest."""
    found = [r['kernel_seconds'] for r in result['rivals'].values() if 'error' not in r]
    return result['kernel_seconds'] / min(found)


HEAD = """\
Predicted, not measured. Times are µs (in brackets, % of peak here, and the kernel alone of a
rival); *ratio* is ours to the best rival's with the transposes that its wrapper makes outside of
its kernel, *kernel* that of the kernels alone. Shapes are B×T×H/K×D in bfloat16; here operands
come and go as the projections' [B, T, H·D], to rivals as [B, T, H, D], which costs them less.

| chip | shape | mask | pass | here | tokamax | splash | ratio | kernel | goal |
|---|---|---|---|---|---|---|---|---|---|"""


def write(table: str, op: str) -> None:
    """Puts the table of an op between its marks of README.md.

    Raises:
      SystemExit: if the marks are not there.
    """
    text = README.read_text() if README.exists() else ''
    begin, end = (text.find(mark) for mark in MARKS[op])
    if begin < 0 or end < begin:
        raise SystemExit(f'{README.name} needs the lines {MARKS[op][0]} and {MARKS[op][1]}')
    README.write_text(text[: begin + len(MARKS[op][0])] + '\n' + table + '\n' + text[end:])


def _attention(chip: str, wanted: list[str], against: list[str], cached: bool) -> Iterator[str]:
    cache = schedule_compile.default_cache()
    for case in cases():
        if not all(word in str(case).split() for word in wanted):
            continue
        try:
            result = schedule.compare(case, chip, against, cache, cached=cached)
        except CompileError as error:
            if not cached:
                print(f'{chip} {case}: {error}', file=sys.stderr)
            continue
        yield row(case, chip, result)


def _conv(chip: str, wanted: list[str], layouts: list[str], cached: bool) -> Iterator[str]:
    for title, goal, case in schedule_table_conv.rows():
        if not all(word in f'{title} {case}'.replace(',', ' ').split() for word in wanted):
            continue
        found = {
            name: _sides(variant, chip, cached) if name in layouts else {}
            for name, variant in schedule_table_conv.variants(case).items()
        }
        if any(found.values()):
            yield schedule_table_conv.row(title, goal, case, chip, found)


def _sides(case: Any, chip: str, cached: bool) -> dict[str, dict[str, Any]]:
    """The predictions here and of XLA; what does not compile is absent."""
    found = {}
    for name, side in (('here', OURS), ('xla', 'xla')):
        try:
            found[name] = schedule.predicted(
                case, chip, side, None, schedule_compile.default_cache(), cached
            )
        except CompileError as error:
            if not cached:
                print(f'{chip} {side} {case}: {error}', file=sys.stderr)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog='pallas_kernels.schedule_table', description=__doc__)
    parser.add_argument('--op', default='attention', choices=MARKS)
    parser.add_argument('--chip', default=','.join(TPUS))
    parser.add_argument('--rows', default='', help='only rows whose description has these words')
    parser.add_argument('--against', default=','.join(RIVALS), help='rivals of attention')
    parser.add_argument('--layouts', default=','.join(LAYOUTS), help='of convolutions')
    parser.add_argument('--cached', action='store_true', help='compile nothing')
    parser.add_argument('--write', action='store_true', help='into README.md')
    args = parser.parse_args(argv)
    print(schedule_compile.version_warning() or '', file=sys.stderr)
    conv = args.op == 'conv'
    lines = [schedule_table_conv.HEAD if conv else HEAD]
    wanted = args.rows.split()
    for chip in args.chip.split(','):
        if conv:
            made = _conv(chip, wanted, args.layouts.split(','), args.cached)
        else:
            made = _attention(chip, wanted, args.against.split(','), args.cached)
        for line in made:
            lines.append(line)
            print(line, file=sys.stderr, flush=True)
    table = '\n'.join(lines if conv else [*lines, '', schedule_calibration.summary()])
    if args.write:
        write(table, args.op)
    else:
        print(table)


if __name__ == '__main__':
    main()

"""The plan beside published runs: `python -m bigjax.plan.calibration` prints the table.

    --rows=TEXT   only rows whose name has TEXT in it
    --compile     compile these rows too (minutes each, needs libtpu) and keep what comes of it
    --write       keep the efficiencies, and put the table into the README of this folder

Every row of calibration.json is one published run: where it was published, its decoder, machine,
mesh, batch and what its blocks keep, and its step's length in the words of the publication. Nothing
is tuned row by row: a generation has one efficiency, and a row is predicted by the others' alone.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bigjax.mesh import parse_mesh, parse_sizes
from bigjax.nn.moe import Routing
from bigjax.plan.arithmetic.closed_flops import model_flops
from bigjax.plan.arithmetic.closed_form import of_step
from bigjax.plan.arithmetic.roofline import ROWS
from bigjax.plan.arithmetic.shape import Shape, Step
from bigjax.plan.records import ClosedForm
from bigjax.plan.topology import parse

README = Path(__file__).parent / 'README.md'
BEGIN, END = '<!-- calibration: written by --write -->', '<!-- end of calibration -->'
Row = Mapping[str, Any]


def shape(row: Row) -> Shape:
    """Returns the decoder of a row."""
    sizes = dict(row['shape'])
    return Shape(**{**sizes, 'routing': Routing(**sizes.pop('routing', {}))})


def step(row: Row) -> Step:
    """Returns how a row's step is computed, and on what."""
    topology = parse(row['topology'])
    saved = row['remat']
    return Step(
        batch=row['batch'],
        length=row['length'],
        mesh=parse_mesh(row['mesh'], topology.devices),
        dcn=parse_sizes(row.get('dcn', ''), 'dcn', ''),
        topology=topology,
        saved=None if saved is None else frozenset(saved),
        offloaded=frozenset(row.get('offloaded', ())),
        accumulate=row.get('accumulate', 1),
        microbatches=row.get('microbatches', 0),
        matmul=row.get('matmul', 'default'),
    )


def published_seconds(row: Row) -> float:
    """Returns a row's step in seconds, from whatever was published of it."""
    said, chips = row['published'], parse(row['topology']).chips
    if 'step_seconds' in said:
        return said['step_seconds']
    if 'tokens_per_second_per_chip' in said:
        return row['batch'] * row['length'] / chips / said['tokens_per_second_per_chip']
    causal = said['convention'] == 'causal'
    work = model_flops(shape(row), row['batch'], row['length'], causal=causal)
    return work / chips / (said['tflops_per_chip'] * 1e12)


def closed(row: Row) -> ClosedForm:
    """Returns what arithmetic says of a row, at the roofline."""
    return of_step(shape(row), step(row), share=1.0)


def generation(row: Row) -> str:
    """Returns the name of a row's hardware."""
    return parse(row['topology']).hardware.name


@dataclasses.dataclass(frozen=True)
class Line:
    """A row, published and predicted.

    Attributes:
      row: of the file.
      published: seconds of a step.
      roofline: seconds of a step at the roofline.
      others: efficiency of the other rows of its generation; None where there is no other.
    """

    row: Row
    published: float
    roofline: float
    others: float | None

    @property
    def simple(self) -> float | None:
        """Predicted over published, by the roofline and the others' efficiency."""
        return self.others and self.roofline / self.others / self.published

    @property
    def range(self) -> tuple[float, float, float] | None:
        """Predicted over published by the compiled program: low, middle and high."""
        found = self.row.get('compiled')
        if not found or 'low' not in found:
            return None
        low, high = sorted(found[end]['seconds'] / self.published for end in ('low', 'high'))
        return low, (low * high) ** 0.5, high


def lines(rows: Sequence[Row]) -> list[Line]:
    """Returns all rows with their predictions, each by the efficiency of the others."""
    measured = [(row, published_seconds(row), closed(row).roofline_seconds) for row in rows]
    found = []
    for row, seconds, roofline in measured:
        shares = [
            r / s
            for other, s, r in measured
            if other is not row and generation(other) == generation(row)
        ]
        found.append(Line(row, seconds, roofline, statistics.mean(shares) if shares else None))
    return found


def errors(ratios: Sequence[float]) -> tuple[float, float]:
    """Returns the median and the largest distance of ratios from 1."""
    distances = [abs(ratio - 1) for ratio in ratios]
    return statistics.median(distances), max(distances)


def efficiencies(found: Sequence[Line]) -> dict[str, dict[str, float]]:
    """Returns what each generation's published rows reach, and how well they predict each other."""
    result = {}
    for name in dict.fromkeys(generation(line.row) for line in found):
        own = [line for line in found if generation(line.row) == name]
        median, worst = errors([line.simple for line in own if line.simple] or [0.0])
        result[name] = {
            'value': round(statistics.mean(line.roofline / line.published for line in own), 4),
            'rows': len(own),
            'median': round(median, 4),
            'worst': round(worst, 4),
        }
    return result


def table(found: Sequence[Line]) -> str:
    """Returns the rows as a table in Markdown, and below it the errors."""
    head = ('published run', 'chips', 'published', 'roofline / efficiency', 'compiled low–mid–high')
    text = [f'| {" | ".join(head)} |', '| --- | ---: | ---: | ---: | ---: |']
    for line in found:
        span = line.range
        mark = '' if line.row['set'] == 'calibration' else '°'
        text.append(
            f'| {line.row["name"]}{mark} | {parse(line.row["topology"]).chips} '
            f'| {line.published:.2f} s | {line.simple or float("nan"):.2f} '
            f'| {"–".join(f"{ratio:.2f}" for ratio in span) if span else ""} |'
        )
    return '\n'.join([*text, '', *summary(found)])


def summary(found: Sequence[Line]) -> list[str]:
    """Returns what the table says of errors, a line each."""
    text = []
    for name, ones in (
        ('the six rows of the first calibration', lambda line: line.row['set'] == 'calibration'),
        ('TPU rows held out (°)', lambda line: line.row['set'] != 'calibration' and _is_tpu(line)),
        ('GPU rows', lambda line: not _is_tpu(line)),
    ):
        own = [line for line in found if ones(line)]
        ratios = [line.simple for line in own if line.simple]
        if ratios:
            median, worst = errors(ratios)
            text.append(
                f'- Roofline / efficiency, {name}: {len(ratios)}, median error {median:.1%}, '
                f'worst {worst:.1%}.'
            )
        spans = [line.range for line in own if line.range]
        if spans:
            median, worst = errors([middle for _, middle, _ in spans])
            inside = sum(low / 1.1 <= 1 <= high * 1.1 for low, _, high in spans)
            text.append(
                f'- Compiled, {name}: {len(spans)}, median error of the middle {median:.1%}, worst '
                f'{worst:.1%}; in the range widened by 10 %: {inside} of {len(spans)}.'
            )
    return text


def _is_tpu(line: Line) -> bool:
    return parse(line.row['topology']).hardware.is_tpu


def main(arguments: Sequence[str]) -> None:
    """Prints the table, and keeps what was asked for."""
    flags = argparse.ArgumentParser(prog='python -m bigjax.plan.calibration')
    flags.add_argument('--rows', default='', help='only rows whose name has this in it')
    flags.add_argument('--compile', action='store_true', help='compile these rows too')
    flags.add_argument('--timeout', type=int, default=1800, help='seconds of one compile')
    flags.add_argument('--write', action='store_true', help='keep efficiencies and table')
    asked = flags.parse_args(arguments)
    known = json.loads(ROWS.read_text('utf-8'))
    if asked.compile:
        from bigjax.plan.calibration_compile import compile_row  # Imports all that compiles.

        for row in known['rows']:
            if asked.rows in row['name'] and parse(row['topology']).hardware.is_tpu:
                print(f'compiling {row["name"]} …', file=sys.stderr, flush=True)
                row['compiled'] = compile_row(row, asked.timeout)
                print(json.dumps(row['compiled'], indent=1), file=sys.stderr, flush=True)
                ROWS.write_text(json.dumps(known, indent=1) + '\n', 'utf-8')
    found = lines(known['rows'])
    if asked.write:
        known['efficiency'] = efficiencies(found)
        ROWS.write_text(json.dumps(known, indent=1) + '\n', 'utf-8')
        text = README.read_text('utf-8')
        before, after = text.partition(BEGIN)[0], text.partition(END)[2]
        README.write_text(f'{before}{BEGIN}\n{table(found)}\n{END}{after}', 'utf-8')
    print(table([line for line in found if asked.rows in line.row['name']]))


if __name__ == '__main__':
    main(sys.argv[1:])

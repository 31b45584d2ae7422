"""How the schedule model's predictions compare with published timings of a published kernel.

  python -m pallas_kernels.schedule_calibration [--chip=v6e]

compiles tokamax's attention with the block sizes it was timed with and writes
schedule_calibration.json; rows that are there already are kept (delete the file to start again).
"""

import argparse
import json
import pathlib
import statistics
import sys

from pallas_kernels import schedule_compile, schedule_model
from pallas_kernels.chip import named
from pallas_kernels.schedule_attention import Case
from pallas_kernels.schedule_compile import CompileError
from pallas_kernels.schedule_rivals import published

FILE = pathlib.Path(__file__).with_suffix('.json')

# (length, heads, head_dim, causal): with 16384 tokens and 2048 features, as it was timed.
_SHAPES = (
    (2048, 16, 128, True),
    (512, 16, 128, True),
    (1024, 16, 128, True),
    (2048, 32, 64, True),
    (2048, 8, 256, True),
    (2048, 16, 128, False),
    (4096, 16, 128, True),
    (16384, 16, 128, True),
    (16384, 16, 128, False),
    (16384, 32, 64, False),
    (16384, 8, 256, False),
)


def cases(chip: str) -> list[Case]:
    """The published calls that the model is checked on, for one chip."""
    found = []
    for length, heads, dim, causal in _SHAPES:
        for backward in (False, True):
            # Backward timings were published for v7x only.
            if not backward or (chip == 'v7x' and heads == 16 and length <= 2048):
                found.append(
                    Case(16384 // length, length, heads, heads, dim, causal, None, backward)
                )
    return found


def rows() -> list[dict]:
    """The rows compiled so far: case, chip, published and predicted seconds."""
    return json.loads(FILE.read_text()) if FILE.exists() else []


def summary() -> str:
    """The calibration in a few words, from the rows on file."""
    ratios: dict[str, list[float]] = {}
    for row in rows():
        kind = 'forward + backward' if 'backward' in row['case'] else 'forward'
        ratios.setdefault(f'{row["chip"]} {kind}', []).append(row['predicted'] / row['published'])
    if not ratios:
        return 'Calibration: none on file.'
    words = [
        f'{name}: median {statistics.median(r):.2f}, {min(r):.2f} to {max(r):.2f} ({len(r)} rows)'
        for name, r in sorted(ratios.items())
    ]
    return (
        "Calibration, predicted / published time of tokamax's attention with its own wrapper: "
        + '; '.join(words)
        + '. Backward passes were timed apart, so published sums hold their transposes twice. Not '
        'calibrated: v5e, and kernels whose MXU is busy more than 80 % of the time.'
    )


def table() -> str:
    """The rows as a Markdown table."""
    lines = ['| chip | case | published ms | predicted ms | ratio |', '|---|---|---|---|---|']
    for row in sorted(rows(), key=lambda row: (row['chip'], row['case'])):
        lines.append(
            f'| {row["chip"]} | {row["case"]} | {1e3 * row["published"]:.3f} '
            f'| {1e3 * row["predicted"]:.3f} | {row["predicted"] / row["published"]:.2f} |'
        )
    return '\n'.join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--chip', default='v6e,v7x,v5p')
    parser.add_argument('--again', action='store_true', help='rows that are there already, too')
    parser.add_argument('--cached', action='store_true', help='compile nothing')
    parser.add_argument('--most', type=int, default=99, help='rows of a chip')
    args = parser.parse_args(argv)
    chips = args.chip.split(',')
    cache = schedule_compile.default_cache()
    for number in range(args.most):  # the first row of every chip, then the second
        for chip in chips:
            if number >= len(cases(chip)):
                continue
            case = cases(chip)[number]
            found = rows()
            same = [row['chip'] == chip and row['case'] == str(case) for row in found]
            if any(same) and not args.again:
                continue
            try:
                config, seconds = published(case, chip)
                request = {
                    'op': 'attention', 'chip': chip, 'side': 'tokamax', 'config': config,
                    'case': vars(case), 'split': True,
                }  # fmt: skip
                result = schedule_model.predict(request, named(chip), cache, args.cached).as_json()
            except CompileError as error:
                print(f'{chip} {case}: {error}', file=sys.stderr)
                continue
            row = {
                'chip': chip, 'case': str(case), 'published': seconds,
                'predicted': result['predicted_seconds'], 'kernel': result['kernel_seconds'],
                'around': result['around_seconds'], 'bundles': result['total_bundles'],
                'steps': result['steps'], 'iterations': result['iterations'],
                'instructions': len(result['around']) + len(result['kernels']),
                'stall_cycles': result['stall_cycles'], 'config': config,
            }  # fmt: skip
            others = [old for old in rows() if (old['chip'], old['case']) != (chip, str(case))]
            FILE.write_text(json.dumps([*others, row], indent=1) + '\n')
            print(f'{chip} {case}: {row["predicted"] / seconds:.3f}', flush=True)
    print(table())
    print(summary())


if __name__ == '__main__':
    main()

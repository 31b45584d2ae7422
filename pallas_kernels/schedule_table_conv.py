"""The rows of the README's table of convolutions: predicted here and of XLA, in both layouts."""

import dataclasses
from typing import Any

from pallas_kernels.chip import named
from pallas_kernels.conv.wins import gated_wins, wins
from pallas_kernels.schedule_conv import LAYOUTS, Case, gated_operands, operands, work

# Description, goal of the forward pass in rooflines (None: no worse than XLA), case.
_ROWS: tuple[tuple[str, float | None, Case], ...] = (
    ('causal depthwise, k 4, C 4096, T 4096, B 8', 1.15,
     Case('conv1d', 8, 1, 4096, 4096, 1, 4, 4096, groups=4096, padding='CAUSAL')),
    ('depthwise 3×3, C 256, 56², B 32', 1.25,
     Case('conv2d', 32, 56, 56, 256, 3, 3, 256, groups=256)),
    ('depthwise 7×7, C 384, 14², B 128', 2.0,
     Case('conv2d', 128, 14, 14, 384, 7, 7, 384, groups=384)),
    ('grouped 3×3, G 32, C 256, 56², B 32', 2.0,
     Case('conv2d', 32, 56, 56, 256, 3, 3, 256, groups=32)),
    ('stem 7×7, stride 2, 3 → 64, 224², B 32', 2.0,
     Case('conv2d', 32, 224, 224, 3, 7, 7, 64, stride=2)),
    ('3×3, 64 → 64, 56², B 32', 2.0, Case('conv2d', 32, 56, 56, 64, 3, 3, 64)),
    ('gated, k 2, dilation 512, C 128, T 16384, B 8', 1.3,
     Case('gated_conv1d', 8, 1, 16384, 128, 1, 2, 256, dilation=512, padding='CAUSAL')),
    ('3×3, 256 → 256, 14², B 128', 1.15, Case('conv2d', 128, 14, 14, 256, 3, 3, 256)),
    ('3×3, dilation 4, 256 → 256, 28², B 32', 1.15,
     Case('conv2d', 32, 28, 28, 256, 3, 3, 256, dilation=4)),
    ('3×3, stride 2, 128 → 256, 28², B 64', None,
     Case('conv2d', 64, 28, 28, 128, 3, 3, 256, stride=2)),
    ('1×1, 256 → 1024, 14², B 128', None, Case('conv2d', 128, 14, 14, 256, 1, 1, 1024)),
)  # fmt: skip

HEAD = """\
Predicted, not measured: µs, in brackets times the roofline. *Here* is the larger of the schedule
model's figure and of that with the compiler's estimates for what stands around the kernels. Of XLA
both are told: by the same model from the bundles of its fusions / by the compiler's estimates,
which are far above. Layouts of arguments and results are free, as between two layers of a network,
or JAX's default ones. *Ratio* is of here to the smaller figure of XLA: images with free layouts,
sequences with the default ones, as their neighbours are projections. *impl* is what None takes.
*Binds*, where the goal is missed: the busiest unit and its share of the kernels' bundles, and the
share of their time that they wait for HBM.

| chip | case | pass | roofline | here | goal | XLA | ratio | default | XLA default | impl | binds |
|---|---|---|---|---|---|---|---|---|---|---|---|"""

_UNITS = {
    'MATMUL': 'products', 'MATPUSH': 'loads of products', 'VPOP': 'results of products',
    'XLU': 'rotations', 'VALU': 'vector', 'EUP': 'functions', 'VLOAD': 'loads', 'VSTORE': 'stores',
    'SALU': 'scalars',
}  # fmt: skip


def rows() -> list[tuple[str, float | None, Case]]:
    """Description, goal in rooflines and case of every row, free layouts; forward first."""
    both = [
        (name, goal and 1.5 * goal, dataclasses.replace(case, passes='all'))
        for name, goal, case in _ROWS
    ]
    return [*_ROWS, *both]


def variants(case: Case) -> dict[str, Case]:
    """A case with each of the layouts."""
    return {layouts: dataclasses.replace(case, layouts=layouts) for layouts in LAYOUTS}


def row(
    name: str, goal: float | None, case: Case, chip: str, found: dict[str, dict[str, Any]]
) -> str:
    """One line of the table.

    Args:
      name, goal, case: of `rows`.
      chip: name of a TPU generation.
      found: of each of the layouts, {'here': prediction, 'xla': prediction}; what did not compile
        is absent.
    """
    roofline = work(case, named(chip)).roofline_seconds(named(chip))
    free, default = (found[layouts] for layouts in LAYOUTS)
    ratio, compared = '–', free if case.op == 'conv2d' else default
    if 'here' in compared and 'xla' in compared:
        ratio = f'**{compared["here"]["predicted_seconds"] / least(compared["xla"]):.2f}**'
    cells = [
        chip, name, 'fwd + bwd' if case.passes == 'all' else 'fwd', f'{1e6 * roofline:.1f}',
        _here(free, roofline), '–' if goal is None else f'{goal:.2f}', _xla(free, roofline), ratio,
        _here(default, roofline), _xla(default, roofline), taken(case, chip),
        _binds(free.get('here') or default.get('here'), goal and goal * roofline),
    ]  # fmt: skip
    return '| ' + ' | '.join(cells) + ' |'


def least(prediction: dict[str, Any]) -> float:
    """The smaller of the two times predicted for a side, in seconds."""
    return min(prediction['model_seconds'], prediction['estimate_seconds'])


def _here(found: dict[str, Any], roofline: float) -> str:
    if 'here' not in found:
        return '–'
    seconds = found['here']['predicted_seconds']
    return f'{1e6 * seconds:.0f} ({seconds / roofline:.2f})'


def _xla(found: dict[str, Any], roofline: float) -> str:
    if 'xla' not in found:
        return '–'
    pair = [found['xla'][key] for key in ('model_seconds', 'estimate_seconds')]
    return ' / '.join(f'{1e6 * seconds:.0f} ({seconds / roofline:.1f})' for seconds in pair)


def _binds(found: dict[str, Any] | None, most: float | None) -> str:
    if found is None or most is None or found['predicted_seconds'] <= most:
        return ''
    unit = max(_UNITS, key=lambda unit: found['utilization'].get(unit, 0.0))
    waits = found['stall_cycles'] / (found['total_bundles'] + found['stall_cycles'])
    return f'{_UNITS[unit]} {found["utilization"][unit]:.0%}, HBM {waits:.0%}'


def taken(case: Case, chip: str) -> str:
    """What None takes: 'tpu' or 'xla'."""
    if case.op == 'gated_conv1d':
        won = gated_wins(gated_operands(case), named(chip))
    else:
        won = wins(*operands(case), named(chip))
    return 'tpu' if won else 'xla'

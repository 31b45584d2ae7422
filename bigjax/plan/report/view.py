"""What all parts of a report share: its sections, the verdict, and how far to trust its times."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from bigjax import units
from bigjax.plan.report.forms import percent

Plan = Mapping[str, Any]
Rows = tuple[tuple[str, ...], ...]
# What a step's seconds go to: the fields of `bigjax.plan.records.Timeline`.
PARTS = {
    'matmul': 'matrix products',
    'kernels': 'Pallas kernels',
    'other': 'other computation',
    'exposed': 'exposed collectives',
}


@dataclasses.dataclass(frozen=True)
class Section:
    """One titled part of a report.

    Attributes:
      key: its name in an address, such as 'memory'.
      title: its heading.
      facts: pairs of label and text.
      head: the columns of its table.
      rows: the table's cells; the first column is text, the others are figures.
      notes: sentences under it.
      totals: first cells of the rows that sum up others.
    """

    key: str
    title: str
    facts: tuple[tuple[str, str], ...] = ()
    head: tuple[str, ...] = ()
    rows: Rows = ()
    notes: tuple[str, ...] = ()
    totals: tuple[str, ...] = ()

    @property
    def text_columns(self) -> set[int]:
        """The table's columns without figures, which stand to the left."""
        columns = range(len(self.head))
        return {0} | {i for i in columns if not any(row[i][:1].isdigit() for row in self.rows)}


def step_range(plan: Plan) -> tuple[float, float] | None:
    """The predicted seconds of a step, low and high; None where there is no prediction."""
    step = plan.get('predicted_step_seconds')
    return (step['low'], step['high']) if step else None


def verdict(plan: Plan) -> tuple[bool | None, str]:
    """Whether the plan fits (None: not known), and the sentence that says so."""
    fits, peak, hbm = plan.get('fits'), plan.get('peak_bytes'), plan['chip']['hbm_bytes']
    where = f'on each device of {plan["topology"]["name"]}'
    if fits is None:
        return None, f'not known whether it fits {where}'
    says = 'fits' if fits else 'does not fit'
    if peak is None:
        return fits, f'{says} {where}: more than its {units.size(hbm)}'
    share = (
        'needs ' * (not fits) + f'{units.size(peak)} of {units.size(hbm)} ({percent(peak / hbm)})'
    )
    return fits, f'{says} {where}: {share}'


def ends(timeline: Mapping[str, Mapping[str, float]]) -> list[Mapping[str, float]]:
    """The two timelines of a step, the shorter first."""
    both = (timeline['low'], timeline['high'])
    return sorted(both, key=lambda end: sum(end[name] for name in PARTS))


def calibration(plan: Plan) -> str:
    """How far predictions made this way were from published step times."""
    found = plan.get('calibration')
    if not found or not found.get('rows'):
        return 'none: no published step time of this kind is known'
    return (
        f'on {found["rows"]} published rows, all of decoders, the middle of the range was '
        f'{percent(found["median_error"])} off (median), {percent(found["worst_error"])} at worst'
    )


def unit(plan: Plan) -> str:
    """What a step is counted in: tokens, images, …."""
    return (plan.get('training') or {}).get('unit') or 'tokens'

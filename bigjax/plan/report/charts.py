"""The plots of a plan as plain geometry: stacked bars, which the page's template draws as SVG."""

import dataclasses
import math
from collections.abc import Callable, Sequence

from bigjax import units
from bigjax.plan.records import CATEGORIES
from bigjax.plan.report import ranking
from bigjax.plan.report.forms import axes, seconds
from bigjax.plan.report.view import PARTS, Plan, ends, step_range

# Pixels of the drawing, whatever its size on a screen.
WIDTH, RIGHT, ROW, BAR, TOP, FOOT = 860, 100, 38, 24, 26, 26
_LETTER = 7.2  # wide, of text within a bar
# The same thing has the same colour in every plot: collectives are red, what hides is green.
_COLOURS = {
    'parameters': 0, 'optimizer': 1, 'gradients': 2, 'collectives': 3, 'activations': 4,
    'program': 5, 'other': 6,
    'matrix products': 0, 'Pallas kernels': 1, 'other computation': 2, 'exposed collectives': 3,
    'hidden collectives': 4, 'exposed': 3, 'hidden': 4, 'alone': 0, 'closed form': 0,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of a bar: what it stands for, how much, and what a reader is told."""

    name: str
    value: float
    text: str


@dataclasses.dataclass(frozen=True)
class Bar:
    """A row: its name, its pieces from left to right, the sum as text, whether it is ruled out."""

    label: str
    parts: tuple[Part, ...]
    text: str
    faint: bool = False


@dataclasses.dataclass(frozen=True)
class Chart:
    """Stacked bars over one scale.

    Attributes:
      title: what is drawn, in a few words.
      bars: from top to bottom.
      names: of the pieces that may occur.
      form: how a value is written at the axis.
      unit: the axis has round multiples of it.
      marks: values with a line across all bars, and their names.
    """

    title: str
    bars: tuple[Bar, ...]
    names: tuple[str, ...]
    form: Callable[[float], str]
    unit: float = 1.0
    marks: tuple[tuple[float, str], ...] = ()

    @property
    def description(self) -> str:
        """The drawing in words, for those who cannot see it."""
        bars = (f'{b.label}: {", ".join(f"{p.name} {p.text}" for p in b.parts)}' for b in self.bars)
        return '; '.join((*bars, *(f'line at {text}' for _, text in self.marks)))

    @property
    def legend(self) -> list[tuple[int, str]]:
        """(colour, name) of every piece that occurs."""
        seen = {part.name for bar in self.bars for part in bar.parts}
        return [(_COLOURS[name], name) for name in self.names if name in seen]

    @property
    def height(self) -> int:
        return TOP + ROW * len(self.bars) + FOOT

    @property
    def left(self) -> int:
        """Where bars begin: after the longest of their names."""
        return round(16 + 7.9 * max((len(bar.label) for bar in self.bars), default=0))

    @property
    def largest(self) -> float:
        """The end of the scale."""
        sums = [sum(part.value for part in bar.parts) for bar in self.bars]
        return max((*sums, *(value for value, _ in self.marks)), default=0.0) or 1.0

    def x(self, value: float) -> float:
        """Where a value stands, in pixels."""
        return round(self.left + value / self.largest * (WIDTH - self.left - RIGHT), 1)

    def pieces(self, bar: Bar) -> list[tuple[float, float, int, Part, bool]]:
        """(left, width, colour, piece, whether its text fits within) of every piece of a bar."""
        found, at = [], 0.0
        for part in bar.parts:
            left, right = self.x(at), self.x(at + part.value)
            wide = right - left > _LETTER * len(part.text) + 6
            found.append((left, round(right - left, 1), _COLOURS[part.name], part, wide))
            at += part.value
        return found

    def ticks(self) -> list[tuple[float, str]]:
        """Round values along the axis, with where they stand."""
        largest = self.largest / self.unit
        step = 10.0 ** math.floor(math.log10(largest / 2))
        step *= next(factor for factor in (1, 2, 2.5, 5, 10) if largest / step / factor <= 6)
        values = [i * step * self.unit for i in range(math.floor(largest / step + 1e-9) + 1)]
        return [(self.x(v), self.form(v) if v else '0') for v in values]

    def marked(self) -> list[tuple[float, str, str]]:
        """(where, name, which side of the line its name goes) of every mark."""
        found = []
        for number, (value, text) in enumerate(self.marks):
            # Two lines can be close: the name of the first one goes left, of the second right.
            side = 'start' if number else 'end'
            found.append((self.x(value), text, side))
        return found


def charts(plan: Plan) -> dict[str, Chart]:
    """The plots of a plan by the section that they stand in; none of what the plan lacks."""
    made = {
        'memory': _memory(plan), 'time': _time(plan), 'speed': _roofline(plan),
        'collectives': _collectives(plan), 'search': _search(plan),
    }  # fmt: skip
    return {key: chart for key, chart in made.items() if chart}


def _bar(label: str, values: Sequence[tuple[str, float]], form: Callable, **extra) -> Bar:
    parts = tuple(Part(name, value, form(value)) for name, value in values if value > 0)
    return Bar(label, parts, form(sum(value for _, value in values)), **extra)


def _memory(plan: Plan) -> Chart | None:
    columns = {'compiled': plan.get('memory_bytes') if plan.get('compiler') else None}
    closed = (plan.get('closed_form') or {}).get('memory') or {}
    columns['closed form'] = closed.get('bytes') or (plan.get('memory_bytes') or None)
    bars = tuple(
        _bar(label, [(name, found.get(name, 0)) for name in CATEGORIES], units.size)
        for label, found in columns.items()
        if found
    )
    hbm = plan['chip']['hbm_bytes']
    if not bars:
        return None
    mark = (hbm, f'HBM {units.size(hbm)}')
    unit = max(u for u in (1, 2**10, 2**20, 2**30, 2**40) if u <= max(hbm, 1))
    return Chart('Bytes that one device holds', bars, CATEGORIES, units.size, unit, (mark,))


def _time(plan: Plan) -> Chart | None:
    timeline, step = plan.get('timeline'), step_range(plan)
    marks: tuple[tuple[float, str], ...] = ()
    if plan.get('roofline_seconds'):
        marks = ((plan['roofline_seconds'], f'roofline {seconds(plan["roofline_seconds"])}'),)
    if timeline:
        both = list(zip(('low', 'high'), ends(timeline), strict=True))
        bars = [
            _bar(f'a step, {end}', [(label, took[n]) for n, label in PARTS.items()], seconds)
            for end, took in both
        ]
        bars += [
            _bar(f'hidden beside, {end}', [('hidden collectives', took['hidden'])], seconds)
            for end, took in both
            if took.get('hidden')
        ]
        names = (*PARTS.values(), 'hidden collectives')
        return Chart('Seconds of a step, predicted', tuple(bars), names, seconds, marks=marks)
    if step:
        pairs = zip(('low', 'high'), step, strict=True)
        bars = [_bar(f'a step, {end}', [('closed form', value)], seconds) for end, value in pairs]
        return Chart(
            'Seconds of a step, predicted', tuple(bars), ('closed form',), seconds, marks=marks
        )
    return None


def _roofline(plan: Plan) -> Chart | None:
    """What each resource would take alone; the largest is the roofline."""
    chip, flops = plan['chip'], plan.get('flops_per_step') or {}
    closed, found = plan.get('closed_form') or {}, plan.get('collectives') or ()
    executed = flops.get('executed_per_device') or flops.get('closed_form_per_device')
    hbm = plan.get('hbm_bytes_moved') or closed.get('hbm_bytes')
    needs = {
        'FLOPs at peak': (executed or 0) / chip['peak_flops'],
        'HBM at its rate': (hbm or 0) / chip['hbm_bytes_per_second'],
    }
    for c in found:
        label = f'{c["network"].upper()} at link speed'
        needs[label] = needs.get(label, 0.0) + c['seconds']
    bars = tuple(_bar(name, [('alone', took)], seconds) for name, took in needs.items() if took)
    if not bars:
        return None
    step = step_range(plan)
    marks = tuple(
        (t, f'{end} {seconds(t)}') for end, t in zip(('low', 'high'), step or (), strict=False)
    )
    return Chart('What each resource would take alone', bars, ('alone',), seconds, marks=marks)


def _collectives(plan: Plan) -> Chart | None:
    found = plan.get('collectives')
    if not found:
        return None
    rows: dict[str, list[float]] = {}
    for c in found:
        row = rows.setdefault(f'{axes(c["axes"])} ({c["network"].upper()})', [0.0, 0.0])
        row[0] += min(c['exposed_seconds'], c['seconds'])
        row[1] += max(c['seconds'] - c['exposed_seconds'], 0.0)
    names = ('exposed', 'hidden')
    ordered = sorted(rows.items(), key=lambda row: -sum(row[1]))
    bars = [_bar(label, list(zip(names, row, strict=True)), seconds) for label, row in ordered]
    return Chart('Collectives by mesh axis, at link speed', tuple(bars), names, seconds)


def _search(plan: Plan) -> Chart | None:
    found = [c for c in plan.get('search') or () if ranking.middle(c) or step_range(c)]
    if not found:
        return None
    bars = []
    for candidate in found:
        # A larger batch takes longer and is not worse: draw as many examples of each.
        scale = found[0].get('batch', 1) / candidate.get('batch', 1)
        if own := ranking.middle(candidate):
            values = [(label, scale * own[part]) for part, label in PARTS.items()]
        else:
            values = [('closed form', scale * math.sqrt(math.prod(step_range(candidate) or ())))]
        label = ranking.name(candidate)
        bars.append(_bar(label, values, seconds, faint=not candidate['fits']))
    title = 'Seconds for as many examples as the best one takes in a step, predicted'
    return Chart(title, tuple(bars), (*PARTS.values(), 'closed form'), seconds)

"""A plan as text for the terminal."""

import textwrap

from bigjax.plan.report.forms import between, seconds
from bigjax.plan.report.sections import sections
from bigjax.plan.report.view import Plan, Section, step_range, verdict

_WIDTH = 100
_LABEL = 18  # as wide as in the summary before a run
_LONG = 48  # a last column of sentences goes below its row when rows get wider than the screen


def show(plan: Plan) -> str:
    """The report of a plan: the verdict, then every section with its tables.

    Args:
      plan: the JSON object of a plan, as `--json` prints it.
    """
    lines = [verdict(plan)[1]]
    if step := step_range(plan):
        lines.append(f'predicted: {between(step, seconds)} a step')
    for section in sections(plan):
        lines += ['', f'── {section.title} '.ljust(_WIDTH, '─'), *_body(section)]
    return '\n'.join(lines)


def _body(section: Section) -> list[str]:
    lines = []
    for label, text in section.facts:
        body = _wrapped(text, _WIDTH - _LABEL - 2)
        lines += [f'{label:<{_LABEL}}  {body[0]}', *(f'{"":{_LABEL}}  {line}' for line in body[1:])]
    if section.rows:
        lines += [''] * bool(lines) + _table(section)
    for note in section.notes:
        lines += _wrapped(note, _WIDTH)
    return lines


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or ['']


def _table(section: Section) -> list[str]:
    """The rows in columns, text to the left and figures to the right."""
    table = [section.head, *section.rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(section.head))]
    below = sum(widths) + 2 * len(widths) > _WIDTH and widths[-1] > _LONG
    if below:
        widths.pop()
    lines = []
    for row in table:
        cells = [
            f'{cell:<{width}}' if i in section.text_columns else f'{cell:>{width}}'
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append('  '.join(cells).rstrip())
        if below:
            lines += [f'    {line}' for line in _wrapped(row[-1], _WIDTH - 4)]
    return lines

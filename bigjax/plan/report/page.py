"""A plan as one HTML file that needs nothing else: no script, font or picture from elsewhere."""

import os
from pathlib import Path

import jinja2

from bigjax.plan.report import charts, view
from bigjax.plan.report.sections import sections
from bigjax.plan.report.view import Plan

_HERE = Path(__file__).parent


def write_page(plan: Plan, path: str | os.PathLike) -> Path:
    """Writes the page of a plan.

    Args:
      plan: the JSON object of a plan, as `--json` prints it.
      path: the file to write; its folder must be there.

    Returns:
      The file.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    fits, sentence = view.verdict(plan)
    html = environment.get_template('page.html.j2').render(
        plan=plan,
        fits=fits,
        sentence=sentence,
        cards=_cards(plan),
        sections=sections(plan),
        charts=charts.charts(plan),
        size=charts,
    )
    file = Path(path)
    file.write_text(html, encoding='utf-8')
    return file


def _cards(plan: Plan) -> list[tuple[str, str]]:
    """What is read first: (label, text) of the plan's main figures."""
    facts = {label: text for section in sections(plan) for label, text in section.facts}
    ways = [way for way in plan.get('ways_out') or () if way['fits']]
    facts |= {'nearest way out': ways[0]['flags']} if ways else {}
    wanted = (
        'predicted step', f'{view.unit(plan)} per second', 'MFU', 'time', 'price', 'bottleneck',
        'nearest way out',
    )  # fmt: skip
    names = {'time': 'training time'}
    return [(names.get(n, n), facts[n].partition(';')[0]) for n in wanted if n in facts]

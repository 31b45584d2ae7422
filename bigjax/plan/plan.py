"""`--action=plan`: from an experiment and the name of a machine to fit, speed, time and price.

Nothing is allocated and no data is read. The program is compiled in a child process, so nothing
else sees a TPU; without libtpu, and for GPUs, arithmetic alone speaks, and says so.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigjax import experiment as experiments
from bigjax.models.decoder import DecoderLM
from bigjax.plan.assess import assess, why_closed
from bigjax.plan.options import PlanOptions
from bigjax.plan.program.compiled import without_data
from bigjax.plan.report.page import write_page
from bigjax.plan.report.terminal import show
from bigjax.plan.search import search
from bigjax.plan.summary import summary
from bigjax.plan.topology import parse
from bigjax.plan.ways_out import ways_out


def plan(
    name: str, values: Mapping[str, Any], options: PlanOptions, folder: Path
) -> dict[str, Any]:
    """Returns the plan of a run as a JSON object.

    Args:
      name: of a file in experiments/.
      values: its knobs; those at their defaults may be left out.
      options: the machine, the budget, and how far to go.
      folder: where compiled programs are kept, so that nothing is compiled twice.

    Raises:
      UsageError: the machine does not exist, or the experiment does not fit it.
    """
    topology = parse(options.topology)
    given = changed(name, values)
    kept = folder / 'compiled'
    found = assess(name, given, topology, options, kept)
    result = summary(name, found, options)
    if not found.fits:
        tried, note = ways_out(name, found, options, kept)
        result['ways_out'] = tried
        result['notes'] = [note, *result['notes']] if note else result['notes']
    if options.search:
        result['search'] = search(name, given, found, options, kept)
    return result


def changed(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the knobs that are not at their defaults."""
    known = experiments.knobs(experiments.find(name))
    return {k: v for k, v in values.items() if k not in known or v != known[k].default}


def unrolled(name: str, values: Mapping[str, Any]) -> int:
    """Returns how many layers the compiler sees one by one, if that takes minutes; else 0."""
    model = without_data(name, changed(name, values)).model
    deep = isinstance(model, DecoderLM) and not model.scan and model.depth > 8
    return model.depth if deep else 0


def run(name: str, values: Mapping[str, Any], options: PlanOptions, workdir: Path) -> int:
    """Makes a plan, shows it, and writes plan.json and plan.html below the workdir.

    Returns:
      The exit status: 0 also where the answer is that it does not fit, 130 where it is interrupted.
    """
    folder = workdir / 'plan'
    if not why_closed(topology := parse(options.topology), options):
        print(f'compiling for {topology.name}, a minute or more; not with --fast', file=sys.stderr)
        if layers := unrolled(name, values):
            print(
                f'--scan=False: {layers} layers are compiled one by one, minutes instead of one; '
                f'--scan compiles one for all',
                file=sys.stderr,
            )
    try:
        result = plan(name, values, options, folder)
    except KeyboardInterrupt:
        goes_on = f'what was compiled is in {folder}, and the same command goes on from there'
        print(f'\ninterrupted; {goes_on}', file=sys.stderr)
        return 130
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1)
    (folder / 'plan.json').write_text(text + '\n', 'utf-8')
    page = write_page(result, folder / 'plan.html')
    print(text if options.json else show(result))
    print(f'page: {page}', file=sys.stderr)
    return 0

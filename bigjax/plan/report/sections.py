"""A plan as a reader meets it: titled sections of facts and tables, for a terminal or a page.

What a plan lacks (nothing compiled, no price, no search) is said or left out, never made up.
"""

from collections.abc import Mapping

from bigjax import units
from bigjax.plan.records import CATEGORIES
from bigjax.plan.report import ranking
from bigjax.plan.report.forms import axes, between, count, long_time, mesh, percent, seconds
from bigjax.plan.report.view import (
    PARTS,
    Plan,
    Rows,
    Section,
    calibration,
    ends,
    step_range,
    unit,
)


def sections(plan: Plan) -> list[Section]:
    """Every section that this plan has, in the order of a report."""
    made = (
        _run(plan), ranking.ways_out(plan), _memory(plan), _time(plan), _speed(plan), _flops(plan),
        _collectives(plan), _training(plan), ranking.search(plan), _conventions(plan),
    )  # fmt: skip
    return [section for section in made if section]


def _run(plan: Plan) -> Section:
    topology, compiler = plan['topology'], plan.get('compiler')
    counts = [f'{topology["chips"]:,} chips']
    for name in ('devices', 'hosts', 'slices'):
        if topology.get(name, 1) > 1 and topology[name] != topology['chips']:
            counts.append(f'{topology[name]:,} {name}')
    if compiler:
        how = f'compiled by libtpu {compiler["libtpu"]} with jax {compiler["jax"]}'
        how += f' in {compiler["cpu_seconds"]:.0f} CPU seconds' * bool(compiler['cpu_seconds'])
        how += f', flags {compiler["flags"]}' * bool(compiler['flags'])
    else:
        how = 'closed form only: nothing was compiled'
    knobs = ' '.join(f'--{name}={value}' for name, value in (plan.get('knobs') or {}).items())
    facts = (
        ('experiment', f'{plan["experiment"]} {knobs}'.strip()),
        ('topology', f'{topology["name"]}: {", ".join(counts)}'),
        ('mesh', mesh(plan['mesh'])),
        ('method', how),
    )
    return Section('run', 'What is planned', facts, notes=tuple(plan.get('notes') or ()))


def _memory(plan: Plan) -> Section | None:
    found, closed = plan.get('memory_bytes'), plan.get('closed_form')
    estimate = (closed or {}).get('memory') or {}
    if not found and not estimate:
        return None
    columns = [('compiled', found)] if found and plan.get('compiler') else []
    columns += [('closed form', estimate.get('bytes') or found)]
    columns = [(name, values) for name, values in columns if values]
    hbm, first = plan['chip']['hbm_bytes'], columns[0][1]

    def row(label: str, values: list[int], share: float) -> tuple[str, ...]:
        return (label, *(units.size(v) for v in values), percent(share / hbm))

    rows = [
        row(name, [values.get(name, 0) for _, values in columns], first.get(name, 0))
        for name in CATEGORIES
        if any(values.get(name) for _, values in columns)
    ]
    totals = [sum(values.values()) for _, values in columns]
    if plan.get('peak_bytes') is not None:
        totals[0] = plan['peak_bytes']
    rows += [row('peak', totals, totals[0]), row('HBM', [hbm] * len(columns), hbm)]
    notes = []
    if plan.get('host_bytes'):
        notes.append(f'{units.size(plan["host_bytes"])} more lie in the memory of its host.')
    if not plan.get('compiler'):
        notes.append('By arithmetic alone: the compiler may need more or less.')
    head = ('each device holds', *(name for name, _ in columns), 'of HBM')
    return Section('memory', 'Memory', (), head, tuple(rows), tuple(notes), ('peak', 'HBM'))


def _time(plan: Plan) -> Section:
    step, timeline = step_range(plan), plan.get('timeline')
    facts: list[tuple[str, str]] = []
    notes: list[str] = []
    if step:
        facts.append(('predicted step', between(step, seconds)))
    else:
        why = 'it does not fit' if plan.get('fits') is False else 'nothing says how fast it is'
        facts.append(('predicted step', f'none: {why}'))
    if plan.get('roofline_seconds'):
        facts.append(('roofline', f'{seconds(plan["roofline_seconds"])}, which no program beats'))
    closed = plan.get('closed_form') or {}
    if closed.get('predicted_seconds'):
        reach = f'roofline / {closed["efficiency"]:.2f}, what its generation is known to reach'
        facts.append(('without compiler', f'{seconds(closed["predicted_seconds"])} ({reach})'))
    facts.append(('calibration', calibration(plan)))
    rows: Rows = ()
    head: tuple[str, ...] = ()
    if timeline:
        head = ('the seconds of a step', 'low', 'high', 'of low', 'of high')
        rows = _timeline(timeline)
        notes.append(
            'One end takes matrix products at a fixed share of the peak, the other the cycles that '
            'the compiler itself expects.'
        )
        for name, kernel in (plan.get('kernels') or {}).items():
            notes.append(f'Pallas kernels, {name}: {seconds(kernel["seconds"])} of a step.')
    title = 'Time of a step, predicted'
    return Section('time', title, tuple(facts), head, rows, tuple(notes), ('a step',))


def _timeline(timeline: Mapping[str, Mapping[str, float]]) -> Rows:
    low, high = both = ends(timeline)
    sums = [sum(end[name] for name in PARTS) for end in both]
    rows: list[tuple[str, ...]] = [
        (label, seconds(low[name]), seconds(high[name]),
         percent(low[name] / (sums[0] or 1)), percent(high[name] / (sums[1] or 1)))
        for name, label in PARTS.items()
    ]  # fmt: skip
    rows.append(('a step', *map(seconds, sums), '100 %', '100 %'))
    hidden = [end.get('hidden', 0.0) for end in both]
    if any(hidden):
        rows.append(('collectives hidden beside', *map(seconds, hidden), '–', '–'))
    return tuple(rows)


def _speed(plan: Plan) -> Section | None:
    step, facts = step_range(plan), list[tuple[str, str]]()
    if plan.get('bottleneck'):
        facts.append(('bottleneck', plan['bottleneck']))
    if step and plan.get('tokens_per_step'):
        per_second = [plan['tokens_per_step'] / t for t in step]
        chips = plan['topology']['chips']
        facts.append((f'{unit(plan)} per second', between(per_second, units.number)))
        facts.append(('of one chip', between((v / chips for v in per_second), units.number)))
    if mfu := plan.get('mfu'):
        text = between((mfu['low'], mfu['high']), percent)
        if mfu.get('causal_middle', mfu['middle']) != mfu['middle']:
            text += f', full scores counted; {percent(mfu["causal_middle"])} in the middle with '
            text += 'causal scores halved'
        if (plan.get('knobs') or {}).get('matmul', 'default') != 'default':
            text += '; the peak is that of bfloat16'
        facts.append(('MFU', text))
    return Section('speed', 'Speed', tuple(facts)) if facts else None


def _flops(plan: Plan) -> Section | None:
    flops = plan.get('flops_per_step')
    if not flops:
        return None
    labels = {
        'model': 'of the model, full scores',
        'model_causal': 'of the model, causal scores',
        'executed': 'executed by all devices',
        'executed_per_device': 'executed by one device, counted in the program',
        'closed_form_per_device': 'executed by one device, closed form',
        'kernels_per_device': 'of these in Pallas kernels',
        'recomputed_by_compiler_per_device': 'of these again, to save memory, by the compiler',
    }
    if flops.get('model') == flops.get('model_causal'):
        labels |= {'model': 'of the model', 'model_causal': ''}
    rows = [(text, units.number(flops[n])) for n, text in labels.items() if text and flops.get(n)]
    notes = []
    counted, closed = flops.get('executed_per_device'), flops.get('closed_form_per_device')
    if counted and closed:
        notes.append(f'Counted / closed form: {counted / closed:.4f}.')
    if flops.get('model') and flops.get('executed'):
        more = flops['executed'] / flops['model'] - 1
        text = f'{percent(more)} more' if more >= 0 else f'{percent(-more)} fewer'
        notes.append(
            f'Devices execute {text} than the model has by convention: what is computed twice '
            f'counts, masked scores do not.'
        )
    return Section('flops', 'FLOPs of a step', (), ('counted', 'FLOPs'), tuple(rows), tuple(notes))


def _collectives(plan: Plan) -> Section | None:
    found = plan.get('collectives')
    if found is None:
        return None
    if not found:
        return Section('collectives', 'Collectives', notes=('No device waits for another one.',))
    # A compiled program does not say what it exchanges.
    told = any(c.get('what') for c in found)
    what = ('what',) * told
    head = ('exchange', 'axes', *what, 'network', 'count', 'bytes', 'at link speed', 'exposed')
    rows: list[tuple[str, ...]] = [
        (c['kind'], axes(c['axes']), *(c.get('what') or '–',) * told, c['network'].upper(),
         f'{c["count"]:,.0f}', units.size(c['bytes']), seconds(c['seconds']),
         seconds(c['exposed_seconds']))
        for c in sorted(found, key=lambda c: -c['seconds'])
    ]  # fmt: skip
    total = [sum(c[n] for c in found) for n in ('bytes', 'seconds', 'exposed_seconds')]
    rows.append(('all', '', *('',) * told, '', '', units.size(total[0]), *map(seconds, total[1:])))
    notes = ['Bytes are what one device sends in a step; exposed is what no computation hides.']
    if not plan.get('compiler'):
        notes.append('Closed form: all of it is taken as exposed.')
    return Section('collectives', 'Collectives', (), head, tuple(rows), tuple(notes), ('all',))


def _training(plan: Plan) -> Section | None:
    training = plan.get('training')
    if not training:
        return None
    facts = [
        ('budget', f'{units.number(training["tokens"])} {unit(plan)}, {training["steps"]:,} steps'),
        ('time', between(training['seconds'], long_time)),
        ('chip-hours', between(training['chip_hours'], count)),
    ]
    if training.get('price'):
        each = f'at {training["price_per_chip_hour"]:g} a chip-hour'
        facts.append(('price', f'{between(training["price"], count)} {each}'))
    else:
        facts.append(('price', 'not known: no price of a chip-hour was given'))
    return Section('training', 'Training time and price, predicted', tuple(facts))


def _conventions(plan: Plan) -> Section:
    notes = (
        'A FLOP is an addition or a multiplication. MFU is the model\'s FLOPs, all scores of the '
        'attention counted and nothing twice (Chowdhery et al. 2022, appendix B), over what the '
        'chips could do in that time; with causal scores halved it is lower.',
        'All figures are of one step and one device where nothing else is said.',
        f'Times are predicted, not measured. Calibration: {calibration(plan)}.',
    )  # fmt: skip
    return Section('conventions', 'How to read this', notes=tuple(notes))

"""Why one mesh, remat policy or batch is better than another, in words: two tables of a plan."""

from collections.abc import Mapping
from typing import Any

from bigjax import units
from bigjax.plan.report.forms import between, mesh, percent, seconds
from bigjax.plan.report.view import PARTS, Plan, Section, step_range

_SMALL = 0.01  # of a step: smaller differences explain nothing


def ways_out(plan: Plan) -> Section | None:
    """The smallest changes that were tried where a plan does not fit."""
    tried = plan.get('ways_out')
    if not tried:
        return None
    rows = tuple(
        (way['flags'], 'yes' if way['fits'] else 'no', units.size(way['peak_bytes']),
         between(step, seconds) if (step := step_range(way)) else '–')
        for way in tried
    )  # fmt: skip
    head = ('change', 'fits', 'peak', 'predicted step')
    compiled = all(way.get('method', 'compiled') == 'compiled' for way in tried)
    note = 'Each was tried by compiling.' if compiled else 'By arithmetic alone, not compiled.'
    return Section('ways-out', 'Ways out', (), head, rows, (note,))


def search(plan: Plan) -> Section | None:
    """What `--search` tried, best first, each with what it pays."""
    found = plan.get('search')
    if not found:
        return None
    rows = tuple(
        (name(candidate), 'yes' if candidate['fits'] else 'no',
         _or_dash(candidate.get('peak_bytes'), units.size),
         between(step, seconds) if (step := step_range(candidate)) else '–',
         _or_dash(candidate.get('tokens_per_second'), units.number),
         _or_dash(candidate.get('mfu'), percent),
         why(candidate, found[0], plan['chip']['hbm_bytes']))
        for candidate in found
    )  # fmt: skip
    head = ('tried', 'fits', 'peak', 'predicted step', 'tokens/s', 'MFU', 'why it stands here')
    notes = (
        'By predicted tokens per second; what does not fit stands last. More and less is of as '
        'many examples as the best one takes in a step.',
    )
    return Section('search', 'Search', (), head, rows, notes)


def _or_dash(value: float | None, form: Any) -> str:
    return form(value) if value else '–'


def name(candidate: Mapping[str, Any]) -> str:
    """A candidate's knobs: fsdp=128,tensor=4 remat=full batch=2048."""
    remat, batch = candidate.get('remat'), candidate.get('batch')
    return ' '.join(
        filter(None, (mesh(candidate['mesh']), remat and f'remat={remat}',
                      batch and f'batch={batch}', '(asked for)' * candidate.get('asked', False)))
    )  # fmt: skip


def middle(candidate: Mapping[str, Any]) -> dict[str, float] | None:
    """A candidate's timeline halfway between low and high; None where nothing was compiled."""
    timeline = candidate.get('timeline')
    if not timeline:
        return None
    low, high = timeline['low'], timeline['high']
    return {part: (low[part] + high[part]) / 2 for part in (*PARTS, 'hidden')}


def why(candidate: Mapping[str, Any], best: Mapping[str, Any], hbm: float) -> str:
    """What a candidate pays, beside the best one: collectives, products, memory."""
    if not candidate['fits']:
        peak = candidate.get('peak_bytes')
        return f'needs {units.size(peak - hbm)} more than there are' if peak else 'does not fit'
    own, first = middle(candidate), middle(best)
    if own is None or first is None:
        return f'closed form: {_slower(candidate, best)}{_computed_twice(candidate)}'
    step = sum(first[part] for part in PARTS)
    if candidate is best:
        return (
            f'best: {percent(own["matmul"] / step)} matrix products, '
            f'{percent(own["exposed"] / step)} exposed collectives{_computed_twice(candidate)}'
        )
    # A larger batch takes longer and is not worse: compare at as many examples.
    scale = best.get('batch', 1) / candidate.get('batch', 1)
    more = {part: scale * own[part] - first[part] for part in PARTS}
    told = sorted((p for p in PARTS if abs(more[p]) > _SMALL * step), key=lambda p: -abs(more[p]))
    text = ', '.join(f'{_signed(more[p])} {PARTS[p]}' for p in told)
    extra = _computed_twice(candidate) if more['matmul'] > _SMALL * step else ''
    return (text or 'as fast as the best one') + extra + ' (same examples)' * (scale != 1)


def _slower(candidate: Mapping[str, Any], best: Mapping[str, Any]) -> str:
    own, first = candidate.get('tokens_per_second'), best.get('tokens_per_second')
    if candidate is best or not own or not first:
        return 'best' if candidate is best else 'not compared'
    return f'{first / own:.2f} times as long as the best one'


def _signed(value: float) -> str:
    return f'{"+" if value > 0 else "−"}{seconds(abs(value))}'


def _computed_twice(candidate: Mapping[str, Any]) -> str:
    flops = candidate.get('recomputed_flops')
    return f'; {units.number(flops)} FLOPs are computed twice' if flops else ''

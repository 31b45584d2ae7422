"""What a step waits for most, in a sentence, with the flag that would move it."""

from bigjax.plan.assess import Assessment
from bigjax.plan.records import Collective

SMALL = 0.1  # of a step: what is less holds nothing up
RECOMPUTED = 1.12  # executed over needed operations from which recomputation is worth naming


def bottleneck(found: Assessment) -> str:
    """Returns what takes most of the step that could be saved, and which flag would save it."""
    if found.walk is None:
        return _bound(found)
    low, high = found.walk.low, found.walk.high
    parts = {
        name: (getattr(low, name) + getattr(high, name)) / 2
        for name in ('matmul', 'kernels', 'other', 'exposed')
    }
    whole = sum(parts.values()) or 1.0
    if parts['exposed'] > SMALL * whole and parts['exposed'] >= parts['other']:
        worst = max(found.walk.collectives, key=lambda row: row.exposed_seconds)
        return (
            f'{_share(parts["exposed"] / whole)} exposed collectives, {_collective(worst, found)}'
        )
    largest = max(parts, key=parts.__getitem__)
    share = _share(parts[largest] / whole)
    if largest == 'other':
        if found.walk.hbm_bytes / found.topology.hardware.hbm_bytes_per_s < SMALL * whole:
            return (
                f'{share} neither products nor kernels, nor waiting for HBM, but many small '
                'operations, or much that is computed element by element; a larger --batch helps '
                'where they are small'
            )
        narrow = found.values.get('dtype') == 'bfloat16'
        way = 'a larger --batch has more products for it' if narrow else 'try --dtype=bfloat16'
        return f'{share} neither products nor kernels, but what reads and writes HBM; {way}'
    if largest == 'kernels':
        return f'{share} Pallas kernels, most of it attention; a shorter --seq has less of it'
    return f'{share} matrix products{_recomputed(found)}'


def _share(value: float) -> str:
    return f'{100 * value:.0f} % of the step is'


def _recomputed(found: Assessment) -> str:
    """What is computed twice, if that is worth a flag."""
    needed = found.closed.causal_flops / found.topology.devices
    more = found.closed.executed_flops / needed if needed else 1.0
    if more < RECOMPUTED or found.values.get('remat', 'none') == 'none':
        return '; only more chips, or --matmul=int8 where the model bears it, make them faster'
    keeps = '--remat=minimal' if found.values.get('remat') == 'full' else '--remat=none'
    return f', {100 * (more - 1):.0f} % more than are needed; {keeps} keeps more, if it fits'


def _collective(row: Collective, found: Assessment) -> str:
    """The exchange that is exposed most, and what would make it less."""
    axes = '+'.join(row.axes) or 'one device'
    what = f'most of them {row.kind} over {axes} ({row.network.upper()})'
    if row.network == 'dcn':
        return f'{what}; a larger --batch, or --accumulate, crosses slices less often for a token'
    if 'tensor' in row.axes:
        return f'{what}; a smaller tensor axis in --mesh sends less'
    if 'fsdp' in row.axes or 'data' in row.axes:
        return f'{what}; a larger --batch hides more of them, or fewer chips in fsdp of --mesh'
    if 'context' in row.axes:
        return f'{what}; a smaller context axis in --mesh sends less'
    if 'expert' in row.axes:
        return f'{what}; a smaller expert axis in --mesh sends less'
    return f'{what}; --microbatches makes the pipeline fill better'


def _bound(found: Assessment) -> str:
    """By the closed form: the largest of what bounds a step."""
    bounds = found.closed.bounds
    if not bounds:
        return 'not known without a compiler'
    name = max(bounds, key=bounds.__getitem__)
    advice = {
        'compute': f'by arithmetic, matrix products bound the step{_recomputed(found)}',
        'memory': 'by arithmetic, HBM bounds the step; a larger --batch reads parameters for more',
        'ici': 'by arithmetic, the links bound the step; a larger --batch, or another --mesh',
        'dcn': 'by arithmetic, the network between slices bounds the step; a larger --batch',
    }
    return advice.get(name, f'by arithmetic, {name} bounds the step')

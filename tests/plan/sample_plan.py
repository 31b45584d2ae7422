"""A whole plan as data, with no compiler: Llama 2 70B on v5p:8x8x8, figures of a first try."""

import copy
import dataclasses
from typing import Any

from bigjax.plan.records import ClosedForm, Collective, Memory, Timeline

GIB = 2**30
CHIPS, TOKENS = 512, 512 * 4 * 4096
MODEL_FLOPS, CAUSAL_FLOPS, EXECUTED = 444.5e9 * TOKENS, 428.0e9 * TOKENS, 8.38e15
PEAK, HBM, HBM_RATE, ICI_RATE = 459e12, 95.74 * GIB, 2765e9, 300e9
LOW = Timeline(matmul=19.2, kernels=1.9, other=0.95, exposed=1.13, hidden=6.2)
HIGH = Timeline(matmul=22.4, kernels=1.9, other=1.0, exposed=1.24, hidden=6.1)
MIDDLE = (LOW.seconds * HIGH.seconds) ** 0.5


def _collectives(exposed: float) -> tuple[Collective, ...]:
    """Returns the exchanges of a step; `exposed` scales what of them is not hidden."""
    return (
        Collective('all-gather', ('fsdp',), 275.4e9, 160, 'ici', 2.76, 0.2 * exposed, 'parameters'),
        Collective('all-reduce', ('fsdp',), 275.4e9, 80, 'ici', 2.75, 0.8 * exposed, 'gradients'),
        Collective('all-reduce', ('data', 'fsdp'), 8192.0, 3, 'ici', 2.4e-4, 2.4e-4, ''),
    )


def _candidate(mesh, remat, timeline, peak_gib, recomputed, batch=2048, fits=True) -> dict:
    high = dataclasses.replace(timeline, matmul=timeline.matmul * 1.15)
    middle = (timeline.seconds * high.seconds) ** 0.5
    return {
        'mesh': mesh, 'remat': remat, 'batch': batch, 'fits': fits,
        'predicted_step_seconds': {'low': timeline.seconds, 'high': high.seconds},
        'tokens_per_second': batch * 4096 / middle,
        'mfu': 444.5e9 * batch * 4096 / (CHIPS * PEAK * middle),
        'timeline': {'low': dataclasses.asdict(timeline), 'high': dataclasses.asdict(high)},
        'peak_bytes': round(peak_gib * GIB),
        'recomputed_flops': recomputed,
    }  # fmt: skip


def _closed_form() -> ClosedForm:
    parts = {
        'parameters': 0.51, 'optimizer': 1.02, 'gradients': 0.51, 'activations': 60.3,
        'collectives': 3.4, 'program': 0.0, 'other': 0.0,
    }  # fmt: skip
    memory = Memory({n: round(v * GIB) for n, v in parts.items()}, round(sum(parts.values()) * GIB))
    return ClosedForm(
        model_flops=MODEL_FLOPS, causal_flops=CAUSAL_FLOPS, executed_flops=8.36e15, memory=memory,
        collectives=_collectives(4.0), roofline_seconds=8.36e15 / PEAK,
        predicted_seconds=8.36e15 / PEAK / 0.74, efficiency=0.74, hbm_bytes=9.1e12,
    )  # fmt: skip


def plan() -> dict[str, Any]:
    """Returns the object that `--json` prints, with every part present."""
    parts = {
        'parameters': 0.51, 'optimizer': 1.02, 'gradients': 0.52, 'activations': 66.1,
        'collectives': 5.2, 'program': 0.05, 'other': 1.1,
    }  # fmt: skip
    closed = dataclasses.asdict(_closed_form())
    search = [
        _candidate('fsdp=512', 'save_out', LOW, 74.5, 1.2e15),
        _candidate('fsdp=512', 'full', Timeline(23.9, 2.4, 1.1, 1.13, 6.4), 41.2, 2.0e15),
        _candidate('fsdp=128,tensor=4', 'save_out', Timeline(19.9, 1.9, 1.2, 6.3, 9), 58.3, 1.2e15),
        _candidate('fsdp=64,tensor=8', 'full', Timeline(24.8, 2.5, 1.2, 9.7, 11.0), 33.0, 2.0e15),
        _candidate('data=8,fsdp=64', 'full', Timeline(24.0, 2.4, 1.1, 12.2, 3.9), 52.9, 2.0e15),
        _candidate('fsdp=512', 'none', Timeline(16.4, 1.5, 0.9, 1.1, 6.0), 153.0, 0.0, fits=False),
    ]  # fmt: skip
    steps = 2e12 / TOKENS
    hours = [t * steps * CHIPS / 3600 for t in (LOW.seconds, HIGH.seconds)]
    return {
        'experiment': 'llama',
        'knobs': {'size': '2-70b', 'batch': 2048, 'mesh': 'fsdp=512', 'remat': 'save_out'},
        'topology': {'name': 'v5p:8x8x8', 'chip': 'v5p', 'chips': CHIPS, 'devices': CHIPS,
                     'slices': 1, 'hosts': 128},
        'chip': {'peak_flops': PEAK, 'hbm_bytes': round(HBM), 'hbm_bytes_per_second': HBM_RATE,
                 'ici_bytes_per_second': ICI_RATE, 'dcn_bytes_per_second': 12.5e9},
        'mesh': {'stage': 1, 'data': 1, 'fsdp': 512, 'context': 1, 'expert': 1, 'tensor': 1},
        'method': 'compiled',
        'fits': True,
        'memory_bytes': {name: round(gib * GIB) for name, gib in parts.items()},
        'peak_bytes': round(sum(parts.values()) * GIB),
        'host_bytes': 0,
        'flops_per_step': {'model': MODEL_FLOPS, 'model_causal': CAUSAL_FLOPS,
                           'executed': EXECUTED * CHIPS, 'executed_per_device': EXECUTED,
                           'closed_form_per_device': 8.36e15, 'kernels_per_device': 3.1e14},
        'collectives': [dataclasses.asdict(c) for c in _collectives(1.2)],
        'predicted_step_seconds': {'low': LOW.seconds, 'middle': MIDDLE, 'high': HIGH.seconds},
        'timeline': {'low': dataclasses.asdict(LOW), 'high': dataclasses.asdict(HIGH)},
        'calibration': {'rows': 11, 'median_error': 0.059, 'worst_error': 0.142},
        'roofline_seconds': 8.36e15 / PEAK,
        'mfu': {'low': MODEL_FLOPS / (CHIPS * PEAK * HIGH.seconds),
                'middle': MODEL_FLOPS / (CHIPS * PEAK * MIDDLE),
                'high': MODEL_FLOPS / (CHIPS * PEAK * LOW.seconds),
                'causal_middle': CAUSAL_FLOPS / (CHIPS * PEAK * MIDDLE)},
        'tokens_per_step': TOKENS,
        'tokens_per_second': TOKENS / MIDDLE,
        'bottleneck': 'matmul: 83 % of the step is matrix products',
        'training': {'unit': 'tokens', 'tokens': 2e12, 'steps': round(steps),
                     'seconds': [LOW.seconds * steps, HIGH.seconds * steps],
                     'chip_hours': hours, 'price_per_chip_hour': 4.2,
                     'price': [4.2 * h for h in hours]},
        'kernels': {'attention': {'seconds': 1.9, 'flops': 3.1e14}},
        'closed_form': closed,
        'ways_out': [],
        'search': search,
        'notes': ['2 kernels have no measured schedule; their figure is a table of bundles'],
        'compiler': {'libtpu': '0.0.52', 'jax': '0.12.0.1', 'flags': '', 'cpu_seconds': 83.0},
    }  # fmt: skip


def fast() -> dict[str, Any]:
    """Returns what `--fast` (or no libtpu) gives: the closed form, nothing compiled."""
    full, closed = plan(), dataclasses.asdict(_closed_form())
    for part in ('timeline', 'kernels', 'search', 'compiler'):
        del full[part]
    del full['flops_per_step']['executed_per_device'], full['flops_per_step']['kernels_per_device']
    seconds = closed['predicted_seconds']
    return full | {
        'method': 'closed form', 'memory_bytes': closed['memory']['bytes'],
        'peak_bytes': closed['memory']['total'], 'collectives': closed['collectives'],
        'predicted_step_seconds': {'low': 0.9 * seconds, 'middle': seconds, 'high': 1.1 * seconds},
        'notes': ['libtpu is missing, nothing was compiled; try pip install "jax[tpu]==0.12.0.1"'],
    }  # fmt: skip


def too_large() -> dict[str, Any]:
    """Returns a plan that does not fit, with what would."""
    full = copy.deepcopy(plan())
    full |= {'fits': False, 'peak_bytes': 153 * GIB, 'predicted_step_seconds': None, 'mfu': None}
    full |= {
        'search': [],
        'timeline': None,
        'tokens_per_second': None,
        'training': None,
        'bottleneck': None,
    }
    full['memory_bytes']['activations'] += full['peak_bytes'] - sum(full['memory_bytes'].values())
    full['ways_out'] = [
        {'flags': '--remat=full', 'fits': True, 'peak_bytes': round(41.2 * GIB),
         'predicted_step_seconds': {'low': 28.5, 'high': 32.1}},
        {'flags': '--batch=1024', 'fits': True, 'peak_bytes': round(79.0 * GIB),
         'predicted_step_seconds': {'low': 11.9, 'high': 13.6}},
        {'flags': '--mesh=fsdp=256,tensor=2', 'fits': False, 'peak_bytes': 104 * GIB,
         'predicted_step_seconds': None},
    ]  # fmt: skip
    return full

"""A published run as this repository would do it: knobs, compiled in a child, walked, summed up."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from bigjax.plan.calibration import Row, shape, step
from bigjax.plan.program.compiled import Compiled, CompileError, Request, compile_step
from bigjax.plan.program.kernels import from_table
from bigjax.plan.program.timeline import walk
from bigjax.plan.records import Timeline, Walk
from bigjax.plan.topology import parse
from bigjax.run import UsageError

# The policy of ours that is nearest to what a row keeps: 'dots_no_batch' is that very set, and
# ours that keep projections keep attention's results as well, so that its kernel runs once:
# 'save_qkv' keeps as many bytes as a set of projections that has attention's last one, too.
NEAREST = {
    (): 'full',
    ('mlp_in', 'mlp_out', 'out', 'qkv'): 'dots_no_batch',
    ('mlp_out', 'out', 'qkv'): 'save_qkv',
    ('out', 'qkv'): 'save_qkv',
    ('qkv',): 'save_qkv',
    ('context', 'qkv'): 'save_qkv',
    ('context', 'mlp_out', 'qkv'): 'save_out',
    ('context', 'mlp_out'): 'save_attention',
    ('mlp_out',): 'full',
}


def knobs(row: Row) -> tuple[str, dict[str, Any]]:
    """Returns the experiment that is a row's model, and its knobs."""
    model, how = shape(row), step(row)
    remat = 'none' if how.saved is None else NEAREST[tuple(sorted(how.saved))]
    if how.offloaded and remat == 'save_qkv':
        remat = 'offload_qkv'
    values: dict[str, Any] = {
        'depth': model.layers,
        'heads': model.heads,
        'width': model.width,
        'vocab': model.vocab,
        'seq': row['length'],
        'batch': row['batch'],
        'mesh': row['mesh'],
        'dcn': row.get('dcn', ''),
        'accumulate': how.accumulate,
        'microbatches': how.microbatches,
        'matmul': how.matmul,
        'remat': row.get('policy', remat),
        'scan': True,
        'dtype': 'bfloat16',
    }
    if model.routing.experts:
        names = ('experts', 'experts_per_token', 'capacity_factor')
        values |= {name: getattr(model.routing, name) for name in names}
    if not model.gated:
        return 'gpt3', values | {'size': '175B', 'bias': model.bias}
    more = {'kv_heads': model.kv_heads, 'head_dim': model.head_dim, 'hidden': model.hidden}
    return 'llama', values | more | {'size': '2-7B'}


def compile_row(row: Row, timeout: int) -> dict[str, Any]:
    """Returns what the compiled program of a row says, small enough to be kept.

    Args:
      row: of calibration.json.
      timeout: seconds that the compiler may take.
    """
    name, values = knobs(row)
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = compile_step(Request(name, values, row['topology']), Path(folder), timeout)
        except (CompileError, UsageError) as error:
            return {'error': str(error), 'remat': values['remat']}
    return summed_up(row, made)


def summed_up(row: Row, made: Compiled) -> dict[str, Any]:
    """Returns what a row's compiled program says."""
    meta, topology = made.meta, parse(row['topology'])
    found = {
        'remat': knobs(row)[1]['remat'],
        'libtpu': meta['libtpu'],
        'cpu_seconds': round(meta['cpu_seconds'], 1),
        'peak_rss_bytes': meta['peak_rss_bytes'],
        'fits': made.fits,
    }
    if not made.fits:
        return {**found, 'message': meta.get('message', ''), **made.memory}
    said = walk(
        made.text,
        chip=topology.hardware,
        mesh_shape=meta['mesh'],
        kernels=from_table(topology.hardware),
        device_ids=meta.get('device_ids'),
        dcn_axes=step(row).dcn,
        coordinates=[tuple(place) for place in meta.get('coordinates', ())],
        wrap=topology.wrap,
    )
    return {**found, 'hbm_bytes': made.memory['peak_memory'], **_summary(said)}


def _summary(said: Walk) -> dict[str, Any]:
    return {
        'low': _timeline(said.low),
        'high': _timeline(said.high),
        'flops': said.flops,
        'rematerialized_flops': said.rematerialized_flops,
        'collectives': [{**dataclasses.asdict(c), 'axes': list(c.axes)} for c in said.collectives],
        'notes': list(said.notes),
    }


def _timeline(seconds: Timeline) -> dict[str, float]:
    return {**dataclasses.asdict(seconds), 'seconds': seconds.seconds}

"""The JSON object of a plan, from what is known of one configuration."""

import dataclasses
import math
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from bigjax.mesh import mesh_text, parse_mesh
from bigjax.plan.assess import Assessment
from bigjax.plan.bottleneck import bottleneck
from bigjax.plan.options import PlanOptions
from bigjax.plan.trust import calibration

SECONDS_PER_HOUR = 3600


def summary(name: str, found: Assessment, options: PlanOptions) -> dict[str, Any]:
    """Returns what `--json` prints, but for ways out and a search.

    Args:
      name: of the experiment.
      found: what is known of it.
      options: prices, budgets and flags.
    """
    topology, walk = found.topology, found.walk
    run = found.experiment.run
    collectives = walk.collectives if walk else found.closed.collectives
    step = found.step_seconds
    return {
        'experiment': name,
        'knobs': dict(found.values),
        'topology': {
            'name': topology.name,
            'chip': topology.hardware.name,
            'chips': topology.chips,
            'devices': topology.devices,
            'slices': topology.slices,
            'hosts': topology.hosts,
        },
        'chip': chip(found),
        'mesh': parse_mesh(run.mesh, topology.devices),
        'method': 'compiled' if found.compiled else 'closed form',
        'fits': found.fits,
        'memory_bytes': dict(found.memory.bytes),
        'peak_bytes': found.memory.total,
        'hbm_bytes': topology.hardware.hbm_bytes,
        'host_bytes': found.memory.host_bytes,
        'flops_per_step': flops(found),
        'hbm_bytes_moved': walk.hbm_bytes if walk else found.closed.hbm_bytes,
        'collectives': [dataclasses.asdict(row) for row in collectives],
        'predicted_step_seconds': step and spread(step),
        'timeline': walk and {'low': _timeline(walk.low), 'high': _timeline(walk.high)},
        'calibration': calibration(topology.hardware.name, compiled=bool(walk))
        if walk or found.decoder
        else None,
        'roofline_seconds': found.closed.roofline_seconds,
        'mfu': step and mfu(found, step),
        'tokens_per_step': found.tokens_per_step,
        'tokens_per_second': found.tokens_per_second,
        'bottleneck': bottleneck(found) if step else None,
        'training': step and training(found, step, options),
        'kernels': kernels(found),
        'closed_form': dataclasses.asdict(found.closed),
        'ways_out': [],
        'notes': list(dict.fromkeys(found.notes)),
        'compiler': compiler(found, options),
    }


def _timeline(timeline: Any) -> dict[str, float]:
    return {**dataclasses.asdict(timeline), 'seconds': timeline.seconds}


def chip(found: Assessment) -> dict[str, float]:
    """Returns the figures of one device; where the compiler names its HBM, that is taken."""
    hardware, said = found.topology.hardware, found.compiled and found.compiled.memory
    return {
        'peak_flops': hardware.peak_flops,
        'hbm_bytes': (said or {}).get('hbm_bytes', hardware.hbm_bytes),
        'hbm_bytes_per_second': hardware.hbm_bytes_per_s,
        'ici_bytes_per_second': hardware.ici_bytes_per_s,
        'dcn_bytes_per_second': hardware.dcn_bytes_per_s,
    }


def flops(found: Assessment) -> dict[str, Any]:
    """Returns operations of a step, by convention and as they are executed."""
    closed, walk = found.closed, found.walk
    each = walk.flops if walk else closed.executed_flops
    counted = {
        'model': closed.model_flops,
        'model_causal': closed.causal_flops,
        'executed': each * found.topology.devices,
        'closed_form_per_device': closed.executed_flops,
        'convention': 'two for a multiply-add; model: all scores of attention, nothing twice',
    }
    if walk:
        counted |= {'executed_per_device': walk.flops, 'kernels_per_device': walk.kernel_flops}
        counted['recomputed_by_compiler_per_device'] = walk.rematerialized_flops
    return counted


def spread(step: tuple[float, float]) -> dict[str, float]:
    """Returns both ends of a range and its geometric middle."""
    low, high = step
    return {'low': low, 'middle': math.sqrt(low * high), 'high': high}


def mfu(found: Assessment, step: tuple[float, float]) -> dict[str, Any]:
    """Returns the model's operations over what the chips could have done, full scores counted."""
    peak = found.topology.hardware.peak_flops * found.topology.devices
    low, high = step
    middle = math.sqrt(low * high)
    return {
        'low': found.closed.model_flops / peak / high,
        'middle': found.closed.model_flops / peak / middle,
        'high': found.closed.model_flops / peak / low,
        'causal_middle': found.closed.causal_flops / peak / middle,
        'convention': 'full scores of attention; causal_middle counts half of them',
    }


def training(found: Assessment, step: tuple[float, float], options: PlanOptions) -> dict[str, Any]:
    """Returns steps, time and price of the budget, or of the run's steps where there is none."""
    run = found.experiment.run
    steps = math.ceil(options.tokens / found.tokens_per_step) if options.tokens else run.steps
    seconds = [t * steps for t in step]
    hours = [t * found.topology.chips / SECONDS_PER_HOUR for t in seconds]
    priced = {'price_per_chip_hour': options.price, 'price': [options.price * h for h in hours]}
    return {
        'unit': found.experiment.task.unit,
        'tokens': steps * found.tokens_per_step,
        'steps': steps,
        'seconds': seconds,
        'chip_hours': hours,
        **(priced if options.price else {}),
    }


def kernels(found: Assessment) -> dict[str, Any]:
    """Returns the share of Pallas kernels, from `pallas_kernels.schedule`'s figures."""
    walk = found.walk
    if not walk or not walk.kernel_flops:
        return {}
    return {'attention and convolution': {'seconds': walk.low.kernels, 'flops': walk.kernel_flops}}


def compiler(found: Assessment, options: PlanOptions) -> dict[str, Any] | None:
    """Returns what compiled, with which flags, at which cost; None where nothing was compiled."""
    if not found.compiled:
        return None
    meta = found.compiled.meta
    return {
        'libtpu': meta['libtpu'],
        'jax': metadata.version('jax'),
        'flags': options.libtpu_flags,
        'cpu_seconds': meta['cpu_seconds'],
        'peak_rss_bytes': meta['peak_rss_bytes'],
        'memory': found.compiled.memory,
    }


def candidate(found: Assessment, knobs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns one row of a search: what was tried, and what came of it."""
    step, walk, run = found.step_seconds, found.walk, found.experiment.run
    sizes = parse_mesh(run.mesh, found.topology.devices)
    more = found.closed.executed_flops * found.topology.devices - found.closed.causal_flops
    return {
        'mesh': mesh_text(sizes),
        'remat': found.values.get('remat', ''),
        'batch': run.batch,
        'flags': as_flags(knobs),
        'fits': found.fits,
        'method': 'compiled' if found.compiled else 'closed form',
        'predicted_step_seconds': step and spread(step),
        'tokens_per_second': found.tokens_per_second,
        'mfu': step and mfu(found, step)['middle'],
        'timeline': walk and {'low': _timeline(walk.low), 'high': _timeline(walk.high)},
        'peak_bytes': found.memory.total,
        # The gradient of attention computes its scores again whatever blocks keep.
        'recomputed_flops': more if more > 0.01 * found.closed.causal_flops else 0.0,
    }


def as_flags(knobs: Mapping[str, Any]) -> str:
    """Returns knobs as they are typed: --remat=full --batch=512."""
    return ' '.join(f'--{name}={value}' for name, value in knobs.items())

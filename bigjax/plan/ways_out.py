"""The smallest changes with which an experiment fits its machine, tried by compiling."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigjax.plan.assess import Assessment, assess
from bigjax.plan.candidates import Change, closed, smaller
from bigjax.plan.options import PlanOptions
from bigjax.plan.summary import as_flags, spread
from bigjax.plan.topology import Topology, parse, shapes
from bigjax.run import UsageError

ENOUGH, MOST = 2, 4  # ways that fit, and that are tried


def ways_out(
    name: str, found: Assessment, options: PlanOptions, kept: Path
) -> tuple[list[dict[str, Any]], str]:
    """Returns what was tried, the best first, and a sentence where nothing fits.

    Arithmetic chooses the order: fewest knobs changed, then the fastest of those that it says fit.

    Args:
      name: of the experiment.
      found: what does not fit.
      options: how far to go.
      kept: folder of what was compiled before.
    """
    limit = found.topology.hardware.hbm_bytes
    ranked: list[tuple[tuple[int, float], Change]] = []
    # The closed form may be off: what it says of the program that was compiled scales the rest.
    scale = found.memory.total / max(found.closed.memory.total, 1) if found.compiled else 1.0
    for change in smaller(name, found):
        guess = closed(name, found, change)
        if guess and guess.closed.memory.total * max(scale, 1.0) <= limit:
            # A smaller batch trains another model than the one asked for.
            cost = len(change) + 2 * ('batch' in change)
            ranked.append(((cost, guess.closed.predicted_seconds / guess.tokens_per_step), change))
    tried: list[dict[str, Any]] = []
    for _, change in sorted(ranked, key=lambda pair: pair[0]):
        if len(tried) >= MOST or sum(way['fits'] for way in tried) >= ENOUGH:
            break
        try:
            way = assess(name, {**found.values, **change}, found.topology, options, kept)
        except UsageError:
            continue
        # Arithmetic alone is no trial where the compiler failed.
        if way.compiled or not found.compiled:
            tried.append(_row(change, way))
    fitting = [way for way in tried if way['fits']]
    note = '' if fitting else larger(name, found)
    return [*fitting, *(way for way in tried if not way['fits'])], note


def _row(change: Mapping[str, Any], way: Assessment) -> dict[str, Any]:
    step = way.step_seconds
    return {
        'flags': as_flags(change),
        'fits': way.fits,
        'method': 'compiled' if way.compiled else 'closed form',
        'peak_bytes': way.memory.total,
        'predicted_step_seconds': step and spread(step),
    }


def larger(name: str, found: Assessment) -> str:
    """Returns the smallest machine of the generation that holds it, by arithmetic."""
    hardware, here = found.topology.hardware, found.topology.name
    for topology in _growing(found.topology):
        devices = topology.devices
        run = found.experiment.run
        batch = max(1, round(run.batch / devices)) * devices
        change: Change = {'mesh': f'fsdp={devices}', 'batch': batch}
        if topology.slices > 1:
            inside = devices // topology.slices
            change['mesh'] = f'data={topology.slices},fsdp={inside}'
        if 'remat' in found.values or hasattr(found.experiment.model, 'remat'):
            change['remat'] = 'full'
        guess = closed(name, found, {'accumulate': 1, 'dcn': '', **change}, topology)
        if guess and guess.closed.memory.total <= hardware.hbm_bytes:
            return (
                f'no mesh, remat policy or batch that was tried fits {here}; by the closed form, '
                f'the smallest {hardware.name} that holds it: --topology={topology.name} '
                f'{as_flags(change)}'
            )
    return (
        f'no mesh, remat policy or batch that was tried fits {here}, and by the closed form no '
        f'slice of {hardware.name} does; try a smaller model, or a chip with more HBM: '
        f'--topology=v5p:8x8x8'
    )


def _growing(topology: Topology) -> list[Topology]:
    """Larger machines of a generation, the smallest first."""
    if not topology.hardware.is_tpu:
        counts = [topology.chips * 2**i for i in range(1, 8)]
        return [parse(f'{topology.hardware.name}:{max(8, count)}') for count in counts]
    found = [
        dataclasses.replace(topology, shape=shape, slices=1)
        for shape in shapes(topology.hardware)
        if math.prod(shape) > topology.chips
    ]
    powers = [t for t in found if t.chips & (t.chips - 1) == 0]
    unique = {t.chips: t for t in sorted(powers, key=_cubic, reverse=True)}
    return [unique[chips] for chips in sorted(unique)]


def _cubic(topology: Topology) -> float:
    return max(topology.shape) / min(topology.shape)

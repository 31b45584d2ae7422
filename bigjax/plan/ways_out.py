"""The smallest changes with which an experiment fits its machine, tried by compiling."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bigjax.plan.assess import Assessment, assess
from bigjax.plan.candidates import Change, closed, on_mesh, smaller
from bigjax.plan.hardware import HARDWARE, Hardware
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
    Once a way fits, more of the same knobs is no other way out, and is not tried.

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
    enough: list[set[str]] = []
    for _, change in tqdm(sorted(ranked, key=lambda pair: pair[0]), 'ways out', leave=False):
        if len(tried) >= MOST or sum(way['fits'] for way in tried) >= ENOUGH:
            break
        if set(change) in enough:
            continue
        try:
            way = assess(name, {**found.values, **change}, found.topology, options, kept)
        except UsageError:
            continue
        # Arithmetic alone is no trial where the compiler failed.
        if way.compiled or not found.compiled:
            tried.append(_row(change, way))
            enough += [set(change)] if way.fits else []
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
    """Returns the smallest machine that holds it, by arithmetic: of the generation, or of others.

    Args:
      name: of the experiment.
      found: what does not fit.
    """
    hardware, here = found.topology.hardware, found.topology.name
    tried = f'no mesh, remat policy or batch that was tried fits {here}'
    if flags := _holds(name, found, _growing(hardware, found.topology.chips)):
        return f'{tried}; by the closed form, the smallest {hardware.name} that holds it: {flags}'
    for other in sorted(HARDWARE.values(), key=lambda other: other.hbm_bytes):
        if other.is_tpu != hardware.is_tpu or other.hbm_bytes <= hardware.hbm_bytes:
            continue
        if flags := _holds(name, found, _growing(other)):
            return (
                f'{tried}, and by the closed form no slice of {hardware.name} does; the '
                f'smallest {other.name} that holds it: {flags}'
            )
    return (
        f'{tried}, and by the closed form nothing larger does, nor a chip with more HBM; '
        'try a smaller model'
    )


def _holds(name: str, found: Assessment, machines: Sequence[Topology]) -> str:
    """The flags with which the first of some machines holds it by arithmetic; '' if none does."""
    run = found.experiment.run
    # What is of this machine, and may not be of a larger one.
    reset = {'accumulate': 1, 'dcn': '', 'eval_batch': 0}
    reset = {knob: value for knob, value in reset.items() if getattr(run, knob) != value}
    for topology in machines:
        devices = topology.devices
        batch = max(1, round(run.batch / devices)) * devices
        change = {**reset, **on_mesh(f'fsdp={devices}', found, topology), 'batch': batch}
        if 'remat' in found.values or hasattr(found.experiment.model, 'remat'):
            change['remat'] = 'full'
        guess = closed(name, found, change, topology)
        if guess and guess.closed.memory.total <= topology.hardware.hbm_bytes:
            return f'--topology={topology.name} {as_flags(change)}'
    return ''


def _growing(hardware: Hardware, beyond: int = 0) -> list[Topology]:
    """Machines of a generation with more than so many chips, the smallest first."""
    if not hardware.is_tpu:
        counts = [8 * 2**i for i in range(12) if beyond < 8 * 2**i <= hardware.largest]
        return [parse(f'{hardware.name}:{count}') for count in counts]
    found = [Topology(hardware, s) for s in shapes(hardware) if math.prod(s) > beyond]
    powers = [t for t in found if t.chips & (t.chips - 1) == 0]
    unique = {t.chips: t for t in sorted(powers, key=_cubic, reverse=True)}
    return [unique[chips] for chips in sorted(unique)]


def _cubic(topology: Topology) -> float:
    return max(topology.shape) / min(topology.shape)

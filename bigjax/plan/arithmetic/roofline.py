"""The least time that a step can take, and the share of that rate which published runs reach."""

import json
from collections.abc import Sequence
from pathlib import Path

from bigjax.plan.arithmetic.closed_flops import busy_seconds
from bigjax.plan.arithmetic.closed_memory import head_bytes, kept_bytes
from bigjax.plan.arithmetic.shape import FSDP, Shape, Step, parameter_bytes
from bigjax.plan.records import Collective

ROWS = Path(__file__).parents[1] / 'calibration.json'
# Of a generation without published rows; the summary in the file says of which there are some.
UNKNOWN = 0.6


def hbm_bytes(shape: Shape, step: Step) -> float:
    """Returns what one device reads and writes in a step, at least.

    Parameters are read twice and their gradients written once, as products need them; the
    optimizer reads gradients, and reads and writes all of its state; what blocks make is written
    and read in either pass.
    """
    state = parameter_bytes(shape, step)
    used = state * step.item / 4 * step.size(FSDP) * step.accumulate
    made = sum(kept_bytes(shape, step, step.tokens).values()) * step.accumulate
    layers = shape.layers / step.stages
    return 3 * used + state * (3 + 2 * step.slots) + 6 * made * layers + 2 * head_bytes(shape, step)


def roofline(shape: Shape, step: Step, collectives: Sequence[Collective]) -> dict[str, float]:
    """Returns the seconds of a step for each thing that can bound it, were it alone.

    'compute': executed operations at peak; 'memory': HBM; 'ici' and 'dcn': the networks.
    """
    seconds = {
        'compute': busy_seconds(shape, step),
        'memory': hbm_bytes(shape, step) / step.topology.hardware.hbm_bytes_per_s,
    }
    for network in ('ici', 'dcn'):
        seconds[network] = sum(c.seconds for c in collectives if c.network == network)
    return seconds


def efficiency(hardware: str) -> tuple[float, str]:
    """Returns the share of the roofline that published runs of a generation reach, and its source.

    The mean over the rows of `calibration.json`, whose `--write` computes it.
    """
    known = json.loads(ROWS.read_text('utf-8'))['efficiency'].get(hardware)
    if not known:
        return UNKNOWN, f'no published run of {hardware} is known; {UNKNOWN} is a guess'
    return known['value'], (
        f'{known["rows"]} published runs of {hardware}, each predicted by the others: median error '
        f'{known["median"]:.1%}, worst {known["worst"]:.1%}'
    )

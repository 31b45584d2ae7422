"""What a compiled step holds in HBM at its peak, by category.

The arguments are known by their shardings, the rest by what lives at the peak of the program (see
`bigjax.plan.program.live`). What that does not explain of the compiler's own peak is `other`.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from bigjax.plan.program.hlo import Module
from bigjax.plan.program.live import live_at_peak
from bigjax.plan.records import CATEGORIES, Memory


def account(module: Module, analysis: Mapping[str, Any]) -> Memory:
    """Returns the memory of a compiled step; the categories sum up to the compiler's peak and code.

    Args:
      module: the program.
      analysis: `memory.json` of `compile.py`; float32 values that have the shape of what one device
        holds of a parameter are gradients.
    """
    state, code, peak = analysis['state'], analysis['generated_code_size'], hbm_peak(analysis)
    found = dict.fromkeys(CATEGORIES, 0)
    found |= {'parameters': state['parameters'], 'optimizer': state['optimizer']}
    given = sum(state.values())
    live = live_at_peak(module, {tuple(dims) for dims in analysis['shapes']})
    sizes = Counter[str]()
    for buffer in live:
        sizes[buffer.category] += buffer.bytes
    # Too much is found where the compiler shares buffers that nothing in the program tells of.
    room, walked = max(peak - given, 0), sum(sizes.values())
    scale = min(1.0, room / walked) if walked else 1.0
    for category, size in sizes.items():
        found[category] += int(size * scale)
    found['program'] = code
    found['other'] += peak + code - sum(found.values())
    host = sum(analysis[f'host_{part}_size'] for part in ('argument', 'temp'))
    return Memory(found, peak + code, host)


def hbm_peak(analysis: Mapping[str, Any]) -> int:
    """Returns the compiler's peak of HBM, without code.

    What it calls the peak is that of VMEM where a small program has more there.
    """
    held = analysis['argument_size'] + analysis['output_size'] - analysis['alias_size']
    return min(analysis['peak_memory'], held + analysis['temp_size'])

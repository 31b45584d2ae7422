"""The ops that the schedule tool knows, each a module.

A module has `RIVALS`, `Case` (what is asked: a dataclass of plain values, and its `op`), `work`
(what any implementation has to do), `build` (a function and its arguments) and `chosen` (the block
sizes that the kernel here takes).
"""

from types import ModuleType

from pallas_kernels import schedule_attention, schedule_conv

MODULES: dict[str, ModuleType] = {
    'attention': schedule_attention,
    'conv2d': schedule_conv,
    'conv1d': schedule_conv,
    'gated_conv1d': schedule_conv,
}


def module(op: str) -> ModuleType:
    """The module of an op; ValueError names the known ones."""
    if op not in MODULES:
        raise ValueError(f'op must be one of {", ".join(MODULES)}, not {op!r}')
    return MODULES[op]

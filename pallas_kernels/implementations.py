"""Which implementation of an op runs: the one that is named, or the one for the chip at hand."""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal, get_args

from pallas_kernels.chip import Chip, current_chip

Implementation = Literal['reference', 'xla', 'tpu', 'gpu']


def implementation(op: str, impl: Implementation) -> ModuleType:
    """Returns the module of an implementation, in the folder `op`: its passes, and `refuses`.

    Raises:
      ValueError: there is none of that name.
    """
    if impl not in get_args(Implementation):
        raise ValueError(
            f"impl={impl!r}: must be 'reference', 'xla', 'tpu', 'gpu' or None; try impl='xla'"
        )
    # What runs kernels is imported when it is used: a CPU need not have what a GPU needs.
    return importlib.import_module(f'{__package__}.{op}.{impl}')


def chosen(
    op: str,
    impl: Implementation | None,
    operands: Any,
    spec: Any,
    wins: Callable[[Any, Any, Chip], bool] = lambda operands, spec, chip: True,
) -> ModuleType:
    """Returns the module that runs these operands.

    None is the kernel of the chip that is compiled for, where there is one, it takes these operands
    and `wins` says so, else 'xla'.

    Raises:
      ValueError: the implementation named does not exist or does not take these operands.
    """
    if impl is None:
        chip = current_chip()
        if chip is not None and wins(operands, spec, chip):
            kernel = implementation(op, 'tpu' if chip.is_tpu else 'gpu')
            if not kernel.refuses(operands, spec):
                return kernel
        return implementation(op, 'xla')
    module = implementation(op, impl)
    if reason := module.refuses(operands, spec):
        raise ValueError(f"impl='{impl}': {reason}; try impl='xla'")
    return module

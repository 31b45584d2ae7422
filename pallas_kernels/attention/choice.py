"""Which implementation runs: the one that is named, or the one for the chip at hand."""

from types import ModuleType
from typing import Literal

from pallas_kernels.attention import reference, xla
from pallas_kernels.attention.arguments import Operands, Spec
from pallas_kernels.chip import current_chip

Implementation = Literal['reference', 'xla', 'tpu', 'gpu']


def implementation(impl: Implementation) -> ModuleType:
    """Returns the module with the `forward`, `backward` and `refuses` of an implementation.

    Raises:
      ValueError: there is none of that name.
    """
    # What runs kernels is imported when it is used: a CPU need not have what a GPU needs.
    match impl:
        case 'reference':
            return reference
        case 'xla':
            return xla
        case 'tpu':
            from pallas_kernels.attention import tpu

            return tpu
        case 'gpu':
            from pallas_kernels.attention import gpu

            return gpu
    raise ValueError(
        f"impl={impl!r}: must be 'reference', 'xla', 'tpu', 'gpu' or None; try impl='xla'"
    )


def chosen(impl: Implementation | None, operands: Operands, spec: Spec) -> ModuleType:
    """Returns the module that runs these operands.

    None is the kernel of the chip that is compiled for, where there is one and it takes these
    operands, else 'xla'.

    Raises:
      ValueError: the implementation named does not exist or does not take these operands.
    """
    if impl is None:
        chip = current_chip()
        if chip is None:
            return xla
        kernel = implementation('tpu' if chip.is_tpu else 'gpu')
        return xla if kernel.refuses(operands, spec) else kernel
    module = implementation(impl)
    if reason := module.refuses(operands, spec):
        raise ValueError(f"impl='{impl}': {reason}; try impl='xla'")
    return module

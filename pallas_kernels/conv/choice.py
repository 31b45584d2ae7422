"""Which implementation runs: the one that is named, or the one for the chip at hand."""

from types import ModuleType
from typing import Literal

from pallas_kernels.chip import current_chip
from pallas_kernels.conv import reference, xla
from pallas_kernels.conv.arguments import Operands, Spec
from pallas_kernels.conv.wins import wins

Implementation = Literal['reference', 'xla', 'tpu', 'gpu']


def implementation(impl: Implementation) -> ModuleType:
    """Returns the module with an implementation's `forward`, both gradients and `refuses`.

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
            from pallas_kernels.conv import tpu

            return tpu
        case 'gpu':
            from pallas_kernels.conv import gpu

            return gpu
    raise ValueError(
        f"impl={impl!r}: must be 'reference', 'xla', 'tpu', 'gpu' or None; try impl='xla'"
    )


def chosen(impl: Implementation | None, operands: Operands, spec: Spec) -> ModuleType:
    """Returns the module that runs these operands.

    None is the kernel of the chip that is compiled for, where it takes these operands and is
    faster there than XLA's own convolution (`wins`), else 'xla'.

    Raises:
      ValueError: the implementation named does not exist or does not take these operands.
    """
    if impl is None:
        chip = current_chip()
        if chip is None or not wins(operands, spec, chip):
            return xla
        kernel = implementation('tpu' if chip.is_tpu else 'gpu')
        return xla if kernel.refuses(operands, spec) else kernel
    module = implementation(impl)
    if reason := module.refuses(operands, spec):
        raise ValueError(f"impl='{impl}': {reason}; try impl='xla'")
    return module

"""Which implementation of attention runs: see `pallas_kernels.implementations`."""

from types import ModuleType

from pallas_kernels import implementations
from pallas_kernels.attention.arguments import Operands, Spec
from pallas_kernels.implementations import Implementation

__all__ = ['Implementation', 'chosen', 'implementation']


def implementation(impl: Implementation) -> ModuleType:
    """Returns the module with an implementation's `forward`, `backward` and `refuses`."""
    return implementations.implementation('attention', impl)


def chosen(impl: Implementation | None, operands: Operands, spec: Spec) -> ModuleType:
    """Returns the module that runs these operands; None takes a chip's kernel where it can."""
    return implementations.chosen('attention', impl, operands, spec)

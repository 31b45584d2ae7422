"""Where the taps of a kernel meet the input, along one spatial dimension.

Legend: B batch, H W rows and columns of what is convolved, K taps, C channels.
"""

import dataclasses
import math

from pallas_kernels.conv.arguments import Operands, Spec


@dataclasses.dataclass(frozen=True)
class Axis:
    """One dimension of a convolution: output p reads, at tap k, `p * stride + first + k * step`.

    Positions outside of [0, size) hold zeros. There are `out` outputs and `taps` taps.
    """

    size: int
    out: int
    taps: int
    first: int = 0
    step: int = 1
    stride: int = 1

    @property
    def last(self) -> int:
        """What the last tap reads for output 0."""
        return self.first + (self.taps - 1) * self.step


def forward_axes(operands: Operands, spec: Spec) -> tuple[Axis, Axis]:
    """Returns rows and columns of a convolution."""
    sizes, taps = operands.x_BHWC.shape[1:3], operands.w_KLDO.shape[:2]
    rows, columns = (
        Axis(*numbers)
        for numbers in zip(
            sizes,
            spec.out_size(sizes, taps),
            taps,
            [-low for low, _ in spec.padding],
            spec.dilation,
            spec.stride,
            strict=True,
        )
    )
    return rows, columns


def gradient_axes(axis: Axis) -> list[tuple[Axis | None, slice]]:
    """Returns, for each phase of the input modulo the stride, what convolves the cotangents to it.

    Input h is read by output p at tap k where h = p * stride + first + k * step, so those h that
    leave the same remainder are a convolution without stride of the cotangents with every n-th
    tap, reversed; the slice says which. All phases have the same number of outputs, the last ones
    maybe outside of the input. The axis is None where no tap reads the phase.
    """
    every = axis.stride // math.gcd(axis.stride, axis.step)
    phases: list[tuple[Axis | None, slice]] = []
    for phase in range(axis.stride):
        met = [
            k for k in range(axis.taps) if (phase - axis.first - k * axis.step) % axis.stride == 0
        ]
        if not met:
            phases.append((None, slice(0)))
            continue
        first = (phase - axis.first - met[-1] * axis.step) // axis.stride
        step = every * axis.step // axis.stride
        out = -(-axis.size // axis.stride)
        stop = met[0] - 1 if met[0] else None
        phases.append((Axis(axis.out, out, len(met), first, step), slice(met[-1], stop, -every)))
    return phases

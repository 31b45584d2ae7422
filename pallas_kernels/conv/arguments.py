"""What a convolution takes: operands, static specification, block sizes.

Legend: B batch, H W input rows and columns, K L kernel rows and columns, P Q output rows and
columns, C input channels, D = C / groups channels of a kernel, O output channels, T positions.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax

Pair = tuple[int, int]
Padding = str | Sequence[Pair]


class Operands(NamedTuple):
    """The arrays of one call; None where absent. A conv1d has one row, [B, 1, T, C].

    Output channel o belongs to group o // (O / groups), as in `jax.lax`. Scale and shift are both
    there or neither. Segment ids are int32 and go with outputs as long as the inputs: a tap at t'
    counts at t only where their ids are equal.
    """

    x_BHWC: jax.Array
    w_KLDO: jax.Array
    bias_O: jax.Array | None = None
    scale_O: jax.Array | None = None
    shift_O: jax.Array | None = None
    residual_BPQO: jax.Array | None = None
    segment_ids_BT: jax.Array | None = None

    @property
    def extra(self) -> dict[str, jax.Array]:
        """The arrays that the epilogue takes, by name; only those that are there."""
        found = {
            'bias': self.bias_O,
            'scale': self.scale_O,
            'shift': self.shift_O,
            'residual': self.residual_BPQO,
        }
        return {name: array for name, array in found.items() if array is not None}


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is static in one call; every pair is of rows and columns.

    `padding` is of zeros, (before, after), never negative and maybe wider than the kernel.
    """

    stride: Pair = (1, 1)
    padding: tuple[Pair, Pair] = ((0, 0), (0, 0))
    dilation: Pair = (1, 1)
    groups: int = 1
    activation: str | None = None

    def out_size(self, size_HW: Pair, kernel_KL: Pair) -> Pair:
        """Returns (P, Q), output rows and columns; below 1 where the kernel does not fit."""
        p, q = (
            (size + sum(pads) - (taps - 1) * dilation - 1) // stride + 1
            for size, taps, stride, pads, dilation in zip(
                size_HW, kernel_KL, self.stride, self.padding, self.dilation, strict=True
            )
        )
        return p, q


@dataclasses.dataclass(frozen=True)
class ConvBlockSizes:
    """How large a block of the output is, which one step of a kernel makes; None is the kernel's.

    Attributes:
      rows, cols: of the image; `cols` are positions of a conv1d.
      batch: images.
      channels: input channels that are summed at once.
      features: output channels.
    """

    rows: int | None = None
    cols: int | None = None
    batch: int | None = None
    channels: int | None = None
    features: int | None = None


def span(taps: int, dilation: int) -> int:
    """Returns how many positions a kernel reaches over."""
    return (taps - 1) * dilation + 1

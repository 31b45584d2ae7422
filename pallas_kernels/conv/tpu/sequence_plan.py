"""How a convolution over sequences is cut into blocks.

Legend: B batch, T input positions, P output positions, K taps, C input channels, O output channels.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.chip import MIB, Chip
from pallas_kernels.conv.arguments import ConvBlockSizes, Operands, Spec
from pallas_kernels.conv.tpu.layout import LANES, up
from pallas_kernels.conv.tpu.sequence_window import ALIGN, CHUNK, Window, around, block_rows

Where = Callable[..., tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is static in a kernel.

    Attributes:
      shifts: where each tap reads, from the output's position.
      window: of the inputs.
      T, P: input and output positions.
      O: output channels.
      features: of them, those of a block.
      dtype: of the arrays.
      masked: whether a mask tells which taps count.
      activation: the epilogue's.
      keep: whether the sum before the epilogue is an output, too.
    """

    shifts: tuple[int, ...]
    window: Window
    T: int
    P: int
    O: int  # noqa: E741
    features: int
    dtype: Any
    masked: bool
    activation: str | None
    keep: bool

    @property
    def blocks(self) -> int:
        """How many blocks of positions there are."""
        return -(-max(self.T, self.P) // self.window.rows)

    @property
    def outputs(self) -> int:
        """How many of them hold outputs."""
        return -(-self.P // self.window.rows)

    @property
    def feature_blocks(self) -> int:
        """How many blocks of output channels there are."""
        return -(-self.O // self.features)

    @property
    def weights(self) -> int:
        """Weights that a position is multiplied with in a step."""
        return len(self.shifts) * self.window.channels * self.features

    @property
    def group(self) -> int:
        """Taps of one matrix product: as many as make its contraction long enough for any MXU."""
        C = self.window.channels
        return max(1, 512 // C) if C % LANES == 0 else 1

    def spec(self, size: int, offset: int, where: Where) -> pl.BlockSpec:
        """The block of x with the `size` positions from a block's `offset` on.

        Behind the ends it is some other block. `where` tells batch row and block of a grid step.
        """
        ratio, last, at = self.window.rows // size, -(-self.T // size) - 1, offset // size

        def index(*ids):
            row, block = where(*ids)
            return row, jnp.clip(block * ratio + at, 0, last), 0

        return pl.BlockSpec((1, size, self.window.channels), index)


def plan(
    operands: Operands,
    spec: Spec,
    chip: Chip,
    *,
    sizes: ConvBlockSizes | None = None,
    keep: bool = False,
    outputs_bytes: int = 0,
) -> Plan:
    """Returns the plan of a call on `chip`.

    `outputs_bytes` is what an output of the kernel's takes for each weight, where it has such.
    """
    sizes = sizes or ConvBlockSizes()
    (_, _, T, C), (_, K, _, O_all) = operands.x_BHWC.shape, operands.w_KLDO.shape
    dtype, P = operands.x_BHWC.dtype, spec.out_size((1, T), (1, K))[1]
    low = spec.padding[1][0]
    shifts = tuple(k * spec.dilation[1] - low for k in range(K))
    before, after = max(0, -shifts[0]), max(0, shifts[-1])
    # A third of the memory for two copies of the weights.
    weight = K * up(C, LANES) * (outputs_bytes or dtype.itemsize)
    most = max(chip.vmem_limit // 6 // weight // LANES, 1) * LANES
    features = min(O_all, sizes.features or most)
    mib = (1 if chip.mxu == 128 else 2) * MIB
    wide = up(max(C, features), LANES) * dtype.itemsize
    long = max(T, P)
    rows = block_rows(long, sizes.cols or mib // wide, max(before, after))
    if rows < long:
        before, after = around(before, rows), around(after, rows)
    else:  # all around it is zeros
        before, after = up(before, ALIGN), up(after, ALIGN)
    return Plan(
        shifts=shifts,
        window=Window(rows, before, after, C),
        T=T,
        P=P,
        O=O_all,
        features=features,
        dtype=dtype,
        masked=operands.segment_ids_BT is not None and any(shifts),
        activation=spec.activation,
        keep=keep,
    )


def vmem_bytes(plan: Plan, outputs_bytes: int = 0) -> int:
    """About what a kernel takes of VMEM: blocks twice, the window, products of one chunk."""
    window, item = plan.window, jnp.dtype(plan.dtype).itemsize
    C, features = up(window.channels, LANES), up(plan.features, LANES)
    around_rows = window.before + window.after
    weights = 2 * len(plan.shifts) * C * features * (outputs_bytes or item)
    blocks = 2 * ((window.rows + around_rows) * C + (2 + plan.keep) * window.rows * features) * item
    products = min(window.rows, CHUNK) * (2 * features * 4 + plan.group * C * item)
    return weights + blocks + (window.rows + around_rows) * C * 4 + products

"""How WaveNet's gated unit is cut into blocks, and how its arrays are laid out for the kernels.

Legend: B batch, T positions, K taps, C channels, G gate channels padded to whole lanes, F = 2 G,
S skip channels, R = (K - 1) * dilation positions before the first.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from pallas_kernels.chip import MIB, Chip
from pallas_kernels.conv.gated_arguments import GatedOperands, reach
from pallas_kernels.conv.tpu.layout import LANES, up
from pallas_kernels.conv.tpu.sequence_window import ALIGN, CHUNK, FINE, Window, block_rows


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is static in a kernel.

    Attributes:
      offsets: of each tap before the output's position; the last is 0.
      window: of the inputs.
      T: positions that there are.
      C, G, S: channels, those of the gate padded.
      dtype: of the arrays.
      masked: whether a mask tells which taps count.
      state: whether inputs before the first are given.
      biases: which of the gate's, the residual's and the skip's bias there are.
      partial: whether outputs and dx are those of some of the gates, to which others add x and dy.
    """

    offsets: tuple[int, ...]
    window: Window
    T: int
    C: int
    G: int
    S: int
    dtype: Any
    masked: bool
    state: bool
    biases: tuple[bool, bool, bool]
    partial: bool = False

    @property
    def parts(self) -> Window:
        """The rows of dx that one tap gives: those of a block, and of the positions behind it."""
        return Window(self.window.rows, 0, self.window.before, self.C)

    @property
    def weights(self) -> int:
        """Weights of the convolution."""
        return len(self.offsets) * self.C * 2 * self.G

    @property
    def blocks(self) -> int:
        """How many blocks hold a sequence."""
        return -(-self.T // self.window.rows)

    @property
    def ragged(self) -> bool:
        """Whether the last block holds rows behind the sequence's end."""
        return self.T % self.window.rows > 0

    @property
    def apart(self) -> bool:
        """Whether residual and skip need products of their own: they would not meet at a tile."""
        return self.C % LANES > 0


def plan(operands: GatedOperands, dilation: int, chip: Chip, *, partial: bool = False) -> Plan:
    """Returns the plan of a call on `chip`, both passes': as long blocks as its memory holds."""
    (_, T, C), (K, _, F) = operands.x_BTC.shape, operands.w_KCF.shape
    dtype, R = operands.x_BTC.dtype, reach(operands, dilation)
    # A step costs some tenths of a microsecond; the first copy in and the last out are waited for.
    most = (1 if chip.mxu == 128 else 2) * MIB // (up(C, LANES) * dtype.itemsize)
    while True:
        found = Plan(
            offsets=tuple((K - 1 - k) * dilation for k in range(K)),
            window=Window(block_rows(T, most, R), up(R, ALIGN), 0, C),
            T=T,
            C=C,
            G=up(F // 2, LANES),
            S=operands.w_skip_GS.shape[1],
            dtype=dtype,
            masked=operands.segment_ids_BT is not None and K > 1,
            state=operands.state_BRC is not None and K > 1,
            biases=tuple(b is not None for b in operands[4:7]),
            partial=partial,
        )
        if vmem_bytes(found) <= chip.vmem_limit or most <= FINE:
            return found
        most //= 2


def vmem_bytes(plan: Plan) -> int:
    """About what the backward kernel, the larger one, takes of VMEM."""
    rows, before, K = plan.window.rows, plan.window.before, len(plan.offsets)
    C, S, G, item = up(plan.C, LANES), up(plan.S, LANES), plan.G, jnp.dtype(plan.dtype).itemsize
    weights = K * C * 2 * G + G * (C + S)
    blocks = 2 * (3 * C + S) * rows * item + (rows + 2 * before) * C * item
    kept = K * (rows + before) * C * 4 + rows * 3 * G * item
    products = min(rows, CHUNK) * (3 * 2 * G + K * C) * 4
    return weights * (item + 2 * 4) + blocks + kept + products

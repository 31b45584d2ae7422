"""Where the kernels here are predicted to be faster than XLA's own convolution.

The evidence is the table of convolutions in ../README.md, bfloat16: its *ratio*, of times here to
the smaller of the two predicted for XLA, forward or with the backward pass, whichever is worse. A
kind of kernel is taken on a chip where that is below 1, for calls like those of the table.
"""

import math

import jax.numpy as jnp

from pallas_kernels.chip import Chip
from pallas_kernels.conv.arguments import Operands, Spec
from pallas_kernels.conv.gated_arguments import GatedOperands

# Kind of kernel -> chip -> ours / XLA's, the table's worst. Causal: default layouts, as between
# projections. No stem: by itself 0.29 of XLA's time on v6e, but in a network's step its layout
# costs copies that take more (whole steps in ../README.md).
RATIOS: dict[str, dict[str, float]] = {
    'causal': {'v5e': 0.58, 'v5p': 0.53, 'v6e': 0.46, 'v7x': 0.54},
    'depthwise': {'v5e': 0.53, 'v5p': 0.61, 'v6e': 0.32, 'v7x': 0.28},  # of 7 x 7 taps
    'gated': {'v5e': 0.52, 'v5p': 0.45, 'v6e': 0.41, 'v7x': 0.27},
    'grouped': {'v5e': 0.44, 'v5p': 0.57, 'v6e': 0.31, 'v7x': 0.33},
}
FEWEST_TAPS = 49  # of a depthwise kernel; with 9 it is 0.8 to 1.3, which a network can undo
MOST_GROUP_CHANNELS = 8  # with more, XLA spends less on the channels of other groups
FEWEST_OUTPUTS = 1 << 20  # below, a call takes about as long as its launch
MOST_PADDING = 1.25  # batches are padded to whole tiles
TILE = 16  # images in a tile


def gated_wins(operands: GatedOperands, chip: Chip) -> bool:
    """Whether `impl=None` takes the kernel of the gated unit on `chip`; only TPUs have one."""
    B, T, C = operands.x_BTC.shape
    outputs = B * T * (C + operands.w_skip_GS.shape[1])
    wide = operands.x_BTC.dtype == jnp.bfloat16 and outputs >= FEWEST_OUTPUTS
    return wide and RATIOS['gated'].get(chip.name, 1.0) < 1


def wins(operands: Operands, spec: Spec, chip: Chip) -> bool:
    """Whether `impl=None` takes the kernel of `chip`: nowhere that XLA is predicted faster.

    On a GPU, where nothing predicts cuDNN, by counts and reports: see `gpu.worthwhile`.
    """
    if not chip.is_tpu:
        from pallas_kernels.conv import gpu

        return gpu.worthwhile(operands, spec)
    if operands.x_BHWC.dtype != jnp.bfloat16:
        return False  # for float32, XLA rounds what the kernels do not
    from pallas_kernels.conv import tpu

    kind = tpu.kind(operands, spec)
    B, H, W, _ = operands.x_BHWC.shape
    K, L, D, features = operands.w_KLDO.shape
    outputs = B * math.prod(spec.out_size((H, W), (K, L))) * features
    if RATIOS.get(kind, {}).get(chip.name, 1.0) >= 1 or outputs < FEWEST_OUTPUTS:
        return False
    if kind == 'depthwise' and K * L < FEWEST_TAPS:
        return False
    if kind == 'grouped' and D > MOST_GROUP_CHANNELS:
        return False
    in_time = kind in ('causal', 'sequence')  # positions fill their tiles, not the batch
    return in_time or math.ceil(B / TILE) * TILE <= MOST_PADDING * B

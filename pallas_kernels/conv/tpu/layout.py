"""How images lie for the kernels: space outside, batch in the sublanes, channels in the lanes.

[B, H, W, C] is turned into [H, W, B, C]: each tap of a kernel, whatever its stride or dilation, is
then an address and no shift. Between convolutions XLA may choose that layout by itself, and the
transposes here cost nothing. Batch and channels are padded with zeros to whole tiles; space is not.

Legend: B batch, H W rows and columns, C channels, P Q output rows and columns.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.chip import CHIPS, Chip, current_chip

LANES = 128


def sublanes(dtype: Any) -> int:
    """Rows of a vector register."""
    return 32 // jnp.dtype(dtype).itemsize


def up(size: int, multiple: int) -> int:
    """Returns the next multiple."""
    return -(-size // multiple) * multiple


def tile_bytes(shape: Sequence[int], dtype: Any) -> int:
    """Bytes of an array in whole tiles, as VMEM and HBM hold it."""
    *outer, rows, lanes = shape
    size = up(rows, sublanes(dtype)) * up(lanes, LANES) * jnp.dtype(dtype).itemsize
    for n in outer:
        size *= n
    return size


def target() -> tuple[Chip, bool]:
    """Returns the chip that blocks are chosen for, and whether the kernel is compiled for it.

    What is no TPU interprets the kernel, with a v5e's blocks.
    """
    chip = current_chip()
    compiled = chip is not None and chip.is_tpu
    return (chip if compiled else CHIPS['v5e']), compiled


def turn(x_BHWC: jax.Array, batch: int, channels: int) -> jax.Array:
    """Returns x_HWBC, its batch and channels padded with zeros to those given."""
    B, _, _, C = x_BHWC.shape
    if (batch, channels) != (B, C):
        x_BHWC = jnp.pad(x_BHWC, ((0, batch - B), (0, 0), (0, 0), (0, channels - C)))
    return x_BHWC.transpose(1, 2, 0, 3)


def turn_back(x_HWBC: jax.Array, batch: int, channels: int) -> jax.Array:
    """Returns x_BHWC without what `turn` padded."""
    return x_HWBC.transpose(2, 0, 1, 3)[:batch, :, :, :channels]


def pad_last(x: jax.Array, size: int) -> jax.Array:
    """Returns an array whose last dimension is filled up with zeros."""
    extra = size - x.shape[-1]
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, extra),)) if extra else x


def span(outputs: int, taps: int, stride: int, dilation: int) -> int:
    """Inputs along one dimension from the first to the last that consecutive outputs see."""
    return (outputs - 1) * stride + (taps - 1) * dilation + 1


def reached(
    tap: int, size: int, outputs: int, *, stride: int, dilation: int, low: int
) -> tuple[int, int]:
    """Returns the range of outputs to which a tap brings an input that is no padding.

    Args:
      tap: which of the kernel's taps along a dimension.
      size, outputs: inputs and outputs that there are.
      stride, dilation, low: of the convolution; `low` zeros stand before the inputs.
    """
    shift = tap * dilation - low  # output q sees the input q * stride + shift
    first = max(0, -(shift // stride))
    last = min(outputs, (size - 1 - shift) // stride + 1)
    return first, max(first, last)


def largest_divisor(size: int, most: int) -> int:
    """Returns the largest divisor of `size` that is not above `most`."""
    return next(n for n in range(max(1, min(size, most)), 0, -1) if size % n == 0)


def clip(place: Any, low: int, high: int) -> Any:
    """Returns a place held between two, be it a number or a value of a kernel."""
    if isinstance(place, int):
        return min(max(place, low), high)
    return jnp.clip(place, low, high)

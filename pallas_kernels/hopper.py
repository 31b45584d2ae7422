"""What the kernels for NVIDIA Hopper share: which chips those are, their memory, their layouts."""

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.chip import accelerator

HOPPER = ('H100', 'H200', 'H800', 'H20')  # parts of a device's kind; GH200 has H200
SHARED_MEMORY = 227 * 1024 - 4096  # of a block, less what barriers and vectors take
ROWS = 64  # rows of one warpgroup's product
ROW = plgpu.Layout.WGMMA.reduce(1)  # layout of a vector with one entry a row of a product
COLUMN = plgpu.Layout.WGMMA.reduce(0)  # and one entry a column
# Layouts are as the kernel gives them. To infer them takes ten times as long where much is written
# out, and is not made for copies in im2col mode.
LAYOUTS_GIVEN = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)


def other_chip() -> str | None:
    """Returns why code traced now will not run on Hopper, or None; a CPU interprets."""
    kind = accelerator()
    if kind is None or any(name in kind for name in HOPPER):
        return None
    return f'is for Hopper ({", ".join(HOPPER)}), and this is {kind}'


def interpretation(
    interpret: plgpu.InterpretGPUParams | None,
) -> plgpu.InterpretGPUParams | None:
    """Returns how to interpret kernels: as asked, or plainly wherever there is no GPU."""
    if interpret is None and accelerator() is None:
        return plgpu.InterpretGPUParams()
    return interpret


def shared(shape: tuple[int, ...], dtype: jnp.dtype) -> plgpu.SMEM:
    """Returns shared memory for 16-bit matrices, laid out as the tensor cores read them."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)

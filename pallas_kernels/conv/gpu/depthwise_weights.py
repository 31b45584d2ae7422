"""Gradient of a depthwise kernel on Hopper: for each tap the sum of input times cotangent.

A warpgroup keeps the sums of all taps in registers while it goes over its share of the blocks, and
copies the next block beside that. What the shares found is added up outside: no sum depends on an
order.

Legend: B batch, P Q output rows and columns, K L kernel rows and columns, C channels, T positions,
S shares, N blocks of channels, F columns and E channels of a vector.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.conv.gpu.axes import Axis
from pallas_kernels.conv.gpu.depthwise import Reader, seen, sees, side_by_side, whole
from pallas_kernels.conv.gpu.patches import Blocks
from pallas_kernels.hopper import LAYOUTS_GIVEN

SLOTS = 2
TAPS = 49  # whose sums fit the registers
RUN = 32  # taps of a call where one row of the kernel has more than that
WARPGROUPS = 396  # three for each multiprocessor


def parts(axes: tuple[Axis, Axis]) -> list[list[tuple[Axis, Axis]]]:
    """Returns rows and columns of the taps that one call takes, calls by rows and columns."""
    rows, columns = axes
    across = columns.taps if columns.taps <= TAPS else RUN
    down = max(1, TAPS // across)

    def cut(axis: Axis, most: int) -> list[Axis]:
        return [
            dataclasses.replace(
                axis, taps=min(most, axis.taps - begin), first=axis.first + begin * axis.step
            )
            for begin in range(0, axis.taps, most)
        ]

    return [[(i, j) for j in cut(columns, across)] for i in cut(rows, down)]


def _add(refs: dict, blocks: Blocks, where: dict, sums: tuple) -> tuple:
    """Adds to every tap's sum what the vectors that lie side by side at `where` come to."""
    axes, sums = (blocks.rows.axis, blocks.columns.axis), list(sums)
    reader = Reader(refs['x_smem'].at[where['slot']], blocks, where['row'], where['column'])
    for i in range(side_by_side(blocks)):
        columns = pl.ds(where['column'] + i * blocks.fold, blocks.fold)
        du = plgpu.load(
            refs['du_smem'].at[where['slot'], where['row'], columns], layout=blocks.layout
        ).astype(jnp.float32)
        for k, n in itertools.product(*(range(axis.taps) for axis in axes)):
            run = blocks.columns.run
            tap = k * axes[1].taps + n
            total = sums[tap] + reader.at(i, k, n // run * run, n % run) * du
            if refs['seen'] is not None:
                total = jnp.where(sees(refs, where, i, n, total.shape), total, sums[tap])
            sums[tap] = total
    return tuple(sums)


def _kernel(x, du, seen, dw, scratch: dict, *, blocks: Blocks, count: int) -> None:
    refs = {'seen': seen, **scratch}
    share, channel = (lax.axis_index(name) for name in ('shares', 'channels'))
    each = -(-count // dw.shape[0])
    begin, end = share * each, jnp.minimum((share + 1) * each, count)
    vectors = side_by_side(blocks)
    across = blocks.columns.block // (blocks.fold * vectors)

    def copy(block: jax.Array) -> None:
        slot = lax.rem(block - begin, jnp.int32(SLOTS))
        place = blocks.unfold(block * blocks.channel_blocks + channel)
        full = refs['full'].at[slot]
        blocks.copy(x, refs['x_smem'].at[slot], place, full)
        plgpu.copy_gmem_to_smem(du.at[blocks.output(place)], refs['du_smem'].at[slot], full)

    pl.when(begin < end)(lambda: copy(begin))

    def each_block(block: jax.Array, sums: tuple) -> tuple:
        slot = lax.rem(block - begin, jnp.int32(SLOTS))
        plgpu.commit_smem()  # the next copy comes after what it replaces was read
        pl.when(block + 1 < end)(lambda: copy(block + 1))
        plgpu.barrier_wait(refs['full'].at[slot])
        batch, _, column, _ = blocks.unfold(block * blocks.channel_blocks + channel)

        def each_row(i: jax.Array, sums: tuple) -> tuple:
            where = {
                'slot': slot,
                'batch': batch,
                'columns': column * blocks.columns.block,
                'row': lax.div(i, jnp.int32(across)),
                'column': lax.rem(i, jnp.int32(across)) * (blocks.fold * vectors),
            }
            return _add(refs, blocks, where, sums)

        return lax.fori_loop(0, blocks.rows.block * across, each_row, sums)

    zeros = plgpu.layout_cast(jnp.zeros(blocks.vector, jnp.float32), blocks.layout)
    sums = lax.fori_loop(begin, end, each_block, (zeros,) * dw.shape[1])
    for tap, total in enumerate(sums):
        plgpu.store(dw.at[share, tap, channel], total, optimized=False)


def weight_gradient(
    x_BHWC: jax.Array,
    du_BPQC: jax.Array,
    blocks: Blocks,
    *,
    ids_BT: jax.Array | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """Returns float32 dw [K, L, C] of the taps of `blocks`; the same bits each time.

    The taps are one of `parts`. C is a multiple of 8; `ids_BT` are segment ids of one row.
    """
    (B, *_, C), dtype = x_BHWC.shape, x_BHWC.dtype
    seen_BWT = whole(seen(ids_BT, blocks.columns.axis), blocks)
    if interpret is not None:
        x_BHWC, blocks = blocks.without_padding(x_BHWC)
    K, L = blocks.rows.axis.taps, blocks.columns.axis.taps
    count = B * blocks.rows.blocks * blocks.columns.blocks
    S = max(1, min(-(-WARPGROUPS // blocks.channel_blocks), count // SLOTS))
    copies = blocks.rows.count * blocks.columns.count + 1
    scratch = {
        'x_smem': plgpu.SMEM((SLOTS, *blocks.patch_shape), dtype),
        'du_smem': plgpu.SMEM((SLOTS, *blocks.shape), dtype),
        'full': plgpu.Barrier(num_arrivals=copies, num_barriers=SLOTS),
    }
    shape = (S, K * L, blocks.channel_blocks, *blocks.vector)
    dw = plgpu.kernel(
        functools.partial(_kernel, blocks=blocks, count=count),
        out_type=jax.ShapeDtypeStruct(shape, jnp.float32),
        scratch_types=(scratch,),
        grid=(S, blocks.channel_blocks),
        grid_names=('shares', 'channels'),
        kernel_name='depthwise_weights',
        compiler_params=LAYOUTS_GIVEN,
        interpret=interpret,
    )(x_BHWC, du_BPQC, seen_BWT)
    return dw.sum((0, 3)).reshape(K, L, -1)[..., :C]

"""Depthwise convolution on Hopper, a conv1d in time among them: vectors of channels, tap by tap.

A warpgroup makes one block of the output. It copies the block's input by TMA, whose zeros beyond
the edges are the padding, and other blocks on the same multiprocessor compute meanwhile.

Legend: B batch, P Q output rows and columns, K L kernel rows and columns, C channels, T positions,
N blocks of channels, F columns and E channels of a vector.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.conv import epilogue
from pallas_kernels.conv.gpu.axes import Axis
from pallas_kernels.conv.gpu.dense import Epilogue
from pallas_kernels.conv.gpu.patches import RUN, Blocks
from pallas_kernels.hopper import LAYOUTS_GIVEN

VECTORS = 8  # that are summed side by side, so that what they read alike is read once
UNROLLED = 200  # products of vectors that are written out; beyond that, rows of taps are a loop
BITS = 32  # of a word of `seen`


def seen(ids_BT: jax.Array | None, axis: Axis) -> jax.Array | None:
    """Returns int32 [B, words, T] with a bit for each tap: whether its position has the same id."""
    if ids_BT is None:
        return None
    B, T = ids_BT.shape
    before, after = max(0, -axis.first), max(0, axis.last)
    around = jnp.pad(ids_BT, ((0, 0), (before, after)))
    words = []
    for begin in range(0, axis.taps, BITS):
        word = jnp.zeros((B, T), jnp.int32)
        for tap in range(begin, min(begin + BITS, axis.taps)):
            start = axis.first + tap * axis.step + before
            same = lax.slice_in_dim(around, start, start + T, axis=1) == ids_BT
            word |= same.astype(jnp.int32) << (tap - begin)
        words.append(word)
    return jnp.stack(words, axis=1)


def whole(seen_BWT: jax.Array | None, blocks: Blocks) -> jax.Array | None:
    """Returns `seen` padded to whole blocks of positions."""
    if seen_BWT is None:
        return None
    spare = blocks.columns.blocks * blocks.columns.block - seen_BWT.shape[2]
    return jnp.pad(seen_BWT, ((0, 0), (0, 0), (0, spare)))


def by_block(x_nC: jax.Array | None, blocks: Blocks) -> jax.Array | None:
    """Returns [..., N, F, E] of [..., C]: what each vector takes of an array of channels."""
    if x_nC is None:
        return None
    pads = ((0, 0),) * (x_nC.ndim - 1) + ((0, -x_nC.shape[-1] % blocks.channels),)
    x = jnp.pad(x_nC, pads).reshape(*x_nC.shape[:-1], -1, 1, blocks.channels)
    return jnp.broadcast_to(x, (*x.shape[:-2], *blocks.vector))


def side_by_side(blocks: Blocks) -> int:
    """Returns how many vectors of a row of the block are summed at once."""
    return next(n for n in (VECTORS, 4, 2, 1) if blocks.columns.block // blocks.fold % n == 0)


class Reader:
    """Reads what vectors that lie side by side need, each vector once.

    `row` and `column` are where in the block the first of them is.
    """

    def __init__(self, x_smem: jax.Ref, blocks: Blocks, row: jax.Array, column: jax.Array):
        self.x_smem, self.blocks, self.row, self.column = x_smem, blocks, row, column
        self.read: dict[tuple, jax.Array] = {}

    def at(self, vector: int, k: jax.Array | int, begin: jax.Array | int, tap: int) -> jax.Array:
        """Returns in float32 what a vector reads at tap (k, begin + tap) of one patch's taps."""
        rows, columns = self.blocks.rows, self.blocks.columns
        shift = vector * self.blocks.fold * columns.axis.stride + tap * columns.axis.step
        # A traced tap has its own reader, so what it reads needs no name here.
        key = (k if isinstance(k, int) else 'k', begin if isinstance(begin, int) else 'l', shift)
        if isinstance(begin, int):
            patch, place = columns.place(0, begin)
            key = (*key[:1], patch, place + shift)
        if key not in self.read:
            i, row = rows.place(self.row, k)
            j, place = columns.place(self.column, begin)
            where = pl.ds(place + shift, self.blocks.fold)
            x = plgpu.load(self.x_smem.at[i, j, row, where], layout=self.blocks.layout)
            self.read[key] = x.astype(jnp.float32)
        return self.read[key]


def sees(
    refs: dict, where: dict, i: int, tap: jax.Array | int, shape: tuple[int, int]
) -> jax.Array:
    """Returns, as a vector, whether the i-th position from `where` on has the id that a tap has."""
    word, bit = lax.div(tap, BITS), lax.rem(tap, BITS)
    bits = refs['seen'][where['batch'], word, where['columns'] + where['column'] + i]
    return lax.broadcast_in_dim((bits >> bit) & 1, shape, ()) == 1


def _row_of_taps(refs: dict, blocks: Blocks, where: dict, k: jax.Array | int, sums: tuple) -> tuple:
    """Adds the taps of one row of the kernel to the sums of vectors that lie side by side."""
    columns, taps = blocks.columns, blocks.columns.axis.taps

    def run(reader: Reader, begin: jax.Array | int, count: int, sums: tuple) -> tuple:
        for n in range(count):
            tap = k * taps + begin + n
            w = plgpu.load(
                refs['w'].at[tap, where['channel']], layout=blocks.layout, optimized=False
            )
            w, added = w.astype(jnp.float32), []
            for i, total in enumerate(sums):
                more = total + reader.at(i, k, begin, n) * w
                if refs['seen'] is not None:
                    more = jnp.where(sees(refs, where, i, begin + n, total.shape), more, total)
                added.append(more)
            sums = tuple(added)
        return sums

    def reader() -> Reader:
        return Reader(refs['x_smem'], blocks, where['row'], where['column'])

    if taps <= 2 * RUN:
        mine = reader()
        for begin in range(0, taps, columns.run):
            sums = run(mine, begin, min(columns.run, taps - begin), sums)
        return sums
    sums = lax.fori_loop(0, taps // RUN, lambda i, x: run(reader(), i * RUN, RUN, x), sums)
    return run(reader(), taps // RUN * RUN, taps % RUN, sums)


def _vectors(refs: dict, blocks: Blocks, where: dict, activation: str | None) -> None:
    """Makes the vectors of the output that lie side by side at `where`."""
    count, taps = side_by_side(blocks), blocks.rows.axis.taps

    def load(name: str) -> jax.Array | None:
        if refs[name] is None:
            return None
        return plgpu.load(refs[name].at[where['channel']], layout=blocks.layout, optimized=False)

    zeros = plgpu.layout_cast(jnp.zeros(blocks.vector, jnp.float32), blocks.layout)
    sums, body = (zeros,) * count, functools.partial(_row_of_taps, refs, blocks, where)
    if taps * min(blocks.columns.axis.taps, 2 * RUN) * count <= UNROLLED:
        for k in range(taps):
            sums = body(k, sums)
    else:
        sums = lax.fori_loop(0, taps, body, sums)
    bias, scale, shift = (load(name) for name in ('bias', 'scale', 'shift'))
    for i, u in enumerate(sums):
        u = u if bias is None else u + bias
        place = (where['row'], pl.ds(where['column'] + i * blocks.fold, blocks.fold))
        y_ref, residual = refs['y_smem'].at[place], None
        if refs['u'] is not None:
            refs['u_smem'].at[place][...] = u.astype(refs['u'].dtype)
        if refs['residual'] is not None:
            residual = plgpu.load(y_ref, layout=blocks.layout)
        y = epilogue.finish(u, activation, scale=scale, shift=shift, residual=residual)
        y_ref[...] = y.astype(refs['y'].dtype)


def _kernel(
    x, w, bias, scale, shift, residual, seen, y, u, scratch: dict, *, blocks: Blocks, activation
) -> None:
    refs = {'w': w, 'bias': bias, 'scale': scale, 'shift': shift, 'residual': residual}
    refs |= {'seen': seen, 'y': y, 'u': u, **scratch}
    place = blocks.unfold(lax.axis_index('blocks'))
    blocks.copy(x, refs['x_smem'], place, refs['full'])
    output = blocks.output(place)
    if residual is not None:
        plgpu.copy_gmem_to_smem(residual.at[output], refs['y_smem'], refs['full'])
    plgpu.barrier_wait(refs['full'])
    across = blocks.columns.block // (blocks.fold * side_by_side(blocks))

    @pl.loop(0, blocks.rows.block * across)
    def _(i: jax.Array) -> None:
        where = {
            'batch': place[0],
            'channel': place[3],
            'columns': place[2] * blocks.columns.block,
            'row': lax.div(i, jnp.int32(across)),
            'column': lax.rem(i, jnp.int32(across)) * (blocks.fold * side_by_side(blocks)),
        }
        _vectors(refs, blocks, where, activation)

    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(refs['y_smem'], y.at[output])
    if u is not None:
        plgpu.copy_smem_to_gmem(refs['u_smem'], u.at[output])
    plgpu.wait_smem_to_gmem(0)


def convolve(
    x_BHWC: jax.Array,
    w_KLC: jax.Array,
    blocks: Blocks,
    finish: Epilogue,
    *,
    ids_BT: jax.Array | None = None,
    keep: bool = False,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns y [B, P, Q, C] and, where `keep`, u, the sum with its bias; both in x's type.

    C is a multiple of 8. The residual is [B, P, Q, C]; `ids_BT` are segment ids of one row.
    """
    (B, *_, C), dtype = x_BHWC.shape, x_BHWC.dtype
    seen_BWT = whole(seen(ids_BT, blocks.columns.axis), blocks)
    if interpret is not None:
        x_BHWC, blocks = blocks.without_padding(x_BHWC)
    rows, columns = blocks.rows, blocks.columns
    vectors = [by_block(v, blocks) for v in (finish.bias, finish.scale, finish.shift)]
    out = jax.ShapeDtypeStruct((B, rows.axis.out, columns.axis.out, C), dtype)
    copies = rows.count * columns.count + (finish.residual is not None)
    scratch = {
        'x_smem': plgpu.SMEM(blocks.patch_shape, dtype),
        'y_smem': plgpu.SMEM(blocks.shape, dtype),
        'full': plgpu.Barrier(num_arrivals=copies),
    }
    if keep:
        scratch['u_smem'] = plgpu.SMEM(blocks.shape, dtype)
    y, u = plgpu.kernel(
        functools.partial(_kernel, blocks=blocks, activation=finish.activation),
        out_type=(out, out if keep else None),
        scratch_types=(scratch,),
        grid=(blocks.count(B),),
        grid_names=('blocks',),
        kernel_name='depthwise',
        compiler_params=LAYOUTS_GIVEN,
        interpret=interpret,
    )(
        x_BHWC,
        by_block(w_KLC.reshape(-1, C), blocks),
        *(None if v is None else v.astype(jnp.float32) for v in vectors),
        finish.residual,
        seen_BWT,
    )
    return y, u

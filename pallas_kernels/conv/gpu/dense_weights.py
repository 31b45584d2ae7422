"""Gradient of a dense kernel on Hopper: channels by features, summed over all outputs, per tap.

Each block sums a share of the outputs for one tap, and what the blocks of a tap found is added up
outside: no sum depends on an order. The input comes as in `dense.py`, as a matrix of outputs by
channels, and is multiplied transposed.

Legend: B batch, H W input rows and columns, K L kernel rows and columns, C input channels, O
features, M = B * P * Q outputs.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.conv.gpu.dense import whole, width_of_a_tile
from pallas_kernels.conv.gpu.windows import COLUMNS, Windows
from pallas_kernels.hopper import LAYOUTS_GIVEN, ROWS, SHARED_MEMORY, shared

OUTPUTS = 64  # that one step of the sum takes in
STAGES = 4
BLOCKS = 264  # two for each multiprocessor: enough to fill them all
FEWEST = 16  # steps of a block; with less, adding the blocks up costs more than they do


def shares(steps: int, tiles: int) -> int:
    """Returns into how many blocks the sum over the outputs of each tile is divided."""
    return max(1, min(-(-BLOCKS // tiles), steps // FEWEST))


def _copy(refs: dict, where: dict, windows: Windows) -> None:
    """The producer: the input at one tap and the cotangents of 64 outputs after the other."""
    stages, groups = refs['x_smem'].shape[:2]
    features = refs['du_smem'].shape[2]
    taps = jnp.int32(windows.axes[1].taps)
    place, phase = windows.index(lax.div(where['tap'], taps), lax.rem(where['tap'], taps))

    @pl.loop(where['begin'], where['end'])
    def _(step: jax.Array) -> None:
        slot = lax.rem(step - where['begin'], jnp.int32(stages))
        full, rows = refs['full'].at[slot], pl.ds(step * OUTPUTS, OUTPUTS)

        @pl.when(step - where['begin'] >= stages)
        def _() -> None:
            plgpu.barrier_wait(refs['empty'].at[slot])

        for group in range(groups):
            channels = pl.ds(phase + where['channel'] + group * ROWS, ROWS)
            source = refs['x'].at[(rows, *place, channels)]
            plgpu.copy_gmem_to_smem(source, refs['x_smem'].at[slot, group], full)
        source = refs['du'].at[rows, pl.ds(where['feature'], features)]
        plgpu.copy_gmem_to_smem(source, refs['du_smem'].at[slot], full)


def _multiply(refs: dict, where: dict, sum_ref: jax.Ref) -> jax.Array:
    """One warpgroup: the sum for 64 channels."""
    stages = refs['x_smem'].shape[0]

    @pl.loop(where['begin'], where['end'])
    def _(step: jax.Array) -> None:
        slot = lax.rem(step - where['begin'], jnp.int32(stages))
        plgpu.barrier_wait(refs['full'].at[slot])
        x_ref = refs['x_smem'].at[slot, where['group']]
        plgpu.wgmma(sum_ref, x_ref.transpose((1, 0)), refs['du_smem'].at[slot])
        plgpu.wgmma_wait(1)

        @pl.when(step > where['begin'])
        def _() -> None:
            before = lax.rem(step - where['begin'] - 1, jnp.int32(stages))
            plgpu.barrier_arrive(refs['empty'].at[before])

    return sum_ref[...]


def _kernel(x, du, dw, scratch: dict, *, windows: Windows, steps: int, interpret: bool) -> None:
    refs = {'x': x if interpret else windows.matrix(x), 'du': du, 'dw': dw, **scratch}
    groups, features = refs['x_smem'].shape[1], refs['du_smem'].shape[2]
    share, tap, channels, feature, group = (
        lax.axis_index(name) for name in ('shares', 'taps', 'channels', 'features', 'group')
    )
    each = -(-steps // dw.shape[0])
    where = {
        'group': group,
        'tap': tap,
        'channel': channels * groups * ROWS,
        'feature': feature * features,
        'begin': share * each,
        'end': jnp.minimum((share + 1) * each, steps),
    }

    @pl.when(group < groups)
    def _() -> None:
        if groups > 1:
            plgpu.set_max_registers(240, action='increase')
        multiply = functools.partial(_multiply, refs, where)
        total = pl.run_scoped(multiply, plgpu.ACC((ROWS, features), jnp.float32))
        rows = pl.ds(where['channel'] + group * ROWS, ROWS)
        target = dw.at[share, tap, rows, pl.ds(where['feature'], features)]
        plgpu.store(target, total, optimized=False)

    @pl.when(group == groups)
    def _() -> None:
        if groups > 1:
            plgpu.set_max_registers(24, action='decrease')
        _copy(refs, where, windows)


def weight_gradient(
    x_BHWC: jax.Array,
    du_BPQO: jax.Array,
    windows: Windows,
    *,
    features: int | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """Returns float32 dw [K, L, C, O]; the same bits each time.

    Raises:
      ValueError: `features`, those of a tile, is not a multiple of 64 up to 256.
    """
    total, dtype = du_BPQO.shape[3], x_BHWC.dtype
    C, M = x_BHWC.shape[3], du_BPQO.size // total
    K, L = (axis.taps for axis in windows.axes)
    features = width_of_a_tile(total, features)
    groups = 2 if C > ROWS else 1
    feature_tiles, channel_tiles = -(-total // features), -(-C // (groups * ROWS))
    steps = -(-M // OUTPUTS)
    S = shares(steps, K * L * channel_tiles * feature_tiles)
    du = whole(du_BPQO.reshape(M, total))
    view = windows.view(x_BHWC)
    stage = 2 * OUTPUTS * (groups * COLUMNS + features)
    stages = min(SHARED_MEMORY // stage, STAGES)
    scratch = {
        'x_smem': shared((stages, groups, OUTPUTS, COLUMNS), dtype),
        'du_smem': shared((stages, OUTPUTS, features), dtype),
        'full': plgpu.Barrier(num_arrivals=groups + 1, num_barriers=stages),
        'empty': plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
    }
    shape = (S, K * L, channel_tiles * groups * ROWS, feature_tiles * features)
    dw = plgpu.kernel(
        functools.partial(_kernel, windows=windows, steps=steps, interpret=interpret is not None),
        out_type=jax.ShapeDtypeStruct(shape, jnp.float32),
        scratch_types=(scratch,),
        grid=(S, K * L, channel_tiles, feature_tiles),
        grid_names=('shares', 'taps', 'channels', 'features'),
        num_threads=groups + 1,
        thread_name='group',
        kernel_name='convolution_weights',
        compiler_params=LAYOUTS_GIVEN,
        interpret=interpret,
    )(view if interpret is None else windows.written_out(view), du)
    return dw.sum(0)[:, :C, :total].reshape(K, L, C, total)

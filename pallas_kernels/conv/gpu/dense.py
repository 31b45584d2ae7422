"""Dense convolution on Hopper: an implicit GEMM of outputs by features, summed over taps and C.

Two warpgroups multiply 64 outputs each, a third one copies: TMA's im2col mode lays the input that
64 channels of a tap need as a matrix, zeros at the edges included, so nothing is written out.

Legend: B batch, H W input rows and columns, K L kernel rows and columns, C input channels, O
features, M = B * P * Q outputs.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.conv import epilogue
from pallas_kernels.conv.gpu.windows import COLUMNS, Windows
from pallas_kernels.hopper import COLUMN, LAYOUTS_GIVEN, ROWS, SHARED_MEMORY, shared

WARPGROUPS = 2
TILE = WARPGROUPS * ROWS
WIDEST = 256  # features of a tile: their sums are half of a thread's registers
STAGES = 4


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """What follows the sum, `conv/epilogue.py`; arrays are [O] and [M, O], None where absent."""

    bias: jax.Array | None = None
    scale: jax.Array | None = None
    shift: jax.Array | None = None
    residual: jax.Array | None = None
    activation: str | None = None


def width_of_a_tile(features: int, asked: int | None = None) -> int:
    """Returns how many features a tile has: what is asked for, or the fewest wasted.

    Raises:
      ValueError: `asked` is none that the tensor cores take.
    """
    if asked is None:
        return min((256, 192, 128, 64), key=lambda n: -(-features // n) * n)
    if asked % COLUMNS or not 0 < asked <= WIDEST:
        rule = f'must be a multiple of {COLUMNS} up to {WIDEST} on the GPU'
        raise ValueError(f'block_sizes.features={asked}: {rule}; try {COLUMNS}')
    return asked


def _place(windows: Windows, step: jax.Array, channel_tiles: int) -> tuple:
    """Returns tap, place in the window and first channels (of x and of w) of a step of the sum."""
    tap = lax.div(step, jnp.int32(channel_tiles))
    channel = lax.rem(step, jnp.int32(channel_tiles)) * COLUMNS
    taps = jnp.int32(windows.axes[1].taps)
    place, phase = windows.index(lax.div(tap, taps), lax.rem(tap, taps))
    return tap, place, phase + channel, channel


def _copy(refs: dict, where: dict, windows: Windows) -> None:
    """The producer: input and kernel of one step of the sum after the other, ahead of their use."""
    stages = refs['a_smem'].shape[0]
    features = refs['b_smem'].shape[2]

    @pl.loop(0, where['steps'])
    def _(step: jax.Array) -> None:
        slot = lax.rem(step, jnp.int32(stages))
        full = refs['full'].at[slot]

        @pl.when(step >= stages)
        def _() -> None:
            plgpu.barrier_wait(refs['empty'].at[slot])

        tap, place, x_channel, w_channel = _place(windows, step, where['channel_tiles'])
        rows, channels = pl.ds(where['row'], TILE), pl.ds(x_channel, COLUMNS)
        source = refs['x'].at[(rows, *place, channels)]
        plgpu.copy_gmem_to_smem(source, refs['a_smem'].at[slot], full)
        source = refs['w'].at[tap, pl.ds(w_channel, COLUMNS), pl.ds(where['feature'], features)]
        plgpu.copy_gmem_to_smem(source, refs['b_smem'].at[slot], full)


def _multiply(refs: dict, where: dict, sum_ref: jax.Ref) -> jax.Array:
    """One warpgroup: the sum of its rows; a product runs while the next one is set up."""
    stages = refs['a_smem'].shape[0]
    rows = pl.ds(where['group'] * ROWS, ROWS)

    @pl.loop(0, where['steps'])
    def _(step: jax.Array) -> None:
        slot = lax.rem(step, jnp.int32(stages))
        plgpu.barrier_wait(refs['full'].at[slot])
        plgpu.wgmma(sum_ref, refs['a_smem'].at[slot, rows], refs['b_smem'].at[slot])
        plgpu.wgmma_wait(1)

        @pl.when(step > 0)
        def _() -> None:
            plgpu.barrier_arrive(refs['empty'].at[lax.rem(step - 1, jnp.int32(stages))])

    return sum_ref[...]


def _finish(refs: dict, where: dict, u: jax.Array, activation: str | None) -> None:
    """Writes the results of a warpgroup's rows, 64 features at a time."""
    group, row = where['group'], where['row'] + where['group'] * ROWS

    def vector(name: str, j: int) -> jax.Array | None:
        if refs[name] is None:
            return None
        columns = pl.ds(where['feature'] + j * COLUMNS, COLUMNS)
        x = plgpu.load(refs[name].at[columns], layout=COLUMN, optimized=False)
        return lax.broadcast_in_dim(x, (ROWS, COLUMNS), (1,))

    if refs['residual'] is not None:
        plgpu.barrier_wait(refs['residual_full'].at[group])
    for j in range(u.shape[1] // COLUMNS):
        part = u[:, j * COLUMNS : (j + 1) * COLUMNS]
        bias = vector('bias', j)
        part = part if bias is None else part + bias
        target = (pl.ds(row, ROWS), pl.ds(where['feature'] + j * COLUMNS, COLUMNS))
        if refs['u'] is not None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            refs['u_smem'].at[group][...] = part.astype(refs['u'].dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(refs['u_smem'].at[group], refs['u'].at[target])
        y_ref = refs['y_smem'].at[group, j]
        residual = None if refs['residual'] is None else y_ref[...]
        options = {'scale': vector('scale', j), 'shift': vector('shift', j), 'residual': residual}
        y_ref[...] = epilogue.finish(part, activation, **options).astype(refs['y'].dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(y_ref, refs['y'].at[target])
    plgpu.wait_smem_to_gmem(0)


def _compute(refs: dict, where: dict, activation: str | None) -> None:
    group, features = where['group'], refs['b_smem'].shape[2]
    if refs['residual'] is not None:
        rows = pl.ds(where['row'] + group * ROWS, ROWS)
        for j in range(features // COLUMNS):
            columns = pl.ds(where['feature'] + j * COLUMNS, COLUMNS)
            full = refs['residual_full'].at[group]
            plgpu.copy_gmem_to_smem(
                refs['residual'].at[rows, columns], refs['y_smem'].at[group, j], full
            )
    multiply = functools.partial(_multiply, refs, where)
    u = pl.run_scoped(multiply, plgpu.ACC((ROWS, features), jnp.float32))
    _finish(refs, where, u, activation)


def _kernel(
    x, w, bias, scale, shift, residual, y, u, scratch: dict, *, windows, activation, interpret
) -> None:
    refs = {'w': w, 'bias': bias, 'scale': scale, 'shift': shift, 'residual': residual}
    refs |= {'x': x if interpret else windows.matrix(x), 'y': y, 'u': u, **scratch}
    features = refs['b_smem'].shape[2]
    feature_tiles = -(-w.shape[2] // features)
    tile, group = lax.axis_index('tiles'), lax.axis_index('group')
    channel_tiles = -(-w.shape[1] // COLUMNS)
    where = {
        'group': group,
        # The tiles that read the same input run side by side.
        'row': lax.div(tile, jnp.int32(feature_tiles)) * TILE,
        'feature': lax.rem(tile, jnp.int32(feature_tiles)) * features,
        'channel_tiles': channel_tiles,
        'steps': w.shape[0] * channel_tiles,
    }

    @pl.when(group < WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(240, action='increase')
        _compute(refs, where, activation)

    @pl.when(group == WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(24, action='decrease')
        _copy(refs, where, windows)


def _scratch(features: int, dtype: jnp.dtype, residual: bool, keep: bool) -> dict:
    outputs = WARPGROUPS * ROWS * (features + (COLUMNS if keep else 0))
    stage = COLUMNS * (TILE + features)
    stages = min((SHARED_MEMORY // 2 - outputs) // stage, STAGES)
    scratch = {
        'a_smem': shared((stages, TILE, COLUMNS), dtype),
        'b_smem': shared((stages, COLUMNS, features), dtype),
        'y_smem': shared((WARPGROUPS, features // COLUMNS, ROWS, COLUMNS), dtype),
        'full': plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        'empty': plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
    }
    if residual:
        arrivals = features // COLUMNS
        scratch['residual_full'] = plgpu.Barrier(num_arrivals=arrivals, num_barriers=WARPGROUPS)
    if keep:
        scratch['u_smem'] = shared((WARPGROUPS, ROWS, COLUMNS), dtype)
    return scratch


def whole(x: jax.Array | None) -> jax.Array | None:
    """Returns x with zeros up to sizes that TMA copies as tiles of 8 rows and 64 columns."""
    if x is None:
        return None
    columns = x.shape[-1]
    spare = -columns % (COLUMNS if columns > COLUMNS else 8)
    return jnp.pad(x, (*[(0, 0)] * (x.ndim - 2), (0, -x.shape[-2] % 8), (0, spare)))


def _vector(x: jax.Array | None, size: int) -> jax.Array | None:
    """Returns a vector in float32, with zeros up to a multiple of `size`."""
    return None if x is None else jnp.pad(x.astype(jnp.float32), (0, -x.size % size))


def convolve(
    x_BHWC: jax.Array,
    w_KLCO: jax.Array,
    windows: Windows,
    finish: Epilogue,
    *,
    keep: bool = False,
    features: int | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns y [M, O] and, where `keep`, u [M, O], the sum with its bias; both in x's type.

    `features` is how many of them a tile has. M counts batch, rows and columns of the output.

    Raises:
      ValueError: `features` is not a multiple of 64 up to 256.
    """
    (*_, C, total), dtype = w_KLCO.shape, x_BHWC.dtype
    M = x_BHWC.shape[0] * windows.axes[0].out * windows.axes[1].out
    features = width_of_a_tile(total, features)
    w = whole(w_KLCO.reshape(-1, C, total))
    view = windows.view(x_BHWC)
    vectors = [_vector(v, features) for v in (finish.bias, finish.scale, finish.shift)]
    out = jax.ShapeDtypeStruct((M + -M % 8, w.shape[2]), dtype)
    y, u = plgpu.kernel(
        functools.partial(
            _kernel,
            windows=windows,
            activation=finish.activation,
            interpret=interpret is not None,
        ),
        out_type=(out, out if keep else None),
        scratch_types=(_scratch(features, dtype, finish.residual is not None, keep),),
        grid=(-(-M // TILE) * -(-total // features),),
        grid_names=('tiles',),
        num_threads=WARPGROUPS + 1,
        thread_name='group',
        kernel_name='convolution',
        compiler_params=LAYOUTS_GIVEN,
        interpret=interpret,
    )(
        view if interpret is None else windows.written_out(view),
        w,
        *vectors,
        whole(finish.residual),
    )
    return y[:M, :total], None if u is None else u[:M, :total]

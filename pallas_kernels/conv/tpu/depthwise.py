"""Depthwise convolution on TPU, each output channel of one input channel: its three passes.

Legend: B batch, H W input rows and columns, K L kernel rows and columns, P Q output rows and
columns, C input channels, O output channels, N blocks of 128 of them, z lanes of a tile.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.conv.arguments import ConvBlockSizes, Operands, Spec
from pallas_kernels.conv.tpu import layout
from pallas_kernels.conv.tpu.depthwise_choice import AT_ONCE_WEIGHT, laid_out, plan, vmem_bytes
from pallas_kernels.conv.tpu.depthwise_kernel import Epilogue, forward_kernel
from pallas_kernels.conv.tpu.depthwise_plan import Axis, Plan
from pallas_kernels.conv.tpu.depthwise_tiles import WORDS
from pallas_kernels.conv.tpu.depthwise_weight import weight_kernel
from pallas_kernels.conv.tpu.layout import LANES
from pallas_kernels.mesh import result

MOST_STRIDE = 16  # columns of a tile
SEMANTICS = ('parallel', 'arbitrary')


def refuses(operands: Operands, spec: Spec) -> str | None:
    """Returns why the kernels do not take a call, None if they do."""
    if spec.groups != operands.x_BHWC.shape[3]:
        return f'a depthwise convolution has a group for each channel, not {spec.groups}'
    if operands.segment_ids_BT is not None:
        return 'takes segment ids with a stride of 1 only'
    if spec.stride[1] > MOST_STRIDE:
        return f'takes strides up to {MOST_STRIDE} columns, and this one is {spec.stride[1]}'
    chip, _ = layout.target()
    x_BHWC, w_KLDO = operands.x_BHWC, operands.w_KLDO
    repeated = jax.ShapeDtypeStruct((*x_BHWC.shape[:3], w_KLDO.shape[3]), x_BHWC.dtype)
    axes = _axes(operands, spec)
    for passes in (axes, tuple(axis.turned for axis in axes)):
        made = plan(passes, _padded(repeated), x_BHWC.dtype, chip, None, 1)
        if vmem_bytes(made, x_BHWC.dtype, 1) > chip.vmem_limit:
            return (
                f'takes kernels whose matrices fit in {chip.vmem_limit >> 20} MiB, and a kernel of '
                f'{w_KLDO.shape[0]} x {w_KLDO.shape[1]} on images {x_BHWC.shape[2]} wide has more'
            )
    return None


def forward(
    operands: Operands,
    spec: Spec,
    block_sizes: ConvBlockSizes | None = None,
    keep: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns y_BPQO and, where `keep`, u_BPQO (else None), both in x's type; see `conv2d`."""
    names = {'bias': operands.bias_O, 'scale': operands.scale_O, 'shift': operands.shift_O}
    vectors = {name: vector for name, vector in names.items() if vector is not None}
    y_BPQO, *u_BPQO = _convolve(
        _repeated(operands),
        _by_channel(operands.w_KLDO),
        _axes(operands, spec),
        block_sizes,
        vectors=vectors,
        residual_BPQO=operands.residual_BPQO,
        activation=spec.activation,
        keep=keep,
    )
    return y_BPQO, u_BPQO[0] if keep else None


def input_gradient(
    du_BPQO: jax.Array, operands: Operands, spec: Spec, block_sizes: ConvBlockSizes | None = None
) -> jax.Array:
    """Returns dx_BHWC, in x's type, of a convolution whose u has the cotangent `du_BPQO`."""
    axes = tuple(axis.turned for axis in _axes(operands, spec))
    dtype, multiplier = operands.x_BHWC.dtype, _multiplier(operands)
    (dx_BHWO,) = _convolve(
        du_BPQO.astype(dtype), _by_channel(operands.w_KLDO), axes, block_sizes
    )  # fmt: skip
    if multiplier == 1:
        return dx_BHWO
    # Not a sum of [B, H, W, C, multiplier], whose last dimension would be padded to 128 lanes.
    window = 1, 1, 1, multiplier
    total = jax.lax.reduce_window(
        dx_BHWO.astype(jnp.float32), 0.0, jax.lax.add, window, window, 'VALID'
    )
    return total.astype(dtype)


def weight_gradient(
    du_BPQO: jax.Array, operands: Operands, spec: Spec, block_sizes: ConvBlockSizes | None = None
) -> jax.Array:
    """Returns dw_KLDO, summed in float32 and in w's type; see `input_gradient`."""
    x_BHWO, axes = _repeated(operands), _axes(operands, spec)
    dtype, (K, L, _, features) = x_BHWO.dtype, operands.w_KLDO.shape
    chip, compiled = layout.target()
    B, C = _padded(x_BHWO)
    made = plan(axes, (B, C), dtype, chip, block_sizes, 1)
    made = laid_out(made, AT_ONCE_WEIGHT) if compiled else made
    x_HWBO, du_PQBO = layout.turn(x_BHWO, B, C), layout.turn(du_BPQO.astype(dtype), B, C)
    tiles = [pltpu.VMEM(made.tiles_in, dtype)] * 2 + [pltpu.VMEM(made.tiles_out, dtype)] * 2
    sums, taps = (made.n, made.T, made.U, made.side, made.side), (2, layout.up(K * L, WORDS), LANES)
    inputs = {'x': (x_HWBO, _in_spec(made)), 'du': (du_PQBO, _out_spec(made, 0))}
    if made.carried:
        inputs['head'] = x_HWBO, _head_spec(made)
    values, specs = zip(*inputs.values(), strict=True)
    kept = jnp.float32 if made.cores > 1 else operands.w_KLDO.dtype
    dw = pl.pallas_call(
        functools.partial(weight_kernel, made, [*inputs, 'dw']),
        grid=(made.cores, made.per_core + 1),
        in_specs=specs,
        out_specs=pl.BlockSpec(
            (1, K, L, LANES), lambda core, step: (core, 0, 0, made.block(core, step - 1)[0])
        ),
        out_shape=result((made.cores, K, L, C), kept, values),
        scratch_shapes=[
            *tiles,
            pltpu.VMEM(sums, jnp.float32),
            pltpu.VMEM(taps, jnp.float32),
        ],
        compiler_params=_params(compiled, chip),
        interpret=not compiled,
        name='depthwise_weight_gradient',
    )(*values)
    dw_KLO = _joined(made, dw)[:, :, :features]
    return dw_KLO[:, :, None].astype(operands.w_KLDO.dtype)


def _joined(made: Plan, dw: jax.Array) -> jax.Array:
    """Sums the gradients of kernels over the cores, [cores, K, L, C]."""
    if made.cores == 1:
        return dw[0]
    # A core writes the blocks of channels that it had a part of.
    blocks, last = made.grid[0], made.items - 1
    per_channel, had = made.items // blocks, []
    for core in range(made.cores):
        first, stop = (min(core * made.per_core + k, last) for k in (0, made.per_core - 1))
        had.append(range(first // per_channel, stop // per_channel + 1))
    lanes = jnp.arange(dw.shape[3]) // LANES
    parts = [
        jnp.where((lanes >= one[0]) & (lanes <= one[-1]), part, 0.0)
        for one, part in zip(had, dw, strict=True)
    ]
    return sum(parts)


def _convolve(
    x_BHWC: jax.Array,
    w_KLC: jax.Array,
    axes: tuple[Axis, Axis],
    block_sizes: ConvBlockSizes | None,
    *,
    vectors: dict[str, jax.Array] | None = None,
    residual_BPQO: jax.Array | None = None,
    activation: str | None = None,
    keep: bool = False,
) -> list[jax.Array]:
    """Returns [y] or [y, u], each [B, P, Q, C] of the axes' outputs."""
    chip, compiled = layout.target()
    (B, C), dtype = _padded(x_BHWC), x_BHWC.dtype
    arrays = 1 + keep + (residual_BPQO is not None)
    made = plan(axes, (B, C), dtype, chip, block_sizes, arrays)
    made = laid_out(made) if compiled else made
    epilogue = Epilogue(tuple(vectors or ()), activation)
    weights = layout.pad_last(w_KLC.astype(dtype), C)
    (K, L, _), rows = weights.shape, layout.up(math.prod(weights.shape[:2]), WORDS)
    column = pl.BlockSpec((K, L, LANES), lambda core, step: (0, 0, made.block(core, step - 1)[0]))
    x_HWBC = layout.turn(x_BHWC, B, C)
    inputs = {'x': (x_HWBC, _in_spec(made)), 'w': (weights, column)}
    if made.carried:
        inputs['head'] = x_HWBC, _head_spec(made)
    if vectors:
        lanes = _lanes(vectors, made)
        inputs['vectors'] = (
            lanes,
            pl.BlockSpec(
                (1, *lanes.shape[1:]), lambda core, step: (made.block(core, step - 1)[0], 0, 0, 0)
            ),
        )
    if residual_BPQO is not None:
        inputs['residual'] = (layout.turn(residual_BPQO, B, C), _out_spec(made, 0))
    outputs = ['y', 'u'] if keep else ['y']
    tiles = {'x': made.tiles_in} | {
        name: made.tiles_out for name in (*outputs, *inputs) if name in ('y', 'u', 'residual')
    }
    scratch = {
        f'tiles_{name}_{k}': pltpu.VMEM(size, dtype) for name, size in tiles.items() for k in (0, 1)
    }
    scratch |= {
        'words': pltpu.VMEM((rows, LANES), jnp.uint32),
        'spread': pltpu.VMEM((made.n, rows, LANES), jnp.uint32),
        'expanded': pltpu.VMEM((made.n, *made.bands, made.side, made.side), dtype),
    }
    values, specs = zip(*inputs.values(), strict=True)
    shape = axes[0].outputs, axes[1].outputs, B, C
    made_PQBC = pl.pallas_call(
        functools.partial(forward_kernel, made, epilogue, [*inputs, *outputs, *scratch]),
        grid=(made.cores, made.per_core + 2),
        in_specs=specs,
        out_specs=[_out_spec(made, 2)] * len(outputs),
        out_shape=[result(shape, dtype, values)] * len(outputs),
        scratch_shapes=list(scratch.values()),
        compiler_params=_params(compiled, chip),
        interpret=not compiled,
        name='depthwise',
    )(*values)
    return [layout.turn_back(y, x_BHWC.shape[0], x_BHWC.shape[3]) for y in made_PQBC]


def _multiplier(operands: Operands) -> int:
    return operands.w_KLDO.shape[3] // operands.x_BHWC.shape[3]


def _repeated(operands: Operands) -> jax.Array:
    """x with each channel as often as it has outputs."""
    x_BHWC, multiplier = operands.x_BHWC, _multiplier(operands)
    if multiplier == 1:
        return x_BHWC
    # Not `jnp.repeat`, whose [B, H, W, C, multiplier] would be padded to 128 lanes.
    nothing, zero = (0, 0, 0), jnp.zeros((), x_BHWC.dtype)
    spread = [(n, multiplier - 1 - n, multiplier - 1) for n in range(multiplier)]
    return sum(jax.lax.pad(x_BHWC, zero, [nothing] * 3 + [places]) for places in spread)


def _by_channel(w_KLDO: jax.Array) -> jax.Array:
    return w_KLDO[:, :, 0]


def _axes(operands: Operands, spec: Spec) -> tuple[Axis, Axis]:
    sizes, taps = operands.x_BHWC.shape[1:3], operands.w_KLDO.shape[:2]
    outputs = spec.out_size(sizes, taps)
    lows = [low for low, _ in spec.padding]
    rows, cols = zip(sizes, outputs, taps, spec.stride, spec.dilation, lows, strict=True)
    return Axis.of(*rows), Axis.of(*cols)


def _padded(x_BHWC: jax.Array) -> tuple[int, int]:
    """Batch and channels in whole registers."""
    B, _, _, C = x_BHWC.shape
    return layout.up(B, layout.sublanes(x_BHWC.dtype)), layout.up(C, LANES)


def _lanes(vectors: dict[str, jax.Array], made: Plan) -> jax.Array:
    """Vectors of channels as the tiles have them, float32 [N, n, vectors, z]."""
    C = made.sizes[1]
    rows = jnp.stack([layout.pad_last(v.astype(jnp.float32), C) for v in vectors.values()])
    split = rows.reshape(len(vectors), C // LANES, made.n, made.g)
    return jnp.tile(split, (1, 1, 1, made.pixels)).transpose(1, 2, 0, 3)


def _in_spec(made: Plan) -> pl.BlockSpec:
    """Blocks of x_HWBC, that overlap where more than one is needed."""

    def start(core, step):
        n, b, *place = made.block(core, step)
        return *made.window(place)[1], b * made.batch, n * LANES

    return pl.BlockSpec(tuple(map(pl.Element, made.in_block)), start)


def _head_spec(made: Plan) -> pl.BlockSpec:
    """Rows of x_HWBC above an image's first block."""
    _, cols, *rest = made.in_block
    sizes = len(made.head), cols, *rest

    def start(core, step):
        n, b, *_ = made.block(core, step)
        return made.head.start, 0, b * made.batch, n * LANES

    return pl.BlockSpec(tuple(map(pl.Element, sizes)), start)


def _out_spec(made: Plan, late: int) -> pl.BlockSpec:
    """Blocks of y_PQBC, of so many steps ago."""

    def index(core, step):
        n, b, p, q = made.block(core, step - late)
        return p, q, b, n

    return pl.BlockSpec(made.out_block, index)


def _params(compiled: bool, chip) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=SEMANTICS, vmem_limit_bytes=chip.vmem_limit if compiled else None
    )

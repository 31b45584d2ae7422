"""Convolution on NVIDIA Hopper, forward and both gradients, in Mosaic GPU.

bfloat16 and float16: depthwise in one and two dimensions (any kernel, stride, dilation and padding,
segment ids), and dense as an implicit GEMM on the tensor cores. Off the GPU it runs in the
interpreter of Pallas, which is for tests. What it lacks, `refuses` names; where XLA's own
convolutions are the better choice, `worthwhile` says so.

Legend: B batch, H W input rows and columns, K L kernel rows and columns, P Q output rows and
columns, C input channels, D channels of a kernel, O output channels.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.conv.arguments import ConvBlockSizes, Operands, Spec
from pallas_kernels.conv.gpu import dense, dense_weights, depthwise, depthwise_weights
from pallas_kernels.conv.gpu.axes import Axis, forward_axes, gradient_axes
from pallas_kernels.conv.gpu.mapped import folds
from pallas_kernels.conv.gpu.patches import Blocks, blocks
from pallas_kernels.conv.gpu.windows import Windows
from pallas_kernels.hopper import interpretation, other_chip
from pallas_kernels.mesh import vary, varying

Axes = tuple[Axis, Axis]
FEWEST_CHANNELS = 32  # of a depthwise block: with fewer, most of each vector is idle
MOST_TAPS = 128  # that a direct sum is the way to do


def refuses(operands: Operands, spec: Spec) -> str | None:
    """Returns why this path cannot run the call, in words for its caller, or None."""
    x, w = operands.x_BHWC, operands.w_KLDO
    channels, features = x.shape[3], w.shape[3]
    if jnp.dtype(x.dtype) not in (jnp.bfloat16, jnp.float16):
        return f'takes bfloat16 and float16, and x is {jnp.dtype(x.dtype)}'
    if spec.groups not in (1, channels):
        return f'takes groups of 1 or as many as channels, {channels}, and these are {spec.groups}'
    if reason := other_chip():
        return reason
    if _is_depthwise(operands, spec):
        if features != channels:
            return f'takes one kernel for each channel, and these are {features // channels}'
        return _depthwise_refuses(operands, spec)
    if operands.segment_ids_BT is not None:
        return 'takes segment ids with as many groups as channels only'
    return _dense_refuses(operands, spec)


def worthwhile(operands: Operands, spec: Spec) -> bool:
    """Returns whether this path, rather than XLA, should run a call that it does not refuse.

    Depthwise convolutions, yes. They are bound by memory: an output moves 4 bytes and takes K * L
    multiply-adds, and in a cycle a multiprocessor of an H100 moves 14 bytes and does 128 of those,
    so that up to some 35 taps the copies take longer. The kernel copies each input about once, and
    bias, scale, residual and activation ride along. XLA hands such calls to cuDNN as grouped
    convolutions: users of H100s see these slower than dense ones, the more so the larger the
    dilation (jax issue 26266), and their backward pass as slow as a dense one's (13800). Not so
    with few channels, which leave most of a vector idle, nor with many taps: no direct sum is then
    the right algorithm.

    Dense convolutions, no. cuDNN's implicit GEMMs are picked by measuring them on the device at
    hand, and share operands among clusters of blocks; the kernel here has one shape of tile, each
    block of which loads all it needs, and the phases of a strided input gradient are put together
    by another pass over memory.

    None of this is measured here: the reasons are counts of bytes and operations, and what others
    measured.
    """
    x, w = operands.x_BHWC, operands.w_KLDO
    narrow, long = x.shape[3] < FEWEST_CHANNELS, w.shape[0] * w.shape[1] > MOST_TAPS
    return _is_depthwise(operands, spec) and not narrow and not long


def _is_depthwise(operands: Operands, spec: Spec) -> bool:
    return spec.groups == operands.x_BHWC.shape[3] > 1


def _dense_refuses(operands: Operands, spec: Spec) -> str | None:
    axes, (channels, features) = forward_axes(operands, spec), operands.w_KLDO.shape[2:]
    found = [Windows(axes, channels).refuses()]
    found += [Windows(phase, features).refuses() for phase, _ in _phases(axes) if phase is not None]
    return next((reason for reason in found if reason), None)


def _depthwise_refuses(operands: Operands, spec: Spec) -> str | None:
    axes, C = forward_axes(operands, spec), operands.x_BHWC.shape[3]
    options = {'by_column': operands.segment_ids_BT is not None}
    found = [blocks(axes, C, outputs=2, **options)]
    found += [
        blocks(phase, C, outputs=1, **options) for phase, _ in _phases(axes) if phase is not None
    ]
    found += [
        blocks(part, C, outputs=1, slots=depthwise_weights.SLOTS, **options)
        for row in depthwise_weights.parts(axes)
        for part in row
    ]
    if None in found:
        return 'takes kernels whose input for some outputs fits the shared memory of a block'
    return None


def _phases(axes: Axes) -> list[tuple[Axes | None, tuple[slice, slice]]]:
    """Returns, for each phase of rows and each of columns, what convolves the cotangents to it."""
    rows, columns = map(gradient_axes, axes)
    return [
        (None if i is None or j is None else (i, j), (down, across))
        for i, down in rows
        for j, across in columns
    ]


def _by_phase(
    operands: Operands, spec: Spec, convolve: Callable[[Axes, jax.Array], jax.Array]
) -> jax.Array:
    """Returns dx from `convolve`, which takes axes and some taps of the kernel to a phase of it."""
    axes, (B, H, W, C) = forward_axes(operands, spec), operands.x_BHWC.shape
    rows, columns = axes
    size = (B, -(-H // rows.stride), -(-W // columns.stride), C)
    found = []
    for phase, (down, across) in _phases(axes):
        if phase is None:
            found.append(jnp.zeros(size, operands.x_BHWC.dtype))
        else:
            taps = operands.w_KLDO[down][:, across]
            found.append(convolve(phase, taps).reshape(size))
    if len(found) == 1:
        return found[0]
    dx = jnp.stack(found).reshape(rows.stride, columns.stride, *size).transpose(2, 3, 0, 4, 1, 5)
    return dx.reshape(B, size[1] * rows.stride, size[2] * columns.stride, C)[:, :H, :W]


def _padded(x: jax.Array | None, spare: int) -> jax.Array | None:
    """Returns x with `spare` more channels."""
    return None if x is None else jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, spare),))


def _blocks(
    axes: Axes,
    operands: Operands,
    sizes: ConvBlockSizes | None,
    *,
    outputs: int,
    slots: int = 1,
) -> Blocks:
    by_column = operands.segment_ids_BT is not None
    C = operands.x_BHWC.shape[3]
    options = {'outputs': outputs, 'slots': slots, 'by_column': by_column}
    found = blocks(axes, C, sizes=sizes, **options)
    if found is None:
        rule = 'must have rows and cols that fit the shared memory, cols a multiple of 8'
        raise ValueError(f'block_sizes={sizes}: {rule}, on the GPU; try block_sizes=None')
    return found


def forward(
    operands: Operands,
    spec: Spec,
    block_sizes: ConvBlockSizes | None = None,
    keep: bool = False,
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns y [B, P, Q, O] and, where `keep`, u, the sum with its bias; both in x's type.

    Of `block_sizes`, a dense convolution reads `features` and a depthwise one `rows` and `cols`.
    `interpret` says how to interpret, which is done wherever there is no GPU.

    Raises:
      ValueError: `block_sizes` do not fit the kernel.
    """
    x, w, residual = operands.x_BHWC, operands.w_KLDO, operands.residual_BPQO
    axes, features = forward_axes(operands, spec), w.shape[3]
    shape = (x.shape[0], axes[0].out, axes[1].out, features)
    vectors = operands.bias_O, operands.scale_O, operands.shift_O
    if _is_depthwise(operands, spec):
        found = _blocks(axes, operands, block_sizes, outputs=2 if keep else 1)
        spare = -features % 8
        finish = dense.Epilogue(
            *(_padded(v, spare) for v in vectors), _padded(residual, spare), spec.activation
        )
        made = depthwise.convolve(
            _padded(x, spare),
            _padded(w[:, :, 0], spare),
            found,
            finish,
            ids_BT=operands.segment_ids_BT,
            keep=keep,
            interpret=interpretation(interpret),
        )
    else:
        mode, features = interpretation(interpret), block_sizes and block_sizes.features

        def convolve(along: tuple, others: tuple) -> list[jax.Array]:
            (x, residual), (w, *vectors) = along, others
            rows = None if residual is None else residual.reshape(-1, w.shape[3])
            finish = dense.Epilogue(*vectors, rows, spec.activation)
            windows = Windows(axes, x.shape[3])
            options = {'keep': keep, 'features': features, 'interpret': mode}
            made = dense.convolve(x, w, windows, finish, **options)
            return [None if z is None else z.reshape(x.shape[0], *shape[1:]) for z in made]

        made = folds(convolve)((x, residual), (w, *vectors))
    y, u = (None if z is None else z[..., :features].reshape(shape) for z in made)
    return vary((y, u), varying(operands))


def input_gradient(
    du_BPQO: jax.Array,
    operands: Operands,
    spec: Spec,
    block_sizes: ConvBlockSizes | None = None,
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """Returns dx [B, H, W, C] in x's type; a stride's phases are convolutions of their own.

    `block_sizes` have no meaning here.
    """
    del block_sizes
    du, C = du_BPQO.astype(operands.x_BHWC.dtype), operands.x_BHWC.shape[3]
    mode, spare = interpretation(interpret), -C % 8

    def depthwise_phase(axes: Axes, w: jax.Array) -> jax.Array:
        found = _blocks(axes, operands, None, outputs=1)
        args = _padded(du, spare), _padded(w[:, :, 0], spare), found, dense.Epilogue()
        dx, _ = depthwise.convolve(*args, ids_BT=operands.segment_ids_BT, interpret=mode)
        return dx[..., :C]

    def dense_phase(axes: Axes, w: jax.Array) -> jax.Array:
        def convolve(du: jax.Array, w: jax.Array) -> jax.Array:
            windows, w = Windows(axes, w.shape[3]), w.swapaxes(2, 3)
            dx, _ = dense.convolve(du, w, windows, dense.Epilogue(), interpret=mode)
            return dx.reshape(du.shape[0], axes[0].out, axes[1].out, -1)

        return folds(convolve)(du, w)

    phase = depthwise_phase if _is_depthwise(operands, spec) else dense_phase
    return vary(_by_phase(operands, spec, phase), varying((du, operands)))


def weight_gradient(
    du_BPQO: jax.Array,
    operands: Operands,
    spec: Spec,
    block_sizes: ConvBlockSizes | None = None,
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """Returns dw [K, L, D, O], summed in float32, in w's type; the same bits each time.

    `block_sizes` have no meaning here.
    """
    del block_sizes
    x, axes = operands.x_BHWC, forward_axes(operands, spec)
    du, C, mode = du_BPQO.astype(x.dtype), x.shape[3], interpretation(interpret)
    if _is_depthwise(operands, spec):
        x, du = _padded(x, -C % 8), _padded(du, -C % 8)

        def one(part: Axes) -> jax.Array:
            found = _blocks(part, operands, None, outputs=1, slots=depthwise_weights.SLOTS)
            ids_BT = operands.segment_ids_BT
            return depthwise_weights.weight_gradient(x, du, found, ids_BT=ids_BT, interpret=mode)

        parts = depthwise_weights.parts(axes)
        dw = jnp.concatenate(
            [jnp.concatenate([one(part) for part in row], axis=1) for row in parts]
        )[:, :, None, :C]
    else:

        def multiply(along: tuple, _: None) -> jax.Array:
            return dense_weights.weight_gradient(*along, Windows(axes, C), interpret=mode)

        dw = folds(multiply, summed=True)((x, du), None)
    return vary(dw.astype(operands.w_KLDO.dtype), varying((du, operands)))

"""Convolution over sequences as Mosaic TPU kernels: one group, stride 1, [B, T, C] as it is.

Legend: B batch, T input positions, P output positions, K taps, C input channels, O output channels.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.conv.arguments import ConvBlockSizes, Operands, Spec
from pallas_kernels.conv.tpu import sequence_kernel
from pallas_kernels.conv.tpu.layout import target
from pallas_kernels.conv.tpu.sequence_plan import Plan, Where, plan, vmem_bytes
from pallas_kernels.conv.tpu.sequence_window import whole_blocks
from pallas_kernels.mesh import result

SUM_BYTES = 4  # of a weight's gradient


def refuses(operands: Operands, spec: Spec) -> str | None:
    """Returns why the kernels do not take a call, None if they do."""
    (_, H, _, C), (K, *_) = operands.x_BHWC.shape, operands.w_KLDO.shape
    dtype, chip = operands.x_BHWC.dtype, target()[0]
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f'takes bfloat16 and float32, and x is {dtype.name}'
    if (H, K, spec.groups, spec.stride) != (1, 1, 1, (1, 1)):
        return 'takes sequences, one group and stride 1'
    needed = max(vmem_bytes(plan(operands, spec, chip, outputs_bytes=n), n) for n in (0, SUM_BYTES))
    if needed > chip.vmem_limit:
        reach = (operands.w_KLDO.shape[1] - 1) * spec.dilation[1]
        return (
            f'takes what fits into {chip.vmem_limit} bytes of VMEM, and {C} channels of '
            f'{reach} positions around an output need about {needed}'
        )
    return None


def forward(
    operands: Operands,
    spec: Spec,
    block_sizes: ConvBlockSizes | None = None,
    keep: bool = False,
    *,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns y [B, 1, P, O] and, with `keep`, the sum before the epilogue, in x's type.

    Args:
      operands: bfloat16 or float32.
      spec: what is static; padding before the first position may be negative, which cuts.
      block_sizes: `cols` and `features`; None chooses.
      keep: whether the sum is returned.
      interpret: passed to `pallas_call`; None interprets unless the current chip is a TPU.
    """
    chip, compiled = target()
    p = plan(operands, spec, chip, sizes=block_sizes, keep=keep)
    B, rows, K = operands.x_BHWC.shape[0], p.window.rows, len(p.shifts)
    inputs = _inputs(operands, p, lambda b, i, o: (b, i))
    inputs['w'] = (
        operands.w_KLDO[0],
        pl.BlockSpec((K, p.window.channels, p.features), lambda b, i, o: (0, 0, o)),
    )
    for name in ('bias', 'scale', 'shift'):
        array = getattr(operands, f'{name}_O')
        if array is not None:
            row = pl.BlockSpec((1, p.features), lambda b, i, o: (0, o))
            inputs[name] = array.astype(jnp.float32)[None], row
    out = pl.BlockSpec((1, rows, p.features), lambda b, i, o: (b, i, o))
    if operands.residual_BPQO is not None:
        inputs['residual'] = operands.residual_BPQO[:, 0], out
    arrays, specs = zip(*inputs.values(), strict=True)
    outputs = ['y', 'u'] if keep else ['y']
    shape = result((B, p.P, p.O), p.dtype, operands)
    found = pl.pallas_call(
        functools.partial(sequence_kernel.forward, p, [*inputs, *outputs, 'window']),
        grid=(B, p.outputs, p.feature_blocks),
        in_specs=specs,
        out_specs=[out] * len(outputs),
        out_shape=[shape] * len(outputs),
        scratch_shapes=[p.window.scratch],
        # The window is filled for a block's first features.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'parallel', 'arbitrary'),
            vmem_limit_bytes=chip.vmem_limit if compiled else None,
        ),
        interpret=not compiled if interpret is None else interpret,
        name='sequence_conv_forward',
    )(*arrays)
    y_B1PO, *u_B1PO = (x[:, None] for x in found)
    return y_B1PO, u_B1PO[0] if keep else None


def input_gradient(
    du_B1PO: jax.Array,
    operands: Operands,
    spec: Spec,
    block_sizes: ConvBlockSizes | None = None,
    *,
    interpret: Any = None,
) -> jax.Array:
    """Returns the gradient of x: du convolved with the kernel turned around, as `forward` does."""
    (_, _, T, _), (_, K, _, _) = operands.x_BHWC.shape, operands.w_KLDO.shape
    reach = (K - 1) * spec.dilation[1]
    low = reach - spec.padding[1][0]
    high = T + reach - du_B1PO.shape[2] - low
    turned = dataclasses.replace(spec, padding=((0, 0), (low, high)), activation=None)
    w_1KOC = jnp.swapaxes(operands.w_KLDO[:, ::-1], 2, 3)
    gradient = Operands(du_B1PO, w_1KOC, segment_ids_BT=operands.segment_ids_BT)
    return forward(gradient, turned, block_sizes, interpret=interpret)[0]


def weight_gradient(
    du_B1PO: jax.Array,
    operands: Operands,
    spec: Spec,
    block_sizes: ConvBlockSizes | None = None,
    *,
    interpret: Any = None,
) -> jax.Array:
    """Returns the gradient of w in its type, summed in float32; see `forward`."""
    chip, compiled = target()
    p = plan(operands, spec, chip, sizes=block_sizes, outputs_bytes=SUM_BYTES)
    B, rows, K, C = operands.x_BHWC.shape[0], p.window.rows, len(p.shifts), p.window.channels
    # Each core of a chip sums over its own part of the batch.
    parts = chip.cores if B % chip.cores == 0 else 1
    each = B // parts
    inputs = _inputs(operands, p, lambda c, o, b, i: (c * each + b, i))
    du = pl.BlockSpec((1, rows, p.features), lambda c, o, b, i: (c * each + b, i, o))
    inputs['du'] = du_B1PO[:, 0], du
    arrays, specs = zip(*inputs.values(), strict=True)
    (dw_NKCO,) = pl.pallas_call(
        functools.partial(sequence_kernel.weight_gradient, p, [*inputs, 'dw', 'window']),
        grid=(parts, p.feature_blocks, each, p.outputs),
        in_specs=specs,
        out_specs=[pl.BlockSpec((1, K, C, p.features), lambda c, o, b, i: (c, 0, 0, o))],
        out_shape=[result((parts, K, C, p.O), jnp.float32, (operands, du_B1PO))],
        scratch_shapes=[p.window.scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'parallel', 'arbitrary', 'arbitrary'),
            vmem_limit_bytes=chip.vmem_limit if compiled else None,
        ),
        interpret=not compiled if interpret is None else interpret,
        name='sequence_conv_weight_gradient',
    )(*arrays)
    return dw_NKCO.sum(0)[None].astype(operands.w_KLDO.dtype)


def _inputs(operands: Operands, p: Plan, where: Where) -> dict[str, tuple[jax.Array, pl.BlockSpec]]:
    """What both kernels read: x and what is around its blocks, and which taps count."""
    x_BTC, window = operands.x_BHWC[:, 0], p.window
    inputs = {'x': (x_BTC, p.spec(window.rows, 0, where))}
    if p.blocks > 1:
        for name, size, offset in (
            ('before', window.before, -window.before),
            ('after', window.after, window.rows),
        ):
            if size:
                inputs[name] = x_BTC, p.spec(size, offset, where)
    if p.masked:
        same_BKT = whole_blocks(_same_segment(operands.segment_ids_BT, p.shifts), window.rows)

        def index(*ids):
            row, block = where(*ids)
            return row, 0, block

        inputs['same'] = same_BKT, pl.BlockSpec((1, len(p.shifts), window.rows), index)
    return inputs


def _same_segment(ids_BT: jax.Array, shifts: tuple[int, ...]) -> jax.Array:
    """Returns where a tap reads its output's own segment, [B, K, T]."""
    before, after = max(0, -min(shifts)), max(0, max(shifts))
    ids_padded = jnp.pad(ids_BT, ((0, 0), (before, after)))
    T = ids_BT.shape[1]
    taps = [ids_padded[:, before + shift : before + shift + T] == ids_BT for shift in shifts]
    return jnp.stack(taps, axis=1)

"""Grouped convolution on TPU, 1 < groups < C: forward and both gradients.

Legend: B batch, H W P Q rows and columns of input and output, C O channels and features, K L taps,
D E channels and features of a group, X Y those of a block.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.conv.arguments import ConvBlockSizes, Operands, Spec
from pallas_kernels.conv.tpu import grouped_axis as axis
from pallas_kernels.conv.tpu import grouped_kernel as kernel
from pallas_kernels.conv.tpu import grouped_plan as plans
from pallas_kernels.conv.tpu import layout
from pallas_kernels.conv.tpu.grouped_plan import Plan
from pallas_kernels.mesh import result


def refuses(operands: Operands, spec: Spec) -> str | None:
    """Returns why the kernels do not take a call, None if they do."""
    (B, H, W, _), dtype = operands.x_BHWC.shape, operands.x_BHWC.dtype
    chip, given = layout.target()[0], ('residual',)
    for back in (False, True):
        plan = dataclasses.replace(_tiled(operands, spec, back=back), given=given, keep=True)
        if plans.fitted(plan, B, dtype, chip, None).bytes(dtype) > chip.vmem_limit:
            return f'takes images of which some rows fit into VMEM, and {H} x {W} is too wide'
    return None


def forward(
    operands: Operands,
    spec: Spec,
    block_sizes: ConvBlockSizes | None = None,
    keep: bool = False,
    *,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns y_BPQO and, where `keep`, u_BPQO (else None), both in x's type; see `conv2d`.

    `interpret` is passed to `pallas_call`; None interprets unless the current chip is a TPU.
    """
    extra = operands.extra
    plan = _tiled(operands, spec)
    plan = dataclasses.replace(plan, activation=spec.activation, given=tuple(extra), keep=keep)
    features = operands.w_KLDO.shape[3] // spec.groups
    image = operands.x_BHWC
    return _convolve(plan, image, operands.w_KLDO, features, extra, block_sizes, interpret)


def input_gradient(
    du_BPQO: jax.Array,
    operands: Operands,
    spec: Spec,
    block_sizes: ConvBlockSizes | None = None,
    *,
    interpret: Any = None,
) -> jax.Array:
    """Returns dx_BHWC, in x's type; see `forward`."""
    plan = _tiled(operands, spec, back=True)
    image, w_KLDO = du_BPQO.astype(operands.x_BHWC.dtype), operands.w_KLDO
    return _convolve(plan, image, w_KLDO, w_KLDO.shape[2], {}, block_sizes, interpret)[0]


def weight_gradient(
    du_BPQO: jax.Array,
    operands: Operands,
    spec: Spec,
    block_sizes: ConvBlockSizes | None = None,
    *,
    interpret: Any = None,
) -> jax.Array:
    """Returns dw_KLDO, summed in float32 and in w's type; see `forward`."""
    chip, compiled = layout.target()
    x_BHWC, (K, L, *_) = operands.x_BHWC, operands.w_KLDO.shape
    plan = _tiled(operands, spec)
    at = plan.lanes
    # The cotangents are turned over, once for all taps: tiles are made that way round.
    plan = dataclasses.replace(plan, lanes=at.swapped(), back=True)
    plan = plans.fitted(plan, x_BHWC.shape[0], x_BHWC.dtype, chip, block_sizes)
    x_HWBC = _turned(plan, x_BHWC, at.D)
    du_PQBO = _turned(plan, du_BPQO.astype(x_BHWC.dtype), at.E)
    shape = K, L, plan.lanes_in, plan.lanes_out
    dw_KLXO = pl.pallas_call(
        functools.partial(kernel.weight_gradient, plan),
        grid=(plan.blocks, x_HWBC.shape[2] // plan.batch, plan.row_blocks),
        in_specs=[_inputs(plan), _outputs(plan)],
        out_specs=pl.BlockSpec(shape, lambda c, b, i: (0, 0, 0, c)),
        out_shape=result((*shape[:3], du_PQBO.shape[3]), jnp.float32, (x_HWBC, du_PQBO)),
        scratch_shapes=[pltpu.VMEM(plan.tile_shape(len(plan.rows.offsets) + 1), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'arbitrary', 'arbitrary'),
            vmem_limit_bytes=chip.vmem_limit if compiled else None,
        ),
        interpret=not compiled if interpret is None else interpret,
        name='grouped_weight_gradient',
    )(x_HWBC, du_PQBO)
    w_KLDO = jax.ShapeDtypeStruct(operands.w_KLDO.shape, jnp.float32)
    (dw_KLDO,) = jax.linear_transpose(lambda w: plans.diagonal(w, at), w_KLDO)(dw_KLXO)
    return dw_KLDO.astype(operands.w_KLDO.dtype)


def _tiled(operands: Operands, spec: Spec, *, back: bool = False) -> Plan:
    """Returns a plan with the tiles that fill the matrix unit best."""
    kind = axis.gradient_axis if back else axis.forward_axis
    sizes, taps = operands.x_BHWC.shape[1:3], operands.w_KLDO.shape[:2]
    D, features = operands.w_KLDO.shape[2:]
    at = plans.lanes(spec.groups, D, features // spec.groups)
    mxu = layout.target()[0].mxu
    found = []
    for halves, *outs in plans.tilings(at, mxu, spec.stride if back else (1, 1)):
        rows, cols = (
            kind(
                sizes[n],
                spec.out_size(sizes, taps)[n],
                taps[n],
                stride=spec.stride[n],
                dilation=spec.dilation[n],
                low=spec.padding[n][0],
                outs=outs[n],
            )
            for n in range(2)
        )
        found.append(Plan(rows, cols, at, halves, back))
    return min(found, key=lambda plan: plan.passes(mxu))


def _turned(plan: Plan, x_BHWC: jax.Array, size: int) -> jax.Array:
    """Returns an image as the kernels take it, [H, W, B, blocks of channels]."""
    at, (B, *_, C) = plan.lanes, x_BHWC.shape
    x_BHWC = plans.spread(x_BHWC, at.groups, C // at.groups, size, at.together)
    return layout.turn(x_BHWC, layout.up(B, plan.batch), x_BHWC.shape[-1])


def _inputs(plan: Plan) -> pl.BlockSpec:
    """Blocks of rows that overlap."""
    shape = tuple(map(pl.Element, plan.in_shape()))

    def where(c, b, i):
        return plan.first_row(i), 0, b * plan.batch, c // plan.splits * plan.lanes_in

    return pl.BlockSpec(shape, where)


def _outputs(plan: Plan) -> pl.BlockSpec:
    return pl.BlockSpec(plan.out_shape(), lambda c, b, i: (i, 0, b, c))


def _convolve(
    plan: Plan,
    x_BHWC: jax.Array,
    w_KLDO: jax.Array,
    features: int,
    extra: dict[str, jax.Array],
    sizes: ConvBlockSizes | None,
    interpret: Any,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns y_BPQO and u_BPQO of the convolution that a plan's tiles are.

    `features` are those of a group, as they are without padding.
    """
    at, dtype, B = plan.lanes, x_BHWC.dtype, x_BHWC.shape[0]
    chip, compiled = layout.target()
    plan = plans.fitted(plan, B, dtype, chip, sizes)
    D, E = (at.E, at.D) if plan.back else (at.D, at.E)
    x_HWBC = _turned(plan, x_BHWC, D)
    w_KLXO = plans.diagonal(w_KLDO, at)
    arrays, specs = [x_HWBC, w_KLXO], [_inputs(plan)]
    shape = plan.kernel_shape(*w_KLXO.shape[:2])
    specs.append(pl.BlockSpec(shape, lambda c, b, i: plan.kernel_block(c)))
    for name, value in extra.items():
        if name == 'residual':
            arrays.append(_turned(plan, value, E))
            specs.append(_outputs(plan))
        else:
            row = plans.spread(value, at.groups, features, E, at.together)
            arrays.append(row.astype(jnp.float32)[None])
            specs.append(pl.BlockSpec((1, plan.lanes_out), lambda c, b, i: (0, c)))
    P, Q = plan.rows.outputs, plan.cols.outputs
    shape = (P, Q, x_HWBC.shape[2], plan.blocks * plan.lanes_out)
    made = pl.pallas_call(
        functools.partial(kernel.forward, plan),
        grid=(plan.blocks, shape[2] // plan.batch, plan.row_blocks),
        in_specs=specs,
        out_specs=[_outputs(plan)] * (1 + plan.keep),
        out_shape=[result(shape, dtype, arrays)] * (1 + plan.keep),
        scratch_shapes=[pltpu.VMEM(plan.tile_shape(len(plan.rows.offsets) + 1), dtype)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'parallel', 'parallel'),
            vmem_limit_bytes=chip.vmem_limit if compiled else None,
        ),
        interpret=not compiled if interpret is None else interpret,
        name='grouped_convolution',
    )(*arrays)
    made = [
        plans.gathered(layout.turn_back(image, B, image.shape[-1]), at.groups, features, E)
        for image in made
    ]
    return made[0], made[1] if plan.keep else None

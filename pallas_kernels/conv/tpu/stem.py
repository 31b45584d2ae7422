"""Convolution of few input channels on TPU, one group: forward and both gradients.

Legend: B batch, C O input and output channels, H W P Q rows and columns of input and output, K L
taps.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.conv.arguments import ConvBlockSizes, Operands, Spec
from pallas_kernels.conv.tpu import layout
from pallas_kernels.conv.tpu import stem_kernel as kernel
from pallas_kernels.conv.tpu import stem_plan as plans
from pallas_kernels.conv.tpu.stem_plan import Plan
from pallas_kernels.mesh import result


def refuses(operands: Operands, spec: Spec) -> str | None:
    """Returns why the kernels do not take a call, None if they do."""
    chip, dtype = layout.target()[0], operands.x_BHWC.dtype
    plan = plans.planned(operands, spec, 3, None, chip, packing=1)  # of all passes the largest
    if plan.bytes(dtype, 3) > chip.vmem_limit:
        _, H, W, C = operands.x_BHWC.shape
        return f'takes images that fit into VMEM with their sums, and {H} x {W} x {C} does not'
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
    x_BHWC, B = operands.x_BHWC, operands.x_BHWC.shape[0]
    extra = operands.extra
    outs = 1 + keep + ('residual' in extra)
    plan = plans.planned(
        operands, spec, outs, block_sizes, layout.target()[0],
        activation=spec.activation, given=tuple(extra), keep=keep,
    )  # fmt: skip
    arrays = [_planar(x_BHWC), plans.kernels(plan, operands.w_KLDO)]
    specs = [_inputs(plan), _whole(arrays[1])]
    for name, value in extra.items():
        if name == 'residual':
            arrays.append(value.transpose(0, 1, 3, 2))
            specs.append(_outputs(plan))
        else:
            shape = plan.features, plan.size_out[1]
            arrays.append(jnp.broadcast_to(value.astype(jnp.float32)[:, None], shape))
            specs.append(_whole(arrays[-1]))
    P, Q = plan.size_out
    shape = (B, P, plan.features, Q)
    made = _call(
        plan, kernel.forward, arrays, specs, [shape] * (1 + keep), [_outputs(plan)] * (1 + keep),
        x_BHWC.dtype, jnp.int32, interpret, 'stem_convolution',
    )  # fmt: skip
    y_BPQO, *u_BPQO = (image.transpose(0, 1, 3, 2) for image in made)
    return y_BPQO, u_BPQO[0] if keep else None


def input_gradient(
    du_BPQO: jax.Array,
    operands: Operands,
    spec: Spec,
    block_sizes: ConvBlockSizes | None = None,
    *,
    interpret: Any = None,
) -> jax.Array:
    """Returns dx_BHWC, in x's type; see `forward`."""
    dtype = operands.x_BHWC.dtype
    chip = layout.target()[0]
    # Sums are of 32 bits, a row each, whatever the type.
    plan = plans.planned(operands, spec, 1, block_sizes, chip, packing=1)
    du_BPOQ = du_BPQO.astype(dtype).transpose(0, 1, 3, 2)
    arrays = [du_BPOQ, plans.kernels(plan, operands.w_KLDO)]
    B, H, W, C = operands.x_BHWC.shape
    (dx_BCHW,) = _call(
        plan, kernel.input_gradient, arrays, [_outputs(plan), _whole(arrays[1])],
        [(B, C, H, W)], [_inputs(plan)], dtype, jnp.float32, interpret, 'stem_input_gradient',
    )  # fmt: skip
    return dx_BCHW.transpose(0, 2, 3, 1)


def weight_gradient(
    du_BPQO: jax.Array,
    operands: Operands,
    spec: Spec,
    block_sizes: ConvBlockSizes | None = None,
    *,
    interpret: Any = None,
) -> jax.Array:
    """Returns dw_KLDO, summed in float32 and in w's type; see `forward`."""
    x_BHWC, w_KLDO = operands.x_BHWC, operands.w_KLDO
    plan = plans.planned(operands, spec, 1, block_sizes, layout.target()[0])
    du_BPOQ = du_BPQO.astype(x_BHWC.dtype).transpose(0, 1, 3, 2)
    shape = plan.parts, plan.outputs, plan.group * plan.padded
    block = pl.BlockSpec((1, *shape[1:]), lambda p, b, i: (p, 0, 0))
    (dw,) = _call(
        plan, kernel.weight_gradient, [_planar(x_BHWC), du_BPOQ],
        [_inputs(plan), _outputs(plan)], [shape], [block],
        jnp.float32, jnp.int32, interpret, 'stem_weight_gradient',
    )  # fmt: skip
    like = jax.ShapeDtypeStruct(w_KLDO.shape, jnp.float32)
    (dw_KLDO,) = jax.linear_transpose(functools.partial(plans.kernels, plan), like)(dw.sum(0))
    return dw_KLDO.astype(w_KLDO.dtype)


def _planar(x_BHWC: jax.Array) -> jax.Array:
    return x_BHWC.transpose(0, 3, 1, 2)


def _inputs(plan: Plan) -> pl.BlockSpec:
    return pl.BlockSpec(plan.in_shape(), lambda p, b, i: (p * plan.blocks + b, 0, 0, 0))


def _outputs(plan: Plan) -> pl.BlockSpec:
    return pl.BlockSpec(plan.out_shape(), lambda p, b, i: (p * plan.blocks + b, i, 0, 0))


def _whole(x: jax.Array) -> pl.BlockSpec:
    return pl.BlockSpec(x.shape, lambda p, b, i: (0,) * x.ndim)


def _call(
    plan: Plan, body: Any, arrays: list[jax.Array], in_specs: list[pl.BlockSpec],
    shapes: list[tuple[int, ...]], out_specs: list[pl.BlockSpec],
    dtype: Any, scratch: Any, interpret: Any, name: str,
) -> list[jax.Array]:  # fmt: skip
    """Runs a kernel over blocks of images and, one after the other, their blocks of rows."""
    chip, compiled = layout.target()
    shared = body is kernel.weight_gradient
    return pl.pallas_call(
        functools.partial(body, plan),
        grid=(plan.parts, plan.blocks, -(-plan.size_out[0] // plan.rows)),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=[result(shape, dtype, arrays) for shape in shapes],
        scratch_shapes=[pltpu.VMEM(plan.phases_shape(), scratch)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'arbitrary' if shared else 'parallel', 'arbitrary'),
            vmem_limit_bytes=chip.vmem_limit if compiled else None,
        ),
        interpret=not compiled if interpret is None else interpret,
        name=name,
    )(*arrays)

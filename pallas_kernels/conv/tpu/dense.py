"""Dense convolutions on TPU as implicit matrix products: forward and both gradients.

Legend: B batch, H W input rows and columns, K L kernel rows and columns, C input channels, O output
channels, P Q output rows and columns.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.conv.arguments import ConvBlockSizes, Operands, Spec
from pallas_kernels.conv.tpu import dense_blocks, dense_kernel, dense_pack, dense_weights, layout
from pallas_kernels.conv.tpu.dense_axis import Axis, forward_axis, gradient_axis
from pallas_kernels.conv.tpu.dense_plan import Plan
from pallas_kernels.mesh import result

MOST_PRODUCTS = 8192  # that a program spells out: compiling takes a second for some hundred


def refuses(operands: Operands, spec: Spec) -> str | None:
    """Returns why the kernels do not take a call, None if they do."""
    operands, spec, _ = _upright(operands, spec)
    (B, H, W, C), (K, L, _, O) = operands.x_BHWC.shape, operands.w_KLDO.shape  # noqa: E741
    dtype = operands.x_BHWC.dtype
    passes = [
        _plan((B, C, O), (K, L), dtype, _axes(forward_axis, operands, spec), None, residual=True),
        _plan((B, O, C), (K, L), dtype, _axes(gradient_axis, operands, spec), None),
        _plan((B, C, O), (K, L), dtype, _axes(forward_axis, operands, spec), None, weights=True),
    ]
    if None in passes:
        return f'no row of the images and the kernel, {K} x {L} x {C} x {O}, fit into VMEM together'
    if max(plan.products for plan in passes) > MOST_PRODUCTS:
        return f'a kernel of {K} x {L} on images of {H} x {W} is too long a program'
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

    Args:
      operands: bfloat16 or float32.
      spec: what is static.
      block_sizes: None chooses.
      keep: whether u, the convolution with its bias, is wanted.
      interpret: passed to `pallas_call`; None interprets unless the current chip is a TPU.
    """
    operands, spec, turned = _upright(operands, spec)
    vectors = {'bias': operands.bias_O, 'scale': operands.scale_O, 'shift': operands.shift_O}
    made = _convolve(
        operands.x_BHWC,
        operands.w_KLDO,
        _axes(forward_axis, operands, spec),
        block_sizes,
        vectors={name: x for name, x in vectors.items() if x is not None},
        residual=operands.residual_BPQO,
        keep=keep,
        activation=spec.activation,
        interpret=interpret,
    )
    y_BPQO, u_BPQO = [x.swapaxes(1, 2) if turned else x for x in made] + [None] * (not keep)
    return y_BPQO, u_BPQO


def input_gradient(
    du_BPQO: jax.Array,
    operands: Operands,
    spec: Spec,
    block_sizes: ConvBlockSizes | None = None,
    *,
    interpret: Any = None,
) -> jax.Array:
    """Returns dx_BHWC, in x's type, of a convolution whose u has the cotangent `du_BPQO`."""
    operands, spec, turned = _upright(operands, spec)
    (dx_BHWC,) = _convolve(
        du_BPQO.swapaxes(1, 2) if turned else du_BPQO,
        operands.w_KLDO.swapaxes(2, 3),
        _axes(gradient_axis, operands, spec),
        block_sizes,
        interpret=interpret,
    )
    return dx_BHWC.swapaxes(1, 2) if turned else dx_BHWC


def weight_gradient(
    du_BPQO: jax.Array,
    operands: Operands,
    spec: Spec,
    block_sizes: ConvBlockSizes | None = None,
    *,
    interpret: Any = None,
) -> jax.Array:
    """Returns dw_KLDO, summed in float32 and in w's type; see `input_gradient`."""
    chip, compiled = layout.target()
    operands, spec, turned = _upright(operands, spec)
    x_BHWC, (K, L, C, O) = operands.x_BHWC, operands.w_KLDO.shape  # noqa: E741
    axes = _axes(forward_axis, operands, spec)
    plan = _plan((x_BHWC.shape[0], C, O), (K, L), x_BHWC.dtype, axes, block_sizes, weights=True)
    dw_NKLOC = dense_weights.call(
        plan,
        layout.turn(x_BHWC, plan.B, C),
        layout.turn(du_BPQO.swapaxes(1, 2) if turned else du_BPQO, plan.B, O),
        chip.cores,
        chip.vmem_limit if compiled else None,
        not compiled if interpret is None else interpret,
    )
    dw_KLDO = dw_NKLOC.sum(0).swapaxes(2, 3).astype(operands.w_KLDO.dtype)
    return dw_KLDO.swapaxes(0, 1) if turned else dw_KLDO


def _upright(operands: Operands, spec: Spec) -> tuple[Operands, Spec, bool]:
    """A call whose images have no more columns than rows: columns are spelt out, rows are not."""
    H, W = operands.x_BHWC.shape[1:3]
    if W <= H:
        return operands, spec, False

    def turn(x, axis):
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.eval_shape(lambda x: x.swapaxes(axis, axis + 1), x)
        return None if x is None else x.swapaxes(axis, axis + 1)

    operands = operands._replace(
        x_BHWC=turn(operands.x_BHWC, 1),
        w_KLDO=turn(operands.w_KLDO, 0),
        residual_BPQO=turn(operands.residual_BPQO, 1),
    )
    pairs = {name: getattr(spec, name)[::-1] for name in ('stride', 'padding', 'dilation')}
    return operands, dataclasses.replace(spec, **pairs), True


def _plan(
    sizes_BCO: tuple[int, int, int],
    kernel: tuple[int, int],
    dtype: Any,
    axes: tuple[Axis, Axis],
    block_sizes: ConvBlockSizes | None,
    **more: Any,
) -> Plan | None:
    """The plan of a pass, None if there is none that fits; see `Plan` for what more there is."""
    chip, _ = layout.target()
    B, C, O = sizes_BCO  # noqa: E741
    packing = dense_pack.choose(*axes, C, O, chip.mxu)
    if packing is not None:
        *kernel, f, n = packing.table.shape
        axes, C, O = packing.axes, f * C, n * O  # noqa: E741
    plan = Plan(*axes, tuple(kernel), B, C, O, packing=packing, **more)
    return dense_blocks.choose(plan, dtype, chip, block_sizes)


def _axes(make, operands: Operands, spec: Spec) -> tuple[Axis, Axis]:
    """Rows and columns of a pass, from what `make` is to what."""
    size_HW, kernel_KL = operands.x_BHWC.shape[1:3], operands.w_KLDO.shape[:2]
    size_PQ = spec.out_size(size_HW, kernel_KL)
    forwards = make is forward_axis
    rows, cols = (
        make(*((size, out) if forwards else (out, size)), taps, stride, dilation, pads[0])
        for size, out, taps, stride, dilation, pads in zip(
            size_HW, size_PQ, kernel_KL, spec.stride, spec.dilation, spec.padding, strict=True
        )
    )
    return rows, cols


def _convolve(
    x_BHWC: jax.Array,
    w_KLCO: jax.Array,
    axes: tuple[Axis, Axis],
    block_sizes: ConvBlockSizes | None,
    *,
    vectors: dict[str, jax.Array] | None = None,
    residual: jax.Array | None = None,
    keep: bool = False,
    activation: str | None = None,
    interpret: Any = None,
) -> list[jax.Array]:
    """Returns y_BHWO, and u_BHWO if it is kept, of outputs and their taps as the axes have them."""
    chip, compiled = layout.target()
    vectors = vectors or {}
    B, (K, L, C, O) = x_BHWC.shape[0], w_KLCO.shape  # noqa: E741
    plan = _plan(
        (B, C, O),
        (K, L),
        x_BHWC.dtype,
        axes,
        block_sizes,
        vectors=tuple(vectors),
        residual=residual is not None,
        keep=keep,
        activation=activation,
    )
    inputs = {'x': layout.turn(x_BHWC, plan.B, C), 'w': w_KLCO}
    if vectors:
        inputs['vectors'] = jnp.stack([x.astype(jnp.float32) for x in vectors.values()])
    if residual is not None:
        inputs['residual'] = layout.turn(residual, plan.B, O)
    interpret = not compiled if interpret is None else interpret
    near = not interpret and dense_blocks.keeps_kernel(plan, w_KLCO.dtype, chip)
    if near:
        inputs['w'] = _near(w_KLCO)
    made = _call(plan, inputs, chip.vmem_limit if compiled else None, near)(interpret=interpret)
    return [layout.turn_back(x, B, O) for x in made]


@jax.custom_batching.custom_vmap
def _near(w_KLCO: jax.Array) -> jax.Array:
    """The kernel, to be fetched into VMEM before the call; many, of a mapped call, stay in HBM."""
    return pltpu.with_memory_space_constraint(w_KLCO, pltpu.VMEM)


@_near.def_vmap
def _(size: int, batched: list[bool], w: jax.Array) -> tuple[jax.Array, bool]:
    del size
    return w, batched[0]


def _call(plan: Plan, inputs: dict[str, jax.Array], limit: int | None, near: bool):
    """The `pallas_call` of a plan, to be called with `interpret`."""
    outputs = ['y', 'u'] if plan.keep else ['y']
    image = pl.BlockSpec(plan.y_block, lambda o, b, i: (i, 0, b, o))
    scratch = dense_kernel.scratch(plan, inputs['x'].dtype)
    specs = {
        'x': dense_kernel.window(plan, lambda o, b, i: (i, b)),
        'w': pl.BlockSpec(memory_space=pltpu.VMEM)
        if near
        else pl.BlockSpec(plan.w_block, lambda o, b, i: (0, 0, 0, o)),
        'vectors': pl.BlockSpec((len(plan.vectors), plan.y_block[3]), lambda o, b, i: (0, o)),
        'residual': image,
    }
    made = result(plan.y_shape, inputs['x'].dtype, inputs)
    call = functools.partial(
        pl.pallas_call,
        functools.partial(dense_kernel.kernel, plan, (*inputs, *outputs, *scratch)),
        grid=(plan.O // plan.features, plan.B // plan.batch, plan.n_rows),
        in_specs=[specs[name] for name in inputs],
        out_specs=[image] * len(outputs),
        scratch_shapes=list(scratch.values()),
        out_shape=[made] * len(outputs),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'parallel', 'parallel'),
            vmem_limit_bytes=limit,
        ),
        name='conv_dense',
    )
    return lambda interpret: call(interpret=interpret)(*inputs.values())

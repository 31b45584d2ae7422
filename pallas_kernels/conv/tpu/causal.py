"""Depthwise convolution over positions, [B, T, C] as it is: the three passes.

One multiplier, no stride; any kernel, dilation and padding, of which causal is (S, 0), and packed
segments. Legend: B batch, T inputs, Q outputs, C channels, L taps.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.conv.arguments import ConvBlockSizes, Operands, Spec
from pallas_kernels.conv.tpu import causal_kernel, causal_plan, causal_weights
from pallas_kernels.conv.tpu.causal_plan import Plan
from pallas_kernels.conv.tpu.layout import target

MOST_TAPS = 256  # they are written out in the kernel, one after the other


def refuses(operands: Operands, spec: Spec) -> str | None:
    """Returns why the kernels do not take a call, None if they do."""
    (_, H, T, C), (K, L, _, features) = operands.x_BHWC.shape, operands.w_KLDO.shape
    if H > 1 or K > 1 or spec.stride != (1, 1) or spec.padding[0] != (0, 0):
        return 'takes one row of positions, and no stride'
    if spec.groups != C or features != C:
        return f'takes one kernel for each of {C} channels, and these are {features}'
    if L > MOST_TAPS:
        return f'takes kernels of up to {MOST_TAPS} positions, and this has {L}'
    found = causal_plan.taps(spec, L, T)
    if not found.shift:
        return f'takes kernels that meet an input, and this of {L} positions meets padding only'
    for taps, gradient in ((found, False), (found.turned, False), (found, True)):
        # With u and a residual there are four arrays.
        if _plan(operands, taps, None, arrays=4, gradient=gradient) is None:
            far = max(taps.before, taps.after)
            return f'takes taps as far apart as VMEM holds, and these are {far} positions apart'
    return None


def forward(
    operands: Operands,
    spec: Spec,
    block_sizes: ConvBlockSizes | None = None,
    keep: bool = False,
    *,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns y_BPQO and, where `keep`, u_BPQO (else None), both in x's type; see `conv1d`.

    Args:
      operands: bfloat16 or float32.
      spec: what is static.
      block_sizes: `cols` and `features` of a block and its `batch`; None chooses.
      keep: whether u is wanted.
      interpret: passed to `pallas_call`; None interprets unless the current chip is a TPU.
    """
    taps = _taps(operands, spec)
    residual_BPQO = operands.residual_BPQO
    found = _plan(operands, taps, block_sizes, arrays=2 + (residual_BPQO is not None) + keep)
    y_BQC, u_BQC = causal_kernel.call(
        found,
        operands.x_BHWC[:, 0],
        _kernel_LC(operands, taps),
        bias_C=operands.bias_O,
        scale_C=operands.scale_O,
        shift_C=operands.shift_O,
        residual_BQC=None if residual_BPQO is None else residual_BPQO[:, 0],
        ids_BT=operands.segment_ids_BT,
        activation=spec.activation,
        keep=keep,
        **_how(interpret),
    )
    return y_BQC[:, None], None if u_BQC is None else u_BQC[:, None]


def input_gradient(
    du_BPQO: jax.Array,
    operands: Operands,
    spec: Spec,
    block_sizes: ConvBlockSizes | None = None,
    *,
    interpret: Any = None,
) -> jax.Array:
    """Returns dx_BHWC, in x's type, of a convolution whose u has the cotangent `du_BPQO`.

    It is a convolution itself, each tap reading as far ahead as it had read back.
    """
    taps = _taps(operands, spec)
    dx_BTC, _ = causal_kernel.call(
        _plan(operands, taps.turned, block_sizes),
        du_BPQO[:, 0],
        _kernel_LC(operands, taps),
        ids_BT=operands.segment_ids_BT,
        **_how(interpret),
    )
    return dx_BTC[:, None]


def weight_gradient(
    du_BPQO: jax.Array,
    operands: Operands,
    spec: Spec,
    block_sizes: ConvBlockSizes | None = None,
    *,
    interpret: Any = None,
) -> jax.Array:
    """Returns dw_KLDO, summed in float32 and in w's type; see `input_gradient`."""
    taps = _taps(operands, spec)
    dw_LC = causal_weights.call(
        _plan(operands, taps, block_sizes, gradient=True),
        operands.x_BHWC[:, 0],
        du_BPQO[:, 0],
        operands.segment_ids_BT,
        cores=target()[0].cores,
        **_how(interpret),
    )
    w_KLDO, index = operands.w_KLDO, taps.index
    # What was left out met padding only.
    dw_LC = jnp.pad(dw_LC, ((index[0], w_KLDO.shape[1] - 1 - index[-1]), (0, 0)))
    return dw_LC[None, :, None].astype(w_KLDO.dtype)


def _taps(operands: Operands, spec: Spec) -> causal_plan.Taps:
    return causal_plan.taps(spec, operands.w_KLDO.shape[1], operands.x_BHWC.shape[2])


def _kernel_LC(operands: Operands, taps: causal_plan.Taps) -> jax.Array:
    """The taps that meet inputs, which are consecutive."""
    return operands.w_KLDO[0, taps.index[0] : taps.index[-1] + 1, 0]


def _plan(
    operands: Operands,
    taps: causal_plan.Taps,
    block_sizes: ConvBlockSizes | None,
    *,
    arrays: int = 2,
    gradient: bool = False,
) -> Plan | None:
    B, _, _, C = operands.x_BHWC.shape
    chip, compiled = target()
    found = causal_plan.plan(
        taps,
        (B, C),
        operands.x_BHWC.dtype,
        chip,
        block_sizes,
        arrays=arrays,
        segments=operands.segment_ids_BT is not None,
        gradient=gradient,
    )
    # An interpreter gains nothing from straight code, and XLA compiles all of it.
    return found if compiled or found is None else dataclasses.replace(found, unroll=1)


def _how(interpret: Any) -> dict[str, Any]:
    """What a call is told about where it runs."""
    chip, compiled = target()
    return {
        'limit': chip.vmem_limit if compiled else None,
        'interpret': not compiled if interpret is None else interpret,
    }

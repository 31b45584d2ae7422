"""Convolution as Mosaic TPU kernels: which kind of kernel a call comes to, and what they refuse."""

import importlib
from types import ModuleType

import jax
import jax.numpy as jnp

from pallas_kernels.conv.arguments import ConvBlockSizes, Operands, Spec

__all__ = ['forward', 'input_gradient', 'kind', 'refuses', 'weight_gradient']

FEW_CHANNELS = 8  # a contraction that leaves more of the matrix unit empty is the stem's


def kind(operands: Operands, spec: Spec) -> str:
    """Returns the name of the file of this folder that does a convolution."""
    _, H, _, C = operands.x_BHWC.shape
    in_time = H == 1 and operands.w_KLDO.shape[0] == 1 and spec.stride == (1, 1)
    in_time = in_time and spec.padding[0] == (0, 0) and operands.residual_BPQO is None
    depthwise = spec.groups == C > 1
    if in_time and (depthwise or spec.groups == 1):
        return 'causal' if depthwise else 'sequence'
    if depthwise:
        return 'depthwise'
    if spec.groups > 1:
        return 'grouped'
    return 'stem' if C <= FEW_CHANNELS else 'dense'


def refuses(operands: Operands, spec: Spec) -> str | None:
    """Returns why the kernels do not take a call, None if they do."""
    dtype = operands.x_BHWC.dtype
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f'takes bfloat16 and float32, and x is {dtype.name}'
    if operands.w_KLDO.dtype != dtype:
        return f'takes x and w of one type, and these are {dtype.name} and {operands.w_KLDO.dtype}'
    name = kind(operands, spec)
    module = _module(name)
    if module is None:
        return f'no kernel for {name} convolutions'
    if operands.segment_ids_BT is not None and name not in ('causal', 'sequence'):
        return 'takes segment ids with a stride of 1 only'
    return module.refuses(operands, spec)


def forward(
    operands: Operands, spec: Spec, block_sizes: ConvBlockSizes | None = None, keep: bool = False
) -> tuple[jax.Array, jax.Array | None]:
    """Returns y_BPQO and, where `keep`, u_BPQO (else None), both in x's type; see `conv2d`."""
    return _module(kind(operands, spec)).forward(operands, spec, block_sizes, keep)


def input_gradient(
    du_BPQO: jax.Array, operands: Operands, spec: Spec, block_sizes: ConvBlockSizes | None = None
) -> jax.Array:
    """Returns dx_BHWC, in x's type, of a convolution whose u has the cotangent `du_BPQO`."""
    return _module(kind(operands, spec)).input_gradient(du_BPQO, operands, spec, block_sizes)


def weight_gradient(
    du_BPQO: jax.Array, operands: Operands, spec: Spec, block_sizes: ConvBlockSizes | None = None
) -> jax.Array:
    """Returns dw_KLDO, summed in float32 and in w's type; see `input_gradient`."""
    return _module(kind(operands, spec)).weight_gradient(du_BPQO, operands, spec, block_sizes)


def _module(name: str) -> ModuleType | None:
    """The file of a kind, imported when it is used; None where there is none."""
    try:
        return importlib.import_module(f'{__name__}.{name}')
    except ModuleNotFoundError as error:
        if error.name != f'{__name__}.{name}':
            raise
        return None

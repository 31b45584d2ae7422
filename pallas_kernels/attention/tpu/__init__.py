"""Attention as Mosaic TPU kernels: forward, backward, and what they refuse."""

import jax.numpy as jnp

from pallas_kernels.attention.arguments import Operands, Spec
from pallas_kernels.attention.tpu.backward import backward
from pallas_kernels.attention.tpu.forward import forward

__all__ = ['backward', 'forward', 'refuses']


def refuses(operands: Operands, spec: Spec) -> str | None:
    """Returns why the kernels do not take a call, None if they do."""
    del spec
    dtype, D, V = operands.q_BTHD.dtype, operands.q_BTHD.shape[3], operands.v_BSKV.shape[3]
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f'takes bfloat16 and float32, and q is {dtype.name}'
    if min(D, V) < 8:
        return f'takes heads of 8 and more, and these have {D} and {V}'
    return None

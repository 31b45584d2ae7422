"""Compiles convolution kernels for an H100 without one and prints their registers and spills.

python -m pallas_kernels.conv.gpu.ptxas --input=32,56,56,256 --kernel=3,3,256 --groups=256
python -m pallas_kernels.conv.gpu.ptxas --input=8,4096,4096 --kernel=4,4096 --groups=4096 --segments

A conv1d, causal, has one number less in --input and in --kernel. See `pallas_kernels/ptxas.py` for
what it needs.
"""

import argparse

import jax
import jax.numpy as jnp

from pallas_kernels import ptxas
from pallas_kernels.ptxas import WHEELS, available

__all__ = ['WHEELS', 'available', 'compile_kernels', 'main']


def compile_kernels(options: list[str]) -> list[dict[str, str | int]]:
    """Returns one dict (kernel, registers, spill_bytes) for each kernel of a training step.

    `options` are those of the command line; see `pallas_kernels.ptxas.compile_kernels`.
    """
    return ptxas.compile_kernels(__spec__.name, options)


def _step(arguments: argparse.Namespace) -> tuple:
    """Returns forward and backward pass of one convolution, and the shapes they take."""
    from pallas_kernels.conv import checks, gpu

    dtype, groups = jnp.dtype(arguments.dtype), arguments.groups
    *taps, features = arguments.kernel
    in_time = len(arguments.input) == 3
    w_shape = (*taps, arguments.input[-1] // groups, features)
    shapes = [jax.ShapeDtypeStruct(s, dtype) for s in (arguments.input, w_shape)]
    shapes += [jax.ShapeDtypeStruct((features,), jnp.float32)]
    if arguments.segments:
        shapes += [jax.ShapeDtypeStruct(arguments.input[:2], jnp.int32)]
    named = {'stride': arguments.stride, 'dilation': arguments.dilation, 'groups': groups}
    named |= {'activation': arguments.activation}
    if in_time:
        named['padding'] = 'CAUSAL'

    def step(x: jax.Array, w: jax.Array, bias: jax.Array, ids: jax.Array | None = None) -> tuple:
        if in_time:
            operands, spec = checks.check_conv1d(x, w, bias=bias, segment_ids=ids, **named)
        else:
            operands, spec = checks.check_conv2d(x, w, bias=bias, **named)
        if reason := gpu.refuses(operands, spec):
            raise SystemExit(f'the kernel {reason}')
        if arguments.scale_shift:
            operands = operands._replace(scale_O=bias, shift_O=bias)
        if arguments.residual:
            out = spec.out_size(operands.x_BHWC.shape[1:3], operands.w_KLDO.shape[:2])
            residual = jnp.ones((x.shape[0], *out, features), dtype)
            operands = operands._replace(residual_BPQO=residual)
        y, u = gpu.forward(operands, spec, None, arguments.keep)
        du = y  # of its shape and type
        dx = gpu.input_gradient(du, operands, spec)
        return y, u, dx, gpu.weight_gradient(du, operands, spec)

    return step, shapes


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(',')))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--input', type=_numbers, required=True, help='B,H,W,C or B,T,C')
    parser.add_argument('--kernel', type=_numbers, required=True, help='K,L,O or K,O')
    parser.add_argument('--stride', type=int, default=1)
    parser.add_argument('--dilation', type=int, default=1)
    parser.add_argument('--groups', type=int, default=1)
    parser.add_argument('--dtype', default='bfloat16', choices=('bfloat16', 'float16'))
    parser.add_argument('--activation', help='relu, silu, gelu, tanh or sigmoid')
    parser.add_argument('--scale_shift', action='store_true', help='a folded BatchNorm')
    parser.add_argument('--residual', action='store_true')
    parser.add_argument('--segments', action='store_true', help='packed documents')
    parser.add_argument('--keep', action='store_true', help='write the sum as well')
    return parser


def main(options: list[str] | None = None) -> None:
    """Runs the command line."""
    ptxas.main(__spec__.name, _parser(), _step, options)


if __name__ == '__main__':
    main()

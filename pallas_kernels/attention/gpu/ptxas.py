"""Compiles the attention kernels for an H100 without one and prints their registers and spills.

python -m pallas_kernels.attention.gpu.ptxas --head_dim=128 --causal

See `pallas_kernels/ptxas.py` for what it needs.
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
    """Returns a training step of attention alone, and the shapes it takes."""
    from pallas_kernels.attention import gpu
    from pallas_kernels.attention.arguments import check_arguments

    B, T, H, K = 2, 1024, 8, 2
    D, V = arguments.head_dim, arguments.value_dim or arguments.head_dim
    dtype = jnp.dtype(arguments.dtype)
    shapes = [jax.ShapeDtypeStruct(s, dtype) for s in ((B, T, H, D), (B, T, K, D), (B, T, K, V))]
    shapes += [jax.ShapeDtypeStruct((B, T), jnp.int32), jax.ShapeDtypeStruct((H,), jnp.float32)]

    def step(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array, sinks: jax.Array) -> tuple:
        operands, spec = check_arguments(
            q,
            k,
            v,
            causal=arguments.causal,
            window=arguments.window,
            softcap=arguments.softcap,
            segment_ids=ids if arguments.segments else None,
            sinks=sinks if arguments.sinks else None,
        )
        o, lse = gpu.forward(operands, spec)
        return o, lse, gpu.backward(operands, spec, None, o, lse, o, lse)

    return step, shapes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--head_dim', type=int, default=128)
    parser.add_argument('--value_dim', type=int, help='head size of the values; as head_dim')
    parser.add_argument('--dtype', default='bfloat16', choices=('bfloat16', 'float16'))
    parser.add_argument('--causal', action='store_true')
    parser.add_argument('--window', type=int)
    parser.add_argument('--softcap', type=float)
    parser.add_argument('--segments', action='store_true', help='packed documents')
    parser.add_argument('--sinks', action='store_true')
    return parser


def main(options: list[str] | None = None) -> None:
    """Runs the command line."""
    ptxas.main(__spec__.name, _parser(), _step, options)


if __name__ == '__main__':
    main()

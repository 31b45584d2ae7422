"""Compiles the attention kernels for an H100 without one and prints their registers and spills.

python -m pallas_kernels.attention.gpu.ptxas --head_dim=128 --causal

It needs the CUDA wheels of JAX (`WHEELS`) and no GPU. Compilation happens in a child process: an
instruction that the target lacks ends the process that compiles it.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp

WHEELS = (
    'pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt '
    'nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-runtime'
)
_KIND, _CORES = 'NVIDIA H100 80GB HBM3', 132
_TARGET = f"""
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  core_count: {_CORES}
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000
  device_memory_size: 84929347584
  clock_rate_ghz: 1.98
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
device_description_str: "{_KIND}"
"""
_RESULT = re.compile(
    r"entry function '(?P<kernel>\w+?)_mosaic_gpu_kernel'"
    r'.*?(?P<spill_bytes>\d+) bytes spill stores.*?Used (?P<registers>\d+) registers',
    re.DOTALL,
)


def available() -> bool:
    """Returns whether the wheels that this needs are installed."""
    return importlib.util.find_spec('jax_cuda13_plugin') is not None


def compile_kernels(options: list[str]) -> list[dict[str, str | int]]:
    """Returns one dict (kernel, registers, spill_bytes) for each kernel of a training step.

    `options` are those of the command line.

    Raises:
      RuntimeError: the wheels are missing, the compiler failed, or it took the asynchrony from
        products; the message says which.
    """
    if not available():
        raise RuntimeError(f'needs the CUDA wheels of JAX, but no GPU: {WHEELS}')
    environment = os.environ | {
        'JAX_PLATFORMS': 'cpu',
        'JAX_SKIP_CUDA_CONSTRAINTS_CHECK': '1',
        'CUDA_VISIBLE_DEVICES': '-1',
        'MOSAIC_GPU_DUMP_PTXAS': '1',
    }
    command = [sys.executable, '-m', __spec__.name, '--child', *options]
    root = pathlib.Path(__file__).parents[3]
    child = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    if child.returncode:
        raise RuntimeError(f'{" ".join(command)} failed:\n{child.stderr[-2000:]}')
    if 'wgmma.mma_async instructions are serialized' in child.stdout + child.stderr:
        raise RuntimeError('the compiler lets the products of a kernel wait for each other')
    found = [x.groupdict() for x in _RESULT.finditer(child.stdout + child.stderr)]
    return [{name: int(x) if x.isdigit() else x for name, x in line.items()} for line in found]


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


def _compile(arguments: argparse.Namespace) -> None:
    from jax.experimental import topologies

    device = jax.sharding.AbstractDevice(_KIND, _CORES, 'gpu')
    target = topologies.get_topology_desc(
        platform='cuda', target_config=_TARGET, topology='1x1x1'
    ).devices[0]
    step, shapes = _step(arguments)
    here = jax.sharding.SingleDeviceSharding(target)
    shapes = [x.update(sharding=here) for x in shapes]
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        jax.jit(step).trace(*shapes).lower(lowering_platforms=('cuda',)).compile()


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
    parser.add_argument('--json', action='store_true', help='one object a kernel')
    parser.add_argument('--child', action='store_true', help=argparse.SUPPRESS)
    return parser


def main(options: list[str] | None = None) -> None:
    """Runs the command line."""
    options = sys.argv[1:] if options is None else options
    arguments = _parser().parse_args(options)
    if arguments.child:
        _compile(arguments)
        return
    for line in compile_kernels([x for x in options if x != '--json']):
        if arguments.json:
            print(json.dumps(line))
        else:
            print('{kernel}: {registers} registers, {spill_bytes} bytes spilled'.format_map(line))


if __name__ == '__main__':
    main()

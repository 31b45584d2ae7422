"""Compiles kernels for an H100 without one and reads their registers and spills off ptxas.

It needs the CUDA wheels of JAX (`WHEELS`) and no GPU. Compilation happens in a child process: an
instruction that the target lacks ends the process that compiles it. `attention/gpu/ptxas.py` and
`conv/gpu/ptxas.py` are the command lines.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable

import jax

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


def compile_kernels(module: str, options: list[str]) -> list[dict[str, str | int]]:
    """Returns one dict (kernel, registers, spill_bytes) for each kernel of a step.

    Args:
      module: a command line that goes through `main`.
      options: the options of that command line.

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
    command = [sys.executable, '-m', module, '--child', *options]
    root = pathlib.Path(__file__).parents[1]
    child = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    if child.returncode:
        raise RuntimeError(f'{" ".join(command)} failed:\n{child.stderr[-2000:]}')
    if 'wgmma.mma_async instructions are serialized' in child.stdout + child.stderr:
        raise RuntimeError('the compiler lets the products of a kernel wait for each other')
    found = [x.groupdict() for x in _RESULT.finditer(child.stdout + child.stderr)]
    return [{name: int(x) if x.isdigit() else x for name, x in line.items()} for line in found]


def _compile(step: Callable, shapes: list[jax.ShapeDtypeStruct]) -> None:
    from jax.experimental import topologies

    device = jax.sharding.AbstractDevice(_KIND, _CORES, 'gpu')
    target = topologies.get_topology_desc(
        platform='cuda', target_config=_TARGET, topology='1x1x1'
    ).devices[0]
    here = jax.sharding.SingleDeviceSharding(target)
    shapes = [x.update(sharding=here) for x in shapes]
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        jax.jit(step).trace(*shapes).lower(lowering_platforms=('cuda',)).compile()


def main(
    module: str,
    parser: argparse.ArgumentParser,
    build: Callable[[argparse.Namespace], tuple[Callable, list[jax.ShapeDtypeStruct]]],
    options: list[str] | None = None,
) -> None:
    """Runs a command line: prints what each kernel takes of the step that `build` returns.

    Args:
      module: its name, for the child process to run.
      parser: its options; those that every such command line has are added.
      build: returns a step and the shapes it takes, from the parsed options.
      options: what was typed; None reads the process's.
    """
    options = sys.argv[1:] if options is None else options
    parser.add_argument('--json', action='store_true', help='one object a kernel')
    parser.add_argument('--child', action='store_true', help=argparse.SUPPRESS)
    arguments = parser.parse_args(options)
    if arguments.child:
        _compile(*build(arguments))
        return
    for line in compile_kernels(module, [x for x in options if x != '--json']):
        if arguments.json:
            print(json.dumps(line))
        else:
            print('{kernel}: {registers} registers, {spill_bytes} bytes spilled'.format_map(line))

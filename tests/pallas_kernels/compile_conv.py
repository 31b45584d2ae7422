"""Compiles convolutions ahead of time for one generation, all three passes; prints their memory.

Run in a child process, whose environment says that there is no TPU: libtpu is loaded once only.
"""

import concurrent.futures
import dataclasses
import json
import re
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout

from pallas_kernels import chip as chips
from pallas_kernels import schedule_conv
from pallas_kernels.conv.tpu.layout import tile_bytes
from pallas_kernels.schedule_conv import Case
from pallas_kernels.schedule_work import OURS

# As small as shows what a kind does: more than one tile, an odd size, every feature once.
CASES = {
    'dense': Case('conv2d', 8, 12, 12, 256, 3, 3, 256, epilogue='bias,scale_shift,residual,relu'),
    'dense_odd': Case('conv2d', 3, 9, 11, 72, 3, 3, 40, padding='VALID', dtype='float32'),
    'one': Case('conv2d', 8, 7, 7, 128, 1, 1, 384, epilogue='bias,gelu'),
    'strided': Case('conv2d', 8, 14, 14, 128, 3, 3, 256, stride=2),
    'dilated': Case('conv2d', 8, 12, 12, 128, 3, 3, 128, dilation=4),
    'stem': Case('conv2d', 8, 32, 32, 3, 7, 7, 64, stride=2, epilogue='scale_shift,relu'),
    'grouped': Case('conv2d', 8, 14, 14, 128, 3, 3, 128, groups=16),
    'depthwise': Case('conv2d', 8, 8, 8, 128, 3, 3, 128, groups=128, epilogue='bias,silu'),
    'multiplied': Case('conv2d', 8, 8, 8, 128, 3, 3, 256, stride=2, groups=128),
    'causal': Case('conv1d', 2, 1, 1024, 256, 1, 4, 256, groups=256, padding='CAUSAL',
                   segments=True, epilogue='bias,silu'),
    'sequence': Case('conv1d', 2, 1, 1024, 128, 1, 3, 128, dilation=2, segments=True),
    'gated': Case('gated_conv1d', 2, 1, 1024, 128, 1, 2, 256, dilation=64, padding='CAUSAL'),
}  # fmt: skip


def lowered(case: Case, chip: chips.Chip, device: jax.Device) -> jax.stages.Lowered:
    """The forward pass and all gradients of a case, layouts free."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    abstract = jax.sharding.AbstractDevice(chip.kind, 1, 'tpu')
    with jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((), (), abstract_device=abstract)
    ):
        request = {'side': OURS, 'case': dataclasses.asdict(case) | {'passes': 'all'}}
        function, arguments, _ = schedule_conv.build(request)
        arguments = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments
        )
        free = Format(Layout.AUTO, sharding)
        jitted = jax.jit(function, in_shardings=free, out_shardings=free)
        return jitted.trace(*arguments).lower(lowering_platforms=('tpu',))


def arrays_bytes(case: Case, chip: chips.Chip) -> int:
    """Bytes of the arguments and the results, in float32 and turned so that a tile is [B, C].

    Where a device has two cores, each has its own sum of the kernel's gradient besides; an epilogue
    keeps its input, of the result's size, whose gradient is another such array.
    """
    turned = {
        name: (*shape[1:-1], shape[0], shape[-1]) if len(shape) == 4 and name != 'w' else shape
        for name, shape in case.shapes.items()
    }
    held = {name: tile_bytes((1, *shape), jnp.float32) for name, shape in turned.items()}
    sums = chip.cores * held['w'] if chip.cores > 1 else 0
    return sum(held.values()) + sums + (held['y'] if case.epilogue else 0)


def report(compiled: jax.stages.Compiled, case: Case, chip: chips.Chip) -> dict[str, int]:
    """Kernels, their VMEM and its limit, temporaries in HBM and the arrays' bytes."""
    text = compiled.as_text()
    sizes = r'used_scoped_memory_configs":\[\{"memory_space":"1"[^}]*"size":"(\d+)"'
    return {
        'kernels': text.count('custom_call_target="tpu_custom_call"'),
        'vmem': max(map(int, re.findall(sizes, text)), default=0),
        'limit': chip.vmem_limit,
        'temp': compiled.memory_analysis().temp_size_in_bytes,
        'arrays': arrays_bytes(case, chip),
    }


def main(name: str, *wanted: str) -> None:
    """Prints {case: report} for the generation called `name`."""
    chip = chips.named(name)
    device = topologies.get_topology_desc(platform='tpu', topology_name=chip.topology).devices[0]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        compiling = {
            case: pool.submit(lowered(CASES[case], chip, device).compile)
            for case in wanted or CASES
        }
        found = {
            case: report(compiled.result(), CASES[case], chip)
            for case, compiled in compiling.items()
        }
    print(json.dumps(found))


if __name__ == '__main__':
    main(*sys.argv[1:])

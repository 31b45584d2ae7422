"""Compiles the TPU forward kernel ahead of time for one generation; prints what memory it takes.

Run in a child process, whose environment says that there is no TPU: libtpu is loaded once only.
"""

import json
import re
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from pallas_kernels import chip as chips
from pallas_kernels.attention import tpu
from pallas_kernels.attention.arguments import Operands, Spec
from pallas_kernels.block_sizes import BlockSizes

SMALL = BlockSizes(256, 256, 128, 128)
CASES = {
    # name: (B, T, S, H, K, D, V), dtype, what else there is
    'full': ((1, 1024, 1024, 2, 2, 128, 128), 'bfloat16', ()),
    'packed': ((2, 700, 700, 4, 2, 64, 64), 'bfloat16', ('causal', 'segments', 'sinks')),
    'masked': ((1, 2048, 2048, 2, 1, 80, 40), 'bfloat16', ('mask', 'bias', 'dropout', 'softcap')),
    'float32': ((1, 1100, 1536, 1, 1, 128, 128), 'float32', ('window', 'rows', 'start')),
}


def main(name: str) -> None:
    """Prints {case: {vmem, limit, temp, logits}} in bytes for the generation called `name`."""
    chip = chips.named(name)
    device = topologies.get_topology_desc(platform='tpu', topology_name=chip.topology).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    abstract = jax.sharding.AbstractDevice(chip.kind, 1, 'tpu')
    found = {}
    for case, (shape, dtype, features) in CASES.items():
        operands, spec = call(shape, dtype, features, sharding)
        with jax.sharding.use_abstract_mesh(
            jax.sharding.AbstractMesh((), (), abstract_device=abstract)
        ):
            run = jax.jit(lambda operands, spec=spec: tpu.forward(operands, spec, SMALL))
            compiled = run.trace(operands).lower(lowering_platforms=('tpu',)).compile()
        vmem = re.findall(
            r'used_scoped_memory_configs":\[\{"memory_space":"1"[^}]*"size":"(\d+)"',
            compiled.as_text(),
        )
        temp = compiled.memory_analysis().temp_size_in_bytes
        B, T, S, H = shape[:4]
        found[case] = {
            'vmem': max(map(int, vmem)),
            'limit': chip.vmem_limit,
            'temp': temp,
            'logits': 4 * B * H * T * S,
        }
    print(json.dumps(found))


def call(shape, dtype, features, sharding) -> tuple[Operands, Spec]:
    """Returns the operands, without values, and the specification of a case."""
    B, T, S, H, K, D, V = shape

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    more = {}
    if 'segments' in features:
        more['segment_ids_BT'] = array(B, T, dtype='int32')
        more['kv_segment_ids_BS'] = array(B, S, dtype='int32')
    if 'mask' in features:
        more['mask_BHTS'] = array(B, 1, T, S, dtype='bool')
    if 'bias' in features:
        more['bias_BHTS'] = array(1, H, T, S)
    if 'rows' in features:
        more['bias_BHTS'] = array(1, H, 1, S)
        more['mask_BHTS'] = array(B, 1, T, 1, dtype='bool')
    if 'sinks' in features:
        more['sinks_H'] = array(H, dtype='float32')
    if 'dropout' in features:
        more['dropout_seed'] = array(dtype='int32')
    if 'start' in features:
        more['start'] = array(4, dtype='int32')
    spec = Spec(
        causal='causal' in features,
        window=(100, 50) if 'window' in features else (None, None),
        softcap=30.0 if 'softcap' in features else None,
        dropout_rate=0.1 if 'dropout' in features else 0.0,
        scale=D**-0.5,
        shift=S - T,
    )
    return Operands(array(B, T, H, D), array(B, S, K, D), array(B, S, K, V), **more), spec


if __name__ == '__main__':
    main(sys.argv[1])

"""Compiles decode attention ahead of time for the TPU named, and prints a line of JSON a case."""

import json
import re
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from pallas_kernels.attention.decode import decode_attention
from pallas_kernels.attention.decode_arguments import DecodeSpec
from pallas_kernels.attention.tpu import decode_plan
from pallas_kernels.chip import CHIPS, Chip

# B, T, S, H, K, D, V, tokens of a page (0: contiguous), type, window
CASES = (
    (16, 1, 2048, 32, 8, 128, 128, 0, 'bfloat16', None),
    (16, 3, 1024, 12, 12, 64, 64, 16, 'bfloat16', 100),
    (8, 2, 1024, 6, 3, 40, 24, 0, 'float32', None),
)


def compiled(chip: Chip, case: tuple) -> dict[str, int]:
    """What the compiler says of memory for one case."""
    B, T, S, H, K, D, V, page, dtype, window = case
    device = topologies.get_topology_desc(
        platform='tpu', topology_name=chip.topology
    ).devices[0]  # fmt: skip
    placed = jax.sharding.SingleDeviceSharding(device)
    lead = (B * S // page, page) if page else (B, S)
    shapes = [((B, T, H, D), dtype), ((*lead, K * D), dtype), ((*lead, K * V), dtype)]
    shapes += [((B,), 'int32'), ((B, S // (page or S)), 'int32')]
    arrays = [jax.ShapeDtypeStruct(s, jnp.dtype(t), sharding=placed) for s, t in shapes]

    def call(q_BTHD, k, v, lengths_B, table):
        return decode_attention(
            q_BTHD, k.reshape(*lead, K, D), v.reshape(*lead, K, V), lengths_B=lengths_B,
            page_table_BP=table if page else None, window=window, softcap=30.0,
            sinks=jnp.ones(H), return_lse=True, impl='tpu',
        )  # fmt: skip

    kind = jax.sharding.AbstractDevice(chip.kind, 1, 'tpu')
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=kind)):
        program = jax.jit(call).trace(*arrays).lower(lowering_platforms=('tpu',)).compile()
        q, k, v = (
            jax.ShapeDtypeStruct(s, dtype) for s in (arrays[0].shape, (*lead, K, D), (*lead, K, V))
        )
        table, spec = arrays[4] if page else None, DecodeSpec(window, 30.0, 1.0)
        plan = decode_plan.choose(q, k, v, table, spec, chip, None)
    (kernel,) = (line for line in program.as_text().splitlines() if 'tpu_custom_call"' in line)
    used = re.search(r'used_scoped_memory_configs":\[{[^}]*"size":"(\d+)"', kernel)
    return {
        'vmem_bytes': int(used[1]),
        'estimate': decode_plan.vmem_bytes(plan, dtype),
        'limit': chip.vmem_limit,
        'temp_bytes': program.memory_analysis().temp_size_in_bytes,
        'lanes': K * D,
        'cache_bytes': B * S * K * (D + V) * jnp.dtype(dtype).itemsize,
    }


if __name__ == '__main__':
    for case in CASES:
        print(json.dumps(compiled(CHIPS[sys.argv[1]], case)))

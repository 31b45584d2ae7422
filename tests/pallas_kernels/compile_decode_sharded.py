"""Compiles decode attention over four chips that are not there; prints a line of JSON a case.

`python compile_decode_sharded.py v5e`: rows on two, heads on two.
"""

import functools
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.attention import decode_attention, shard_decode
from pallas_kernels.chip import CHIPS, Chip

B, T, S, H, D = 16, 1, 2048, 16, 128
ROW = P('data', None, 'tensor')
SPLIT = shard_decode(batch='data', heads='tensor')
# name: key-value heads, tokens of a page (0: contiguous), whether a `jax.shard_map` is around it
CASES = {
    'contiguous': (4, 0, False),
    'one key-value head': (1, 0, False),
    'paged': (4, 64, False),
    'in a shard_map': (4, 0, True),
}
COLLECTIVE = re.compile(r'(all-gather|all-reduce|all-to-all|collective-permute)(-start)?\(')


def arrays(mesh: Mesh, K: int, page: int) -> list[jax.ShapeDtypeStruct]:
    """q, k, v, lengths and page table; caches as a model keeps them, heads side by side."""
    lead = (B * S // page, page) if page else (B, S)
    cache = (*lead, K * D), P(None if page else 'data', None, None if K == 1 else 'tensor')
    given = (
        ((B, T, H, D), ROW, 'bfloat16'), (*cache, 'bfloat16'), (*cache, 'bfloat16'),
        ((B,), P('data'), 'int32'), ((B, S // (page or S)), P('data'), 'int32'),
    )  # fmt: skip
    return [
        jax.ShapeDtypeStruct(shape, jnp.dtype(kind), sharding=NamedSharding(mesh, spec))
        for shape, spec, kind in given
    ]


def call(K: int, page: int, inside: bool, q, k, v, lengths_B, table) -> jax.Array:
    """Decode attention, split by itself or in a `jax.shard_map` of the caller's."""
    k, v = (x.reshape(*x.shape[:2], K, D) for x in (k, v))
    if not inside:
        table = table if page else None
        return SPLIT(q, k, v, lengths_B=lengths_B, page_table_BP=table, impl='tpu')
    return jax.shard_map(
        lambda q, k, v, lengths_B: decode_attention(q, k, v, lengths_B=lengths_B, impl='tpu'),
        in_specs=(ROW, ROW, ROW, P('data')),
        out_specs=ROW,
    )(q, k, v, lengths_B)


def report(chip: Chip) -> None:
    """Prints what the compiler made of each case."""
    devices = topologies.get_topology_desc(platform='tpu', topology_name=chip.topology).devices
    mesh = Mesh(np.reshape(devices, (2, 2)), ('data', 'tensor'), axis_types=(AxisType.Auto,) * 2)
    for name, case in CASES.items():
        K, page, _ = case
        with jax.set_mesh(mesh):
            traced = jax.jit(functools.partial(call, *case)).trace(*arrays(mesh, K, page))
            program = traced.lower(lowering_platforms=('tpu',)).compile()
        text = program.as_text()
        parts = (1 if page else 2) * (1 if K == 1 else 2)
        found = {
            'case': name,
            'kernels': text.count('custom_call_target="tpu_custom_call"'),
            'collectives': sorted({match[1] for match in COLLECTIVE.finditer(text)}),
            'temp_bytes': program.memory_analysis().temp_size_in_bytes,
            'cache_bytes': B * S * K * 2 * D * 2 // parts,
        }
        print(json.dumps(found))


if __name__ == '__main__':
    report(CHIPS[sys.argv[1]])

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
SPLIT = shard_decode(batch='data', heads='tensor')
# name: key-value heads, tokens of a page (0: contiguous), whether a `jax.shard_map` is around it
CASES = {
    'contiguous': (4, 0, False),
    'one key-value head': (1, 0, False),
    'paged': (4, 64, False),
    'in a shard_map': (4, 0, True),
}
COLLECTIVE = re.compile(r'(all-gather|all-reduce|all-to-all|collective-permute)(-start)?\(')


def compiled(mesh: Mesh, K: int, page: int) -> jax.stages.Compiled:
    """The program of one case: caches lie as a model keeps them, heads side by side."""
    heads = None if K == 1 else 'tensor'
    lead = (B * S // page, page) if page else (B, S)
    cache = (*lead, K * D), P(None if page else 'data', None, heads), 'bfloat16'
    given = (
        ((B, T, H, D), P('data', None, 'tensor'), 'bfloat16'), cache, cache,
        ((B,), P('data'), 'int32'), ((B, S // (page or S)), P('data'), 'int32'),
    )  # fmt: skip
    arrays = [
        jax.ShapeDtypeStruct(shape, jnp.dtype(kind), sharding=NamedSharding(mesh, spec))
        for shape, spec, kind in given
    ]

    def call(q, k, v, lengths_B, table):
        k, v = (x.reshape(*lead, K, D) for x in (k, v))
        table = table if page else None
        return SPLIT(q, k, v, lengths_B=lengths_B, page_table_BP=table, impl='tpu')

    def around(q, k, v, lengths_B, table):
        del table
        k, v = (x.reshape(*lead, K, D) for x in (k, v))
        row = P('data', None, 'tensor')
        return jax.shard_map(
            lambda q, k, v, n: decode_attention(q, k, v, lengths_B=n, impl='tpu'),
            in_specs=(row, row, row, P('data')), out_specs=row,
        )(q, k, v, lengths_B)  # fmt: skip

    return functools.partial(lowered, mesh, arrays), call, around


def lowered(mesh: Mesh, arrays: list, call) -> jax.stages.Compiled:
    with jax.set_mesh(mesh):
        return jax.jit(call).trace(*arrays).lower(lowering_platforms=('tpu',)).compile()


def report(chip: Chip) -> None:
    """Prints what the compiler made of each case."""
    devices = topologies.get_topology_desc(platform='tpu', topology_name=chip.topology).devices
    mesh = Mesh(
        np.array(devices).reshape(2, 2), ('data', 'tensor'), axis_types=(AxisType.Auto,) * 2
    )
    for name, (K, page, inside) in CASES.items():
        compile_, call, around = compiled(mesh, K, page)
        program = compile_(around if inside else call)
        text = program.as_text()
        split = (1 if page else 2) * (1 if K == 1 else 2)
        print(json.dumps({
            'case': name,
            'kernels': text.count('custom_call_target="tpu_custom_call"'),
            'collectives': sorted({match[1] for match in COLLECTIVE.finditer(text)}),
            'temp_bytes': program.memory_analysis().temp_size_in_bytes,
            'cache_bytes': B * S * K * 2 * D * 2 // split,
        }))  # fmt: skip


if __name__ == '__main__':
    report(CHIPS[sys.argv[1]])

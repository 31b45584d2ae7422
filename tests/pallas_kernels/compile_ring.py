"""Compiles the ring for a TPU that is not there, in a process of its own; prints JSON about it.

`python compile_ring.py v5e:2x2`: forward and backward, zigzag, over the four chips.
"""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.attention.sharded import shard

LENGTH, DEVICES = 8192, 4


def compile_ring(topology: str) -> jax.stages.Compiled:
    """Returns value and gradients of causal attention over four chips, compiled."""
    devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
    mesh = Mesh(np.array(devices), ('context',), axis_types=(AxisType.Auto,))
    ring = shard(context='context', layout='zigzag')

    def loss(q, k, v):
        return ring(q, k, v, causal=True, impl='tpu').astype(jnp.float32).sum()

    def arrays(heads):
        sharding = NamedSharding(mesh, P(None, 'context'))
        return jax.ShapeDtypeStruct((1, LENGTH, heads, 128), jnp.bfloat16, sharding=sharding)

    with jax.set_mesh(mesh):
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(arrays(2), arrays(1), arrays(1))
        return traced.lower(lowering_platforms=('tpu',)).compile()


def hidden_transfers(text: str) -> list[bool]:
    """Returns, for each transfer, whether a loop of kernels runs before its end is awaited."""
    found = []
    for body in re.findall(r'^%?\S.*?\{\n(.*?)^\}', text, re.M | re.S):
        lines = body.splitlines()
        for i, line in enumerate(lines):
            if start := re.search(r'(%\S+) = .* collective-permute-start\(', line):
                done = f'collective-permute-done({start[1]})'
                end = next(j for j, other in enumerate(lines) if done in other)
                found.append(any(' while(' in other for other in lines[i:end]))
    return found


if __name__ == '__main__':
    compiled = compile_ring(sys.argv[1])
    text = compiled.as_text()
    transfers = hidden_transfers(text)
    report = {
        'kernels': text.count('custom_call_target="tpu_custom_call"'),
        'transfers': len(transfers),
        'hidden': sum(transfers),
        'temp_bytes': compiled.memory_analysis().temp_size_in_bytes,
        'square_bytes': 4 * (LENGTH // DEVICES) ** 2,
    }
    print(json.dumps(report))

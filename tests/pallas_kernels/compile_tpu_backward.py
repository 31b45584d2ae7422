"""Compiles the TPU backward kernels ahead of time for one generation; prints what memory they take.

Run in a child process, whose environment says that there is no TPU: libtpu is loaded once only.
"""

import dataclasses
import json
import re
import sys

import jax
import jax.numpy as jnp
from compile_tpu_forward import CASES, SMALL, call
from jax.experimental import topologies

from pallas_kernels import chip as chips
from pallas_kernels.attention import tpu


def main(name: str, *wanted: str) -> None:
    """Prints {case: {vmem, limit, temp, logits}} in bytes for the generation called `name`."""
    chip = chips.named(name)
    device = topologies.get_topology_desc(platform='tpu', topology_name=chip.topology).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    abstract = jax.sharding.AbstractDevice(chip.kind, 1, 'tpu')
    found = {}
    for case in wanted or CASES:
        shape, dtype, features = CASES[case]
        operands, spec = call(shape, dtype, features, sharding)
        B, T, S, H, _, _, V = shape
        o_BTHV = jax.ShapeDtypeStruct((B, T, H, V), jnp.dtype(dtype), sharding=sharding)
        lse_BHT = jax.ShapeDtypeStruct((B, H, T), jnp.float32, sharding=sharding)

        def run(operands, o_BTHV, lse_BHT, do_BTHV, dlse_BHT, spec=spec):
            return tpu.backward(operands, spec, SIZES, o_BTHV, lse_BHT, do_BTHV, dlse_BHT)

        with jax.sharding.use_abstract_mesh(
            jax.sharding.AbstractMesh((), (), abstract_device=abstract)
        ):
            traced = jax.jit(run).trace(operands, o_BTHV, lse_BHT, o_BTHV, lse_BHT)
            compiled = traced.lower(lowering_platforms=('tpu',)).compile()
        vmem = re.findall(
            r'used_scoped_memory_configs":\[\{"memory_space":"1"[^}]*"size":"(\d+)"',
            compiled.as_text(),
        )
        temp = compiled.memory_analysis().temp_size_in_bytes
        found[case] = {'vmem': max(map(int, vmem)), 'limit': chip.vmem_limit, 'temp': temp}
        # The gradient of a bias of every logit is as large as they are: float32, until it is cast.
        found[case]['logits'] = 4 * B * H * T * S * (2 if 'bias' in features else 1)
    print(json.dumps(found))


SIZES = dataclasses.replace(SMALL, backward=SMALL)

if __name__ == '__main__':
    main(*sys.argv[1:])

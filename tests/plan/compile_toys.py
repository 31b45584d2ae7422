"""Compiles tiny programs for a TPU that is not there: python compile_toys.py TOPOLOGY FOLDER NAME….

What each of them exchanges and computes is known; `test_plan_collectives.py` compares. A process of
its own, for libtpu reads its environment when it is loaded.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

ROWS, WIDTH, HIDDEN, LAYERS, STEPS = 1024, 1024, 2048, 6, 5
BF16 = jnp.bfloat16


def mapped(mesh: Mesh, body, in_specs, out_specs):
    return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def fsdp(mesh: Mesh):
    """Weights of a scanned stack are gathered for use, and gradients scattered."""

    def loss(w_LCC, x_BC):
        def layer(x_BC, w_CC):
            gathered_CC = lax.all_gather(w_CC, 'fsdp', axis=0, tiled=True)
            return jnp.tanh(x_BC @ gathered_CC), None

        y_BC, _ = lax.scan(layer, x_BC, w_LCC)
        return jnp.sum(y_BC.astype(jnp.float32)) / y_BC.size

    body = mapped(mesh, jax.grad(loss), (P(None, 'fsdp'), P('fsdp')), P(None, 'fsdp'))
    return body, [((LAYERS, WIDTH, WIDTH), P(None, 'fsdp')), ((ROWS, WIDTH), P('fsdp'))]


def tensor(mesh: Mesh):
    """An MLP cut by its hidden features: its outputs are added up."""

    def body(x_BC, up_CM, down_MC):
        return lax.psum(jax.nn.relu(x_BC @ up_CM) @ down_MC, 'tensor')

    specs = (P('fsdp'), P(None, 'tensor'), P('tensor'))
    shapes = ((ROWS, WIDTH), (WIDTH, HIDDEN), (HIDDEN, WIDTH))
    return mapped(mesh, body, specs, P('fsdp')), list(zip(shapes, specs, strict=True))


def experts(mesh: Mesh):
    """Rows go to the devices of their experts and back."""

    def body(x_EBC, w_CC):
        sent_EBC = lax.all_to_all(x_EBC, 'tensor', 0, 0)
        return lax.all_to_all(jax.nn.relu(sent_EBC @ w_CC), 'tensor', 0, 0)

    size = mesh.shape['tensor']
    specs = (P(None, ('fsdp', 'tensor')), P())
    shapes = ((size, ROWS, WIDTH), (WIDTH, WIDTH))
    return mapped(mesh, body, specs, P(None, ('fsdp', 'tensor'))), list(
        zip(shapes, specs, strict=True)
    )


def ring(mesh: Mesh):
    """Keys go around while queries are multiplied by them; a loop of as many steps as devices."""
    size = mesh.shape['fsdp']
    around = [(i, (i + 1) % size) for i in range(size)]

    def body(q_BC, k_BC):
        def step(_, carry):
            k_BC, sum_BC = carry
            scores_BB = q_BC @ k_BC.T
            return lax.ppermute(k_BC, 'fsdp', around), sum_BC + jax.nn.relu(scores_BB) @ k_BC

        return lax.fori_loop(0, size, step, (k_BC, jnp.zeros_like(q_BC)))[1]

    specs = (P('fsdp'), P('fsdp'))
    return mapped(mesh, body, specs, P('fsdp')), [((ROWS, WIDTH), spec) for spec in specs]


def pipeline(mesh: Mesh):
    """What a stage has made goes to the next one, in STEPS steps of a loop."""
    size = mesh.shape['fsdp']
    following = [(i, i + 1) for i in range(size - 1)]

    def body(x_BC, w_CC):
        def step(x_BC, _):
            return lax.ppermute(jnp.tanh(x_BC @ w_CC[0]), 'fsdp', following), None

        return lax.scan(step, x_BC, None, length=STEPS)[0]

    specs = (P('tensor'), P('fsdp'))
    shapes = ((ROWS, WIDTH), (size, WIDTH, WIDTH))
    return mapped(mesh, body, specs, P('tensor')), list(zip(shapes, specs, strict=True))


def chain(mesh: Mesh):
    """Products alone, each device its own rows."""

    def body(x_BC, w_LCC):
        return lax.scan(lambda x_BC, w_CC: (x_BC @ w_CC, None), x_BC, w_LCC)[0]

    rows = 2048 * mesh.size
    shapes = ((rows, 2048), (LAYERS, 2048, 2048))
    specs = (P(('fsdp', 'tensor')), P())
    return body, list(zip(shapes, specs, strict=True))


TOYS = {toy.__name__: toy for toy in (fsdp, tensor, experts, ring, pipeline, chain)}


def main(topology: str, folder: str, *names: str) -> None:
    described = topologies.get_topology_desc(platform='tpu', topology_name=topology)
    devices = np.array(described.devices)
    mesh = Mesh(devices.reshape(4, len(devices) // 4), ('fsdp', 'tensor'))
    for name in names:
        function, arrays = TOYS[name](mesh)
        arguments = [
            jax.ShapeDtypeStruct(shape, BF16, sharding=NamedSharding(mesh, spec))
            for shape, spec in arrays
        ]
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=('tpu',))
        (Path(folder) / f'{name}.txt').write_text(lowered.compile().as_text())


if __name__ == '__main__':
    main(*sys.argv[1:])

"""What a compiled program says of its collectives: of the gradient of one layer of a tiny model."""

import collections
import re
from typing import Any

import jax
import jax.numpy as jnp
from same_model import TINY

from bigjax import experiment as experiments
from bigjax import sharding
from bigjax.state import setup

_BYTES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4, 'f32': 4}
_KINDS = 'all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute'


def collectives(text: str) -> collections.Counter[tuple[str, int]]:
    """Returns how often each (kind, bytes of the result on one device) stands in the program.

    One in a loop's body counts once. `text` is of a CPU's, where none is cut into start and done.
    """
    found: collections.Counter[tuple[str, int]] = collections.Counter()
    for line in re.sub(r'/\*.*?\*/', '', text).splitlines():
        if match := re.search(rf'= (.*?) ({_KINDS})\(', line):
            size = 0
            for dtype, shape in re.findall(r'(\w+)\[([\d,]*)\]', match[1]):
                count = _BYTES[dtype]
                for n in filter(None, shape.split(',')):
                    count *= int(n)
                size += count
            found[match[2], size] += 1
    return found


def gradient_text(**knobs: Any) -> str:
    """Returns the program of the gradient of one layer, compiled; knobs are as in `same_model`."""
    made = experiments.load('llama', **TINY | {'depth': 1} | knobs)
    plan = setup(made)
    batch = jax.ShapeDtypeStruct((16, 17), jnp.int32, sharding=sharding.batch_sharding(plan.mesh))
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        plan.abstract.params,
        plan.shardings.params,
    )
    loss = lambda params, batch: made.task.loss(params, {}, batch, jax.random.key(0), True)[0]  # noqa: E731
    with jax.set_mesh(plan.mesh):
        return jax.jit(jax.grad(loss)).lower(params, {'tokens': batch}).compile().as_text()

"""The warpgroup that copies keys and values into shared memory, ahead of those that compute."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def copy_keys(refs: dict, where: dict, names: tuple[str, str]) -> None:
    """Copies the tiles that a block of queries meets; `names` is k and v in order of use."""
    first, end = where['bounds'][0], where['bounds'][3]
    stages, columns = refs['k_smem'].shape[:2]

    @pl.loop(first, end)
    def _(tile: jax.Array) -> None:
        slot = lax.rem(tile - first, jnp.int32(stages))
        keys = (where['batch'], pl.ds(tile * columns, columns), where['kv_head'])
        for name in names:
            full, empty = refs[f'{name}_full'].at[slot], refs[f'{name}_empty'].at[slot]

            @pl.when(tile >= first + stages)
            def _(empty: jax.Ref = empty) -> None:
                plgpu.barrier_wait(empty)

            plgpu.copy_gmem_to_smem(refs[name].at[keys], refs[f'{name}_smem'].at[slot], full)

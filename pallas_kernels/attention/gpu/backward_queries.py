"""Gradient of the queries on Hopper: warpgroups hold queries, keys and values stream by.

Legend: B batch, T queries, S keys and values, H query heads, K key-value heads, D size of a query
and key head, V size of a value head, N tiles of queries, R rows of a warpgroup.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.arguments import Operands, Spec
from pallas_kernels.attention.gpu import tiles
from pallas_kernels.attention.gpu.logits import down, hide, slope, softcapped
from pallas_kernels.attention.gpu.producer import copy_keys
from pallas_kernels.attention.gpu.tensor_core import add_product, products
from pallas_kernels.hopper import ROW, ROWS, shared


def _compute(refs: dict, where: dict, spec: Spec, band: tiles.Band, interpret: bool) -> None:
    """One warpgroup: the sum over its keys of the logits' cotangents times the keys."""
    group, row, bounds = where['group'], where['row'], where['bounds']
    first, offset = bounds[0], bounds[4]
    batch, head = where['batch'], where['head']
    q_ref, do_ref = refs['q_smem'].at[group], refs['do_smem'].at[group]
    stages, columns, D = refs['k_smem'].shape
    queries, loaded = pl.ds(row, ROWS), refs['q_full'].at[group]
    plgpu.copy_gmem_to_smem(refs['q'].at[batch, queries, head], q_ref, loaded)
    plgpu.copy_gmem_to_smem(refs['do'].at[batch, queries, head], do_ref, loaded)

    def vector(ref: jax.Ref) -> jax.Array:
        return plgpu.load(ref.at[queries], layout=ROW, optimized=False)

    lse, delta = (vector(refs[name].at[batch, head]) for name in ('lse', 'delta'))
    row_ids = column_ids = None
    if refs['ids'] is not None:
        row_ids, column_ids = vector(refs['ids'].at[batch]), refs['kv_ids'].at[batch]
    plgpu.barrier_wait(loaded)

    def step(tile: jax.Array, dq: jax.Array, *, masked: bool) -> jax.Array:
        slot = lax.rem(tile - first, jnp.int32(stages))
        k_ref, v_ref = refs['k_smem'].at[slot], refs['v_smem'].at[slot]
        plgpu.barrier_wait(refs['k_full'].at[slot])
        plgpu.barrier_wait(refs['v_full'].at[slot])
        k_transposed, v_transposed = (ref.transpose((1, 0)) for ref in (k_ref, v_ref))
        s, dp = products((q_ref, k_transposed), (do_ref, v_transposed))
        plgpu.barrier_arrive(refs['v_empty'].at[slot])
        x, c = softcapped(s, spec)
        logits = x
        if masked:
            logits = hide(x, band, row, tile * columns, offset, row_ids, column_ids)
        p = jnp.exp2(logits * c - down(lse, x.shape))
        ds = (p * (dp - down(delta, x.shape)) * slope(x, spec)).astype(k_ref.dtype)
        dq = add_product(dq, ds, k_ref, interpret=interpret)
        plgpu.barrier_arrive(refs['k_empty'].at[slot])
        return dq

    dq = plgpu.layout_cast(jnp.zeros((ROWS, D), jnp.float32), plgpu.Layout.WGMMA)
    for begin, stop, masked in tiles.loops(band, columns, bounds, row_ids is not None):
        dq = lax.fori_loop(begin, stop, functools.partial(step, masked=masked), dq)
    q_ref[...] = (dq * spec.scale).astype(refs['dq'].dtype)  # the queries are spent
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_ref, refs['dq'].at[batch, queries, head])
    plgpu.wait_smem_to_gmem(0)


def _kernel(
    q, k, v, do, lse, delta, table, ids, kv_ids, dq, scratch: dict, *, spec, band, share, interpret
) -> None:
    refs = {'q': q, 'k': k, 'v': v, 'do': do, 'lse': lse, 'delta': delta, 'dq': dq}
    refs |= {'ids': ids, 'kv_ids': kv_ids, **scratch}
    batch, head, group = (lax.axis_index(name) for name in ('batch', 'heads', 'group'))
    groups = refs['q_smem'].shape[0]
    tile = table.shape[1] - 1 - lax.axis_index('tiles')
    line = table.at[batch if table.shape[0] > 1 else 0, tile]
    where = {
        'batch': batch,
        'head': head,
        'kv_head': lax.div(head, jnp.int32(share)),
        'group': group,
        'row': (tile * groups + group) * ROWS,
        'bounds': tuple(line[i] for i in range(5)),
    }

    @pl.when(group < groups)
    def _() -> None:
        if groups > 1:
            plgpu.set_max_registers(240, action='increase')
        _compute(refs, where, spec, band, interpret)

    @pl.when(group == groups)
    def _() -> None:
        if groups > 1:
            plgpu.set_max_registers(24, action='decrease')
        copy_keys(refs, where, ('v', 'k'))


def query_gradient(
    operands: Operands,
    do_BTHV: jax.Array,
    lse_BHT: jax.Array,
    delta_BHT: jax.Array,
    spec: Spec,
    band: tiles.Band,
    *,
    groups: int,
    columns: int,
    stages: int,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """Returns dq [B, T, H, D].

    `lse_BHT` is in base 2 and +inf where a query sees nothing; `delta_BHT` is the sum of
    do * o less the cotangent of lse; both are padded to whole tiles of `groups` warpgroups. Dao
    et al., FlashAttention-2 (2023), Algorithm 2, split in two so that no sum depends on an order.
    """
    q, k, v = operands.q_BTHD, operands.k_BSKD, operands.v_BSKV
    (B, T, H, D), V, rows = q.shape, v.shape[3], groups * ROWS
    ids, kv_ids = operands.segment_ids_BT, operands.kv_segment_ids_BS
    table_BN5 = tiles.table(band, rows, columns, ids, kv_ids)
    if ids is not None:
        ids, kv_ids = tiles.pad_ids(ids, rows), tiles.pad_ids(kv_ids, columns)
    full = plgpu.Barrier(num_barriers=stages)
    empty = plgpu.Barrier(num_arrivals=groups, num_barriers=stages)
    scratch = {
        'q_smem': shared((groups, ROWS, D), q.dtype),
        'do_smem': shared((groups, ROWS, V), q.dtype),
        'k_smem': shared((stages, columns, D), q.dtype),
        'v_smem': shared((stages, columns, V), q.dtype),
        'q_full': plgpu.Barrier(num_arrivals=2, num_barriers=groups),
        'k_full': full,
        'v_full': full,
        'k_empty': empty,
        'v_empty': empty,
    }
    share, debug = H // k.shape[2], interpret is not None
    return plgpu.kernel(
        functools.partial(_kernel, spec=spec, band=band, share=share, interpret=debug),
        out_type=jax.ShapeDtypeStruct((B, T, H, D), q.dtype),
        scratch_types=(scratch,),
        grid=(H, table_BN5.shape[1], B),
        grid_names=('heads', 'tiles', 'batch'),
        num_threads=groups + 1,
        thread_name='group',
        kernel_name='attention_query_gradient',
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(q, k, v, do_BTHV, lse_BHT, delta_BHT, table_BN5, ids, kv_ids)

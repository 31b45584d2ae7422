"""Gradients of keys and values on Hopper: warpgroups hold keys, queries stream by, transposed.

Legend: B batch, T queries, S keys and values, H query heads, K key-value heads, D size of a query
and key head, V size of a value head, M tiles of queries, C queries of such a tile.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.arguments import Operands, Spec
from pallas_kernels.attention.gpu import tiles
from pallas_kernels.attention.gpu.logits import across, hide, slope, softcapped
from pallas_kernels.attention.gpu.tensor_core import add_product, product
from pallas_kernels.hopper import COLUMN, ROW, ROWS, shared


def _slot(tile: jax.Array, share: jax.Array | int, where: dict, stages: int) -> jax.Array:
    """Returns where a tile of queries of the group's `share`-th head lies in the ring."""
    first, end = where['bounds'][0], where['bounds'][3]
    return lax.rem(share * (end - first) + tile - first, jnp.int32(stages))


def _compute(refs: dict, where: dict, spec: Spec, band: tiles.Band, interpret: bool) -> None:
    """One warpgroup: the sums over the queries that see its keys, of all heads that share them."""
    group, row, bounds, batch = where['group'], where['row'], where['bounds'], where['batch']
    stages, columns = refs['q_smem'].shape[:2]
    keys, head = pl.ds(row, ROWS), where['head']
    k_ref, loaded = refs['k_smem'].at[group], refs['k_full'].at[group]
    plgpu.copy_gmem_to_smem(refs['k'].at[batch, keys, head], k_ref, loaded)
    if 'v_smem' in refs:
        v_ref = refs['v_smem'].at[group]
        plgpu.copy_gmem_to_smem(refs['v'].at[batch, keys, head], v_ref, loaded)
    row_ids = column_ids = None
    if refs['ids'] is not None:
        row_ids = plgpu.load(refs['kv_ids'].at[batch, keys], layout=ROW, optimized=False)
        column_ids = refs['ids'].at[batch]
    plgpu.barrier_wait(loaded)

    def step(tile: jax.Array, sums: dict, *, share: jax.Array, masked: bool) -> dict:
        slot = _slot(tile, share, where, stages)
        q_ref, do_ref = refs['q_smem'].at[slot], refs['do_smem'].at[slot]
        plgpu.barrier_wait(refs['q_full'].at[slot])
        s = product(k_ref, q_ref.transpose((1, 0)))
        x, c = softcapped(s, spec)
        logits = x
        if masked:
            logits = hide(x, band, row, tile * columns, bounds[4], row_ids, column_ids)
        lse = plgpu.load(refs['lse_smem'].at[slot], layout=COLUMN)
        p = jnp.exp2(logits * c - across(lse, x.shape))
        sums = dict(sums)
        if 'dv' in sums:
            sums['dv'] = add_product(sums['dv'], p.astype(q_ref.dtype), do_ref, interpret=interpret)
        if 'dk' in sums:
            dp = product(v_ref, do_ref.transpose((1, 0)))
            delta = plgpu.load(refs['delta_smem'].at[slot], layout=COLUMN)
            ds = (p * (dp - across(delta, x.shape)) * slope(x, spec)).astype(q_ref.dtype)
            sums['dk'] = add_product(sums['dk'], ds, q_ref, interpret=interpret)
        plgpu.commit_smem()  # the next copies to lse and delta come after they were read
        plgpu.barrier_arrive(refs['q_empty'].at[slot])
        return sums

    def each_head(share: jax.Array, sums: dict) -> dict:
        for begin, stop, masked in tiles.loops(band, columns, bounds, row_ids is not None):
            body = functools.partial(step, share=share, masked=masked)
            sums = lax.fori_loop(begin, stop, body, sums)
        return sums

    sums = {}
    for name in ('dk', 'dv'):
        if refs[name] is not None:
            zeros = jnp.zeros((ROWS, refs[name].shape[3]), jnp.float32)
            sums[name] = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
    sums = lax.fori_loop(0, where['share'], each_head, sums)
    for name, total in sums.items():
        scale = spec.scale if name == 'dk' else 1.0
        refs[f'{name}_smem'].at[group][...] = (total * scale).astype(refs[name].dtype)
    plgpu.commit_smem()
    for name in sums:
        ref = refs[f'{name}_smem'].at[group]
        plgpu.copy_smem_to_gmem(ref, refs[name].at[batch, keys, head])
    plgpu.wait_smem_to_gmem(0)


def _copy(refs: dict, where: dict) -> None:
    """The producer: queries, their cotangents and two numbers a query, a tile ahead."""
    first, end = where['bounds'][0], where['bounds'][3]
    stages, columns = refs['q_smem'].shape[:2]

    @pl.loop(0, where['share'])
    def _(share: jax.Array) -> None:
        head = where['head'] * where['share'] + share

        @pl.loop(first, end)
        def _(tile: jax.Array) -> None:
            slot = _slot(tile, share, where, stages)

            @pl.when(share * (end - first) + tile - first >= stages)
            def _() -> None:
                plgpu.barrier_wait(refs['q_empty'].at[slot])

            queries = pl.ds(tile * columns, columns)
            for name in ('q', 'lse', 'do', 'delta'):
                if f'{name}_smem' not in refs:
                    continue
                many = (queries, head) if name in ('q', 'do') else (head, queries)
                source, target = refs[name].at[(where['batch'], *many)], refs[f'{name}_smem']
                plgpu.copy_gmem_to_smem(source, target.at[slot], refs['q_full'].at[slot])


def _kernel(
    q, k, v, do, lse, delta, table, ids, kv_ids, dk, dv, scratch: dict, *, spec, band, interpret
) -> None:
    refs = {'q': q, 'k': k, 'v': v, 'do': do, 'lse': lse, 'delta': delta, 'dk': dk, 'dv': dv}
    refs |= {'ids': ids, 'kv_ids': kv_ids, **scratch}
    # Keys and values are spent when their gradients are written.
    refs['dk_smem'] = refs['k_smem']
    refs.setdefault('dv_smem', refs.get('v_smem', refs['k_smem']))
    batch, head, group = (lax.axis_index(name) for name in ('batch', 'heads', 'group'))
    groups, tile = refs['k_smem'].shape[0], lax.axis_index('tiles')
    line = table.at[batch if table.shape[0] > 1 else 0, tile]
    where = {
        'batch': batch,
        'head': head,
        'share': q.shape[2] // k.shape[2],
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
        _copy(refs, where)


def _scratch(
    D: int, V: int, outputs: tuple[str, ...], dtype: jnp.dtype, sizes: tuple[int, int, int]
) -> dict:
    groups, columns, stages = sizes
    statistic = plgpu.SMEM((stages, columns), jnp.float32)
    copies, held = (4, 2) if 'dk' in outputs else (3, 1)
    scratch = {
        'k_smem': shared((groups, ROWS, D), dtype),
        'q_smem': shared((stages, columns, D), dtype),
        'do_smem': shared((stages, columns, V), dtype),
        'lse_smem': statistic,
        'k_full': plgpu.Barrier(num_arrivals=held, num_barriers=groups),
        'q_full': plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        'q_empty': plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
    }
    if 'dk' in outputs:
        scratch |= {'v_smem': shared((groups, ROWS, V), dtype), 'delta_smem': statistic}
    elif D != V:
        scratch['dv_smem'] = shared((groups, ROWS, V), dtype)
    return scratch


def key_gradients(
    operands: Operands,
    do_BTHV: jax.Array,
    lse_BHT: jax.Array,
    delta_BHT: jax.Array,
    spec: Spec,
    band: tiles.Band,
    *,
    outputs: tuple[str, ...] = ('dk', 'dv'),
    groups: int,
    columns: int,
    stages: int,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> dict[str, jax.Array]:
    """Returns those of dk [B, S, K, D] and dv [B, S, K, V] that `outputs` names.

    `band` is that of the queries among the keys. `lse_BHT` and `delta_BHT` are those of
    `query_gradient`, padded to whole tiles of `columns` queries. One call for both sums is less
    work, but their accumulators fit the registers only while D + V <= 256.
    """
    q, k, v = operands.q_BTHD, operands.k_BSKD, operands.v_BSKV
    (B, S, K, D), V, rows = k.shape, v.shape[3], groups * ROWS
    band = tiles.transposed(band)
    ids, kv_ids = operands.segment_ids_BT, operands.kv_segment_ids_BS
    table_BN5 = tiles.table(band, rows, columns, kv_ids, ids)
    if ids is not None:
        ids, kv_ids = tiles.pad_ids(ids, columns), tiles.pad_ids(kv_ids, rows)
    shapes = {'dk': (B, S, K, D), 'dv': (B, S, K, V)}
    out = [jax.ShapeDtypeStruct(shapes[x], q.dtype) if x in outputs else None for x in shapes]
    found = plgpu.kernel(
        functools.partial(_kernel, spec=spec, band=band, interpret=interpret is not None),
        out_type=tuple(out),
        scratch_types=(_scratch(D, V, outputs, q.dtype, (groups, columns, stages)),),
        grid=(K, table_BN5.shape[1], B),
        grid_names=('heads', 'tiles', 'batch'),
        num_threads=groups + 1,
        thread_name='group',
        kernel_name='attention_' + '_'.join(outputs),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(q, k, v, do_BTHV, lse_BHT, delta_BHT, table_BN5, ids, kv_ids)
    return {name: x for name, x in zip(shapes, found, strict=True) if x is not None}

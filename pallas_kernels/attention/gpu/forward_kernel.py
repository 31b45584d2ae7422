"""Forward pass on Hopper: two warpgroups take turns at the tensor cores, a third one copies.

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
from pallas_kernels.attention.gpu.logits import LOG2_E, down, hide, softcapped
from pallas_kernels.attention.gpu.producer import copy_keys
from pallas_kernels.attention.gpu.tensor_core import add_product, product
from pallas_kernels.hopper import ROW, ROWS, shared

WARPGROUPS = 2
# Below any logit; a finite one, so that a row that sees nothing yields zeros and not NaN.
LOWEST = -1e30


def _compute(refs: dict, where: dict, spec: Spec, band: tiles.Band, interpret: bool) -> None:
    """One warpgroup: the online softmax of ROWS queries over the keys they see."""
    plgpu.set_max_registers(240, action='increase')
    group, row, bounds = where['group'], where['row'], where['bounds']
    first, end, offset = bounds[0], *bounds[3:]
    batch, head = where['batch'], where['head']
    q_ref, stages = refs['q_smem'].at[group], refs['k_smem'].shape[0]
    columns, V = refs['v_smem'].shape[1:]
    queries = pl.ds(row, ROWS)
    plgpu.copy_gmem_to_smem(refs['q'].at[batch, queries, head], q_ref, refs['q_full'].at[group])

    def take_turns() -> None:
        plgpu.barrier_arrive(refs['turn'])
        plgpu.barrier_wait(refs['turn'])

    def vector(x: jax.Array | float) -> jax.Array:
        return plgpu.layout_cast(jnp.full((ROWS,), x, jnp.float32), ROW)

    row_ids = column_ids = None
    if refs['ids'] is not None:
        row_ids = plgpu.load(refs['ids'].at[batch, queries], layout=ROW, optimized=False)
        column_ids = refs['kv_ids'].at[batch]
    if refs['sinks'] is None:
        m, norm = vector(LOWEST), vector(0.0)
    else:  # a sink is one more key, with a value of zeros, that has already been seen
        m, norm = vector(refs['sinks'][head] * LOG2_E), vector(1.0)
    total = plgpu.layout_cast(jnp.zeros((ROWS, V), jnp.float32), plgpu.Layout.WGMMA)
    plgpu.barrier_wait(refs['q_full'].at[group])

    @pl.when(end > first)
    def _() -> None:
        plgpu.barrier_wait(refs['k_full'].at[0])

    pl.when(group == 1)(take_turns)

    def step(tile: jax.Array, carry: tuple, *, masked: bool) -> tuple:
        total, m, norm = carry
        slot = lax.rem(tile - first, jnp.int32(stages))
        k_ref, v_ref = refs['k_smem'].at[slot], refs['v_smem'].at[slot]
        s = product(q_ref, k_ref.transpose((1, 0)), meanwhile=take_turns)
        plgpu.barrier_arrive(refs['k_empty'].at[slot])
        x, c = softcapped(s, spec)

        if masked:
            x = hide(x, band, row, tile * columns, offset, row_ids, column_ids)
        new = jnp.maximum(m, x.max(axis=1) * c)
        p = jnp.exp2(x * c - down(new, x.shape))
        decay = jnp.exp2(m - new)
        norm = norm * decay + p.sum(axis=1)
        total *= down(decay, total.shape)
        p = p.astype(v_ref.dtype)
        total, new, norm, p = lax.optimization_barrier((total, new, norm, p))
        plgpu.barrier_arrive(refs['turn'])
        plgpu.barrier_wait(refs['v_full'].at[slot])
        plgpu.barrier_wait(refs['turn'])

        def await_next() -> None:
            @pl.when(tile + 1 < end)
            def _() -> None:
                next_slot = lax.rem(tile + 1 - first, jnp.int32(stages))
                plgpu.barrier_wait(refs['k_full'].at[next_slot])

        total = add_product(total, p, v_ref, interpret=interpret, meanwhile=await_next)
        plgpu.barrier_arrive(refs['v_empty'].at[slot])
        return total, new, norm

    loops = tiles.loops(band, columns, where['bounds'], row_ids is not None)
    carry = total, m, norm
    for begin, stop, masked in loops:
        carry = lax.fori_loop(begin, stop, functools.partial(step, masked=masked), carry)
    total, m, norm = carry
    pl.when(group == 0)(take_turns)
    _write(refs, where, total, m, norm)


def _write(refs: dict, where: dict, total: jax.Array, m: jax.Array, norm: jax.Array) -> None:
    """Divides a warpgroup's sums by their weights, and writes its outputs and lse."""
    batch, head, group = where['batch'], where['head'], where['group']
    queries = pl.ds(where['row'], ROWS)
    sees = norm > 0
    norm = jnp.where(sees, norm, 1.0)
    scale = jnp.where(sees, 1 / norm, 0.0)
    o = total * down(scale, total.shape)
    refs['o_smem'].at[group][...] = o.astype(refs['o'].dtype)
    lse = jnp.where(sees, (m + jnp.log2(norm)) / LOG2_E, -jnp.inf)
    refs['lse_smem'].at[group][...] = lse
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(refs['o_smem'].at[group], refs['o'].at[batch, queries, head])
    plgpu.copy_smem_to_gmem(refs['lse_smem'].at[group], refs['lse'].at[batch, head, queries])
    plgpu.wait_smem_to_gmem(0)


def _kernel(
    q, k, v, table, ids, kv_ids, sinks, o, lse, scratch: dict, *, spec, band, group_size, interpret
) -> None:
    refs = {'q': q, 'k': k, 'v': v, 'ids': ids, 'kv_ids': kv_ids, 'sinks': sinks}
    refs |= {'o': o, 'lse': lse, **scratch}
    refs.setdefault('o_smem', refs['q_smem'])  # queries are spent when the output is written
    batch, head, group = (lax.axis_index(name) for name in ('batch', 'heads', 'group'))
    # Causal tiles at the end are the longest; begun first, the short ones fill the gaps they leave.
    tile = table.shape[1] - 1 - lax.axis_index('tiles')
    line = table.at[batch if table.shape[0] > 1 else 0, tile]
    where = {
        'batch': batch,
        'head': head,
        'kv_head': lax.div(head, jnp.int32(group_size)),
        'group': group,
        'row': (tile * WARPGROUPS + group) * ROWS,
        'bounds': tuple(line[i] for i in range(5)),
    }

    @pl.when(group < WARPGROUPS)
    def _() -> None:
        _compute(refs, where, spec, band, interpret)

    @pl.when(group == WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(24, action='decrease')
        copy_keys(refs, where, ('k', 'v'))


def _scratch(D: int, V: int, dtype: jnp.dtype, columns: int, stages: int) -> dict:
    full = plgpu.Barrier(num_barriers=stages)
    empty = plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages)
    scratch = {
        'q_smem': shared((WARPGROUPS, ROWS, D), dtype),
        'k_smem': shared((stages, columns, D), dtype),
        'v_smem': shared((stages, columns, V), dtype),
        'lse_smem': plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
        'q_full': plgpu.Barrier(num_barriers=WARPGROUPS),
        'k_full': full,
        'v_full': full,
        'k_empty': empty,
        'v_empty': empty,
        'turn': plgpu.Barrier(num_arrivals=WARPGROUPS),
    }
    if D != V:
        scratch['o_smem'] = shared((WARPGROUPS, ROWS, V), dtype)
    return scratch


def forward(
    operands: Operands,
    spec: Spec,
    band: tiles.Band,
    *,
    columns: int,
    stages: int,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns output [B, T, H, V] and float32 lse [B, H, T].

    Lengths are multiples of 8 and head sizes of 64; the band holds the lengths before they were
    padded to that. `columns` keys are a tile,
    `stages` tiles are in shared memory at a time. Dao et al., FlashAttention-2 (2023), Algorithm 1,
    with the two-warpgroup schedule of Shah et al., FlashAttention-3 (2024), section 3.1.
    """
    q, k, v = operands.q_BTHD, operands.k_BSKD, operands.v_BSKV
    (B, T, H, D), V = q.shape, v.shape[3]
    rows = WARPGROUPS * ROWS
    ids, kv_ids = operands.segment_ids_BT, operands.kv_segment_ids_BS
    table_BN5 = tiles.table(band, rows, columns, ids, kv_ids)
    if ids is not None:
        ids, kv_ids = tiles.pad_ids(ids, rows), tiles.pad_ids(kv_ids, columns)
    N = table_BN5.shape[1]
    sinks = operands.sinks_H
    o, lse = plgpu.kernel(
        functools.partial(
            _kernel,
            spec=spec,
            band=band,
            group_size=H // k.shape[2],
            interpret=interpret is not None,
        ),
        out_type=(
            jax.ShapeDtypeStruct((B, T, H, V), q.dtype),
            jax.ShapeDtypeStruct((B, H, N * rows), jnp.float32),
        ),
        scratch_types=(_scratch(D, V, q.dtype, columns, stages),),
        grid=(H, N, B),
        grid_names=('heads', 'tiles', 'batch'),
        num_threads=WARPGROUPS + 1,
        thread_name='group',
        kernel_name='attention_forward',
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(q, k, v, table_BN5, ids, kv_ids, None if sinks is None else sinks.astype(jnp.float32))
    return o, lse[..., :T]

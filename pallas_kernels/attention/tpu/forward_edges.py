"""The forward kernel's rarer parts: before the first block, after the last, and redoing a chunk.

Legend: D and V head sizes, S keys and T queries of a tile, n query head of the step.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.attention.tpu import tile
from pallas_kernels.attention.tpu.blocks import Body
from pallas_kernels.attention.tpu.forward_kernel import SUBLANES, Step
from pallas_kernels.attention.tpu.layout import LANES

AT_RUN_TIME = Body()
REDO = 256  # queries and keys of a tile that is redone


def start(step: Step) -> None:
    """Turns the queries, finds the first m, and clears the sums."""
    plan, refs = step.plan, step.refs
    heads = plan.heads
    step.side.columns.clear()
    for n in range(heads.q):
        lane = n * heads.D
        low = lane // LANES * LANES if heads.D < LANES else lane
        wide = min(max(LANES, heads.D), heads.q * heads.D - low)
        q_DT = refs.q[0, :, low : low + wide].T[lane - low : lane - low + heads.D]
        if plan.blocks.queries % plan.blocks.q:  # what lies behind the end may be NaN
            query = jax.lax.broadcasted_iota(jnp.int32, q_DT.shape, 1)
            left = plan.blocks.queries - step.i * plan.blocks.q
            q_DT = jnp.where(query < left, q_DT, jnp.zeros_like(q_DT))
        _, row = heads.window(heads.kv_head(n))
        if heads.width > heads.D:  # zeros meet the other heads' keys
            above = jnp.zeros((row, plan.blocks.q), q_DT.dtype)
            below = jnp.zeros((heads.width - row - heads.D, plan.blocks.q), q_DT.dtype)
            q_DT = jnp.concatenate([x for x in (above, q_DT, below) if x.shape[0]])
        refs.qt[n] = q_DT
    refs.flags[0] = 0
    refs.flags[1] = 0
    if not plan.whole:
        refs.acc[0] = jnp.zeros(refs.acc.shape[1:], jnp.float32)
    for n in range(heads.q):
        for c in range(0, plan.blocks.q, plan.chunk):
            _start_sums(step, n, pl.ds(c, plan.chunk))


def _start_sums(step: Step, n: int, queries: pl.Slice) -> None:
    """Sets m to the highest logit of a few keys, and l to the sink's weight."""
    refs, shape = step.refs, (SUBLANES, queries.size)
    if step.plan.diagonal:
        m_1T = _diagonal(step, n, queries)
    else:
        keys = pl.ds(0, step.plan.probe)
        raw_ST = step.raw(n, keys, queries)
        z_ST, seen = step.logits(raw_ST, n, keys, queries, AT_RUN_TIME)
        z_ST = z_ST if seen is None else jnp.where(seen, z_ST, -jnp.inf)
        m_1T = z_ST.max(0, keepdims=True)
    l_8T = jnp.zeros(shape, jnp.float32)
    if refs.sinks is not None:
        sink = refs.sinks[step.g * step.plan.heads.q + n] * tile.LOG2_E
        m_1T = jnp.maximum(m_1T, sink)
        weight_1T = jnp.exp2(sink - jnp.where(m_1T == -jnp.inf, 0.0, m_1T))
        # Without ones, the sum is that of the eight rows.
        share = 1.0 if step.plan.ones else 1 / SUBLANES
        l_8T = jnp.broadcast_to(weight_1T * share, shape)
    refs.m[n, :, queries] = jnp.broadcast_to(m_1T, shape)
    refs.l[0, n, :, queries] = l_8T


def _diagonal(step: Step, n: int, queries: pl.Slice) -> jax.Array:
    """Logits of the keys at the queries' own positions, -inf where a segment hides one, [1, T]."""
    plan, refs = step.plan, step.refs
    low, _ = plan.heads.window(plan.heads.kv_head(n))
    k_DT = refs.k_diagonal[0, queries, low : low + plan.heads.width].astype(jnp.float32).T
    raw_1T = (refs.qt[n, :, queries].astype(jnp.float32) * k_DT).sum(0, keepdims=True)
    z_1T = tile.logits(raw_1T, plan.spec)
    if plan.blocks.segments:
        ids = step.side.refs['query_ids'][0, 0, :, queries]
        z_1T = jnp.where(ids == refs.key_ids_diagonal[0, 0, :, queries], z_1T, -jnp.inf)
    return z_1T


def finish(step: Step) -> None:
    """Divides by l and writes the outputs of a block of queries, and log sum exp."""
    plan, refs = step.plan, step.refs
    slot = 1 if plan.whole else refs.flags[0]
    kept = 1 - plan.spec.dropout_rate
    for c in range(0, plan.blocks.q, plan.chunk):
        queries = pl.ds(c, plan.chunk)
        outs = []
        for n in range(plan.heads.q):
            l_8T = refs.l[slot, n, :, queries]
            l_1T = l_8T[:1] if plan.ones else l_8T.sum(0, keepdims=True)
            refs.lse[0, n, :, queries] = (refs.m[n, :1, queries] + jnp.log2(l_1T)) * tile.LN_2
            weight_1T = jnp.where(l_1T == 0, 0.0, 1 / (l_1T * kept))
            o_VT = refs.acc[slot, n * plan.heads.V : (n + 1) * plan.heads.V, queries]
            outs.append(o_VT * weight_1T)
        o_TV = jnp.concatenate(outs).T if len(outs) > 1 else outs[0].T
        refs.o[0, queries] = o_TV.astype(refs.o.dtype)


def redo(step: Step) -> None:
    """Does the chunks whose sums grew too large again, with a maximum that follows the keys."""
    plan, refs = step.plan, step.refs
    slot = 1 - refs.flags[0]  # of the sums before this block
    wide = REDO if plan.chunk % REDO == 0 else LANES
    refs.flags[1] = 0
    for n in range(plan.heads.q):

        @pl.loop(0, plan.blocks.q // wide)
        def _(c, n=n):
            queries = pl.ds(pl.multiple_of(c * wide, wide), wide)
            wrong = step.wrong(refs.l[1 - slot, n, :, queries], queries)
            pl.when(jnp.any(wrong))(lambda: _redo_chunk(step, n, queries, slot))


def _redo_chunk(step: Step, n: int, queries: pl.Slice, slot: jax.Array) -> None:
    """The online softmax over a block of keys, exact for any logits."""
    plan, refs, V = step.plan, step.refs, step.plan.heads.V
    high = REDO if plan.sub % REDO == 0 else LANES
    rows = pl.ds(n * V, V)
    new = 1 - slot
    l_8T = refs.l[slot, n, :, queries]
    first = l_8T[:1] if plan.ones else l_8T.sum(0, keepdims=True)
    refs.l[new, n, :, queries] = jnp.broadcast_to(first, l_8T.shape)
    before = refs.acc[slot, rows, queries]
    refs.acc[new, rows, queries] = jnp.zeros_like(before) if plan.whole else before

    @pl.loop(0, plan.blocks.kv // high)
    def _(s):
        keys = pl.ds(pl.multiple_of(s * high, high), high)
        z_ST, seen = step.logits(step.raw(n, keys, queries), n, keys, queries, AT_RUN_TIME)
        z_ST = z_ST if seen is None else jnp.where(seen, z_ST, -jnp.inf)
        m_1T = refs.m[n, :1, queries]
        new_1T = jnp.maximum(m_1T, z_ST.max(0, keepdims=True))
        safe_1T = jnp.where(new_1T == -jnp.inf, 0.0, new_1T)
        p_ST = jnp.exp2(z_ST - safe_1T)
        alpha_1T = jnp.exp2(m_1T - safe_1T)
        v_VS = step.values(n, keys, AT_RUN_TIME)
        o_VT = step.dot(v_VS, step.dropped(p_ST, n, keys, queries).astype(v_VS.dtype))
        l_1T = refs.l[new, n, :1, queries] * alpha_1T + p_ST.sum(0, keepdims=True)
        refs.acc[new, rows, queries] = refs.acc[new, rows, queries] * alpha_1T + o_VT
        refs.l[new, n, :, queries] = jnp.broadcast_to(l_1T, l_8T.shape)
        refs.m[n, :, queries] = jnp.broadcast_to(new_1T, l_8T.shape)

    if not plan.ones:
        refs.l[new, n, :, queries] = refs.l[new, n, :, queries] * (1 / SUBLANES)

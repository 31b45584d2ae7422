"""The forward kernel: one grid step of attention with a maximum that is known beforehand.

An exact running maximum makes every tile wait for its own logits. Here the maximum m is one that
was known before the block began; what it fails to bound is found afterwards (the sum l passes
2^60, or is no number) and that chunk of the block is done again, exactly, which moves m.
m is always -inf, or the logit of a key that the query sees, or its sink: never above the true
maximum. So nothing underflows that matters, and a query that has m = -inf and sees a key gets an
infinite l, which is found. Tiles are [keys, queries]: S^T = K Q^T, O^T = V^T P^T.

Legend: D and V head sizes, S keys and T queries of a block or tile, n query head of the step.
"""

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.attention import dropout
from pallas_kernels.attention.arguments import Spec
from pallas_kernels.attention.tpu import side, tile
from pallas_kernels.attention.tpu.blocks import Blocks, Body, Reader
from pallas_kernels.attention.tpu.layout import Heads

LIMIT = 2.0**60  # of the sum of weights: leaves 2^67 for values
SUBLANES = 8
ONES = 16  # rows of ones: a packed register of bfloat16


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is static in a kernel.

    Attributes:
      sub, chunk: keys and queries of a tile.
      ones: whether l is summed by the matmul, as rows of ones below V^T.
      diagonal: whether the first m is the logit of the key at the query's own position.
    """

    spec: Spec
    blocks: Blocks
    heads: Heads
    side: side.Side
    sub: int
    chunk: int
    ones: bool
    diagonal: bool

    @property
    def whole(self) -> bool:
        """Whether all queries and keys are one block, so that nothing is left to run time."""
        return self.blocks.n_q == self.blocks.n_kv == 1 and not self.blocks.moved

    @property
    def probe(self) -> int:
        """Keys whose logits give the first m."""
        return 128 if self.side.tiles else 16


class Step:
    """One grid step in the kernel: (batch row, step of heads, block of queries, step of keys)."""

    def __init__(self, plan: Plan, refs: types.SimpleNamespace, side_refs: dict[str, Any]):
        self.plan, self.refs = plan, refs
        self.reader = Reader(plan.blocks, refs.scalars)
        self.b, self.g, row, step = (pl.program_id(n) for n in range(4))
        self.place = self.reader.place(self.b, row, step)
        self.i, self.j = self.place.i, self.place.j
        self.side = side.Reader(plan.side, side_refs)
        self.slot = None  # of the sums before a block

    # One tile -----------------------------------------------------------------------------------

    def dot(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Matrix product accumulated in float32, exact products also for float32 inputs."""
        precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
        return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)

    def raw(self, n: int, keys: pl.Slice, queries: pl.Slice) -> jax.Array:
        """Products q.k of a tile, [S, T]."""
        heads = self.plan.heads
        low, _ = heads.window(heads.kv_head(n))
        k_SD = self.refs.k[0, keys, low : low + heads.width]
        return self.dot(k_SD, self.refs.qt[n, :, queries])

    def logits(self, raw_ST, n: int, keys: pl.Slice, queries: pl.Slice, body: Body):
        """Logits to base 2 of a tile, and who sees whom in it (None: all do)."""
        plan, blocks = self.plan, self.plan.blocks
        bias = self.side.bias(n, keys, queries)
        z_ST = tile.logits(raw_ST, plan.spec, bias)
        limits = {}
        if not body.inside:
            offset = self.reader.offset(self.i, self.j) if body.offset is None else body.offset
            offset = offset + keys.start - queries.start
            static = body.offset is not None
            if not (static and tile.covers(blocks.band, offset, *raw_ST.shape)):
                limits['offset'] = offset
        if body.checked and blocks.keys % blocks.kv:
            limits['keys'] = blocks.keys - self.j * blocks.kv - keys.start
        at = self.side.tile(n, (keys, queries), body.checked, **limits)
        seen = tile.visible_ST(blocks.band, at, raw_ST.shape)
        if bias is not None:  # a bias of -inf is a mask, and -inf - m may be no number
            finite = z_ST > -jnp.inf
            seen = finite if seen is None else seen & finite
        return z_ST, seen

    def values(self, n: int, keys: pl.Slice, body: Body) -> jax.Array:
        """Values of a tile, transposed, [V, S]; rows behind the end, which may hold NaN, are 0."""
        blocks, V = self.plan.blocks, self.plan.heads.V
        low = self.plan.heads.kv_head(n) * V
        v_SV = self.refs.v[0, keys, low : low + V]
        if body.checked and blocks.keys % blocks.kv:
            row = jax.lax.broadcasted_iota(jnp.int32, v_SV.shape, 0)
            left = blocks.keys - self.j * blocks.kv - keys.start
            v_SV = jnp.where(row < left, v_SV, jnp.zeros_like(v_SV))
        return v_SV.T

    def dropped(self, p_ST, n: int, keys: pl.Slice, queries: pl.Slice) -> jax.Array:
        """Weights after dropout, not yet divided by the rate that is kept."""
        plan = self.plan
        if not plan.spec.dropout_rate:
            return p_ST
        b, h, t, s = self.reader.start
        S, T = p_ST.shape
        query_1T = jax.lax.broadcasted_iota(jnp.int32, (1, T), 1) + (
            t + self.i * plan.blocks.q + queries.start
        )
        key_S1 = jax.lax.broadcasted_iota(jnp.int32, (S, 1), 0) + (
            s + self.j * plan.blocks.kv + keys.start
        )
        head = h + self.g * plan.heads.q + n
        kept = dropout.keep(
            self.reader.seed, b + self.b, head, query_1T, key_S1, plan.spec.dropout_rate
        )
        return jnp.where(kept, p_ST, 0.0)

    # The steady state ---------------------------------------------------------------------------

    def accumulate(self, body: Body) -> None:
        """Adds a block to l and the outputs, with the m that there is.

        All tiles are one basic block: the product of the next tile is issued before this tile's
        weights, and those of the last one meet the values one tile late.
        """
        plan, refs = self.plan, self.refs
        self.slot = 0 if plan.whole else refs.flags[0]
        self.side.columns.clear()
        items = self.tiles(body)
        sums, bad, waiting, l_8T = {}, None, None, None
        raw_ST = self.raw(*items[0][:3]) if items else None
        for at, (n, keys, queries, last) in enumerate(items):
            ready_ST, raw_ST = raw_ST, self.raw(*items[at + 1][:3]) if items[at + 1 :] else None
            z_ST, seen = self.logits(ready_ST, n, keys, queries, body)
            m_8T = refs.m[n, :, queries]
            p_ST = jnp.exp2(z_ST.reshape(-1, SUBLANES, plan.chunk) - m_8T[None])
            p_ST = p_ST.reshape(ready_ST.shape)
            if seen is not None:
                p_ST = jnp.where(seen, p_ST, 0.0)
            if not plan.ones:
                part_8T = p_ST.reshape(-1, SUBLANES, plan.chunk).sum(0)
                l_8T = part_8T if l_8T is None else l_8T + part_8T
            p_ST = self.dropped(p_ST, n, keys, queries).astype(refs.v.dtype)
            if waiting is not None:
                bad = self.add(sums, bad, *waiting)
            waiting = (n, keys, queries, last, p_ST, l_8T, body)
            l_8T = None if last else l_8T
        if waiting is not None:
            bad = self.add(sums, bad, *waiting)
            refs.flags[0] = 1 - self.slot
            refs.flags[1] = jnp.any(bad).astype(jnp.int32)

    def tiles(self, body: Body) -> list[tuple[int, pl.Slice, pl.Slice, bool]]:
        """The tiles of a block that anyone sees: (head, keys, queries, last of its queries)."""
        plan, found = self.plan, []
        for n in range(plan.heads.q):
            for c in range(0, plan.blocks.q, plan.chunk):
                starts = [
                    s
                    for s in range(0, plan.blocks.kv, plan.sub)
                    if body.inside
                    or body.offset is None
                    or not tile.misses(plan.blocks.band, body.offset + s - c, plan.sub, plan.chunk)
                ]
                queries = pl.ds(c, plan.chunk)
                if not starts:
                    self.keep(n, queries)
                found += [(n, pl.ds(s, plan.sub), queries, s == starts[-1]) for s in starts]
        return found

    def keep(self, n: int, queries: pl.Slice) -> None:
        """Takes the sums of queries that see nothing of a block over to the other slot."""
        refs, rows = self.refs, pl.ds(n * self.plan.heads.V, self.plan.heads.V)
        refs.l[1 - self.slot, n, :, queries] = refs.l[self.slot, n, :, queries]
        acc_VT = refs.acc[self.slot, rows, queries]
        refs.acc[1 - self.slot, rows, queries] = (
            jnp.zeros_like(acc_VT) if self.plan.whole else acc_VT
        )

    def add(self, sums, bad, n, keys, queries, last, p_ST, part_8T, body):
        """Adds one tile's weights times values; after a chunk's last tile moves on to the next."""
        plan, refs, V = self.plan, self.refs, self.plan.heads.V
        v_VS = self.values(n, keys, body)
        if plan.ones:
            v_VS = jnp.concatenate([v_VS, jnp.ones((ONES, plan.sub), v_VS.dtype)])
        o_VT = self.dot(v_VS, p_ST)
        sums['o'] = sums['o'] + o_VT if 'o' in sums else o_VT
        if not last:
            return bad
        o_VT = sums.pop('o')
        if plan.ones:
            part_8T = o_VT[V : V + SUBLANES]
        l_8T = refs.l[self.slot, n, :, queries] + part_8T
        refs.l[1 - self.slot, n, :, queries] = l_8T
        rows = pl.ds(n * V, V)
        before = 0.0 if plan.whole else refs.acc[self.slot, rows, queries]
        refs.acc[1 - self.slot, rows, queries] = before + o_VT[:V]
        wrong = self.wrong(l_8T, queries)
        return wrong if bad is None else bad | wrong

    def wrong(self, l_8T: jax.Array, queries: pl.Slice) -> jax.Array:
        """Which sums are too large or no number, among the queries that exist."""
        wrong = ~(l_8T < LIMIT)
        blocks = self.plan.blocks
        if blocks.queries % blocks.q:
            query = jax.lax.broadcasted_iota(jnp.int32, l_8T.shape, 1)
            wrong &= query < blocks.queries - self.i * blocks.q - queries.start
        return wrong

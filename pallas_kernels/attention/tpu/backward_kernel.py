"""The backward kernel: all five products of a tile in one pass, with nothing summed in HBM.

Tiles are [keys, queries], as in the forward pass: S^T = K Q^T and dP^T = V dO^T are computed anew,
P^T = exp2(S^T - lse) needs no maximum, dS^T = P^T * (dP^T - delta) with delta = sum(o * do) - dlse.
Then dV^T += dO^T P, dK^T += Q^T dS and dQ^T += K^T dS^T, whose sides of 256 on the MXU are keys and
queries, never the head (FlashAttention-2, arXiv 2307.08691, algorithm 2, in another layout).
A grid goes over (batch row, block of key-value heads, row, step): a row is a block of queries of
some of the query heads that share these keys, its steps are the blocks of keys. dQ is summed in
VMEM over the steps of a row; dK and dV of all keys stay in VMEM until the last row, and rows behind
it write them. Every sum has one order: two runs give the same bits.

Legend: D and V head sizes, S keys and T queries of a block or tile, n query head of the step.
"""

import functools
import types
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.attention import dropout
from pallas_kernels.attention.tpu import side, tile
from pallas_kernels.attention.tpu.backward_plan import Plan, lanes, width
from pallas_kernels.attention.tpu.blocks import Body, Reader
from pallas_kernels.attention.tpu.layout import LANES
from pallas_kernels.attention.tpu.tile import Scalar


def kernel(plan: Plan, names: tuple[str, ...], scalars: Any, *refs: Any) -> None:
    """One grid step; `names` are those of `refs`."""
    b, group, row, at = (pl.program_id(n) for n in range(4))
    step = Step(plan, named_refs(names, scalars, refs), plan.where(b, group, row, at, scalars))
    first, last = at == 0, at == plan.blocks.steps() - 1
    computes = row < plan.rows
    pl.when((row == 0) & first)(step.clear)
    pl.when(computes & first)(step.prepare)
    pl.when(computes & first)(step.start_dq)
    runs = computes & step.reader.runs(step.b, step.i, at)
    for body, chosen in step.choices():
        pl.when(runs & chosen)(functools.partial(step.add, body))
    pl.when(computes & last)(step.write_dq)
    pl.when(row >= plan.rows)(lambda: step.write_dkv(plan.written(row, at)))


def named_refs(names: tuple[str, ...], scalars: Any, refs: tuple[Any, ...]) -> Any:
    """References by name."""
    return types.SimpleNamespace(scalars=scalars, **dict(zip(names, refs, strict=True)))


class Step:
    """One grid step: batch row b, step of heads g, block of queries i and of keys j."""

    def __init__(self, plan: Plan, refs: Any, where: tuple[Scalar, Scalar, Scalar, Scalar]):
        self.plan, self.refs = plan, refs
        self.b, self.g, self.i, self.j = where
        self.reader = Reader(plan.blocks, refs.scalars)

    # Before and after the tiles -----------------------------------------------------------------

    def clear(self) -> None:
        """Sets the sums over queries to zero."""
        kv = self.plan.blocks.kv

        @pl.loop(0, self.plan.blocks.n_kv)
        def _(j):
            keys = pl.ds(pl.multiple_of(j * kv, LANES), kv)
            for sums in (self.refs.dk_sum, self.refs.dv_sum):
                sums[:, keys] = jnp.zeros((sums.shape[0], kv), sums.dtype)

    def prepare(self) -> None:
        """Turns a block of queries, and sums what is the same for all its keys.

        Queries behind the end, which may hold anything, become zeros that see nothing.
        """
        plan, refs, heads, blocks = self.plan, self.refs, self.plan.heads, self.plan.blocks
        left = None
        if blocks.queries % blocks.q:
            left = blocks.queries - self.i * blocks.q
        q_DT, do_VT, o_VT = (_turned(x, left) for x in (refs.q, refs.do, refs.o))
        product_VT = do_VT.astype(jnp.float32) * o_VT.astype(jnp.float32)
        for n in range(heads.q):
            kv_head = heads.kv_head(n)
            refs.q_turned[n] = _placed(q_DT, n, heads.kv, heads.D, kv_head)
            refs.do_turned[n] = _placed(do_VT, n, heads.kv, heads.V, kv_head)
            lse_1T = refs.lse[0, n]
            delta_1T = product_VT[n * heads.V : (n + 1) * heads.V].sum(0, keepdims=True)
            if plan.dlse:
                delta_1T -= refs.dlse[0, n]
            sees = lse_1T > -jnp.inf
            if left is not None:
                sees &= jax.lax.broadcasted_iota(jnp.int32, lse_1T.shape, 1) < left
            # exp2(z - inf) = 0: a query that sees nothing gets no weights and no gradient.
            refs.lse2[n] = jnp.where(sees, lse_1T * tile.LOG2_E, jnp.inf)
            refs.delta[n] = jnp.where(sees, delta_1T, 0.0)

    def start_dq(self) -> None:
        """Sets the sum over keys to zero."""
        self.refs.dq_sum[...] = jnp.zeros(self.refs.dq_sum.shape, self.refs.dq_sum.dtype)

    def write_dq(self) -> None:
        """Writes the gradient of a block of queries."""
        D, scale = self.plan.heads.D, self.end_scale
        for n in range(self.plan.heads.q):
            dq_DT = self.refs.dq_sum[n] * scale
            self.refs.dq[0, :, n * D : (n + 1) * D] = dq_DT.T.astype(self.refs.dq.dtype)

    def write_dkv(self, block: Scalar) -> None:
        """Writes the gradients of a block of keys and values."""
        kv = self.plan.blocks.kv
        keys = pl.ds(pl.multiple_of(block * kv, LANES), kv)
        refs = self.refs
        for out, sums, scale in ((refs.dk, refs.dk_sum, self.end_scale), (refs.dv, refs.dv_sum, 1)):
            out[0] = (sums[:, keys] * scale).T.astype(out.dtype)

    @property
    def end_scale(self) -> float:
        """What is left to multiply dQ and dK by."""
        return self.plan.spec.scale if self.plan.spec.softcap is None else 1.0

    # The tiles ----------------------------------------------------------------------------------

    def choices(self) -> Iterator[tuple[Body, Any]]:
        """The plan's bodies, and when each is the one that is made for the block."""
        blocks, masked = self.plan.blocks, self.plan.side.masked
        covered = self.reader.covered(self.b, self.i, self.j)
        others = True if masked else not covered if isinstance(covered, bool) else ~covered
        offset = self.reader.offset(self.i, self.j)
        inside = tile.covers(blocks.band, offset, blocks.kv, blocks.q)
        for body in self.plan.bodies():
            if body.offset is not None:
                yield body, offset == body.offset
            elif body.inside:
                yield body, inside & others if body.checked else covered
            else:  # whatever no fast body does
                yield body, others

    def add(self, body: Body) -> None:
        """Adds a block, all its tiles in one basic block.

        The products of the next tile are issued before this tile's weights, so that the matrix
        units have work while the vector units compute those.
        """
        items = list(self.tiles(body))
        self.begin()
        ready = self.products(*items[0], body)
        waiting = None
        for at, item in enumerate(items):
            raw_ST, dp_ST = ready
            if items[at + 1 :]:
                ready = self.products(*items[at + 1], body)
            weights = self.weights(raw_ST, dp_ST, *item, body)
            if waiting is not None:
                self.sum(*waiting)
            waiting = (*weights, *item)
        self.sum(*waiting)

    def begin(self) -> None:
        """Forgets what is kept for the tiles beside one: it belongs to one basic block."""
        self.side = side.Reader(self.plan.side, vars(self.refs))
        self.turned_keys = {}

    def tiles(self, body: Body):
        """The tiles of a block that anyone sees: (head, keys, queries)."""
        plan = self.plan
        for n in range(plan.heads.q):
            for c in range(0, plan.blocks.q, plan.chunk):
                first, end = plan.seen_keys(body, c)
                for s in range(0, plan.blocks.kv, plan.sub):
                    low, high = max(s, first), min(s + plan.sub, end)
                    if low < high:
                        yield n, pl.ds(low, high - low), pl.ds(c, plan.chunk)

    def products(self, n, keys, queries, body):
        """Q K and dO V of a tile, [S, T] both."""
        heads, refs = self.plan.heads, self.refs
        kv_head = heads.kv_head(n)
        k_SD = self.keys(refs.k, keys, heads.D, kv_head, body)
        v_SV = self.keys(refs.v, keys, heads.V, kv_head, body)
        # Transposed once for all queries of the block: dQ^T = K^T dS^T.
        at = kv_head, keys.start, keys.size
        if at not in self.turned_keys:
            _, low = lanes(heads.kv, heads.D, kv_head)
            self.turned_keys[at] = k_SD.T[low : low + heads.D]
        return (
            dot(k_SD, refs.q_turned[n, :, queries], 1, 0),
            dot(v_SV, refs.do_turned[n, :, queries], 1, 0),
        )

    def keys(self, ref, keys, size, kv_head, body):
        """Keys or values of a tile; rows behind the end, which may hold NaN, are 0."""
        kv = self.plan.heads.kv
        low, _ = lanes(kv, size, kv_head)
        x_SD = ref[0, keys, low : low + width(kv, size)]
        blocks = self.plan.blocks
        if body.checked and blocks.keys % blocks.kv:
            row = jax.lax.broadcasted_iota(jnp.int32, x_SD.shape, 0)
            left = blocks.keys - self.j * blocks.kv - keys.start
            x_SD = jnp.where(row < left, x_SD, jnp.zeros_like(x_SD))
        return x_SD

    def weights(self, raw_ST, dp_ST, n, keys, queries, body):
        """Weights after dropout and the gradient of the products, as the matrix unit takes them."""
        dropped_ST, ds_ST = self.gradient(raw_ST, dp_ST, n, keys, queries, body)
        if self.plan.spec.softcap is not None:
            ds_ST = ds_ST * tile.slope(raw_ST, self.plan.spec)
        dtype = self.refs.q_turned.dtype
        return dropped_ST.astype(dtype), ds_ST.astype(dtype)

    def gradient(self, raw_ST, dp_ST, n, keys, queries, body):
        """Weights after dropout and the gradient of the logits, float32 [S, T] both."""
        plan, refs = self.plan, self.refs
        z_ST = tile.logits(raw_ST, plan.spec, self.side.bias(n, keys, queries))
        p_ST = jnp.exp2(z_ST - refs.lse2[n, :, queries])
        seen = self.seen(raw_ST.shape, n, keys, queries, body)
        if seen is not None:
            p_ST = jnp.where(seen, p_ST, 0.0)
        kept = self.kept(n, keys, queries)
        dropped_ST = p_ST
        if kept is not None:
            scale = 1 / (1 - plan.spec.dropout_rate)
            dropped_ST = jnp.where(kept, p_ST * scale, 0.0)
            dp_ST = jnp.where(kept, dp_ST * scale, 0.0)
        return dropped_ST, p_ST * (dp_ST - refs.delta[n, :, queries])

    def seen(self, shape, n, keys, queries, body):
        """Who sees whom in a tile, bool [S, T]; None if all see all."""
        blocks, limits = self.plan.blocks, {}
        if not body.inside:
            offset = self.reader.offset(self.i, self.j) if body.offset is None else body.offset
            offset = offset + keys.start - queries.start
            if body.offset is None or not tile.covers(blocks.band, offset, *shape):
                limits['offset'] = offset
        if body.checked and blocks.keys % blocks.kv:
            limits['keys'] = blocks.keys - self.j * blocks.kv - keys.start
        if 'bias' in self.plan.side.full and blocks.queries % blocks.q:
            # Behind the end a bias may be NaN, which no lse makes 0.
            limits['queries'] = blocks.queries - self.i * blocks.q - queries.start
        here = self.side.tile(n, (keys, queries), body.checked, **limits)
        return tile.visible_ST(blocks.band, here, shape)

    def kept(self, n, keys, queries):
        """Which weights dropout leaves, bool [S, T]; None if it is off."""
        plan = self.plan
        if not plan.spec.dropout_rate:
            return None
        b, h, t, s = self.reader.start
        query_1T = jax.lax.broadcasted_iota(jnp.int32, (1, plan.chunk), 1) + (
            t + self.i * plan.blocks.q + queries.start
        )
        key_S1 = jax.lax.broadcasted_iota(jnp.int32, (keys.size, 1), 0) + (
            s + plan.key_start + self.j * plan.blocks.kv + keys.start
        )
        head = h + self.g * plan.heads.q + n
        where = b + self.b, head, query_1T, key_S1
        return dropout.keep(self.reader.seed, *where, plan.spec.dropout_rate)

    def sum(self, p_ST, ds_ST, n, keys, queries):
        """Adds what a tile gives to dV, dK and dQ."""
        heads, refs = self.plan.heads, self.refs
        kv_head = heads.kv_head(n)
        at = pl.multiple_of(self.j * self.plan.blocks.kv + keys.start, LANES)
        columns = pl.ds(at, keys.size)
        for sums, turned, weights_ST, size in (
            (refs.dv_sum, refs.do_turned, p_ST, heads.V),
            (refs.dk_sum, refs.q_turned, ds_ST, heads.D),
        ):
            _, low = lanes(heads.kv, size, kv_head)
            rows = pl.ds(kv_head * size, size)
            x_DT = turned[n, low : low + size, queries]
            sums[rows, columns] += dot(x_DT, weights_ST, 1, 1)
        k_DS = self.turned_keys[kv_head, keys.start, keys.size]
        refs.dq_sum[n, :, queries] += dot(k_DS, ds_ST, 1, 0)


def dot(a: jax.Array, b: jax.Array, a_dim: int, b_dim: int) -> jax.Array:
    """Matrix product over those dimensions in float32, exact products also for float32 inputs."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((a_dim,), (b_dim,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision, preferred_element_type=jnp.float32)


def _turned(ref: Any, left: jax.Array | None) -> jax.Array:
    """A block [1, T, D] as [D, T]; queries from `left` on are 0."""
    x_DT = ref[0].T
    if left is None:
        return x_DT
    query = jax.lax.broadcasted_iota(jnp.int32, x_DT.shape, 1)
    return jnp.where(query < left, x_DT, jnp.zeros_like(x_DT))


def _placed(x_DT: jax.Array, n: int, kv: int, size: int, kv_head: int) -> jax.Array:
    """Head n's rows where its key-value head lies among the lanes of `width`, zeros around them."""
    x_DT = x_DT[n * size : (n + 1) * size]
    _, low = lanes(kv, size, kv_head)
    sizes = low, width(kv, size) - low - size
    before, after = ([jnp.zeros((rows, x_DT.shape[1]), x_DT.dtype)] * (rows > 0) for rows in sizes)
    return jnp.concatenate([*before, x_DT, *after]) if before or after else x_DT

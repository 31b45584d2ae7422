"""Which blocks of queries x keys run at all, and which of them nobody needs to mask.

Where a block lies decides, and the range of segment ids in it: a block of keys runs for a block of
queries if the diagonal band passes through it and their ranges of ids overlap. What is read at
run time is a vector of int32 scalars, whose size grows with T / q and S / kv, not their product.

Legend: B batch (1 where it does not matter), I blocks of queries, J blocks of keys.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.arguments import Operands, Spec
from pallas_kernels.attention.tpu import tile
from pallas_kernels.attention.tpu.tile import Band, Scalar

_START, _SEED, _TABLES = 0, 4, 5  # where things are in the vector of scalars


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The blocks of one call, all static.

    Attributes:
      batch, queries, keys: B, T and S.
      q, kv: queries and keys of a block.
      band: what causality and the window let a query see.
      shift: see `Spec`.
      moved: whether global indices are given at run time (`Operands.start`).
      segments: whether there are segment ids.
      outer: 'query' if a grid goes over the blocks of keys that run for a block of queries,
        'key' the other way round.
    """

    batch: int
    queries: int
    keys: int
    q: int
    kv: int
    band: Band
    shift: int
    moved: bool
    segments: bool
    outer: Literal['query', 'key'] = 'query'

    @property
    def n_q(self) -> int:
        """Blocks of queries."""
        return -(-self.queries // self.q)

    @property
    def n_kv(self) -> int:
        """Blocks of keys."""
        return -(-self.keys // self.kv)

    @property
    def n_outer(self) -> int:
        """Blocks of the outer side."""
        return self.n_q if self.outer == 'query' else self.n_kv

    @property
    def n_inner(self) -> int:
        """Blocks of the inner side."""
        return self.n_kv if self.outer == 'query' else self.n_q

    @property
    def banded(self) -> bool:
        """Whether causality or a window hides anything."""
        return self.band != Band(None, None)

    @property
    def all_run(self) -> bool:
        """Whether every block runs, whatever the data."""
        return not self.banded and not self.segments

    @property
    def folded(self) -> bool:
        """Whether a grid of queries x keys is folded so that no step is idle.

        Causality leaves r + 1 of n blocks of keys to row r, and n - r to row n - 1 - r: n + 1 steps
        do both.
        """
        return (
            self.band == Band(None, 0)
            and (self.outer, self.shift, self.moved, self.segments) == ('query', 0, False, False)
            and (self.queries, self.q, self.n_q % 2) == (self.keys, self.kv, 0)
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and steps of a grid, as `Reader.place` takes them."""
        return (self.n_q // 2, self.n_q + 1) if self.folded else (self.n_outer, self.steps())

    def offset(self, i: Scalar, j: Scalar, scalars: Any = None) -> Scalar:
        """Position of the first key of block j minus that of the first query of block i."""
        offset = j * self.kv - i * self.q - self.shift
        if self.moved:
            offset = offset + scalars[_START + 3] - scalars[_START + 2]
        return offset

    def steps(self) -> int:
        """Returns the most inner blocks that may run for one outer block: a grid's length."""
        inner, outer = (self.kv, self.q) if self.outer == 'query' else (self.q, self.kv)
        if None in self.band:
            bound = self.n_inner
        else:
            # A span of n positions touches at most (n - 2) // inner + 2 blocks.
            bound = (outer + self.band.high - self.band.low - 2) // inner + 2
        if not self.moved and self.banded:
            first_I, last_I = _first_and_last(self._in_band(np, None))
            bound = min(bound, int((last_I - first_I).max()) + 1)
        return max(1, min(bound, self.n_inner))

    def _in_band(self, xp: Any, start: Any) -> Any:
        """Returns bool [1, outer, inner]: does the band pass through the block?"""
        i_I1 = xp.arange(self.n_q)[:, None]
        j_1J = xp.arange(self.n_kv)[None]
        outside_IJ = tile.misses(self.band, self.offset(i_I1, j_1J, start), self.kv, self.q)
        inside_IJ = xp.broadcast_to(~(outside_IJ | xp.zeros((1, 1), bool)), (self.n_q, self.n_kv))
        return (inside_IJ if self.outer == 'query' else inside_IJ.T)[None]


def blocks(operands: Operands, spec: Spec, q: int, kv: int, outer: str = 'query') -> Blocks:
    """Returns the blocks of a call."""
    B, T = operands.q_BTHD.shape[:2]
    return Blocks(
        batch=B,
        queries=T,
        keys=operands.k_BSKD.shape[1],
        q=q,
        kv=kv,
        band=tile.band(spec),
        shift=spec.shift,
        moved=operands.start is not None,
        segments=operands.segment_ids_BT is not None,
        outer=outer,
    )


def scalars(operands: Operands, blocks: Blocks) -> jax.Array:
    """Returns what `Reader` reads, int32 [n], to be prefetched into scalar memory."""
    zeros = jnp.zeros(4, jnp.int32)
    seed = operands.dropout_seed
    parts = [
        zeros if operands.start is None else operands.start.astype(jnp.int32),
        zeros[:1] if seed is None else seed.astype(jnp.int32).reshape(1),
    ]
    if blocks.all_run:
        return jnp.concatenate(parts)
    runs_Boi = blocks._in_band(jnp if blocks.moved else np, operands.start)
    ranges = []
    if blocks.segments:
        q_low_BI, q_high_BI = _id_ranges(operands.segment_ids_BT, blocks.q)
        k_low_BJ, k_high_BJ = _id_ranges(operands.kv_segment_ids_BS, blocks.kv)
        ranges = [q_low_BI, q_high_BI, k_low_BJ, k_high_BJ]
        overlap = (q_low_BI[:, :, None] <= k_high_BJ[:, None]) & (
            k_low_BJ[:, None] <= q_high_BI[:, :, None]
        )
        runs_Boi = runs_Boi & (overlap if blocks.outer == 'query' else overlap.swapaxes(1, 2))
    tables = [*_first_and_last(runs_Boi), *ranges]
    return jnp.concatenate(parts + [jnp.asarray(x, jnp.int32).reshape(-1) for x in tables])


@dataclasses.dataclass(frozen=True)
class Body:
    """One way to do a block, chosen by where it lies.

    Attributes:
      offset: position of the first key minus that of the first query if it is static, None if it
        is read at run time.
      inside: whether the band hides nothing.
      checked: whether segment ids, the mask and the end of the keys are looked at.
    """

    offset: int | None = None
    inside: bool = False
    checked: bool = True


class Place(NamedTuple):
    """What a grid step does: block i of queries and j of keys, and where it is among those of i."""

    i: Scalar
    j: Scalar
    runs: Scalar
    first: Scalar
    last: Scalar


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads the scalars of `scalars` in a kernel or an index map, for batch row b."""

    blocks: Blocks
    ref: Any

    @property
    def start(self) -> list[jax.Array]:
        """Global index of the first batch row, head, query and key."""
        return [self.ref[_START + n] for n in range(4)]

    @property
    def seed(self) -> jax.Array:
        """Seed of dropout."""
        return self.ref[_SEED]

    def offset(self, i: Scalar, j: Scalar) -> Scalar:
        """Position of the first key of block j minus that of the first query of block i."""
        return self.blocks.offset(i, j, self.ref)

    def inner(self, b: Scalar, outer: Scalar, step: Scalar) -> Scalar:
        """The inner block of a step, to be fetched: a step behind the last one fetches nothing."""
        if self.blocks.n_inner == 1:
            return 0
        if self.blocks.all_run:
            return step
        first, last = self._span(b, outer)
        return jnp.minimum(first + step, jnp.maximum(first, last))

    def runs(self, b: Scalar, outer: Scalar, step: Scalar) -> Scalar:
        """Whether the inner block of a step runs."""
        if self.blocks.all_run:
            return True
        first, last = self._span(b, outer)
        runs = first + step <= last
        if self.blocks.segments:
            (q_low, q_high), (k_low, k_high) = self._ids(b, outer, self.inner(b, outer, step))
            runs = runs & (q_low <= k_high) & (k_low <= q_high)
        return runs

    def place(self, b: Scalar, row: Scalar, step: Scalar) -> Place:
        """Where a grid step is, of a grid with queries outside; see `Blocks.grid`."""
        blocks = self.blocks
        if blocks.folded:
            upper = step <= row
            i = jnp.where(upper, row, blocks.n_q - 1 - row)
            j = jnp.where(upper, step, step - row - 1)
            return Place(i, j, True, j == 0, j == i)
        i = 0 if blocks.n_q == 1 else row
        runs = self.runs(b, row, step)
        return Place(i, self.inner(b, row, step), runs, step == 0, step == blocks.steps() - 1)

    def covered(self, b: Scalar, i: Scalar, j: Scalar) -> Scalar:
        """Whether every query of block i sees every key of block j; a mask apart."""
        at = self.blocks
        covered = tile.covers(at.band, self.offset(i, j), at.kv, at.q) if at.banded else True
        if at.keys % at.kv:
            covered = covered & (j < at.n_kv - 1)
        if at.segments:
            pair = (i, j) if at.outer == 'query' else (j, i)
            (q_low, q_high), (k_low, k_high) = self._ids(b, *pair)
            covered = covered & (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
        return covered

    def _span(self, b: Scalar, outer: Scalar) -> tuple[jax.Array, jax.Array]:
        rows = self.blocks.batch if self.blocks.segments else 1
        at = _TABLES + outer + (b * self.blocks.n_outer if rows > 1 else 0)
        return self.ref[at], self.ref[at + rows * self.blocks.n_outer]

    def _ids(self, b: Scalar, outer: Scalar, inner: Scalar) -> Any:
        """Lowest and highest segment id of the block of queries, and of the block of keys."""
        at = self.blocks
        i, j = (outer, inner) if at.outer == 'query' else (inner, outer)
        low_q = _TABLES + 2 * at.batch * at.n_outer + b * at.n_q + i
        low_k = _TABLES + 2 * at.batch * (at.n_outer + at.n_q) + b * at.n_kv + j
        return (
            (self.ref[low_q], self.ref[low_q + at.batch * at.n_q]),
            (self.ref[low_k], self.ref[low_k + at.batch * at.n_kv]),
        )


def _first_and_last(runs_Boi: Any) -> tuple[Any, Any]:
    """First and last inner block that runs; 0 and -1 if none does."""
    n_inner = runs_Boi.shape[2]
    first_Bo = runs_Boi.argmax(2)
    last_Bo = n_inner - 1 - runs_Boi[:, :, ::-1].argmax(2)
    return first_Bo, jnp.where(runs_Boi.any(2), last_Bo, -1) if isinstance(
        runs_Boi, jax.Array
    ) else np.where(runs_Boi.any(2), last_Bo, -1)


def _id_ranges(ids_BT: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Lowest and highest id of each block of rows, int32 [B, blocks]."""
    B, T = ids_BT.shape
    # The last block is filled up with its last id, which changes neither.
    padded_BT = jnp.pad(ids_BT, ((0, 0), (0, -T % block)), mode='edge')
    split = padded_BT.reshape(B, -1, block)
    return split.min(2), split.max(2)

"""All that is static in a backward kernel: its grid, its bodies, and what it keeps in VMEM."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.arguments import Spec
from pallas_kernels.attention.tpu import side
from pallas_kernels.attention.tpu.blocks import Blocks, Body, Reader
from pallas_kernels.attention.tpu.layout import LANES, Heads


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is static in a backward kernel.

    Attributes:
      sub, chunk: keys and queries of a tile.
      inside: whether there are blocks of which the band hides nothing.
      offsets: where the others can lie (`Body.offset`), None if anywhere.
      key_start: index of the first key in the call that these keys are a part of.
      dlse: whether lse has a gradient.
    """

    spec: Spec
    blocks: Blocks
    heads: Heads
    side: side.Side
    sub: int
    chunk: int
    inside: bool
    offsets: tuple[int, ...] | None
    key_start: int = 0
    dlse: bool = False

    @property
    def turns(self) -> int:
        """Steps of query heads that share a block of key-value heads."""
        return self.heads.kv * self.heads.share // self.heads.q

    @property
    def rows(self) -> int:
        """Rows of the grid that compute."""
        return self.turns * self.blocks.n_q

    @property
    def flushes(self) -> int:
        """Rows of the grid behind those, which write dK and dV."""
        return -(-self.blocks.n_kv // self.blocks.steps())

    def query_scratch(self, dtype: Any) -> dict[str, Any]:
        """What is kept in VMEM of a block of queries."""
        heads, q = self.heads, self.blocks.q
        return {
            'q_turned': pltpu.VMEM((heads.q, width(heads.kv, heads.D), q), dtype),
            'do_turned': pltpu.VMEM((heads.q, width(heads.kv, heads.V), q), dtype),
            'lse2': pltpu.VMEM((heads.q, 1, q), jnp.float32),
            'delta': pltpu.VMEM((heads.q, 1, q), jnp.float32),
        }

    def scratch(self, dtype: Any) -> dict[str, Any]:
        """What is kept in VMEM from step to step."""
        heads, keys = self.heads, self.blocks.n_kv * self.blocks.kv
        return self.query_scratch(dtype) | {
            'dq_sum': pltpu.VMEM((heads.q, heads.D, self.blocks.q), jnp.float32),
            'dk_sum': pltpu.VMEM((heads.kv * heads.D, keys), jnp.float32),
            'dv_sum': pltpu.VMEM((heads.kv * heads.V, keys), jnp.float32),
        }

    def where(self, b, group, row, step, scalars):
        """Returns where a grid step is: (batch row, step of heads, block of queries, of keys)."""
        row = jnp.minimum(row, self.rows - 1)
        # A division takes scalar units some twenty cycles, in every index map.
        n_q = self.blocks.n_q
        turn, i = (row // n_q, row % n_q) if self.turns > 1 else (0, row)
        return b, group * self.turns + turn, i, Reader(self.blocks, scalars).inner(b, i, step)

    def fetched(self, b, group, row, step, scalars):
        """Returns what a grid step has in VMEM, as `where` does.

        A step that computes nothing, as a row's last ones and those that write dK and dV, takes
        what the next row begins with: it is fetched during the step before, which computes.
        """
        here = self.where(b, group, row, step, scalars)
        ended = row >= self.rows
        if not self.blocks.all_run:
            first = Reader(self.blocks, scalars).inner(b, here[2], 0)
            ended |= here[3] < first + step
        new_group = row + 1 >= self.rows
        group += jnp.where(new_group, 1, 0)
        new_batch = group >= self.heads.n_kv // self.heads.kv
        b = jnp.minimum(b + jnp.where(new_batch, 1, 0), self.blocks.batch - 1)
        row = jnp.where(new_group, 0, row + 1)
        there = self.where(b, jnp.where(new_batch, 0, group), row, 0, scalars)
        return tuple(jnp.where(ended, y, x) for x, y in zip(here, there, strict=True))

    def group(self, g):
        """Returns the block of key-value heads that a step of query heads uses."""
        return g // self.turns if self.turns > 1 else g

    def written(self, row, step):
        """Which block of dK and dV a grid step writes, the first one until there are sums."""
        block = (row - self.rows) * self.blocks.steps() + step
        return jnp.clip(block, 0, self.blocks.n_kv - 1)

    def bodies(self) -> list[Body]:
        """The ways in which blocks are done, the fast one first."""
        at = self.blocks
        checked = at.segments or self.side.masked or at.keys % at.kv > 0
        bodies = [Body(inside=True, checked=False)] if self.inside and not self.side.masked else []
        if self.offsets is None:
            return [*bodies, Body()]
        if self.inside and checked:
            bodies.append(Body(inside=True))
        return bodies + [Body(offset=offset, checked=checked) for offset in self.offsets]

    def seen_keys(self, body: Body, chunk: int) -> tuple[int, int]:
        """First and end of the keys that the queries from `chunk` on see, to whole lanes."""
        keys, band = self.blocks.kv, self.blocks.band
        first, end = 0, keys
        if body.offset is not None and band.low is not None:
            first = max(0, band.low - body.offset + chunk)
        if body.offset is not None and band.high is not None:
            end = min(keys, band.high - body.offset + chunk + self.chunk)
        return first // LANES * LANES, -(-end // LANES) * LANES


def width(kv: int, size: int) -> int:
    """Lanes that a matmul contracts for one of `kv` heads: its own, or 128 if it is smaller."""
    return size if size >= LANES else min(LANES, kv * size)


def lanes(kv: int, size: int, kv_head: int) -> tuple[int, int]:
    """First of the `width` lanes in which a head lies, and its own first lane among those."""
    lane, wide = kv_head * size, width(kv, size)
    low = min(lane // wide * wide, kv * size - wide)
    return low, lane - low

"""Segment ids, mask and bias: how they are fetched, and read as the tile that a kernel works on.

A mask or bias comes as one of three things, by which of its last two dimensions are full: a tile
[.., T, S], which is transposed in the kernel, a row of keys [.., 1, S], or a row of queries
[.., T, 1]. Dimensions of size 1 among batch and heads are broadcast by the index maps.
Legend: B batch, H query heads, T queries, S keys; a tile is [S, T].
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.attention.arguments import Operands
from pallas_kernels.attention.tpu.blocks import Blocks
from pallas_kernels.attention.tpu.layout import Heads
from pallas_kernels.attention.tpu.tile import Scalar, Tile, column

# Grid indices and the scalars' reference -> batch row, step of heads, block of queries, of keys.
Where = Callable[..., tuple[Scalar, Scalar, Scalar, Scalar]]


@dataclasses.dataclass(frozen=True)
class Side:
    """What there is beside q, k and v, static: for each array, which dimensions are full."""

    full: dict[str, tuple[bool, bool, bool, bool]]

    @property
    def tiles(self) -> bool:
        """Whether a mask or bias is fetched as whole tiles."""
        return any(keys and queries for _, _, queries, keys in self.full.values())

    @property
    def masked(self) -> bool:
        """Whether there is a mask."""
        return 'mask' in self.full


def arrays(operands: Operands) -> tuple[Side, dict[str, jax.Array]]:
    """Returns what there is, and the arrays to pass to the kernel, each of four dimensions."""
    T, S = operands.q_BTHD.shape[1], operands.k_BSKD.shape[1]
    found, full = {}, {}
    if operands.segment_ids_BT is not None:
        found['query_ids'] = operands.segment_ids_BT[:, None, None, :]
        found['key_ids'] = operands.kv_segment_ids_BS[:, None, None, :]
        full['query_ids'] = (True, False, True, False)
        full['key_ids'] = (True, False, False, True)
    for name, x in (('mask', operands.mask_BHTS), ('bias', operands.bias_BHTS)):
        if x is None:
            continue
        dims = [n > 1 for n in x.shape[:2]] + [x.shape[2] == T > 1, x.shape[3] == S > 1]
        tiled = dims[2] and dims[3]
        if name == 'mask':
            # Rows are kept in 32 bits, which is what a kernel turns into a column.
            x = x.astype(jnp.int8 if tiled else jnp.int32)
        if not tiled:
            x = x.astype(jnp.promote_types(x.dtype, jnp.float32)) if name == 'bias' else x
            if not dims[3]:
                dims[2] = True
                x = jnp.broadcast_to(x, (*x.shape[:2], T, 1)).swapaxes(2, 3)
        found[name], full[name] = x, tuple(dims)
    return Side(full), found


def specs(side: Side, blocks: Blocks, heads: Heads, where: Where) -> dict[str, pl.BlockSpec]:
    """Returns the block of each array, in the order of `side.full`."""

    def spec(batch: bool, head: bool, queries: bool, keys: bool) -> pl.BlockSpec:
        def index(*ids):
            b, g, i, j = where(*ids)
            rows, lanes = (i, j) if queries and keys else (0, j if keys else i)
            return (b if batch else 0, g if head else 0, rows, lanes)

        rows = blocks.q if queries and keys else 1
        lanes = blocks.kv if keys else blocks.q
        return pl.BlockSpec((1, heads.q if head else 1, rows, lanes), index)

    return {name: spec(*full) for name, full in side.full.items()}


class Reader:
    """Reads tiles in a kernel; a column that was turned once is kept for the tiles beside it.

    A kernel clears `columns` where a new region of its code begins.
    """

    def __init__(self, side: Side, refs: dict[str, Any]):
        self.side, self.refs, self.columns = side, refs, {}

    def tile(self, n: int, at: tuple[pl.Slice, pl.Slice], ids: bool = True, **limits: Any) -> Tile:
        """Returns what tells who sees whom: head n, slices (keys, queries) of the block.

        `ids` is whether segment ids are looked at; `limits` are fields of `Tile`.
        """
        if 'query_ids' in self.refs and ids:
            limits['key_ids_S1'] = self._read('key_ids', 0, *at)
            limits['query_ids_1T'] = self._read('query_ids', 0, *at)
        if 'mask' in self.refs:
            limits['mask_ST'] = self._read('mask', n, *at) != 0
        return Tile(**limits)

    def bias(self, n: int, keys: pl.Slice, queries: pl.Slice) -> jax.Array | None:
        """Returns the bias of head n, [S, T], [S, 1] or [1, T]; None if there is none."""
        return self._read('bias', n, keys, queries) if 'bias' in self.refs else None

    def _read(self, name: str, n: int, keys: pl.Slice, queries: pl.Slice) -> jax.Array:
        ref, (_, head, has_queries, has_keys) = self.refs[name], self.side.full[name]
        n = n if head else 0
        if has_queries and has_keys:
            x_TS = ref[0, n, queries, keys]
            wide = jnp.float32 if name == 'bias' else jnp.int32
            return x_TS.astype(wide).T
        if has_queries:
            return ref[0, n, :, queries]
        if not isinstance(keys.start, int):
            return column(ref[0, n, :, keys])
        at = (name, n, keys.start, keys.size)
        if at not in self.columns:
            self.columns[at] = column(ref[0, n, :, keys])
        return self.columns[at]

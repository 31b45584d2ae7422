"""Which tiles of the logits the rows of a block meet: the loop bounds of every kernel here.

Legend: B batch (or 1 where no segment ids make batch entries differ), N tiles of rows, M tiles of
columns. Rows are queries and columns keys in the forward pass and in the gradient of the queries;
in the gradient of keys and values it is the other way round.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.attention.arguments import Operands, Spec


@dataclasses.dataclass(frozen=True)
class Band:
    """Where a row sees columns: from `row + offset - left` to `row + offset + right`, both in.

    `offset` may be traced; None for `left` or `right` is without limit. There are `rows` and
    `columns` of them.
    """

    offset: jax.Array | int
    left: int | None
    right: int | None
    rows: int
    columns: int


def band(operands: Operands, spec: Spec) -> Band:
    """Returns the band of the queries among the keys."""
    offset = spec.shift
    if operands.start is not None:
        offset = offset + operands.start[2] - operands.start[3]
    T, S = operands.q_BTHD.shape[1], operands.k_BSKD.shape[1]
    return Band(offset, spec.left, spec.right, T, S)


def transposed(band: Band) -> Band:
    """Returns the band of the keys among the queries."""
    return Band(-band.offset, band.right, band.left, band.columns, band.rows)


def table(
    band: Band,
    rows: int,
    columns: int,
    row_ids: jax.Array | None = None,
    column_ids: jax.Array | None = None,
) -> jax.Array:
    """Returns int32 [B, N, 5]: for each tile of `rows` rows the tiles of columns it has to visit.

    The five are `first`, `full_first`, `full_end`, `end` and the band's offset: tiles of `columns`
    columns from `first` until before `end` hold all that any row sees, and those from `full_first`
    until before `full_end` are seen whole by every row. Segment ids [B, rows] and [B, columns]
    narrow both. It is made outside the kernel, where it costs a few vector operations, so that
    the kernel's loop bounds are loads and run-time segments are skipped like static masks.
    """
    N = -(-band.rows // rows)
    top = jnp.arange(N, dtype=jnp.int32) * rows + band.offset
    bottom = jnp.minimum(top + rows, band.rows + band.offset) - 1

    def clip(x: jax.Array | int) -> jax.Array:
        return jnp.broadcast_to(jnp.clip(x, 0, band.columns), (N,))

    first = clip(0 if band.left is None else top - band.left) // columns
    end = -(-clip(band.columns if band.right is None else bottom + band.right + 1) // columns)
    full_first = -(-clip(0 if band.left is None else bottom - band.left) // columns)
    full_end = clip(band.columns if band.right is None else top + band.right + 1) // columns
    bounds = [x[None] for x in (first, full_first, full_end, end)]
    if row_ids is not None:
        found = _segment_bounds(_extremes(row_ids, rows), _extremes(column_ids, columns))
        narrow = (jnp.maximum, jnp.maximum, jnp.minimum, jnp.minimum)
        bounds = [f(x, y) for f, x, y in zip(narrow, bounds, found, strict=True)]
    bounds[3] = jnp.maximum(bounds[3], bounds[0])
    offset = jnp.broadcast_to(jnp.asarray(band.offset, jnp.int32), bounds[0].shape)
    return jnp.stack([*bounds, offset], axis=-1)


def loops(
    band: Band, columns: int, bounds: tuple[jax.Array, ...], segments: bool
) -> list[tuple[jax.Array, jax.Array, bool]]:
    """Returns (begin, end, masked) of the loops that visit the tiles of one line of the table.

    Loops that are empty for every line are left out: each costs registers and code.
    """
    first, full_first, full_end, end, _ = bounds
    cut_left = segments or band.left is not None
    cut_right = segments or band.right is not None or band.columns % columns != 0
    full_first = jnp.clip(full_first, first, end) if cut_left else first
    full_end = jnp.clip(full_end, full_first, end) if cut_right else end
    found = [(full_first, full_end, False)]
    if cut_left:
        found = [(first, full_first, True), *found]
    return [*found, (full_end, end, True)] if cut_right else found


def _extremes(ids: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Returns the least and the greatest id of each tile, [B, tiles] both."""
    padded = pad_ids(ids, size).reshape(ids.shape[0], -1, size)
    return padded.min(-1), padded.max(-1)


def pad_ids(ids: jax.Array, size: int) -> jax.Array:
    """Returns [B, length] ids repeated at the end up to a multiple of `size`."""
    return jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % size)), mode='edge')


def _segment_bounds(
    rows: tuple[jax.Array, jax.Array], columns: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, ...]:
    """Returns `first`, `full_first`, `full_end`, `end` [B, N] of the tiles that share an id."""
    row_min, row_max = (x[:, :, None] for x in rows)
    column_min, column_max = (x[:, None, :] for x in columns)
    M = column_min.shape[-1]
    tile = jnp.arange(M, dtype=jnp.int32)[None, None]
    meet = (row_max >= column_min) & (row_min <= column_max)
    same = (row_min == row_max) & (column_min == row_min) & (column_max == row_min)
    first = jnp.where(meet, tile, M).min(-1)
    end = jnp.where(meet, tile + 1, 0).max(-1)
    full_first = jnp.where(same, tile, M).min(-1)
    full_end = jnp.where(~same & (tile >= full_first[..., None]), tile, M).min(-1)
    return first, full_first, full_end, end

"""What one grid step of a grouped convolution does.

Legend: j a tile of columns, b an image, X Y channels and features of a block.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.conv import epilogue
from pallas_kernels.conv.tpu.grouped_plan import Plan
from pallas_kernels.conv.tpu.grouped_tile import assemble, fold, swapped

ROWS = 2  # the axis of the grid with blocks of rows


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    """Matrix product accumulated in float32, exact products also for float32 inputs."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision, preferred_element_type=jnp.float32)


def forward(plan: Plan, x_ref: Any, w_ref: Any, *refs: Any) -> None:
    """Makes a block of outputs, u and y."""
    named = dict(zip(plan.given, refs, strict=False))
    y_ref, *u_ref, tile_ref = refs[len(plan.given) :]
    assemble(plan, w_ref, tile_ref)
    rows, cols = plan.rows, plan.cols
    block = pl.program_id(ROWS)

    def row_tile(i, carry):
        sums = [None] * plan.halves
        for m, offset in enumerate(rows.offsets):
            row, inside = _row(plan, block, block * plan.row_tiles + i, offset)
            # What is behind the image's edge is some row of it times zero.
            kernel = jnp.where(inside, m, len(rows.offsets))
            for half, seen in enumerate(gathered(plan, x_ref, row)):
                part = dot(seen, tile_ref[kernel, half], (1, 1) if plan.back else (1, 0))
                sums[half] = part if sums[half] is None else sums[half] + part
        for t, u in enumerate(_apart(plan, sums)):
            r, s = divmod(t, cols.outs)
            places = range(s, cols.outputs, cols.outs)
            if places:
                u_jbY = u.reshape(-1, plan.batch, plan.lanes_out)[: len(places)]
                _finish(plan, u_jbY, (i * rows.outs + r, places), named, y_ref, u_ref)
        return carry

    jax.lax.fori_loop(0, plan.row_tiles, row_tile, 0)


def _apart(plan: Plan, sums: list[jax.Array]) -> list[jax.Array]:
    """Returns every output of a row of tiles, [tiles * batch, lanes], of all or of both halves."""
    size = plan.lanes_out
    found = []
    for at in range(0, sums[0].shape[1], size):
        parts = [x[:, at : at + size] for x in sums]
        found += swapped(*parts) if plan.halves == 2 else parts
    return found


def _finish(plan: Plan, u_jbY, at, named, y_ref, u_ref) -> None:
    """The epilogue of outputs at `at`: a row, and every so many of its columns."""
    row = lambda name: named[name][...][None] if name in named else None  # noqa: E731
    if 'bias' in named:
        u_jbY = u_jbY + row('bias')
    if plan.keep:
        _put(u_ref[0], at, u_jbY)
    residual = None
    if 'residual' in named:
        i, places = at
        residual = _every(named['residual'], i, places.start, places.step, len(places))
    y_jbY = epilogue.finish(
        u_jbY, plan.activation, scale=row('scale'), shift=row('shift'), residual=residual
    )
    _put(y_ref, at, y_jbY)


def _put(ref: Any, at: tuple[Any, range], x_jbY: jax.Array) -> None:
    row, places = at
    x_jbY = x_jbY.astype(ref.dtype)
    if places.step == 1:
        ref[row, : len(places)] = x_jbY
        return
    for j, place in enumerate(places):
        ref[row, place] = x_jbY[j]


def _every(ref: Any, row, first: int, step: int, count: int) -> jax.Array:
    """Returns every so many columns of a row: addresses, but no strided load takes them."""
    if step == 1:
        return ref[row, first : first + count]
    return jnp.stack([ref[row, first + j * step] for j in range(count)])


def weight_gradient(plan: Plan, x_ref: Any, du_ref: Any, dw_ref: Any, sums_ref: Any) -> None:
    """Adds a block's part of the gradient of the kernels."""
    rows, block = plan.rows, pl.program_id(ROWS)
    last = (pl.program_id(1) == pl.num_programs(1) - 1) & (block == pl.num_programs(ROWS) - 1)

    @pl.when((pl.program_id(1) == 0) & (block == 0))
    def _():
        sums_ref[...] = jnp.zeros_like(sums_ref)

    def row_tile(i, carry):
        tile = block * plan.row_tiles + i
        made = [x.T for x in _cotangents(plan, du_ref, i, tile)]
        for m, offset in enumerate(rows.offsets):
            row, inside = _row(plan, block, tile, offset)
            # What is behind an edge is added up where nobody looks.
            place = jnp.where(inside & (tile < rows.tiles), m, len(rows.offsets))
            for half, seen in enumerate(gathered(plan, x_ref, row)):
                sums_ref[place, half] += dot(made[half], seen)
        return carry

    jax.lax.fori_loop(0, plan.row_tiles, row_tile, 0)
    pl.when(last)(lambda: fold(plan, sums_ref, dw_ref))


def _row(plan: Plan, block, tile, offset: int):
    """Which row of the block an offset of a tile is, and whether it is one of the image."""
    wanted = tile * plan.rows.step + offset
    last = plan.rows.inputs - 1
    row = jnp.clip(wanted, 0, last) - plan.first_row(block)
    return row, (wanted >= 0) & (wanted <= last)


def gathered(plan: Plan, x_ref: Any, row) -> list[jax.Array]:
    """Returns what a row's tiles see, [tiles * batch, columns * channels], of each half."""
    cols = plan.cols
    parts = []
    for offset in cols.offsets:
        first, last = cols.inside(offset)
        x_jbX = _every(x_ref, row, first * cols.step + offset, cols.step, last - first)
        parts.append(_filled(x_jbX, first, cols.tiles - last))
    return _together(plan, parts)


def _cotangents(plan: Plan, du_ref: Any, i, tile) -> list[jax.Array]:
    """Returns the cotangents of a row of tiles, as `gathered` does what they see."""
    rows, cols, parts = plan.rows, plan.cols, []
    for t in range(plan.outs):
        r, s = divmod(t, cols.outs)
        made = cols.made(s)
        du_jbY = _filled(
            _every(du_ref, i * rows.outs + r, s, cols.outs, made), 0, cols.tiles - made
        )
        if rows.outputs % rows.outs:  # behind the last row is anything
            there = tile * rows.outs + r < rows.outputs
            du_jbY = jnp.where(there, du_jbY, jnp.zeros_like(du_jbY))
        parts.append(du_jbY)
    return _together(plan, parts)


def _together(plan: Plan, parts: list[jax.Array]) -> list[jax.Array]:
    """Returns columns side by side, those of each half of the lanes together."""
    parts = [x.reshape(-1, x.shape[2]) for x in parts]
    if plan.halves == 1:
        return [jnp.concatenate(parts, axis=1)]
    parts += [jnp.zeros_like(parts[0])] * (len(parts) % 2)
    pairs = [swapped(*parts[n : n + 2]) for n in range(0, len(parts), 2)]
    return [jnp.concatenate(half, axis=1) for half in zip(*pairs, strict=True)]


def _filled(x_jbX: jax.Array, before: int, after: int) -> jax.Array:
    """Returns tiles with zeros before and after them."""
    zeros = lambda n: [jnp.zeros((n, *x_jbX.shape[1:]), x_jbX.dtype)] if n else []  # noqa: E731
    parts = [*zeros(before), x_jbX, *zeros(after)]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)

"""The kernel of dense convolutions: a matrix product for each tap, no input is ever gathered.

A block of the grid holds whole rows of `batch` images. Its outputs are done some `places` (output
columns, of one or more rows) at a time: for each tap the inputs that those see, [M, C], are whole
tiles at known addresses, and are multiplied by the tap's [C, O]. A tap that sees padding at some
places leaves these out, so padding costs nothing and is nowhere stored.
Rows whose taps see no padding are done in a loop, all others are written out.

Legend: K L kernel rows and columns, C input channels, O output channels, H W Q input and output
rows and columns of a block, B images of a block, M places * images.
"""

import dataclasses
import functools
import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.conv import epilogue
from pallas_kernels.conv.tpu import layout
from pallas_kernels.conv.tpu.dense_axis import Tap
from pallas_kernels.conv.tpu.dense_plan import FEATURES, Plan

PACKED_ROWS = 8  # of inputs that are put side by side in a turn of a loop


@dataclasses.dataclass(frozen=True)
class Place:
    """An output: its row of units from the first of a turn on, its row and column in the block."""

    unit: int
    row: int
    col: int


@dataclasses.dataclass(frozen=True)
class Rows:
    """Units of rows that are done in one basic block.

    Attributes:
      count: how many.
      x, y: where the first one's input row, shift 0, and output row are in the blocks; these may be
        known at run time only.
      unit: the first one, None if the taps of none see any padding.
    """

    count: int
    x: Any
    y: Any
    unit: int | None = None


def kernel(plan: Plan, names: tuple[str, ...], *refs: Any) -> None:
    """One grid step: (block of features, of the batch, of rows)."""
    named = types.SimpleNamespace(**dict(zip(names, refs, strict=True)))

    _pack(plan, named)

    def run(rows: Rows) -> None:
        for low in range(0, plan.features, FEATURES):
            for places, pairs in tiles(plan, rows):
                for part in evenly(places, plan.places):
                    _tile(plan, named, rows, part, pairs, slice(low, low + FEATURES))

    over_rows(plan, pl.program_id(2) if plan.n_rows > 1 else 0, run)


def evenly(places: list[Place], most: int) -> Iterator[list[Place]]:
    """Cuts into parts of much the same size: a small one would wait for its kernels to load."""
    count = -(-len(places) // most)
    for n in range(count):
        yield places[n * len(places) // count : (n + 1) * len(places) // count]


def over_rows(plan: Plan, block: Any, run: Callable[[Rows], None]) -> None:
    """Runs `run` for all units of a block of rows."""
    axis = plan.rows

    def rows(unit, count, block, static=None):
        x = unit * axis.step_in - plan.first_row(block)
        y = (unit - block * plan.units) * axis.step_out * plan.spread
        return Rows(count, x, y, static)

    def static(unit, count):
        at = unit // plan.units
        only = functools.partial(run, rows(unit, count, at, unit))
        pl.when(block == at)(only) if plan.n_rows > 1 else only()

    if not plan.group:
        for unit in range(0, axis.units, plan.units):
            static(unit, min(plan.units, axis.units - unit))
        return
    first, last = axis.inner
    low = jnp.maximum(first, block * plan.units)
    high = jnp.minimum(last, (block + 1) * plan.units)
    turns = jnp.maximum(high - low, 0) // plan.group
    rest = low + turns * plan.group

    @pl.loop(0, turns)
    def _(turn):
        run(rows(low + turn * plan.group, plan.group, block))

    if plan.rest:

        @pl.loop(rest, high, step=plan.rest)
        def _(unit):
            run(rows(unit, plan.rest, block))

    for unit in [*range(first), *range(last, axis.units)]:
        static(unit, 1)


def tiles(plan: Plan, rows: Rows) -> Iterator[tuple[list[Place], list[tuple[Tap, Tap]]]]:
    """Places that share their taps, and these taps."""
    for a, row_taps in enumerate(plan.rows.taps):
        for b, col_taps in enumerate(plan.cols.taps):
            places = [
                Place(unit, unit * plan.rows.step_out + a, col)
                for unit in range(rows.count)
                for col in range(b, plan.cols.size_out, plan.cols.step_out)
                if rows.unit is None
                or (rows.unit + unit) * plan.rows.step_out + a < plan.rows.size_out
            ]
            if places:
                yield places, [(down, right) for right in col_taps for down in row_taps]


def _tile(plan, refs, rows: Rows, places: list[Place], pairs, features: slice) -> None:
    """Makes the outputs of some places."""
    sees = functools.partial(source, plan, rows)
    groups = [list(group) for group in itertools.batched(pairs, plan.together)]
    groups = [g for g in groups if any(sees(at, pair) for at in places for pair in g)]
    # Those that all places see go first: the others' products are then added to theirs.
    groups.sort(key=lambda g: -sum(any(sees(at, pair) for pair in g) for at in places))
    # Runs of places that the same products count for.
    runs = [
        [at for at, _ in run]
        for _, run in itertools.groupby(
            ((at, [any(sees(at, pair) for pair in g) for g in groups]) for at in places),
            lambda item: item[1],
        )
    ]
    width = min(features.stop, plan.features) - features.start
    sums: list[Any] = [None] * len(runs)
    for group in groups:
        used = [n for n, run in enumerate(runs) if any(sees(run[0], pair) for pair in group)]
        seen = [at for n in used for at in runs[n]]
        x_MC = beside(read(plan, refs.x, rows.x, [sees(at, pair) for at in seen]) for pair in group)
        w_CO = [refs.w[down[0], right[0], :, features] for down, right in group]
        product_MO = dot(x_MC, jnp.concatenate(w_CO) if len(w_CO) > 1 else w_CO[0])
        start = 0
        for n in used:
            part = product_MO[start : start + len(runs[n]) * plan.batch]
            sums[n] = part if sums[n] is None else sums[n] + part
            start += len(runs[n]) * plan.batch
    for n, run in enumerate(runs):
        if sums[n] is None:
            sums[n] = jnp.zeros((len(run) * plan.batch, width), jnp.float32)
    _finish(plan, refs, rows, places, jnp.concatenate(sums), features)


def source(plan: Plan, rows: Rows, at: Place, pair: tuple[Tap, Tap]) -> tuple[Any, int] | None:
    """Row and column in the block of the input that a tap sees, None for padding."""
    (_, down), (_, right) = pair
    col = plan.cols.source(at.col // plan.cols.step_out, right)
    known = rows.unit is None or plan.rows.source(rows.unit + at.unit, down) is not None
    if col is None or not known:
        return None
    return at.unit * plan.rows.step_in + down, col


def read(plan: Plan, ref: Any, row: Any, places: list, lanes: slice = slice(None)) -> jax.Array:
    """A block's values at some places, rows counted from `row` on, zeros for None: [M, lanes]."""
    parts = []
    for start, stop in _stretches(places):
        width = len(range(ref.shape[-1])[lanes])
        if places[start] is None:
            parts.append(jnp.zeros(((stop - start) * plan.batch, width), ref.dtype))
        else:
            down, right = places[start]
            part = ref[row + down, pl.ds(right, stop - start), :, lanes]
            parts.append(part.reshape(-1, width))
    return jnp.concatenate(parts) if len(parts) > 1 else parts[0]


def _stretches(places: list[tuple[int, int] | None]) -> Iterator[tuple[int, int]]:
    """First and one past the last of places that lie side by side, or that are all None."""
    start = 0
    for n in range(1, len(places) + 1):
        if n < len(places):
            before, at = places[n - 1], places[n]
            if at == before or (at and before and at == (before[0], before[1] + 1)):
                continue
        yield start, n
        start = n


def _pack(plan: Plan, refs: types.SimpleNamespace) -> None:
    """Puts inputs, and the kernel with them, side by side if the plan wants that."""
    if plan.packed:
        inputs_side_by_side(plan, refs.x, refs.x_packed)
        refs.x = refs.x_packed
    if plan.packing is None:
        return
    table, C = plan.packing.table, refs.w.shape[2]
    zeros = jnp.zeros(refs.w.shape[2:], refs.w.dtype)
    for down, right, i in np.ndindex(table.shape[:3]):
        taps = [divmod(int(tap), refs.w.shape[1]) for tap in table[down, right, i]]
        parts = [refs.w[tap] if tap[0] < refs.w.shape[0] else zeros for tap in taps]
        refs.w_packed[down, right, i * C : (i + 1) * C] = jnp.concatenate(parts, axis=1)
    refs.w = refs.w_packed


def inputs_side_by_side(plan: Plan, from_ref: Any, to_ref: Any) -> None:
    """Puts neighbouring columns of a block into the lanes."""
    zeros = jnp.zeros((plan.batch, from_ref.shape[3]), from_ref.dtype)
    # Moving lanes takes long, but many of such moves may be under way.
    together = layout.largest_divisor(plan.in_rows, PACKED_ROWS)

    @pl.loop(0, plan.in_rows, step=together)
    def _(first):
        for row, block in np.ndindex(together, plan.cols.size_in):
            cols = plan.packing.columns(block)
            parts = [zeros if col is None else from_ref[first + row, col] for col in cols]
            to_ref[first + row, block] = jnp.concatenate(parts, axis=1)


def _finish(plan: Plan, refs, rows: Rows, places: list[Place], sum_MO, features: slice) -> None:
    """Stores the outputs of some places."""
    if plan.packing is None:
        _store(plan, refs, rows, [(at.row, at.col) for at in places], sum_MO, features)
        return
    packing = plan.packing
    O = plan.features // len(packing.parts)  # noqa: E741
    for n, (a, b) in enumerate(packing.parts):
        ats = [(at.row * packing.r + a, at.col * packing.g + b) for at in places]
        ats = [at if at[1] < packing.cols.size_out else None for at in ats]
        if n * O in range(features.start, features.stop) and any(ats):
            start = n * O - features.start
            _store(plan, refs, rows, ats, sum_MO[:, start : start + O], slice(0, O))


def _store(plan: Plan, refs, rows: Rows, ats: list, sum_MO: jax.Array, features: slice) -> None:
    """Stores the outputs [M, O] of some rows and columns, and what the epilogue makes of them."""
    vector = {name: refs.vectors[n : n + 1, features] for n, name in enumerate(plan.vectors)}
    if 'bias' in vector:
        sum_MO += vector.pop('bias')
    results = [(refs.u, sum_MO)] if plan.keep else []
    residual = None
    if plan.residual:
        residual = read(plan, refs.residual, rows.y, ats, features).astype(jnp.float32)
    y_MO = epilogue.finish(sum_MO, plan.activation, residual=residual, **vector)
    for ref, value_MO in [*results, (refs.y, y_MO)]:
        for a, b in _stretches(ats):
            if ats[a] is None:
                continue
            row, col = ats[a]
            part = value_MO[a * plan.batch : b * plan.batch].astype(ref.dtype)
            part = part.reshape(b - a, plan.batch, -1)
            ref[rows.y + row, pl.ds(col, b - a), :, features] = part


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Matrix product accumulated in float32, exact products also for float32 inputs."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def beside(parts) -> jax.Array:
    parts = list(parts)
    return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


def window(plan: Plan, where: Callable[..., tuple[Any, Any]]) -> pl.BlockSpec:
    """The block of inputs, rows of which neighbours share, of a step's block of rows and batch."""
    shape = plan.x_block

    def at(*step):
        rows, batch = where(*step)
        if plan.n_rows == 1:
            return 0, 0, batch, 0
        return plan.first_row(rows), 0, batch * plan.batch, 0

    return pl.BlockSpec(shape if plan.n_rows == 1 else tuple(map(pl.Element, shape)), at)


def scratch(plan: Plan, dtype: Any) -> dict[str, Any]:
    """The kernel's own memory, by the names of its references."""
    return {
        f'{name}_packed': pltpu.VMEM(shape, jnp.float32 if name == 'dw' else dtype)
        for name, shape in plan.scratch.items()
    }

"""The inputs of a step as float32 rows in VMEM, where any row may be read first.

A register column, 128 lanes wide, of a block and of the rows around it lies in one scratch, its
rows one after the other: a load that starts at any of them is only an address, where in a block,
whose rows lie in tiles beside other lanes, it would be rotations and selections.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.conv.tpu.causal_plan import Plan
from pallas_kernels.conv.tpu.layout import LANES

PIECE = 64  # rows that are copied at a time


def lanes(g: Any) -> Any:
    """Returns the lanes of a block's register column g."""
    return pl.ds(pl.multiple_of(g * LANES, LANES), LANES)


def scratch(plan: Plan) -> dict[str, Any]:
    """Returns what of VMEM this takes."""
    n = plan.before + plan.rows + max(plan.after, plan.view)
    found = {'rows': pltpu.VMEM((plan.columns, n, LANES), jnp.float32)}
    if plan.carried:
        found['carry'] = pltpu.VMEM((plan.groups, plan.carried, LANES), jnp.float32)
    return found


def begin(plan: Plan, refs: Any) -> None:
    """Sets to zero what lies around a block for all of its columns."""
    end = plan.before + plan.rows
    for rows in map(refs.rows.at.__getitem__, range(plan.columns)):
        if not plan.carried or plan.down:
            fill_zeros(rows, 0, plan.before)
        if not plan.view and not (plan.carried and plan.down):
            fill_zeros(rows, end, plan.after)


def sweep(plan: Plan, refs: Any, b: Any, first: Any, make: Any) -> None:
    """Calls `make` for every chunk of some register columns, when the rows it reads are there.

    Args:
      plan: how the work is cut.
      refs: the kernel's: x, the scratch, `view` if there is one; and `step`, along the positions.
      b: of the block's batch.
      first: of the block's register columns, of which `plan.columns` are done side by side.
      make: of the column, counted from the first; the row at which a chunk starts in the block;
        and whether some rows of the block do not exist.
    """
    start = plan.block(refs.step) * plan.rows
    columns = range(plan.columns)

    def fill(column: int, at: Any, masked: bool) -> None:
        x = refs.x[b, pl.ds(at, plan.chunk), lanes(first + column)].astype(jnp.float32)
        if masked:
            x = jnp.where(start + at + iota(plan.chunk) < plan.taps.inputs, x, 0.0)
        refs.rows[column, pl.ds(plan.before + at, plan.chunk)] = x

    def run(masked: bool) -> None:
        def one(at: Any, filled: bool, made: bool) -> None:
            for column in columns:
                if filled:
                    fill(column, at, masked)
                if made:
                    make(column, at, masked)

        if plan.both:
            chunks(plan, lambda at: one(at, True, False))
            chunks(plan, lambda at: one(at, False, True))
        else:
            chunks(plan, lambda at: one(at, True, True))

    for column in columns:
        _edges(plan, refs, b, first + column, refs.rows.at[column], start)
    if plan.cut:
        whole = start + plan.rows <= min(plan.taps.inputs, plan.taps.outputs)
        pl.when(whole)(lambda: run(False))
        pl.when(jnp.logical_not(whole))(lambda: run(True))
    else:
        run(False)
    if plan.carried:
        row = plan.before if plan.down else plan.rows
        for column in columns:
            carry = refs.carry.at[first + column]
            copy(carry, 0, refs.rows.at[column], row, plan.carried)


def _edges(plan: Plan, refs: Any, b: Any, g: Any, rows: Any, start: Any) -> None:
    """Puts the rows around a block in place, of one column, where `begin` does not."""
    end = plan.before + plan.rows

    def view() -> None:
        n = min(plan.view, PIECE)

        def one(k, _):
            at = pl.multiple_of(k * n, n)
            x = refs.view[b, pl.ds(at, n), lanes(g)].astype(jnp.float32)
            there = start + plan.rows + at + iota(n) < plan.taps.inputs
            rows[pl.ds(end + at, n)] = jnp.where(there, x, 0.0)

        jax.lax.fori_loop(0, plan.view // n, one, None)

    if plan.view and not (plan.carried and plan.down):
        view()
    if not plan.carried:
        return
    at = end if plan.down else 0

    @pl.when(refs.step == 0)
    def _():
        if plan.view and plan.down:
            view()
        else:
            fill_zeros(rows, at, plan.carried)

    pl.when(refs.step > 0)(lambda: copy(rows, at, refs.carry.at[g], 0, plan.carried))


def chunks(plan: Plan, make: Any) -> None:
    """Calls `make` with the first row of every chunk of a block."""
    n = plan.rows // plan.chunk

    def one(k, _):
        k = n - 1 - k if plan.down else k
        make(pl.multiple_of(k * plan.chunk, plan.chunk))

    jax.lax.fori_loop(0, n, one, None, unroll=plan.unroll)


def copy(to: Any, to_row: int, source: Any, row: int, n: int) -> None:
    """Copies n rows from one reference to another."""

    def piece(at, size):
        to[pl.ds(to_row + at, size)] = source[pl.ds(row + at, size)]

    _pieces(piece, n)


def fill_zeros(to: Any, row: int, n: int) -> None:
    """Sets n rows to zero."""

    def piece(at, size):
        to[pl.ds(row + at, size)] = jnp.zeros((size, to.shape[1]), to.dtype)

    _pieces(piece, n)


def _pieces(piece: Any, n: int) -> None:
    whole = n // PIECE
    if whole:
        step = lambda k, _: piece(pl.multiple_of(k * PIECE, 8), PIECE)  # noqa: E731
        jax.lax.fori_loop(0, whole, step, None)
    if n % PIECE:
        piece(whole * PIECE, n % PIECE)


def iota(n: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, (n, LANES), 0)

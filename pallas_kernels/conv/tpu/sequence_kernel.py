"""The kernels of a convolution over sequences: one block of outputs, one block of sums of weights.

Legend: N positions of a chunk, K taps, C input channels, O output channels of a block.
"""

import types
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.conv.epilogue import finish
from pallas_kernels.conv.tpu.sequence_plan import Plan
from pallas_kernels.conv.tpu.sequence_window import at_once, dot, for_chunks, joined, own_segment


def forward(plan: Plan, names: list[str], *all_refs: Any) -> None:
    """One grid step: (batch row, block of positions, block of output channels)."""
    absent = dict.fromkeys(('bias', 'scale', 'shift', 'residual'))
    refs = types.SimpleNamespace(**absent | dict(zip(names, all_refs, strict=True)))
    block = pl.program_id(1)
    pl.when(pl.program_id(2) == 0)(lambda: fill(plan, refs, block))

    def chunk(start: Any, size: int) -> None:
        rows = pl.ds(start, size)
        u_NO = _convolved(plan, refs, start, size)
        if refs.bias is not None:
            u_NO += refs.bias[...]
        if plan.keep:
            refs.u[0, rows] = u_NO.astype(plan.dtype)
        y_NO = finish(
            u_NO,
            plan.activation,
            scale=refs.scale if refs.scale is None else refs.scale[...],
            shift=refs.shift if refs.shift is None else refs.shift[...],
            residual=refs.residual if refs.residual is None else refs.residual[0, rows],
        )
        refs.y[0, rows] = y_NO.astype(plan.dtype)

    for_chunks(plan.window.rows, chunk, weights=plan.weights)


def weight_gradient(plan: Plan, names: list[str], *all_refs: Any) -> None:
    """One grid step: (part of the batch, output channels, row of the part, block of positions)."""
    refs = types.SimpleNamespace(**dict(zip(names, all_refs, strict=True)))
    row, block = pl.program_id(2), pl.program_id(3)

    @pl.when((row == 0) & (block == 0))
    def _():
        refs.dw[...] = jnp.zeros(refs.dw.shape, refs.dw.dtype)

    fill(plan, refs, block)

    def some(start: Any, size: int) -> None:
        du_NO = refs.du[0, pl.ds(start, size)]
        if plan.P % plan.window.rows:
            du_NO = existing(du_NO, block * plan.window.rows + start, plan.P)
        C = plan.window.channels
        for low in range(0, len(plan.shifts), plan.group):
            taps = _taps(
                plan, refs, range(low, min(low + plan.group, len(plan.shifts))), start, size
            )
            dw = dot(joined(taps), du_NO, (0, 0))
            for n in range(len(taps)):
                refs.dw[0, low + n] += dw[n * C : (n + 1) * C]

    # At once where that is not too long: a sum in memory that is read and written for every chunk
    # holds up the chunks after it.
    if at_once(plan.window.rows, plan.weights):
        some(0, plan.window.rows)
    else:
        for_chunks(plan.window.rows, some, weights=plan.weights)


def fill(plan: Plan, refs: types.SimpleNamespace, block: Any) -> None:
    """Fills the window with the rows of x, and zeros where there are none."""
    window, first = plan.window, block * plan.window.rows
    single = plan.blocks == 1
    for name, size, start in (
        ('before', window.before, -window.before),
        ('after', window.after, window.rows),
    ):
        if size and single:
            columns, _, lanes = refs.window.shape
            zeros = jnp.zeros((columns, size, lanes), jnp.float32)
            refs.window[:, pl.ds(window.before + start, size)] = zeros
        elif size:
            x_NC = existing(getattr(refs, name)[0], first + start, plan.T)
            window.store(refs.window, start, x_NC)

    def rows(all_exist: bool) -> None:
        def chunk(start: Any, size: int) -> None:
            x_NC = refs.x[0, pl.ds(start, size)]
            if not all_exist:
                x_NC = existing(x_NC, first + start, plan.T)
            window.store(refs.window, start, x_NC)

        for_chunks(window.rows, chunk)

    full = plan.T // window.rows
    if full >= plan.outputs:
        rows(True)
        return
    if full:
        pl.when(block < full)(lambda: rows(True))
    pl.when(block >= full)(lambda: rows(False))


def existing(x_NC: jax.Array, first: Any, size: int) -> jax.Array:
    """Returns zeros for the positions, counted from `first`, that are not among `size`."""
    position = first + jax.lax.broadcasted_iota(jnp.int32, x_NC.shape, 0)
    exists = (position >= 0) & (position < size)
    return jnp.where(exists, x_NC.astype(jnp.float32), 0).astype(x_NC.dtype)


def _convolved(plan: Plan, refs: types.SimpleNamespace, start: Any, size: int) -> jax.Array:
    """Returns the sum over taps and channels, [N, O] in float32."""
    K, C = len(plan.shifts), plan.window.channels
    total = None
    for low in range(0, K, plan.group):
        some = range(low, min(low + plan.group, K))
        taps = joined(_taps(plan, refs, some, start, size))
        w = refs.w[some.start : some.stop].reshape(len(some) * C, -1)
        part = dot(taps, w)
        total = part if total is None else total + part
    return total


def _taps(plan, refs, some: range, start: Any, size: int) -> list[jax.Array]:
    """Returns what some taps read, [N, C] each."""
    taps = []
    for k in some:
        x_NC = plan.window.load(refs.window, start + plan.shifts[k], size)
        if plan.masked and plan.shifts[k]:
            x_NC = own_segment(x_NC, refs.same[0, k : k + 1, pl.ds(start, size)])
        taps.append(x_NC.astype(plan.dtype))
    return taps

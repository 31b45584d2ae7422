"""The kernel of a depthwise kernel's gradient: that of its bands, summed over batch and space.

As in the forward pass a step turns one block of inputs and cotangents into tiles and multiplies
those of the block before.

Legend: T and U tiles of inputs that a tile of outputs sees, M rows of a product (tiles x batch), i
pixels of a tile, z lanes of a tile.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.conv.tpu import depthwise_tiles as tiles
from pallas_kernels.conv.tpu.depthwise_bands import gather
from pallas_kernels.conv.tpu.depthwise_kernel import alone, beside, dot, rows_of
from pallas_kernels.conv.tpu.depthwise_plan import Plan


def weight_kernel(plan: Plan, x_ref, du_ref, dw_ref, *scratch: Any) -> None:
    """One step: the share of the sums of the block before; the last of its channels writes them."""
    *tiled, sums, taps = scratch
    core, step = pl.program_id(0), pl.program_id(1)
    channels = plan.block(core, step - 1)[0]
    first = (step == 1) | ((step > 1) & (channels != plan.block(core, step - 2)[0]))
    last = (step == plan.per_core) | ((step > 0) & (channels != plan.block(core, step)[0]))
    # What a core does once more, since blocks do not come out even, counts nothing.
    counts = core * plan.per_core + step - 1 < plan.items

    @pl.when(first)
    def _():
        sums[...] = jnp.zeros_like(sums)

    place = plan.block(core, step)[2:]
    for parity in range(2):
        fill = [
            tiles.inputs_turn(plan, tiled[parity], x_ref, place),
            tiles.outputs_turn(plan, tiled[2 + parity], du_ref, place),
        ]
        other = tiled[1 - parity], tiled[3 - parity]

        @pl.when((step % 2 == parity) & counts)
        def _(fill=fill, other=other):
            pl.when(step == 0)(lambda: alone(fill))
            products = lambda j: _products(plan, *other, sums, j)  # noqa: E731
            pl.when(step > 0)(lambda: beside(plan, fill, products))

    pl.when(last)(lambda: _finish(plan, dw_ref, sums, taps))


def _products(plan: Plan, x_ref, du_ref, sums: Any, j: Any) -> None:
    """Adds a block's gradients of tile j's bands, [z out, z in]."""
    _, T, U = plan.bands
    down, per_product = plan.rows.down, max(1, plan.side // plan.batch)
    chunks = [
        (a, i, min(per_product, plan.row_tiles - i))
        for a in range(plan.col_tiles)
        for i in range(0, plan.row_tiles, per_product)
    ]
    turned = [
        rows_of(plan, du_ref.at[j, 0, pl.ds(a, 1), pl.ds(i, size)]).T for a, i, size in chunks
    ]
    for t in range(T):
        for u in range(U):
            sum_zz = jnp.zeros((plan.side, plan.side), jnp.float32)
            for (a, i, size), du_zM in zip(chunks, turned, strict=True):
                rows = pl.ds(i + t // down, size)
                sum_zz += dot(du_zM, rows_of(plan, x_ref.at[j, u, pl.ds(a, 1), t % down, rows]))
            sums[j, t, u] += sum_zz


def _finish(plan: Plan, dw_ref: Any, sums: Any, taps: Any) -> None:
    """Sums, by weight, what the sums have of one channel with itself."""
    shape = plan.side, plan.side
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(2))
    own = row % plan.g == lane % plan.g
    shape = plan.pixels, plan.side
    pixel, lane = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(2))
    join_iz = (lane // plan.g == pixel).astype(jnp.float32)
    dw_ref[...] = jnp.zeros_like(dw_ref)

    @pl.loop(0, plan.n)
    def _(j):
        bands = {
            (t, u): dot(join_iz, jnp.where(own, sums[j, t, u], 0.0))
            for t in range(plan.T)
            for u in range(plan.U)
        }
        gather(plan, dw_ref.at[0, 0], taps, bands, j)

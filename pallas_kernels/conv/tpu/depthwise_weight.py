"""The kernel of a depthwise kernel's gradient: that of its bands, summed over batch and space.

As in the forward pass a step turns one block of inputs and cotangents into tiles and multiplies
those of the block before.

Legend: T and U tiles of inputs that a tile of outputs sees, M rows of a product (tiles x batch), i
pixels of a tile, z lanes of a tile.
"""

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.conv.tpu import depthwise_tiles as tiles
from pallas_kernels.conv.tpu.depthwise_bands import gather
from pallas_kernels.conv.tpu.depthwise_kernel import alone, beside, carry, dot, rows_of
from pallas_kernels.conv.tpu.depthwise_plan import Plan


def weight_kernel(plan: Plan, names: list[str], *refs: Any) -> None:
    """One step: the share of the sums of the block before; the last of its channels writes them."""
    named = dict(zip(names, refs, strict=False))
    *tiled, sums, taps = refs[len(names) :]
    core, step = pl.program_id(0), pl.program_id(1)
    channels = plan.block(core, step - 1)[0]
    first = (step == 1) | ((step > 1) & (channels != plan.block(core, step - 2)[0]))
    last = (step == plan.per_core) | ((step > 0) & (channels != plan.block(core, step)[0]))
    # What a core does once more, since blocks do not come out even, counts nothing.
    counts = core * plan.per_core + step - 1 < plan.items

    @pl.when(step == 0)
    def _():
        for x_tiles_ref in tiled[:2]:
            tiles.clear(plan, x_tiles_ref)

    place = plan.block(core, step)[2:]
    for parity in range(2):
        fill = [
            tiles.inputs_turn(plan, tiled[parity], named['x'], place),
            tiles.outputs_turn(plan, tiled[2 + parity], named['du'], place),
        ]
        other = tiled[1 - parity], tiled[3 - parity]

        @pl.when((step % 2 == parity) & counts)
        def _(parity=parity, fill=fill, other=other):
            if plan.carried:
                carry(plan, tiled[parity], other[0], named['head'], place)
            pl.when(step == 0)(lambda: alone(fill))
            products = lambda j: _products(plan, *other, sums, first, j)  # noqa: E731
            pl.when(step > 0)(lambda: beside(plan, fill, products))

    pl.when(last)(lambda: _finish(plan, named['dw'], sums, taps))


def _products(plan: Plan, x_ref, du_ref, sums: Any, first: Any, j: Any) -> None:
    """Adds a block's gradients of tile j's bands, [z out, z in]."""
    _, T, U = plan.bands
    down, per_product = plan.rows.down, max(1, plan.side // plan.batch)
    together = max(1, per_product // plan.row_tiles)
    chunks = [
        (pl.ds(a, min(together, plan.col_tiles - a)), i, min(per_product, plan.row_tiles - i))
        for a in range(0, plan.col_tiles, together)
        for i in range(0, plan.row_tiles, per_product)
    ]
    turned = [rows_of(plan, du_ref.at[j, 0, a, pl.ds(i, size)]).T for a, i, size in chunks]
    for t in range(T):
        for u in range(U):
            sum_zz = jnp.zeros((plan.side, plan.side), jnp.float32)
            for (a, i, size), du_zM in zip(chunks, turned, strict=True):
                rows = pl.ds(i + t // down, size)
                sum_zz += dot(du_zM, rows_of(plan, x_ref.at[j, u, a, t % down, rows]))
            sums[j, t, u] = jnp.where(first, sum_zz, sums[j, t, u] + sum_zz)


def _finish(plan: Plan, dw_ref: Any, sums: Any, taps: Any) -> None:
    """Sums, by weight, what the sums have of one channel with itself."""
    total, one = taps.at[0], taps.at[1]
    taps[...] = jnp.zeros_like(taps)

    @pl.loop(0, plan.n)
    def _(j):
        gather(plan, total, one, sums, j)

    K, L, _ = dw_ref.shape[1:]
    for k in range(K):
        dw_ref[0, k] = total[pl.ds(k * L, L)].astype(dw_ref.dtype)

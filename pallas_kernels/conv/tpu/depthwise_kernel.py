"""The depthwise kernel: a block of an image becomes tiles, is multiplied by bands, and turns back.

A step does three blocks at once, none of which waits for another: it turns a block's inputs into
tiles, multiplies the tiles of the one before, and turns the products of the one before that back.
The second step so writes what the third writes again.

Legend: F phases of output rows, T and U tiles of inputs that a tile of outputs sees, n tiles of a
block of channels, M rows of a product, z lanes of a tile.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.conv.epilogue import finish
from pallas_kernels.conv.tpu import depthwise_tiles as tiles
from pallas_kernels.conv.tpu.depthwise_bands import expand, spread, words
from pallas_kernels.conv.tpu.depthwise_plan import Plan
from pallas_kernels.conv.tpu.layout import LANES

PARTS = 4  # of a turn that are laid out together where nothing else is done beside them
MOST_ROWS = 1024  # of one product, whose sums are float32


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """What follows the sum: which vectors there are, in order, and the rest that is static."""

    vectors: tuple[str, ...] = ()
    activation: str | None = None


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Matrix product accumulated in float32, exact products also for float32 inputs."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def forward_kernel(plan: Plan, epilogue: Epilogue, names: list[str], *refs: Any) -> None:
    """One step: y and, where it is wanted, u of the block two steps ago."""
    named = dict(zip(names, refs, strict=True))
    core, step = pl.program_id(0), pl.program_id(1)
    channels = plan.block(core, step - 1)[0]
    before = plan.block(core, step - 2)[0]

    @pl.when((step == 1) | ((step > 1) & (channels != before)))
    def _():
        words(named['words'], named['w'])
        spread(plan, named['spread'], named['words'])
        expand(plan, named['expanded'], named['spread'])

    @pl.when(step == 0)
    def _():
        for parity in range(2):
            tiles.clear(plan, named[f'tiles_x_{parity}'])

    for parity in range(2):
        here, other = (
            {name.removesuffix(suffix): ref for name, ref in named.items() if name.endswith(suffix)}
            for suffix in (f'_{parity}', f'_{1 - parity}')
        )
        place = plan.block(core, step)[2:]
        fill, drain = _turns(plan, named, here, place)

        @pl.when(step % 2 == parity)
        def _(here=here, other=other, place=place, fill=fill, drain=drain):
            if plan.carried:
                carry(plan, here['tiles_x'], other['tiles_x'], named['head'], place)
            both = (step > 0) & (step <= plan.per_core)
            pl.when(step == 0)(lambda: alone(fill))
            pl.when(step > plan.per_core)(lambda: alone(drain))
            pl.when(both)(
                lambda: beside(
                    plan, [*fill, *drain], lambda j: _products(plan, epilogue, named, other, j)
                )
            )


def _turns(plan: Plan, named, here, place) -> tuple[list[tiles.Turn], list[tiles.Turn]]:
    """What becomes tiles, and what turns back."""
    fill = [tiles.inputs_turn(plan, here['tiles_x'], named['x'], place)]
    if 'residual' in named:
        ref = here['tiles_residual']
        fill.append(tiles.outputs_turn(plan, ref, named['residual'], place))
    names = [name for name in ('y', 'u') if name in named]
    return fill, [tiles.results_turn(plan, named[name], here[f'tiles_{name}']) for name in names]


def carry(plan: Plan, tiles_ref: Any, above_ref: Any, head_ref: Any, place) -> None:
    """Fills a block's first tiles of inputs with the last ones of the block above, or the head."""

    @pl.when(place[0] == 0)
    def _():
        alone([tiles.inputs_turn(plan, tiles_ref, head_ref, place, head=True)])

    @pl.when(place[0] > 0)
    def _():
        for k in range(plan.carried):
            tiles_ref[:, :, :, 0, k] = above_ref[:, :, :, 0, plan.row_tiles + k]


def alone(turns: Sequence[tiles.Turn]) -> None:
    """Does turns beside nothing."""
    for turn in turns:

        @pl.loop(0, -(-turn.count // PARTS))
        def _(outer, turn=turn):
            for inner in range(PARTS):
                turn.part(outer * PARTS + inner)


def beside(plan: Plan, turns: Sequence[tiles.Turn], products: Callable[[Any], None]) -> None:
    """Does the products of all tiles, each beside its share of the turns."""

    @pl.loop(0, plan.n // plan.at_once)
    def _(outer):
        for inner in range(plan.at_once):
            j = outer * plan.at_once + inner
            for turn in turns:
                share = -(-turn.count // plan.n)
                for k in range(share):
                    turn.part(j * share + k)
            products(j)


def _products(plan: Plan, epilogue: Epilogue, named, other, j: Any) -> None:
    """All products of tile j, and what follows them."""
    F, T, U = plan.bands
    group = max(1, MOST_ROWS // (plan.row_tiles * plan.batch))
    vectors = {name: named['vectors'][0, j, pl.ds(k, 1)] for k, name in enumerate(epilogue.vectors)}
    for f in range(F):
        for a in range(0, plan.col_tiles, group):
            columns = pl.ds(a, min(group, plan.col_tiles - a))
            u_Mz = sum(
                dot(inputs(plan, other['tiles_x'], j, t, u, columns), named['expanded'][j, f, t, u])
                for t in range(T)
                for u in range(U)
            )
            if 'bias' in vectors:
                u_Mz += vectors['bias']
            residual = None
            if 'residual' in named:
                residual = rows_of(plan, other['tiles_residual'].at[j, f, columns])
            y_Mz = finish(
                u_Mz,
                epilogue.activation,
                scale=vectors.get('scale'),
                shift=vectors.get('shift'),
                residual=residual,
            )
            shape = columns.size, plan.row_tiles, plan.batch, LANES
            for name, value in (('y', y_Mz), ('u', u_Mz)):
                if name in named:
                    ref = other[f'tiles_{name}']
                    for v, part in enumerate(jnp.split(value.astype(ref.dtype), plan.registers, 1)):
                        ref[j, f, columns, :, v] = part.reshape(shape)


def inputs(plan: Plan, tiles_ref: Any, j: Any, t: int, u: int, columns: pl.Slice) -> jax.Array:
    """Returns the inputs that tap tile (t, u) brings to all tiles of outputs, [M, z]."""
    down = plan.rows.down
    rows = pl.ds(t // down, plan.row_tiles)
    return rows_of(plan, tiles_ref.at[j, u, columns, t % down, rows])


def rows_of(plan: Plan, ref: Any) -> jax.Array:
    """Returns tiles [columns, rows, registers, batch, 128] as rows of a product, [M, z]."""
    parts = [ref[:, :, v].reshape(-1, LANES) for v in range(plan.registers)]
    return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]

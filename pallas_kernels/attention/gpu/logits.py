"""Logits of one tile in registers: soft cap, what is seen, and the slope for the backward pass.

A tile has rows and columns; rows are queries in the forward pass and in the gradient of the
queries, and keys in the gradient of keys and values (`tiles.py`).
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.arguments import Spec
from pallas_kernels.attention.gpu.tiles import Band
from pallas_kernels.hopper import COLUMN, ROW

LOG2_E = math.log2(math.e)


def down(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Returns a vector with one entry a row as a tile."""
    return lax.broadcast_in_dim(x, shape, (0,))


def across(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Returns a vector with one entry a column as a tile."""
    return lax.broadcast_in_dim(x, shape, (1,))


def softcapped(s: jax.Array, spec: Spec) -> tuple[jax.Array, float]:
    """Returns x and c such that x * c is the logit, in base 2, of the product s.

    The hyperbolic tangent is spelled out, because the hardware's own is good to 11 bits only.
    """
    if spec.softcap is None:
        return s, spec.scale * LOG2_E
    double = 2 * LOG2_E * spec.scale / spec.softcap
    return 1 - 2 / (jnp.exp2(s * double) + 1), spec.softcap * LOG2_E


def slope(x: jax.Array, spec: Spec) -> jax.Array | float:
    """Returns the derivative of `softcapped` logits by scaled products, from x before the mask."""
    return 1.0 if spec.softcap is None else 1 - x * x


def hide(
    x: jax.Array,
    band: Band,
    row: jax.Array,
    column: jax.Array,
    offset: jax.Array,
    row_ids: jax.Array | None,
    column_ids: jax.Ref | None,
) -> jax.Array:
    """Returns the tile x that begins at (`row`, `column`), -inf where the row does not see.

    `row_ids` is a vector in registers, `column_ids` a reference to global memory: so few threads
    need each of them that no copy to shared memory pays.
    """
    shape = x.shape
    j = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
    # Limits are vectors of the rows, two registers each; differences j - i would be a tile of them.
    i = plgpu.broadcasted_iota(jnp.int32, shape[:1], 0, layout=ROW) + (row + offset - column)
    seen = []
    if band.columns % shape[1]:
        seen.append(j < band.columns - column)
    if band.right is not None:
        seen.append(j <= down(i + band.right, shape))
    if band.left is not None:
        seen.append(j >= down(i - band.left, shape))
    if row_ids is not None:
        ids = plgpu.load(column_ids.at[pl.ds(column, shape[1])], layout=COLUMN, optimized=False)
        seen.append(down(row_ids, shape) == across(ids, shape))
    every = seen[0]
    for part in seen[1:]:
        every &= part
    return jnp.where(every, x, -jnp.inf)

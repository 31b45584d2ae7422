"""One tile of keys x queries: its logits to base 2, and who sees whom in it.

Tiles are transposed, keys on sublanes and queries on lanes: reductions over keys are then additions
of whole registers. Legend: S keys and T queries of the tile.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention.arguments import Spec

LOG2_E = math.log2(math.e)
LN_2 = math.log(2)

Scalar = jax.Array | int


class Band(NamedTuple):
    """A query sees keys at `low` <= key position - query position <= `high`; None is no limit."""

    low: int | None
    high: int | None


class Tile(NamedTuple):
    """What tells who sees whom in a tile; None where everything is seen.

    `offset` is the position of the tile's first key minus that of its first query; `keys` and
    `queries` count the rows of the tile that exist, the rest lies behind the arrays' ends;
    `mask_ST` is bool.
    """

    offset: Scalar | None = None
    keys: Scalar | None = None
    queries: Scalar | None = None
    key_ids_S1: jax.Array | None = None
    query_ids_1T: jax.Array | None = None
    mask_ST: jax.Array | None = None


def band(spec: Spec) -> Band:
    """Returns the diagonal band of keys that causality and the window leave to a query."""
    rights = [n for n in (0 if spec.causal else None, spec.window[1]) if n is not None]
    left = spec.window[0]
    return Band(None if left is None else -left, min(rights) if rights else None)


def misses(limits: Band, offset: Scalar, keys: int, queries: int) -> Scalar:
    """Returns whether the band lies outside a tile of that many keys and queries."""
    above = limits.high is not None and offset - (queries - 1) > limits.high
    below = limits.low is not None and offset + keys - 1 < limits.low
    return above | below


def covers(limits: Band, offset: Scalar, keys: int, queries: int) -> Scalar:
    """Returns whether the whole tile lies inside the band."""
    above = limits.high is None or offset + keys - 1 <= limits.high
    below = limits.low is None or offset - (queries - 1) >= limits.low
    return above & below


def visible_ST(limits: Band, tile: Tile, shape: tuple[int, int]) -> jax.Array | None:
    """Returns which keys each query of a tile sees, bool [S, T]; None if it is all of them."""
    parts = []
    key = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    query = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    if tile.offset is not None and limits.high is not None:
        parts.append(key <= query + (limits.high - tile.offset))
    if tile.offset is not None and limits.low is not None:
        parts.append(key >= query + (limits.low - tile.offset))
    if tile.keys is not None:
        parts.append(key < tile.keys)
    if tile.queries is not None:
        parts.append(query < tile.queries)
    if tile.key_ids_S1 is not None:
        parts.append(tile.key_ids_S1 == tile.query_ids_1T)
    if tile.mask_ST is not None:
        parts.append(tile.mask_ST)
    if not parts:
        return None
    visible = parts[0]
    for part in parts[1:]:
        visible = visible & part
    return visible


def logits(raw_ST: jax.Array, spec: Spec, bias_ST: jax.Array | None = None) -> jax.Array:
    """Returns log2(e) times the logits, from raw products q.k in float32: exp2 is their exponent.

    The scale is applied here, in float32, rather than to q, where it would be rounded.
    """
    if spec.softcap is None:
        z_ST = raw_ST * (spec.scale * LOG2_E)
    else:
        z_ST = jnp.tanh(raw_ST * (spec.scale / spec.softcap)) * (spec.softcap * LOG2_E)
    return z_ST if bias_ST is None else z_ST + bias_ST.astype(z_ST.dtype) * LOG2_E


def slope(raw_ST: jax.Array, spec: Spec) -> jax.Array | float:
    """Returns the derivative of the (natural) logits with respect to the raw products."""
    if spec.softcap is None:
        return spec.scale
    tanh_ST = jnp.tanh(raw_ST * (spec.scale / spec.softcap))
    return spec.scale * (1 - tanh_ST * tanh_ST)


def column(row_1N: jax.Array) -> jax.Array:
    """Returns a 32-bit row of lanes as a column of sublanes, [1, N] -> [N, 1]; N % 128 == 0."""
    return jnp.broadcast_to(row_1N, (128, row_1N.shape[1])).T[:, :1]

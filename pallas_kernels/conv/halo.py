"""The rows that a part of an array needs from its neighbours, and their gradients' way back.

Legend: N devices along the axis, each of which holds S positions of the dimension.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp


def exchange(x: jax.Array, axis: str, dim: int, before: int, after: int) -> jax.Array:
    """Returns a part with the positions before and after it, zeros beyond the array's ends.

    Args:
      x: this device's part.
      axis: the mesh axis, of a `jax.shard_map`, that splits the dimension.
      dim: the dimension.
      before: positions wanted before the part's first; may be more than a part has.
      after: positions wanted behind its last.
    """
    S, parts = x.shape[dim], []
    for hops, count in reversed([*_hops(before, S)]):
        parts.append(_sent(_slice(x, dim, S - count, S), axis, hops))
    parts.append(x)
    for hops, count in _hops(after, S):
        parts.append(_sent(_slice(x, dim, 0, count), axis, -hops))
    return jnp.concatenate(parts, dim) if len(parts) > 1 else x


def fold(x: jax.Array, axis: str, dim: int, before: int, after: int) -> jax.Array:
    """Returns the transpose of `exchange`: each device's positions, summed over who had them."""
    S = x.shape[dim] - before - after
    total = _slice(x, dim, before, before + S)
    for hops, count in _hops(before, S):
        first = before - (hops - 1) * S - count
        part = _sent(_slice(x, dim, first, first + count), axis, -hops)
        total += _placed(part, dim, S - count, 0)
    for hops, count in _hops(after, S):
        first = before + S + (hops - 1) * S
        part = _sent(_slice(x, dim, first, first + count), axis, hops)
        total += _placed(part, dim, 0, S - count)
    return total


def _hops(wanted: int, S: int) -> Iterator[tuple[int, int]]:
    """Yields how far a neighbour is, nearest first, and how many positions come from it."""
    for hops in range(1, -(-wanted // S) + 1):
        yield hops, min(S, wanted - (hops - 1) * S)


def _sent(x: jax.Array, axis: str, hops: int) -> jax.Array:
    """Returns what the device `hops` before this one sent; zeros where there is none."""
    N = jax.lax.axis_size(axis)
    pairs = [(n, n + hops) for n in range(N) if 0 <= n + hops < N]
    return jax.lax.ppermute(x, axis, pairs) if pairs else jnp.zeros_like(x)


def _slice(x: jax.Array, dim: int, start: int, stop: int) -> jax.Array:
    return jax.lax.slice_in_dim(x, start, stop, axis=dim)


def _placed(x: jax.Array, dim: int, before: int, after: int) -> jax.Array:
    pads = [(0, 0)] * x.ndim
    pads[dim] = (before, after)
    return jnp.pad(x, pads)

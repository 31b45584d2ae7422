"""What decode attention takes: queries, cache, static specification, and the checks of them.

Legend: B rows, T new tokens, S tokens that a row's cache can hold, H query heads, K key-value
heads, D and V sizes of a key and a value head, N pages of P tokens, L pages of a row.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.arrays import FLOATS, wrong
from pallas_kernels.attention import arguments
from pallas_kernels.block_sizes import BlockSizes


@dataclasses.dataclass(frozen=True)
class DecodeSpec:
    """What is static in a call; `left` is the window's, `keys` how many make a block."""

    left: int | None
    softcap: float | None
    scale: float
    keys: int | None = None


class Cache(NamedTuple):
    """Keys and values [B, S, K, *], or pages of them [N, P, K, *] with a table; lengths."""

    k: jax.Array
    v: jax.Array
    lengths_B: jax.Array
    page_table_BL: jax.Array | None

    @property
    def size(self) -> int:
        """S, tokens that a row can hold."""
        return self.k.shape[1] * (1 if self.page_table_BL is None else self.page_table_BL.shape[1])


class DecodeOperands(NamedTuple):
    """The arrays of one call."""

    q_BTHD: jax.Array
    cache: Cache
    sinks_H: jax.Array | None = None


def check_decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    lengths_B: jax.Array,
    page_table_BP: jax.Array | None = None,
    window: int | arguments.Window | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    scale: float | None = None,
    block_sizes: BlockSizes | None = None,
) -> tuple[DecodeOperands, DecodeSpec]:
    """Returns the operands and the specification that `decode_attention`'s arguments come to.

    Raises:
      ValueError: an argument does not fit; the message names it, its value, the rule, and a value
        that works.
    """
    q_BTHD, cache = _check_cache(q, k, v, lengths_B, page_table_BP)
    left, _ = arguments._check_window(window)
    softcap = arguments._check_softcap(softcap)
    sinks_H = arguments._check_sinks(sinks, q_BTHD.shape[2])
    if scale is None:
        scale = 1 / math.sqrt(q_BTHD.shape[3])
    scale = arguments._check_number('scale', scale, 'None')
    spec = DecodeSpec(left, softcap, scale, _check_keys(block_sizes))
    return DecodeOperands(q_BTHD, cache, sinks_H), spec


def _check_keys(sizes: BlockSizes | None) -> int | None:
    """Returns the keys of a block; the other sizes have no meaning to so few queries."""
    arguments.check_block_sizes(sizes)
    return None if sizes is None else sizes.kv


def _check_cache(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths_B: jax.Array,
    page_table_BP: jax.Array | None,
) -> tuple[jax.Array, Cache]:
    """Returns queries and cache as arrays, the lengths within what the cache can hold."""
    q, k, v, lengths_B = (jnp.asarray(x) for x in (q, k, v, lengths_B))
    letters = {'q': '[B, T, H, D]'}
    paged = page_table_BP is not None
    letters |= {n: f'[{"N, P" if paged else "B, S"}, K, {s}]' for n, s in (('k', 'D'), ('v', 'V'))}
    for name, x in (('q', q), ('k', k), ('v', v)):
        if x.ndim != 4 or not x.size or x.dtype.name not in FLOATS:
            rule = f'must be {", ".join(FLOATS)} {letters[name]}, no dimension of them 0'
            raise wrong(
                name, x, rule, f'{q.dtype if q.dtype.name in FLOATS else FLOATS[0]}[2, 16, 4, 64]'
            )
    (B, _, H, D), (n, s, K, _) = q.shape, k.shape
    fits = (n if paged else B, s, K, D)
    if k.shape != fits:
        rule = f'must have the {"head size" if paged else "rows and head size"} of q'
        raise wrong('k', k, rule, f'{k.dtype}{list(fits)}')
    if v.shape[:3] != k.shape[:3] or v.dtype != k.dtype:
        fits = f'{k.dtype}{[*k.shape[:3], v.shape[3]]}'
        raise wrong('v', v, 'must have the type of k and its first dimensions', fits)
    if H % K:
        good = max(n for n in range(1, K) if H % n == 0)
        rule = f'its {K} heads must divide the {H} heads of q'
        raise wrong('k', k, rule, f'{k.dtype}{[n, s, good, D]}')
    if not jnp.issubdtype(lengths_B.dtype, jnp.integer) or lengths_B.shape != (B,):
        raise wrong('lengths_B', lengths_B, 'must be integers [B]', f'int32[{B}]')
    if paged:
        page_table_BP = jnp.asarray(page_table_BP)
        shape = page_table_BP.shape
        if not jnp.issubdtype(page_table_BP.dtype, jnp.integer) or len(shape) != 2 or (
            shape[0] != B or not shape[1]
        ):  # fmt: skip
            rule = 'must be integers [B, pages of a row]'
            raise wrong('page_table_BP', page_table_BP, rule, f'int32[{B}, 8]')
        page_table_BP = page_table_BP.astype(jnp.int32)
    cache = Cache(k, v, lengths_B, page_table_BP)
    return q, cache._replace(lengths_B=jnp.clip(lengths_B, 0, cache.size).astype(jnp.int32))

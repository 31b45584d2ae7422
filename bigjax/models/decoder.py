"""What decoder-only language models share: the key-value cache, and the way into and out of them.

Legend: B batch, T positions of the input, S positions of the cache, C width, H query heads,
K key-value heads, D size of a head, V vocabulary, N = B * T, L layers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bigjax.nn.attention import Implementation, attention, cached_attention

KeyValue = tuple[jax.Array, jax.Array]


class Cache(NamedTuple):
    """Keys and values of the positions decoded so far.

    Row b holds `length_B[b]` positions; what lies behind is ignored and overwritten.

    Attributes:
      layers: as `bigjax.nn.stack.stack` takes them: unrolled, one pair of keys and values
        [B, S, K, D] a layer; scanned, one pair [L, B, S, K, D].
      length_B: int32.
    """

    layers: tuple[KeyValue, ...] | KeyValue
    length_B: jax.Array


def empty_cache(
    batch: int, length: int, *, depth: int, kv_heads: int, head_size: int, dtype: Any, scan: bool
) -> Cache:
    """Returns a cache for `batch` rows of `length` positions that holds none yet."""
    shape = (batch, length, kv_heads, head_size)
    layers: tuple[KeyValue, ...] | KeyValue
    if scan:
        layers = jnp.zeros((depth, *shape), dtype), jnp.zeros((depth, *shape), dtype)
    else:
        layers = tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(depth))
    return Cache(layers, jnp.zeros(batch, jnp.int32))


def positions(tokens_BT: jax.Array, cache: Cache | None) -> jax.Array:
    """Returns the positions of tokens [1, T], or [B, T] of those that follow a cache."""
    t_1T = jnp.arange(tokens_BT.shape[1])[None]
    return t_1T if cache is None else cache.length_B[:, None] + t_1T


def attend(
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    kv: KeyValue | None,
    start_B: jax.Array | None,
    impl: Implementation | None,
) -> tuple[jax.Array, KeyValue | None]:
    """Causal attention of new positions to each other and to those in one layer's cache, if any.

    Returns:
      The output [B, T, H, D], and the cache with the new keys and values from `start_B` on.
    """
    if kv is None:
        return attention(q_BTHD, k_BTKD, v_BTKD, causal=True, impl=impl), None
    assert start_B is not None
    kv = _write(kv[0], k_BTKD, start_B), _write(kv[1], v_BTKD, start_B)
    return cached_attention(q_BTHD, *kv, start_B=start_B), kv


def _write(cache_BSKD: jax.Array, new_BTKD: jax.Array, start_B: jax.Array) -> jax.Array:
    new_BTKD = new_BTKD.astype(cache_BSKD.dtype)
    update = jax.vmap(
        lambda row, new, start: jax.lax.dynamic_update_slice_in_dim(row, new, start, 0)
    )
    return update(cache_BSKD, new_BTKD, start_B)


def embed(embedding_VC: jax.Array, tokens_BT: jax.Array, dtype: Any) -> jax.Array:
    """Returns the rows [B, T, C] of tokens in the type of the computation."""
    return jnp.take(embedding_VC, tokens_BT, axis=0).astype(dtype)


def logits(x_BTC: jax.Array, embedding_VC: jax.Array) -> jax.Array:
    """Returns float32 logits [B, T, V]: products with the rows of an output embedding."""
    x_NC = x_BTC.reshape(-1, x_BTC.shape[-1])
    logits_NV = jax.lax.dot_general(
        x_NC,
        embedding_VC.astype(x_NC.dtype),
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    return logits_NV.reshape(*x_BTC.shape[:-1], embedding_VC.shape[0])

"""What decoder-only language models share: the key-value cache, and the way into and out of them.

Legend: B batch, T positions of the input, S positions of the cache, C width, H query heads,
K key-value heads, D size of a head, F = K D, V vocabulary, L layers.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from bigjax.nn.attention import (
    Implementation,
    KeyValue,
    attention,
    cached_attention,
    empty_layers,
)
from bigjax.nn.context import laid_out
from bigjax.nn.moe import DENSE, Routing
from bigjax.strategy import Context, Matmul, Remat


class Cache(NamedTuple):
    """Keys and values of the positions decoded so far.

    Row b holds `length_B[b]` positions; what lies behind is ignored and overwritten.

    Attributes:
      layers: as `bigjax.nn.stack.stack` takes them: unrolled, one pair of keys and values
        [B, S, F] a layer; scanned, one pair [L, B, S, F].
      length_B: int32.
    """

    layers: tuple[KeyValue, ...] | KeyValue
    length_B: jax.Array


class DecoderLM(nn.Module):
    """A decoder-only language model without its layers: what calls them, with a cache or without.

    A family inherits the fields, adds its own, and says in `_run` what it computes.

    Attributes:
      vocab_size: number of tokens.
      context_length: positions that the model can see, and a cache holds.
      depth: number of layers.
      heads: number of query heads; divides the width.
      width: width of the residual stream.
      dtype: type of the computation, float32 or bfloat16.
      attention_impl: implementation of attention.
      scan: whether the layers are one scanned block, see `bigjax.nn.stack`.
      remat: what of each block is computed again for the gradient, likewise.
      microbatches: parts that a batch goes through a pipeline of stages in; 0 is one a stage.
      context: how attention sees the positions that other devices hold.
      matmul: precision of the dense layers.
      routing: mixture of experts in each block, if any.
    """

    vocab_size: int
    context_length: int
    depth: int = 12
    heads: int = 12
    width: int = 768
    dtype: Any = jnp.float32
    attention_impl: Implementation = 'auto'
    scan: bool = False
    remat: Remat = 'none'
    microbatches: int = 0
    context: Context = 'ring'
    matmul: Matmul = 'default'
    routing: Routing = DENSE

    def __call__(self, tokens_BT: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns float32 logits [B, T, V] for int32 tokens [B, T].

        Needs the rng 'dropout' where `train` and a dropout above zero.

        Raises:
          ValueError: more positions than `context_length`.
        """
        if tokens_BT.shape[1] > self.context_length:
            raise ValueError(
                f'{tokens_BT.shape[1]} positions: the model sees {self.context_length}'
            )
        return self._run(tokens_BT, None, train)[0]

    def decode(self, tokens_BT: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Returns the logits [B, T, V] of tokens that follow those in the cache, and the new cache.

        Used as `model.apply(variables, tokens, cache, method='decode')`. The cache must have room
        for T more positions; this is not checked, as its length is known only when it runs.
        """
        logits_BTV, layers = self._run(tokens_BT, cache, False)
        return logits_BTV, Cache(layers, cache.length_B + tokens_BT.shape[1])

    def init_cache(self, batch: int, length: int | None = None) -> Cache:
        """Returns an empty cache for `batch` rows of `length` positions (None: all the model sees).

        A pure function of the configuration: call it on the module, without `apply`.
        """
        length = length or self.context_length
        if length > self.context_length:
            raise ValueError(f'{length} positions: the model sees {self.context_length}')
        shape = (batch, length, self._kv_heads * self._head_dim)
        layers = empty_layers(shape, self.dtype, depth=self.depth, scan=self.scan)
        return Cache(layers, jnp.zeros(batch, jnp.int32))

    @property
    def _kv_heads(self) -> int:
        """K, of every layer."""
        return self.heads

    @property
    def _head_dim(self) -> int:
        """D."""
        return self.width // self.heads

    def _run(self, tokens_BT: jax.Array, cache: Cache | None, train: bool) -> tuple[jax.Array, Any]:
        """Returns the logits, and the layers of the cache; a compact method."""
        raise NotImplementedError


def positions(tokens_BT: jax.Array, cache: Cache | None) -> jax.Array:
    """Returns the positions of tokens [1, T], or [B, T] of those that follow a cache.

    Tokens without a cache are in the order of `bigjax.nn.context`.
    """
    t_1T = jnp.arange(tokens_BT.shape[1])[None]
    return laid_out(t_1T) if cache is None else cache.length_B[:, None] + t_1T


def attend(
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    kv: KeyValue | None,
    start_B: jax.Array | None,
    impl: Implementation,
    context: Context,
) -> tuple[jax.Array, KeyValue | None]:
    """Causal attention of new positions to each other and to those in one layer's cache, if any.

    Returns:
      The output [B, T, H, D], and the cache with the new keys and values from `start_B` on.
    """
    if kv is None:
        o_BTHD = attention(q_BTHD, k_BTKD, v_BTKD, causal=True, impl=impl, context=context)
        return o_BTHD, None
    assert start_B is not None
    kv = _write(kv[0], k_BTKD, start_B), _write(kv[1], v_BTKD, start_B)
    return cached_attention(q_BTHD, *kv, start_B=start_B, impl=impl), kv


def _write(cache_BSF: jax.Array, new_BTKD: jax.Array, start_B: jax.Array) -> jax.Array:
    new_BTF = new_BTKD.reshape(*new_BTKD.shape[:2], -1).astype(cache_BSF.dtype)
    update = jax.vmap(
        lambda row, new, start: jax.lax.dynamic_update_slice_in_dim(row, new, start, 0)
    )
    return update(cache_BSF, new_BTF, start_B)

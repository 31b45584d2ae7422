"""GPT: a decoder-only transformer with learned positions (Radford et al. 2019).

Legend: B batch, T positions of the input, S positions of the cache, C width, H heads, D = C / H,
V vocabulary, M width of the hidden MLP layer, L layers.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from bigjax.experiment import UsageError
from bigjax.nn.activations import gelu
from bigjax.nn.attention import Implementation, attention, cached_attention
from bigjax.nn.linear import Dense
from bigjax.nn.norm import LayerNorm

# GPT-2's published variants; all have 1,024 positions and 50,257 tokens.
SIZES = {
    '124M': {'depth': 12, 'heads': 12, 'width': 768},
    '355M': {'depth': 24, 'heads': 16, 'width': 1024},
    '774M': {'depth': 36, 'heads': 20, 'width': 1280},
    '1.5B': {'depth': 48, 'heads': 25, 'width': 1600},
}

RULES = (
    (r'embedding$', ('vocab', 'embed')),
    (r'position$', (None, 'embed')),
    (r'qkv/kernel$', ('embed', 'heads', None, None)),
    (r'qkv/bias$', ('heads', None, None)),
    (r'attention/out/kernel$', ('heads', None, 'embed')),
    (r'mlp/up/kernel$', ('embed', 'mlp')),
    (r'mlp/up/bias$', ('mlp',)),
    (r'mlp/down/kernel$', ('mlp', 'embed')),
    (r'(scale|bias)$', ('embed',)),
)


class Cache(NamedTuple):
    """Keys and values of the positions decoded so far, one array [B, S, H, D] a layer.

    Row b holds `length_B[b]` positions; what lies behind is ignored and overwritten.
    """

    k_BSHD: tuple[jax.Array, ...]
    v_BSHD: tuple[jax.Array, ...]
    length_B: jax.Array


class Attention(nn.Module):
    """Causal self-attention; with a cache, of new positions to all before them.

    Attributes:
      heads: number of heads; divides the width.
      bias: whether the dense layers have biases.
      dtype: type of the computation.
      out_init: initializer of the output projection.
      impl: implementation of attention; None chooses.
    """

    heads: int
    bias: bool
    dtype: Any
    out_init: nn.initializers.Initializer
    impl: Implementation | None = None

    @nn.compact
    def __call__(
        self,
        x_BTC: jax.Array,
        cache: tuple[jax.Array, jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        C, H = x_BTC.shape[-1], self.heads
        options = {'use_bias': self.bias, 'dtype': self.dtype}
        init = nn.initializers.normal(0.02)
        qkv = Dense((H, 3, C // H), kernel_init=init, name='qkv', **options)(x_BTC)
        # Not qkv[:, :, :, i], whose gradient is a sum of zero-padded arrays; this one's is a join.
        q_BTHD, k_BTHD, v_BTHD = (x.squeeze(3) for x in jnp.split(qkv, 3, axis=3))
        kv = None
        if cache is None:
            o_BTHD = attention(q_BTHD, k_BTHD, v_BTHD, causal=True, impl=self.impl)
        else:
            k_BSHD, v_BSHD, start_B = cache
            kv = _write(k_BSHD, k_BTHD, start_B), _write(v_BSHD, v_BTHD, start_B)
            o_BTHD = cached_attention(q_BTHD, *kv, start_B=start_B)
        out = Dense(C, in_dims=2, kernel_init=self.out_init, name='out', **options)
        return out(o_BTHD), kv


def _write(cache_BSHD: jax.Array, new_BTHD: jax.Array, start_B: jax.Array) -> jax.Array:
    new_BTHD = new_BTHD.astype(cache_BSHD.dtype)
    update = jax.vmap(
        lambda row, new, start: jax.lax.dynamic_update_slice_in_dim(row, new, start, 0)
    )
    return update(cache_BSHD, new_BTHD, start_B)


class MLP(nn.Module):
    """Two dense layers with GELU between them, four times as wide inside.

    Attributes:
      bias: whether the dense layers have biases.
      dtype: type of the computation.
      out_init: initializer of the second layer.
    """

    bias: bool
    dtype: Any
    out_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x_BTC: jax.Array) -> jax.Array:
        C = x_BTC.shape[-1]
        options = {'use_bias': self.bias, 'dtype': self.dtype}
        up = Dense(4 * C, kernel_init=nn.initializers.normal(0.02), name='up', **options)
        return Dense(C, kernel_init=self.out_init, name='down', **options)(gelu(up(x_BTC)))


class Block(nn.Module):
    """One layer: normalise, attend, add; normalise, MLP, add.

    Attributes:
      heads: number of attention heads.
      bias: whether dense layers and norms have biases.
      dropout: share of each residual branch set to zero in training.
      dtype: type of the computation.
      out_init: initializer of the projections that write to the residual stream.
      impl: implementation of attention; None chooses.
    """

    heads: int
    bias: bool
    dropout: float
    dtype: Any
    out_init: nn.initializers.Initializer
    impl: Implementation | None = None

    @nn.compact
    def __call__(self, x_BTC, cache=None, *, train: bool = False):
        norm = {'use_bias': self.bias, 'dtype': self.dtype}
        options = {'bias': self.bias, 'dtype': self.dtype, 'out_init': self.out_init}
        h_BTC = LayerNorm(name='attention_norm', **norm)(x_BTC)
        attend = Attention(self.heads, impl=self.impl, name='attention', **options)
        h_BTC, kv = attend(h_BTC, cache)
        x_BTC += nn.Dropout(self.dropout)(h_BTC, deterministic=not train)
        h_BTC = LayerNorm(name='mlp_norm', **norm)(x_BTC)
        h_BTC = MLP(name='mlp', **options)(h_BTC)
        x_BTC += nn.Dropout(self.dropout)(h_BTC, deterministic=not train)
        return x_BTC, kv


class GPT(nn.Module):
    """Decoder-only transformer language model (Radford et al. 2019): tokens in, logits out.

    Parameters are float32; so are logits, softmax and the statistics of the norms, whatever
    `dtype`. The output layer is the embedding, transposed. Initialized as GPT-2: normal with
    deviation 0.02, divided by sqrt(2 * depth) where a layer writes to the residual stream.

    Attributes:
      vocab_size: number of tokens.
      context_length: number of positions the model can see.
      depth: number of layers.
      heads: number of attention heads; divides the width.
      width: width of the residual stream.
      bias: whether dense layers and norms have biases.
      dropout: share of embeddings and residual branches set to zero in training.
      dtype: type of the computation, float32 or bfloat16.
      attention_impl: implementation of attention; None chooses.
    """

    vocab_size: int
    context_length: int
    depth: int = 12
    heads: int = 12
    width: int = 768
    bias: bool = False
    dropout: float = 0.0
    dtype: Any = jnp.float32
    attention_impl: Implementation | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads < 1 or self.width % self.heads:
            good = max((h for h in range(1, self.heads) if self.width % h == 0), default=1)
            raise UsageError(
                f'--heads={self.heads}: width {self.width} must be a multiple of heads; '
                f'try --heads={good}'
            )

    def setup(self) -> None:
        init = nn.initializers.normal(0.02)
        out_init = nn.initializers.normal(0.02 / math.sqrt(2 * self.depth))
        self.embedding = self.param('embedding', init, (self.vocab_size, self.width))
        self.position = self.param('position', init, (self.context_length, self.width))
        self.drop = nn.Dropout(self.dropout)
        self.block = [
            Block(self.heads, self.bias, self.dropout, self.dtype, out_init, self.attention_impl)
            for _ in range(self.depth)
        ]
        self.norm = LayerNorm(use_bias=self.bias, dtype=self.dtype)

    def __call__(self, tokens_BT: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns float32 logits [B, T, V] for int32 tokens [B, T].

        Needs the rng 'dropout' where `train` and a dropout above zero.

        Raises:
          ValueError: more positions than `context_length`.
        """
        length = tokens_BT.shape[1]
        if length > self.context_length:
            raise ValueError(f'{length} positions: the model sees {self.context_length}')
        x_BTC = self._embed(tokens_BT) + self.position[None, :length].astype(self.dtype)
        x_BTC = self.drop(x_BTC, deterministic=not train)
        for block in self.block:
            x_BTC, _ = block(x_BTC, train=train)
        return self._logits(x_BTC)

    def decode(self, tokens_BT: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Returns the logits [B, T, V] of tokens that follow those in the cache, and the new cache.

        Used as `model.apply(variables, tokens, cache, method='decode')`. The cache must have room
        for T more positions; this is not checked, as its length is known only when it runs.
        """
        T, start_B = tokens_BT.shape[1], cache.length_B
        position_BT = start_B[:, None] + jnp.arange(T)[None]
        x_BTC = self._embed(tokens_BT) + self.position[position_BT].astype(self.dtype)
        layers = []
        for block, k_BSHD, v_BSHD in zip(self.block, cache.k_BSHD, cache.v_BSHD, strict=True):
            x_BTC, kv = block(x_BTC, (k_BSHD, v_BSHD, start_B))
            layers.append(kv)
        keys, values = zip(*layers, strict=True)
        return self._logits(x_BTC), Cache(keys, values, start_B + T)

    def init_cache(self, batch: int, length: int | None = None) -> Cache:
        """Returns an empty cache for `batch` rows of `length` positions (None: all the model sees).

        A pure function of the configuration: call it on the module, without `apply`.
        """
        length = length or self.context_length
        if length > self.context_length:
            raise ValueError(f'{length} positions: the model sees {self.context_length}')
        shape = (batch, length, self.heads, self.width // self.heads)
        k_BSHD, v_BSHD = (
            tuple(jnp.zeros(shape, self.dtype) for _ in range(self.depth)) for _ in range(2)
        )
        return Cache(k_BSHD, v_BSHD, jnp.zeros(batch, jnp.int32))

    def _embed(self, tokens_BT: jax.Array) -> jax.Array:
        return jnp.take(self.embedding, tokens_BT, axis=0).astype(self.dtype)

    def _logits(self, x_BTC: jax.Array) -> jax.Array:
        x_NC = self.norm(x_BTC).reshape(-1, self.width)
        logits_NV = jax.lax.dot_general(
            x_NC,
            self.embedding.astype(self.dtype),
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        return logits_NV.reshape(*x_BTC.shape[:-1], self.vocab_size)


def forward_flops(*, vocab_size: int, length: int, depth: int, width: int) -> int:
    """FLOPs of the matrix products in one example's forward pass, two for a multiply-add.

    Per layer 12 C^2 parameters and T^2 scores, of which attention takes and applies all, the
    masked ones too (the convention of Chowdhery et al. 2022, appendix B); then the output layer.
    The embedding is a look-up and counts nothing.
    """
    layer = 2 * length * 12 * width**2 + 2 * 2 * length**2 * width
    return depth * layer + 2 * length * width * vocab_size

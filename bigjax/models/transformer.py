"""The Transformer: an encoder and a decoder (Vaswani et al. 2017), laid out as Marian's.

Legend: B source texts, N rows of the decoder (B, or B times the beam), S source positions, T target
positions, C width, H heads, D = C / H, V vocabulary.
"""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from bigjax.experiment import UsageError
from bigjax.nn.attention import Implementation, check_heads, empty_layers
from bigjax.nn.encoder_decoder import Activation, Block, Layers, Norm
from bigjax.nn.linear import embedding_logits
from bigjax.nn.stack import stacked_rules
from bigjax.strategy import Remat

# Vaswani et al. 2017, table 3: base and big, of 6 + 6 layers; and one for two CPU cores.
SIZES = {
    'small': {'depth': 2, 'heads': 4, 'width': 128, 'hidden': 512},
    'base': {'depth': 6, 'heads': 8, 'width': 512, 'hidden': 2048},
    'big': {'depth': 6, 'heads': 16, 'width': 1024, 'hidden': 4096},
}

RULES = stacked_rules(
    (
        (r'embedding$', ('vocab', 'embed')),
        (r'(qkv|kv)/kernel$', ('embed', 'heads', None, None)),
        (r'(qkv|kv)/bias$', ('heads', None, None)),
        (r'q/kernel$', ('embed', 'heads', None)),
        (r'q/bias$', ('heads', None)),
        (r'out/kernel$', ('heads', None, 'embed')),
        (r'up/kernel$', ('embed', 'mlp')),
        (r'up/bias$', ('mlp',)),
        (r'down/kernel$', ('mlp', 'embed')),
        (r'logits_bias$', ('vocab',)),
        (r'(scale|bias)$', ('embed',)),
    )
)


class Memory(NamedTuple):
    """What the decoder reads of the source.

    Attributes:
      kv: keys and values [B, S, H, D] of every decoder layer, as `stack` hands them out.
      real_BS: where the source has tokens.
    """

    kv: Any
    real_BS: jax.Array


class Transformer(nn.Module):
    """Encoder-decoder Transformer: source and target tokens in, logits of the next ones out.

    One embedding serves both sides and, transposed, the output layer; it is multiplied by sqrt(C)
    where tokens are read. Parameters are float32; so are logits, softmax and the statistics of the
    norms, whatever `dtype`.

    Attributes:
      vocab_size: number of tokens, those that begin and end a text included.
      depth: layers of the encoder and of the decoder.
      heads: attention heads; divides the width.
      width: width of the residual stream; even.
      hidden: width of the hidden layers.
      decoder_depth: layers of the decoder, where they are fewer or more.
      norm: 'post' as published, or 'pre', which trains deep stacks without warm-up.
      activation: of the hidden layers.
      dropout: share of embeddings and residual branches set to zero in training.
      logits_bias: whether the logits have a bias, as Marian's.
      scan: whether layers are scanned; see `bigjax.nn.stack`.
      remat: what is recomputed for the gradient; see `bigjax.nn.stack`.
      dtype: type of the computation, float32 or bfloat16.
      attention_impl: implementation of attention.
    """

    vocab_size: int
    depth: int = 6
    heads: int = 8
    width: int = 512
    hidden: int = 2048
    decoder_depth: int | None = None
    norm: Norm = 'post'
    activation: Activation = 'relu'
    dropout: float = 0.0
    logits_bias: bool = False
    scan: bool = False
    remat: Remat = 'none'
    dtype: Any = jnp.float32
    attention_impl: Implementation = 'auto'

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.heads, self.width)
        if self.width % 2:
            raise UsageError(
                f'--width={self.width}: must be even, half of it being sines and half cosines; '
                f'try --width={self.width + 1}'
            )

    def setup(self) -> None:
        init = nn.initializers.normal(self.width**-0.5)
        self.embedding = self.param('embedding', init, (self.vocab_size, self.width))
        if self.logits_bias:
            zeros = nn.initializers.zeros_init()
            self.bias_V = self.param('logits_bias', zeros, (self.vocab_size,))
        self.drop = nn.Dropout(self.dropout)
        sides = (self.depth, False), (self.decoder_depth or self.depth, True)
        options = (self.norm, self.activation, self.dropout, self.dtype, self.attention_impl)
        self.encoder, self.decoder = (
            Layers(
                depth,
                functools.partial(Block, self.heads, self.hidden, decodes, *options),
                self.scan,
                self.remat,
                self.norm == 'pre',
                self.dtype,
            )
            for depth, decodes in sides
        )

    def __call__(
        self, source_BS: jax.Array, target_BT: jax.Array, *, train: bool = False
    ) -> jax.Array:
        """Returns float32 logits [B, T, V] of the token after each of `target_BT`.

        Args:
          source_BS: int32; negative is padding, which nothing sees.
          target_BT: int32, the token that begins a text first; negative is read as token 0.
          train: whether there is dropout, from the rng 'dropout'.
        """
        memory_BSC = self._encode(source_BS, train)
        y_BTC = self._embed(target_BT, 0, train)
        y_BTC, _ = self.decoder(y_BTC, memory_BSC, source_BS >= 0, None, train=train)
        return self._logits(y_BTC)

    def start(self, source_BS: jax.Array) -> Memory:
        """Returns what decoding needs of the source."""
        memory_BSC = self._encode(source_BS, False)
        # Only keys and values are used of this pass: the compiler leaves out the rest of it.
        nothing_B1C = jnp.zeros_like(memory_BSC[:, :1])
        _, kv = self.decoder(nothing_B1C, memory_BSC, source_BS >= 0, None, keeps='memory')
        return Memory(kv, source_BS >= 0)

    def init_cache(self, rows: int, length: int, memory: Memory | None = None) -> Any:
        """Returns empty caches of `rows` texts of up to `length` tokens, whatever the source."""
        del memory
        depth = self.decoder_depth or self.depth
        return empty_layers((rows, length, self.width), self.dtype, depth=depth, scan=self.scan)

    @property
    def cache_axis(self) -> int:
        """The axis of the caches that counts rows."""
        return int(self.scan)

    def decode(
        self, token_N: jax.Array, position: jax.Array, cache: Any, memory: Memory
    ) -> tuple[jax.Array, Any]:
        """Returns logits [N, V] of what follows `token_N`, and the cache with it.

        Args:
          token_N: int32, the token at `position` of each row; N is B, or B times the beam with the
            rows of one text together.
          position: int32 scalar; the cache holds those before it.
          cache: what `init_cache` or `decode` gave.
          memory: what `start` gave.
        """
        y_N1C = self._embed(token_N[:, None], position, False)
        layers = (cache, memory.kv) if self.scan else tuple(zip(cache, memory.kv, strict=True))
        y_N1C, cache = self.decoder(
            y_N1C, None, memory.real_BS, position, layers=layers, keeps='cache'
        )
        return self._logits(y_N1C)[:, 0], cache

    def _encode(self, source_BS: jax.Array, train: bool) -> jax.Array:
        x_BSC = self._embed(source_BS, 0, train)
        return self.encoder(x_BSC, None, source_BS >= 0, None, train=train)[0]

    def _embed(self, tokens_NT: jax.Array, start: jax.typing.ArrayLike, train: bool) -> jax.Array:
        x_NTC = jnp.take(self.embedding, jnp.maximum(tokens_NT, 0), axis=0) * math.sqrt(self.width)
        x_NTC += sinusoids(start + jnp.arange(tokens_NT.shape[1]), self.width)[None]
        return self.drop(x_NTC.astype(self.dtype), deterministic=not train)

    def _logits(self, y_NTC: jax.Array) -> jax.Array:
        bias_V = self.bias_V if self.logits_bias else None
        return embedding_logits(y_NTC, self.embedding, bias_V)


def sinusoids(position_T: jax.typing.ArrayLike, width: int) -> jax.Array:
    """Returns float32 [T, C]: sin(p / 10000^(2i / C)) for i below C / 2, then the cosines.

    Vaswani et al. 2017, §3.5, with the sines and cosines side by side instead of in turn.
    """
    rate_I = 10000.0 ** (-2 * jnp.arange(width // 2) / width)
    angle_TI = jnp.asarray(position_T, jnp.float32)[:, None] * rate_I[None]
    return jnp.concatenate([jnp.sin(angle_TI), jnp.cos(angle_TI)], axis=1)


def forward_flops(
    *,
    vocab_size: int,
    source_length: int,
    target_length: int,
    depth: int,
    width: int,
    hidden: int,
    decoder_depth: int | None = None,
) -> int:
    """FLOPs of the matrix products in one example's forward pass, two for a multiply-add.

    Attention takes and applies all scores, the masked ones too; look-ups count nothing.
    """
    S, T, C = source_length, target_length, width
    dense = 2 * (4 * C**2 + 2 * C * hidden)
    encoder = depth * (S * dense + 4 * S**2 * C)
    cross = 4 * (S + T) * C**2 + 4 * S * T * C
    decoder = (decoder_depth or depth) * (T * dense + 4 * T**2 * C + cross)
    return encoder + decoder + 2 * T * C * vocab_size

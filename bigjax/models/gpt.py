"""GPT-2 and GPT-3: decoder-only transformers with learned positions (Radford et al. 2019).

Legend: B batch, T positions of the input, C width, H heads, D = C / H, M = 4 C,
V vocabulary.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax

from bigjax.models.decoder import Cache, DecoderLM, attend, positions
from bigjax.nn.activations import gelu
from bigjax.nn.attention import Implementation, KeyValue, check_heads, split_projections
from bigjax.nn.constrain import constrain, enter, leave
from bigjax.nn.context import laid_out
from bigjax.nn.linear import Dense
from bigjax.nn.logits import logits
from bigjax.nn.look_up import look_up
from bigjax.nn.moe import DENSE, MoE, Routing
from bigjax.nn.norm import LayerNorm
from bigjax.nn.stack import stack, stacked_rules
from bigjax.nn.together import together
from bigjax.strategy import Context, Matmul

# GPT-2's published variants; all have 1,024 positions and 50,257 tokens.
GPT2_SIZES = {
    '124M': {'depth': 12, 'heads': 12, 'width': 768},
    '355M': {'depth': 24, 'heads': 16, 'width': 1024},
    '774M': {'depth': 36, 'heads': 20, 'width': 1280},
    '1.5B': {'depth': 48, 'heads': 25, 'width': 1600},
}

# GPT-3's (Brown et al. 2020, table 2.1): 2,048 positions, the same tokens. The table's 24 heads of
# 128 for 1.3B and its width of 5,140 for 13B contradict the rest of it; these fit its counts.
GPT3_SIZES = {
    '125M': {'depth': 12, 'heads': 12, 'width': 768},
    '350M': {'depth': 24, 'heads': 16, 'width': 1024},
    '760M': {'depth': 24, 'heads': 16, 'width': 1536},
    '1.3B': {'depth': 24, 'heads': 16, 'width': 2048},
    '2.7B': {'depth': 32, 'heads': 32, 'width': 2560},
    '6.7B': {'depth': 32, 'heads': 32, 'width': 4096},
    '13B': {'depth': 40, 'heads': 40, 'width': 5120},
    '175B': {'depth': 96, 'heads': 96, 'width': 12288},
}

_BLOCK_RULES = (
    (r'router_kernel$', ('embed', None)),
    (r'experts/up/kernel$', ('experts', 'embed', 'mlp')),
    (r'experts/up/bias$', ('experts', 'mlp')),
    (r'experts/down/kernel$', ('experts', 'mlp', 'embed')),
    (r'experts/down/bias$', ('experts', 'embed')),
    (r'qkv/kernel$', ('embed', 'heads', None, None)),
    (r'qkv/bias$', ('heads', None, None)),
    (r'attention/out/kernel$', ('heads', None, 'embed')),
    (r'mlp/up/kernel$', ('embed', 'mlp')),
    (r'mlp/up/bias$', ('mlp',)),
    (r'mlp/down/kernel$', ('mlp', 'embed')),
    (r'(scale|bias)$', ('embed',)),
)
RULES = (
    (r'embedding$', ('vocab', 'embed')),
    (r'position$', (None, 'embed')),
    *stacked_rules(_BLOCK_RULES),
)
# 50,257 is 29 times 1,733, which no tensor axis divides: the table is split along the width alone.
ODD_VOCAB_RULES = ((r'embedding$', (None, 'embed')), *RULES)


class Attention(nn.Module):
    """Causal self-attention; with a cache, of new positions to all before them.

    Attributes:
      heads: number of heads; divides the width.
      bias: whether the dense layers have biases.
      dtype: type of the computation.
      out_init: initializer of the output projection.
      impl: implementation of attention.
      context: how it sees positions on other devices.
      matmul: precision of the dense layers.
    """

    heads: int
    bias: bool
    dtype: Any
    out_init: nn.initializers.Initializer
    impl: Implementation = 'auto'
    context: Context = 'ring'
    matmul: Matmul = 'default'

    @nn.compact
    def __call__(
        self, x_BTC: jax.Array, kv: KeyValue | None, start_B: jax.Array | None
    ) -> tuple[jax.Array, KeyValue | None]:
        C, H = x_BTC.shape[-1], self.heads
        options = {'use_bias': self.bias, 'dtype': self.dtype, 'matmul': self.matmul}
        dense = functools.partial(Dense, kernel_init=nn.initializers.normal(0.02), **options)
        (qkv,) = together(dense, x_BTC, 'heads', {'qkv': (H, 3, C // H)})
        q_BTHD, k_BTHD, v_BTHD = (
            constrain(x, 'batch', 'length', 'heads', None) for x in split_projections(qkv)
        )
        o_BTHD, kv = attend(q_BTHD, k_BTHD, v_BTHD, kv, start_B, self.impl, self.context)
        out = Dense(C, in_dims=2, kernel_init=self.out_init, reads='heads', name='out', **options)
        return out(o_BTHD), kv


class MLP(nn.Module):
    """Two dense layers with GELU between them, four times as wide inside.

    Attributes:
      bias: whether the dense layers have biases.
      dtype: type of the computation.
      out_init: initializer of the second layer.
      matmul: precision of both.
    """

    bias: bool
    dtype: Any
    out_init: nn.initializers.Initializer
    matmul: Matmul = 'default'

    @nn.compact
    def __call__(self, x_BTC: jax.Array) -> jax.Array:
        C = x_BTC.shape[-1]
        options = {'use_bias': self.bias, 'dtype': self.dtype, 'matmul': self.matmul}
        dense = functools.partial(Dense, kernel_init=nn.initializers.normal(0.02), **options)
        (up_BTM,) = together(dense, x_BTC, 'mlp', {'up': 4 * C})
        down = Dense(C, kernel_init=self.out_init, reads='mlp', name='down', **options)
        return down(gelu(up_BTM))


class Block(nn.Module):
    """One layer: normalise, attend, add; normalise, MLP (or a mixture of them), add.

    Attributes:
      heads: number of attention heads.
      bias: whether dense layers and norms have biases.
      dropout: share of each residual branch set to zero in training.
      dtype: type of the computation.
      out_init: initializer of the projections that write to the residual stream.
      impl: implementation of attention.
      routing: mixture of experts, if any.
      context: how attention sees positions on other devices.
      matmul: precision of the dense layers.
    """

    heads: int
    bias: bool
    dropout: float
    dtype: Any
    out_init: nn.initializers.Initializer
    impl: Implementation = 'auto'
    routing: Routing = DENSE
    context: Context = 'ring'
    matmul: Matmul = 'default'

    @nn.compact
    def __call__(self, x_BTC, kv, start_B, *, train: bool):
        norm = {'use_bias': self.bias, 'dtype': self.dtype}
        options = {'bias': self.bias, 'dtype': self.dtype, 'out_init': self.out_init}
        options['matmul'] = self.matmul
        h_BTC = enter(LayerNorm(name='attention_norm', **norm)(x_BTC))
        attention = Attention(
            self.heads, impl=self.impl, context=self.context, name='attention', **options
        )
        h_BTC, kv = attention(h_BTC, kv, start_B)
        x_BTC += nn.Dropout(self.dropout)(leave(h_BTC), deterministic=not train)
        h_BTC = enter(LayerNorm(name='mlp_norm', **norm)(x_BTC))
        if self.routing.experts:
            moe = MoE(functools.partial(MLP, **options), self.routing, name='moe')
            h_BTC = moe(h_BTC, drop=kv is None, train=train)
        else:
            h_BTC = MLP(name='mlp', **options)(h_BTC)
        x_BTC += nn.Dropout(self.dropout)(leave(h_BTC), deterministic=not train)
        return x_BTC, kv


class GPT(DecoderLM):
    """Decoder-only transformer language model (Radford et al. 2019): tokens in, logits out.

    Parameters are float32; so are logits, softmax and the statistics of the norms, whatever
    `dtype`. The output layer is the embedding, transposed. Initialized as GPT-2: normal with
    deviation 0.02, divided by sqrt(2 * depth) where a layer writes to the residual stream.

    Attributes, beside those of `DecoderLM`:
      bias: whether dense layers and norms have biases.
      dropout: share of embeddings and residual branches set to zero in training.
    """

    bias: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.heads, self.width)

    @nn.compact
    def _run(self, tokens_BT: jax.Array, cache: Cache | None, train: bool) -> tuple[jax.Array, Any]:
        init = nn.initializers.normal(0.02)
        out_init = nn.initializers.normal(0.02 / math.sqrt(2 * self.depth))
        embedding_VC = self.param('embedding', init, (self.vocab_size, self.width))
        position_TC = self.param('position', init, (self.context_length, self.width))
        if cache is None:
            place_BTC = laid_out(position_TC[None, : tokens_BT.shape[1]])
        else:
            place_BTC = position_TC[positions(tokens_BT, cache)]
        x_BTC = look_up(embedding_VC, tokens_BT, self.dtype) + place_BTC.astype(self.dtype)
        x_BTC = nn.Dropout(self.dropout, name='drop')(x_BTC, deterministic=not train)
        block = functools.partial(
            Block, self.heads, self.bias, self.dropout, self.dtype, out_init, self.attention_impl,
            self.routing, self.context, self.matmul,
        )  # fmt: skip
        x_BTC, layers = stack(
            block, x_BTC, cache and cache.length_B, layers=cache and cache.layers,
            depth=self.depth, scan=self.scan, remat=self.remat, microbatches=self.microbatches,
            train=train,
        )  # fmt: skip
        x_BTC = LayerNorm(use_bias=self.bias, dtype=self.dtype, name='norm')(x_BTC)
        return logits(x_BTC, embedding_VC), layers


def forward_flops(
    *, vocab_size: int, length: int, depth: int, width: int, routing: Routing = DENSE
) -> int:
    """FLOPs of the matrix products in one example's forward pass, two for a multiply-add.

    Per layer 12 C^2 parameters and T^2 scores, of which attention takes and applies all, the
    masked ones too (the convention of Chowdhery et al. 2022, appendix B); then the output layer.
    The embedding is a look-up and counts nothing; of a mixture, what a token's experts compute.
    """
    mlp = routing.flops(2 * 8 * width**2, width)
    layer = length * (2 * 4 * width**2 + mlp) + 2 * 2 * length**2 * width
    return depth * layer + 2 * length * width * vocab_size

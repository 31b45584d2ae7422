"""BERT and RoBERTa: the encoder transformer (Devlin et al. 2019; Liu et al. 2019).

The heads are in `bigjax.models.bert_heads`.

Legend: B batch, T positions, C width, H heads, D = C / H, V vocabulary, P positions predicted,
K types, 1 a reduced dimension.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bigjax.nn.activations import gelu_erf
from bigjax.nn.attention import Implementation, attention, check_heads, split_projections
from bigjax.nn.constrain import enter, leave
from bigjax.nn.linear import Dense, embedding_logits
from bigjax.nn.norm import LayerNorm
from bigjax.nn.stack import stack, stacked_rules
from bigjax.strategy import Remat

# Devlin et al. 2019, table 6 of Turc et al. 2019 for the small ones, Wang et al. 2020 for MiniLM.
SIZES = {
    'tiny': {'depth': 2, 'heads': 2, 'width': 128, 'hidden': 512},
    'mini': {'depth': 4, 'heads': 4, 'width': 256, 'hidden': 1024},
    'small': {'depth': 4, 'heads': 8, 'width': 512, 'hidden': 2048},
    'medium': {'depth': 8, 'heads': 8, 'width': 512, 'hidden': 2048},
    'minilm': {'depth': 6, 'heads': 12, 'width': 384, 'hidden': 1536},
    'base': {'depth': 12, 'heads': 12, 'width': 768, 'hidden': 3072},
    'large': {'depth': 24, 'heads': 16, 'width': 1024, 'hidden': 4096},
}
# What the published models share, beside their size.
BERT_UNCASED = {'vocab_size': 30_522, 'positions': 512, 'types': 2, 'epsilon': 1e-12}
# RoBERTa numbers positions from 2, the number of its padding token being 1.
ROBERTA = {
    'vocab_size': 50_265,
    'positions': 512,
    'first_position': 2,
    'types': 1,
    'epsilon': 1e-5,
}

RULES = stacked_rules((
    (r'embedding$', ('vocab', 'embed')),
    (r'(position|type)$', (None, 'embed')),
    (r'qkv/kernel$', ('embed', 'heads', None, None)),
    (r'qkv/bias$', ('heads', None, None)),
    (r'attention/out/kernel$', ('heads', None, 'embed')),
    (r'mlp/up/kernel$', ('embed', 'mlp')),
    (r'mlp/up/bias$', ('mlp',)),
    (r'mlp/down/kernel$', ('mlp', 'embed')),
    (r'(pooler|transform)/kernel$', ('embed', None)),
    (r'output_bias$', ('vocab',)),
    (r'(next|classifier|span)/kernel$', ('embed', None)),
    (r'(next|classifier|span)/bias$', (None,)),
    (r'(scale|bias)$', ('embed',)),
))  # fmt: skip

# Where no tensor axis divides the vocabulary (50,265 is odd), its table is split along the width.
ODD_VOCAB_RULES = (
    (r'embedding$', (None, 'embed')),
    (r'output_bias$', (None,)),
    *RULES,
)

INIT = nn.initializers.normal(0.02)


class Block(nn.Module):
    """One layer, normalised after each addition: attend, add, norm; MLP, add, norm.

    Attributes:
      heads: number of attention heads; divides the width.
      hidden: width of the MLP's hidden layer.
      dropout: share of each branch set to zero in training.
      epsilon: added to the variance in norms.
      dtype: type of the computation.
      impl: implementation of attention.
    """

    heads: int
    hidden: int
    dropout: float
    epsilon: float
    dtype: Any
    impl: Implementation = 'auto'

    @nn.compact
    def __call__(self, x_BTC, layer, mask_B11T, *, train: bool = False):
        """Returns the next x [B, T, C], and None; `layer` is not used (see `bigjax.nn.stack`)."""
        norm = functools.partial(LayerNorm, epsilon=self.epsilon, dtype=self.dtype)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        attend = SelfAttention(self.heads, self.dtype, self.impl, name='attention')
        h_BTC = leave(attend(enter(x_BTC), mask_B11T))
        x_BTC = norm(name='attention_norm')(x_BTC + drop(h_BTC))
        h_BTC = leave(MLP(self.hidden, self.dtype, name='mlp')(enter(x_BTC)))
        return norm(name='mlp_norm')(x_BTC + drop(h_BTC)), None


class SelfAttention(nn.Module):
    """Self-attention of every position to all that `mask` lets be seen.

    Attributes:
      heads: number of heads; divides the width.
      dtype: type of the computation.
      impl: implementation of attention.
    """

    heads: int
    dtype: Any
    impl: Implementation = 'auto'

    @nn.compact
    def __call__(self, x_BTC: jax.Array, mask_B11T: jax.Array) -> jax.Array:
        C, H = x_BTC.shape[-1], self.heads
        qkv = Dense((H, 3, C // H), kernel_init=INIT, dtype=self.dtype, name='qkv')(x_BTC)
        q_BTHD, k_BTHD, v_BTHD = split_projections(qkv)
        o_BTHD = attention(q_BTHD, k_BTHD, v_BTHD, mask=mask_B11T, impl=self.impl)
        options = {'kernel_init': INIT, 'dtype': self.dtype, 'reads': 'heads'}
        return Dense(C, in_dims=2, name='out', **options)(o_BTHD)


class MLP(nn.Module):
    """Two dense layers with GELU between them.

    Attributes:
      hidden: width between them.
      dtype: type of the computation.
    """

    hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BTC: jax.Array) -> jax.Array:
        options = {'kernel_init': INIT, 'dtype': self.dtype}
        up = Dense(self.hidden, name='up', **options)
        down = Dense(x_BTC.shape[-1], reads='mlp', name='down', **options)
        return down(gelu_erf(up(x_BTC)))


class BERT(nn.Module):
    """The encoder: tokens in, one vector a position out; without the pooler, which heads have.

    Post-norm blocks after the normalised sum of token, position and type embeddings. Padding is
    seen by no position. Parameters are float32, whatever `dtype`; they are drawn from a normal
    distribution with deviation 0.02. There is no dropout inside of attention (the papers have it
    on its weights, too).

    Attributes:
      vocab_size: number of tokens.
      positions: the most tokens the model can see.
      depth: number of layers.
      heads: number of attention heads; divides the width.
      width: width of the residual stream.
      hidden: width of the MLPs' hidden layer.
      types: number of token types: 2 in BERT, 1 (which says nothing) in RoBERTa.
      separator: token after the first of which tokens are of type 1; None, all are of type 0.
      first_position: number of the first position: 0 in BERT, 2 in RoBERTa.
      epsilon: added to the variance in norms.
      dropout: share of embeddings and branches set to zero in training.
      scan: whether the layers are scanned, one compiled body, or unrolled.
      remat: what layers compute again for the gradient; see `bigjax.nn.stack`.
      dtype: type of the computation, float32 or bfloat16.
      attention_impl: implementation of attention.
    """

    vocab_size: int
    positions: int = 512
    depth: int = 12
    heads: int = 12
    width: int = 768
    hidden: int = 3072
    types: int = 2
    separator: int | None = None
    first_position: int = 0
    epsilon: float = 1e-12
    dropout: float = 0.1
    scan: bool = False
    remat: Remat = 'none'
    dtype: Any = jnp.float32
    attention_impl: Implementation = 'auto'

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.heads, self.width)

    def setup(self) -> None:
        rows = self.positions + self.first_position
        self.embedding = self.param('embedding', INIT, (self.vocab_size, self.width))
        self.position = self.param('position', INIT, (rows, self.width))
        self.type = self.param('type', INIT, (self.types, self.width))
        self.norm = LayerNorm(epsilon=self.epsilon, dtype=self.dtype)
        self.drop = nn.Dropout(self.dropout)

    @nn.compact
    def __call__(
        self, tokens_BT: jax.Array, types_BT: jax.Array | None = None, *, train: bool = False
    ) -> jax.Array:
        """Returns [B, T, C] in `dtype` for int32 tokens [B, T], negative = padding, at the end.

        What stands at a position of padding means nothing. `types_BT` None derives the types from
        `separator`. Needs the rng 'dropout' where `train` and a dropout above zero.

        Raises:
          ValueError: more tokens than `positions`.
        """
        x_BTC = self.drop(self._embed(tokens_BT, types_BT), deterministic=not train)
        block = functools.partial(
            Block, self.heads, self.hidden, self.dropout, self.epsilon, self.dtype,
            self.attention_impl,
        )  # fmt: skip
        mask_B11T = (tokens_BT >= 0)[:, None, None]
        return stack(
            block, x_BTC, mask_B11T, depth=self.depth, scan=self.scan, remat=self.remat, train=train
        )[0]

    def _embed(self, tokens_BT: jax.Array, types_BT: jax.Array | None) -> jax.Array:
        length = tokens_BT.shape[1]
        if length > self.positions:
            raise ValueError(f'{length} positions: the model sees {self.positions}')
        if types_BT is None:
            types_BT = token_types(tokens_BT, self.separator if self.types > 1 else None)
        places = slice(self.first_position, self.first_position + length)
        x_BTC = jnp.take(self.embedding, jnp.maximum(tokens_BT, 0), axis=0)
        x_BTC += self.position[None, places] + _typed(self.type, types_BT)
        return self.norm(x_BTC)

    def attend(self, x_BPC: jax.Array) -> jax.Array:
        """Returns float32 logits [B, P, V]: products of vectors with the tokens' embeddings."""
        return embedding_logits(x_BPC.astype(self.dtype), self.embedding)


def token_types(tokens_BT: jax.Array, separator: int | None) -> jax.Array:
    """Returns int32 [B, T]: 0 up to and including the first `separator`, 1 after it."""
    if separator is None:
        return jnp.zeros_like(tokens_BT)
    ends_BT = (tokens_BT == separator).astype(jnp.int32)
    return jnp.minimum(jnp.cumsum(ends_BT, 1) - ends_BT, 1)


def _typed(table_KC: jax.Array, types_BT: jax.Array) -> jax.Array:
    if table_KC.shape[0] == 1:
        return table_KC[None]
    # A product, because the gradient of a look-up in two rows adds up one position at a time.
    return jax.nn.one_hot(types_BT, table_KC.shape[0], dtype=table_KC.dtype) @ table_KC


def forward_flops(
    *, length: int, depth: int, width: int, hidden: int, vocab_size: int = 0, predictions: int = 0
) -> int:
    """FLOPs of the matrix products in one example's forward pass, two for a multiply-add.

    Per layer 4 C^2 + 2 C M parameters and T^2 scores, taken and applied; for each masked token
    predicted, the transformation and the output layer. Look-ups and the heads of a few classes
    count nothing.
    """
    layer = 2 * length * (4 * width**2 + 2 * width * hidden) + 2 * 2 * length**2 * width
    return depth * layer + 2 * predictions * (width**2 + width * vocab_size)

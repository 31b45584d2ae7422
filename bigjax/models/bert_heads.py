"""Heads of BERT and RoBERTa: masked tokens, next sentence, classes of texts and of tokens, spans.

Legend: B batch, T positions, C width, V vocabulary, P positions predicted, K classes, 1 a reduced
dimension.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from bigjax.models.bert import BERT, INIT
from bigjax.nn.activations import gelu_erf
from bigjax.nn.linear import Dense
from bigjax.nn.norm import LayerNorm


def mean_pool(x_BTC: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Returns the mean [B, C] over the positions that are no padding; zero for an empty row."""
    real_BT1 = (tokens_BT >= 0)[..., None].astype(x_BTC.dtype)
    return (x_BTC * real_BT1).sum(1) / jnp.maximum(real_BT1.sum(1), 1)


class Pooler(nn.Module):
    """The first position's vector through a dense layer and tanh: [B, T, C] -> [B, C]."""

    @nn.compact
    def __call__(self, x_BTC: jax.Array) -> jax.Array:
        C, first_BC = x_BTC.shape[-1], x_BTC[:, 0]
        kernel = self.param('kernel', INIT, (C, C)).astype(x_BTC.dtype)
        bias = self.param('bias', nn.initializers.zeros_init(), (C,)).astype(x_BTC.dtype)
        return jnp.tanh(first_BC @ kernel + bias[None])


class MaskedLM(nn.Module):
    """What the masked tokens were, with the embedding as output layer; BERT: does B follow A.

    Attributes:
      encoder: the encoder.
      next_sentence: whether to predict that, too.
    """

    encoder: BERT
    next_sentence: bool = False

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BP: jax.Array | None = None,
        types_BT: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns float32 logits [B, P, V] at some positions (None: all), and [B, 2] or None.

        Of the two, the first says that the second text follows, the second that it does not.
        """
        dtype, epsilon = self.encoder.dtype, self.encoder.epsilon
        x_BTC = self.encoder(tokens_BT, types_BT, train=train)
        x_BPC = x_BTC
        if positions_BP is not None:
            x_BPC = jnp.take_along_axis(x_BTC, positions_BP[..., None], axis=1)
        transform = Dense(x_BTC.shape[-1], kernel_init=INIT, dtype=dtype, name='transform')
        x_BPC = LayerNorm(epsilon=epsilon, dtype=dtype, name='norm')(gelu_erf(transform(x_BPC)))
        zeros, shape = nn.initializers.zeros_init(), (self.encoder.vocab_size,)
        bias_V = self.param('output_bias', zeros, shape)
        logits_BPV = self.encoder.attend(x_BPC) + bias_V[None, None]
        if not self.next_sentence:
            return logits_BPV, None
        pooled_BC = Pooler(name='pooler')(x_BTC)
        return logits_BPV, Dense(2, kernel_init=INIT, name='next')(pooled_BC.astype(jnp.float32))


class SequenceClassifier(nn.Module):
    """Classes of a text or a pair of texts.

    Attributes:
      encoder: the encoder.
      classes: K.
      pool: what they are read from: the first position through the pooler, or all positions' mean.
    """

    encoder: BERT
    classes: int
    pool: Literal['first', 'mean'] = 'first'

    @nn.compact
    def __call__(self, tokens_BT: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns float32 logits [B, K] for int32 tokens [B, T], negative = padding."""
        x_BTC = self.encoder(tokens_BT, train=train)
        if self.pool == 'first':
            pooled_BC = Pooler(name='pooler')(x_BTC)
        else:
            pooled_BC = mean_pool(x_BTC, tokens_BT)
        pooled_BC = nn.Dropout(self.encoder.dropout)(pooled_BC, deterministic=not train)
        head = Dense(self.classes, kernel_init=INIT, name='classifier')
        return head(pooled_BC.astype(jnp.float32))


class TokenClassifier(nn.Module):
    """Classes of every token; with two of them, where an answer starts and where it ends.

    Attributes:
      encoder: the encoder.
      classes: K.
      head: name of the last layer: 'classifier', or 'span'.
    """

    encoder: BERT
    classes: int
    head: Literal['classifier', 'span'] = 'classifier'

    @nn.compact
    def __call__(self, tokens_BT: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns float32 logits [B, T, K] for int32 tokens [B, T], negative = padding."""
        x_BTC = self.encoder(tokens_BT, train=train)
        if self.head == 'classifier':
            x_BTC = nn.Dropout(self.encoder.dropout)(x_BTC, deterministic=not train)
        return Dense(self.classes, kernel_init=INIT, name=self.head)(x_BTC.astype(jnp.float32))

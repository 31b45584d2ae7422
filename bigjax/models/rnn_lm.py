"""Recurrent language model (Mikolov et al. 2010; Zaremba et al. 2014): tokens in, logits out.

Shape legend: B batch, T time, N = T·B, E embedding, H state features, V vocabulary.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bigjax.experiment import UsageError
from bigjax.nn.recurrent import GATES, Cell, RecurrentStack, RecurrentState, zero_state

# The three models of Zaremba et al. (2014) on the 10,000 words of the Penn Treebank.
SIZES = {
    'small': {'embed': 200, 'features': 200, 'layers': 2, 'dropout': 0.0},
    'medium': {'embed': 650, 'features': 650, 'layers': 2, 'dropout': 0.5},
    'large': {'embed': 1500, 'features': 1500, 'layers': 2, 'dropout': 0.65},
}

RULES = (
    (r'embedding$', ('vocab', 'embed')),
    (r'layer_\d+/\w+_kernel$', ('embed', None)),
    (r'layer_\d+/\w+_bias$', (None,)),
    (r'output_kernel$', ('embed', 'vocab')),
    (r'output_bias$', ('vocab',)),
)

Cache = tuple[RecurrentState, ...]


class RecurrentLM(nn.Module):
    """Embedding, a stack of recurrent layers, and a linear output over the vocabulary.

    Dropout acts where Zaremba et al. (2014) put it: on what goes into each layer and into the
    output, not on what goes from step to step. Parameters and logits are float32.

    Attributes:
        vocab_size: number of tokens.
        embed: width of the embedding.
        features: state features of each layer.
        layers: number of recurrent layers.
        cell: 'elman', 'lstm' or 'gru'.
        tied: whether the output layer is the embedding, transposed (Press and Wolf, 2017).
        dropout: rate in training.
        dtype: type of the computation, float32 or bfloat16.
    """

    vocab_size: int
    embed: int = 128
    features: int = 128
    layers: int = 1
    cell: Cell = 'lstm'
    tied: bool = False
    dropout: float = 0.0
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tied and self.embed != self.features:
            raise UsageError(
                f'--embed={self.embed}: must equal --width={self.features} with --tied; '
                f'try --embed={self.features}'
            )

    def setup(self) -> None:
        # Rows of length one: of the size of a state, whichever end they stand at.
        init = nn.initializers.normal(self.embed**-0.5)
        self.embedding = self.param('embedding', init, (self.vocab_size, self.embed))
        if not self.tied:
            init, shape = nn.initializers.lecun_normal(), (self.features, self.vocab_size)
            self.output_kernel = self.param('output_kernel', init, shape)
        zeros = nn.initializers.zeros_init()
        self.output_bias = self.param('output_bias', zeros, (self.vocab_size,))
        self.recurrent = RecurrentStack(
            self.features,
            layers=self.layers,
            cell=self.cell,
            time_major=True,
            dropout=self.dropout,
            dtype=self.dtype,
        )
        self.drop = nn.Dropout(self.dropout)

    def __call__(self, tokens_BT: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns float32 logits [B, T, V] for int32 tokens [B, T], from an empty state.

        Needs the 'dropout' generator when `train` and `dropout` > 0.
        """
        return self._run(tokens_BT, None, train)[0]

    def decode(self, tokens_BT: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Returns the logits [B, T, V] of tokens that follow those in the cache, and the new cache.

        Used as `model.apply(variables, tokens, cache, method='decode')`.
        """
        return self._run(tokens_BT, cache, False)

    def init_cache(self, batch: int) -> Cache:
        """Returns the states of `batch` rows that have read nothing; call it without `apply`."""
        state = zero_state(batch, self.features, cell=self.cell, dtype=self.dtype)
        return (state,) * self.layers

    def _run(self, tokens_BT: jax.Array, states: Cache | None, train: bool):
        tokens_TB: jax.Array | None = jnp.asarray(tokens_BT).T
        T, x = tokens_BT.shape[1], self.embedding
        if train and self.dropout:  # Else the layer may project the whole table, which is shorter.
            x, tokens_TB = self.drop(x[tokens_TB], deterministic=False), None
        y_TBH, states = self.recurrent(x, tokens_BT=tokens_TB, states=states, train=train)
        y_TBH = self.drop(y_TBH, deterministic=not train)
        # Here, where it is narrow, time goes behind the batch; on two dimensions, as in Dense.
        y_NH = jnp.swapaxes(y_TBH, 0, 1).reshape(-1, self.features)
        kernel_HV = self.embedding.T if self.tied else self.output_kernel
        logits_NV = jnp.matmul(
            y_NH, kernel_HV.astype(self.dtype), preferred_element_type=jnp.float32
        )
        return (logits_NV + self.output_bias[None]).reshape(-1, T, self.vocab_size), states


def forward_flops(
    *, vocab_size: int, length: int, embed: int, features: int, layers: int, cell: Cell = 'lstm'
) -> int:
    """Matrix-product FLOPs of one example's forward pass, two for a multiply-add.

    For each token 2 · G (C + H) a layer, G = 4H in an LSTM, 3H in a GRU, H in Elman's network, and
    2 · H · V for the output. The embedding is a look-up and counts nothing.
    """
    widths = [embed] + [features] * (layers - 1)
    layer_flops = sum(2 * GATES[cell] * features * (width + features) for width in widths)
    return length * (layer_flops + 2 * features * vocab_size)

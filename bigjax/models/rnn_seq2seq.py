"""Recurrent encoder and decoder, with additive attention between them or a fixed vector.

Legend: B source texts, N rows of the decoder (B, or B times the beam), S source positions, T target
positions, E embedding, H state features, K = 2H features of the encoder's outputs, A attention
features, G = 3H gate features, V vocabulary.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from bigjax.nn.additive import AttendingWeights, attending_gru, attending_gru_scan, gru_cell
from bigjax.nn.gru import gru_scan
from bigjax.nn.linear import Dense, embedding_logits
from bigjax.nn.recurrent import RecurrentStack

# Bahdanau et al. 2015, appendix A.2.3: RNNsearch; and one for two CPU cores.
SIZES = {
    'small': {'depth': 1, 'embed': 128, 'width': 128},
    'rnnsearch': {'depth': 1, 'embed': 620, 'width': 1000},
}

RULES = (
    (r'embedding$', ('vocab', 'embed')),
    (r'logits_bias$', ('vocab',)),
    (r'(kernel|query|memory)$', ('embed', None)),
    (r'(bias|score)$', (None,)),
)


class Memory(NamedTuple):
    """What the decoder reads of the source.

    Attributes:
      keys_BSA: projected outputs of the encoder; None without attention.
      values_BSK: these outputs, or without attention the one vector [B, 1, K] there is.
      real_BS: where the source has tokens.
      h_BH: the state that decoding starts from.
    """

    keys_BSA: jax.Array | None
    values_BSK: jax.Array
    real_BS: jax.Array
    h_BH: jax.Array


class RecurrentSeq2Seq(nn.Module):
    """Bidirectional encoder and a decoder of gated recurrent units (Cho et al. 2014).

    With attention (Bahdanau et al. 2015) each step of the decoder reads a sum of the encoder's
    outputs that is weighted anew; without (Cho et al. 2014, Sutskever et al. 2014) every step reads
    the encoder's last states. One embedding serves both sides and, transposed, the output layer.
    Parameters and logits are float32, whatever `dtype`.

    Attributes:
      vocab_size: number of tokens, those that begin and end a text included.
      depth: layers of the encoder.
      embed: width of the embedding.
      width: state features of the decoder and of each direction of the encoder.
      attention: whether the decoder attends.
      dropout: share of embeddings, encoder outputs and readouts set to zero in training.
      dtype: type of the computation.
    """

    vocab_size: int
    depth: int = 1
    embed: int = 128
    width: int = 128
    attention: bool = True
    dropout: float = 0.0
    dtype: Any = jnp.float32

    def setup(self) -> None:
        E, H, K = self.embed, self.width, 2 * self.width
        fan, zeros = nn.initializers.lecun_normal(), nn.initializers.zeros_init()
        init = nn.initializers.normal(E**-0.5)
        self.embedding = self.param('embedding', init, (self.vocab_size, E))
        self.bias_V = self.param('logits_bias', zeros, (self.vocab_size,))
        self.encoder = RecurrentStack(
            H,
            layers=self.depth,
            cell='gru',
            direction='both',
            dropout=self.dropout,
            dtype=self.dtype,
        )
        self.bridge = Dense(H, dtype=self.dtype)
        self.input = Dense(3 * H, dtype=self.dtype)
        if self.attention:
            self.query_HA = self.param('query', fan, (H, H))
            self.memory_KA = self.param('memory', fan, (K, H))
            self.score_A = self.param('score', nn.initializers.normal(H**-0.5), (H,))
        self.context_KG = self.param('context_kernel', fan, (K, 3 * H))
        orthogonal = nn.initializers.orthogonal()
        self.recurrent_HG = self.param('recurrent_kernel', orthogonal, (H, 3 * H))
        self.bias_H = self.param('recurrent_bias', zeros, (H,))
        self.readout = Dense(E, dtype=self.dtype)
        self.drop = nn.Dropout(self.dropout)

    def __call__(
        self, source_BS: jax.Array, target_BT: jax.Array, *, train: bool = False
    ) -> jax.Array:
        """Returns float32 logits [B, T, V] of the token after each of `target_BT`.

        Args:
          source_BS: int32; negative is padding, which changes nothing.
          target_BT: int32, the token that begins a text first; negative is read as token 0.
          train: whether there is dropout, from the rng 'dropout'.
        """
        memory = self._encode(source_BS, train)
        y_TBE = self.drop(self._embed(target_BT.T), deterministic=not train)
        z_TBG, weights = self.input(y_TBE), self._weights()
        if memory.keys_BSA is not None:
            h_TBH, context_TBK = attending_gru_scan(
                z_TBG, memory.h_BH, memory.keys_BSA, memory.values_BSK, memory.real_BS, weights
            )
        else:
            context_BK = memory.values_BSK[:, 0]
            z_TBG += (context_BK @ weights.context_KG)[None]
            no_bias_G = jnp.zeros_like(z_TBG, shape=z_TBG.shape[-1:])
            h_TBH, _ = gru_scan(
                z_TBG, weights.recurrent_HG, no_bias_G, weights.bias_H, memory.h_BH, None, False
            )
            context_TBK = jnp.broadcast_to(context_BK[None], (*h_TBH.shape[:2], 2 * self.width))
        logits_TBV = self._logits(h_TBH, context_TBK, y_TBE, train)
        return logits_TBV.swapaxes(0, 1)

    def start(self, source_BS: jax.Array) -> Memory:
        """Returns what decoding needs of the source."""
        return self._encode(source_BS, False)

    def init_cache(self, rows: int, length: int, memory: Memory) -> jax.Array:
        """Returns the states [N, H] that decoding starts from."""
        del length
        return jnp.repeat(memory.h_BH, rows // memory.h_BH.shape[0], axis=0)

    cache_axis = 0

    def decode(
        self, token_N: jax.Array, position: jax.Array, cache: jax.Array, memory: Memory
    ) -> tuple[jax.Array, jax.Array]:
        """Returns logits [N, V] of what follows `token_N`, and the states with it.

        Args:
          token_N: int32, the token before, of each row; N is B, or B times the beam with the rows
            of one text together.
          position: not used; the state knows it.
          cache: what `init_cache` or `decode` gave.
          memory: what `start` gave.
        """
        del position
        y_NE, weights = self._embed(token_N), self._weights()
        z_NG = self.input(y_NE)
        if memory.keys_BSA is not None:
            h_NH, context_NK = attending_gru(
                z_NG, cache, memory.keys_BSA, memory.values_BSK, memory.real_BS, weights
            )
        else:
            beam = len(token_N) // len(memory.values_BSK)
            context_NK = jnp.repeat(memory.values_BSK[:, 0], beam, axis=0)
            h_NH = gru_cell(z_NG + context_NK @ weights.context_KG, cache, weights)
        return self._logits(h_NH, context_NK, y_NE, False), h_NH

    def _encode(self, source_BS: jax.Array, train: bool) -> Memory:
        real_BS = source_BS >= 0
        x_BSE = self.drop(self._embed(source_BS), deterministic=not train)
        y_BSK, states = self.encoder(x_BSE, mask_BT=real_BS, train=train)
        y_BSK = self.drop(y_BSK, deterministic=not train)
        last_BK = states[-1].h
        h_BH = jnp.tanh(self.bridge(last_BK))
        if not self.attention:
            return Memory(None, last_BK[:, None], real_BS, h_BH)
        flat_NK = y_BSK.reshape(-1, y_BSK.shape[-1])
        keys_BSA = (flat_NK @ self.memory_KA.astype(self.dtype)).reshape(*source_BS.shape, -1)
        return Memory(keys_BSA, y_BSK, real_BS, h_BH)

    def _weights(self) -> AttendingWeights:
        cast = lambda x: x.astype(self.dtype)  # noqa: E731
        return AttendingWeights(
            query_HA=cast(self.query_HA) if self.attention else None,
            score_A=cast(self.score_A) if self.attention else None,
            context_KG=cast(self.context_KG),
            recurrent_HG=cast(self.recurrent_HG),
            bias_H=cast(self.bias_H),
        )

    def _embed(self, tokens: jax.Array) -> jax.Array:
        return jnp.take(self.embedding, jnp.maximum(tokens, 0), axis=0).astype(self.dtype)

    def _logits(self, h: jax.Array, context: jax.Array, y: jax.Array, train: bool) -> jax.Array:
        read = jnp.tanh(self.readout(jnp.concatenate([h, context, y], axis=-1)))
        read = self.drop(read, deterministic=not train)
        return embedding_logits(read, self.embedding, self.bias_V)


def forward_flops(
    *,
    vocab_size: int,
    source_length: int,
    target_length: int,
    depth: int,
    embed: int,
    width: int,
    attention: bool = True,
) -> int:
    """FLOPs of the matrix products in one example's forward pass, two for a multiply-add."""
    S, T, E, H, K = source_length, target_length, embed, width, 2 * width
    layers = sum(2 * 3 * H * (inputs + H) for inputs in [E] + [K] * (depth - 1))
    flops = S * 2 * layers + 2 * K * H
    flops += T * (2 * 3 * H * (E + H) + 2 * (H + K + E) * E + 2 * E * vocab_size)
    if not attention:
        return flops + 2 * K * 3 * H
    # Keys once; at each step the query, the scores, the sum of values and the gates' share of it.
    return flops + S * 2 * K * H + T * (2 * H * H + 2 * S * H + 2 * S * K + 2 * K * 3 * H)

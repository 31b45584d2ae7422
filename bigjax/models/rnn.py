"""Recurrent classifier of token sequences: Elman, LSTM or GRU layers, one or both directions.

Shape legend: B batch, T time, E embedding, K outputs of one layer, V vocabulary.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from bigjax.nn.linear import Dense
from bigjax.nn.recurrent import GATES, Cell, RecurrentStack

RULES = (
    # Not along the vocabulary: the layers, which are the work, have nothing that tensor shares out.
    (r'embed/embedding$', (None, 'embed')),
    (r'layer_\d+/\w+_kernel$', ('embed', None)),
    (r'layer_\d+/\w+_bias$', (None,)),
    (r'head/kernel$', ('embed', None)),
    (r'head/bias$', (None,)),
)


class RecurrentClassifier(nn.Module):
    """Embedding, a stack of recurrent layers with dropout between them, pooling, a dense layer.

    Attributes:
        classes: number of classes.
        vocab: number of token ids.
        embed: width of the embedding.
        features: state features of each layer and direction.
        layers: number of recurrent layers.
        cell: 'elman', 'lstm' or 'gru'.
        direction: 'forward' or 'both'.
        pool: 'last' (the state after each direction's last valid step), 'mean' or 'max' over the
            valid steps.
        dropout: rate between layers and before the dense layer.
        dtype: compute type; parameters are float32.
    """

    classes: int
    vocab: int = 256
    embed: int = 128
    features: int = 128
    layers: int = 2
    cell: Cell = 'lstm'
    direction: Literal['forward', 'both'] = 'both'
    pool: Literal['last', 'mean', 'max'] = 'last'
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens_BT: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns logits [B, classes] in float32; `tokens_BT` is int32, negative = padding.

        A row without tokens gets the logits of the zero vector. Needs the 'dropout' generator
        when `train` and `dropout` > 0. Raises ValueError on an unknown `pool`.
        """
        if self.pool not in ('last', 'mean', 'max'):
            raise ValueError(f'--pool={self.pool}: must be last, mean or max; try --pool=last')
        # Turning the small integer array over spares every layer two transposes.
        tokens_TB = jnp.asarray(tokens_BT).T
        mask_TB = tokens_TB >= 0
        embed = nn.Embed(self.vocab, self.embed, name='embed')
        stack = RecurrentStack(
            self.features,
            layers=self.layers,
            cell=self.cell,
            direction=self.direction,
            time_major=True,
            dropout=self.dropout,
            dtype=self.dtype,
            name='recurrent',
        )
        y_TBK, states = stack(
            embed.embedding, tokens_BT=jnp.maximum(tokens_TB, 0), mask_BT=mask_TB, train=train
        )
        pooled_BK = _pool(self.pool, y_TBK, states[-1].h, mask_TB)
        pooled_BK = nn.Dropout(self.dropout)(pooled_BK, deterministic=not train)
        head = Dense(self.classes, dtype=self.dtype, name='head')
        return head(pooled_BK).astype(jnp.float32)


def _pool(kind: str, y_TBK: jax.Array, h_BK: jax.Array, mask_TB: jax.Array) -> jax.Array:
    if kind == 'last':
        return h_BK
    mask_TBK = mask_TB[:, :, None]
    count_B = mask_TB.sum(0)
    if kind == 'mean':
        return jnp.where(mask_TBK, y_TBK, 0).sum(0) / jnp.maximum(count_B, 1)[:, None]
    most_BK = jnp.where(mask_TBK, y_TBK, -jnp.inf).max(0)
    return jnp.where(count_B[:, None] > 0, most_BK, 0)


def forward_flops(
    *,
    length: int,
    classes: int,
    embed: int = 128,
    features: int = 128,
    layers: int = 2,
    cell: Cell = 'lstm',
    direction: str = 'both',
) -> int:
    """Matrix-product FLOPs of one sequence of `length` tokens through `RecurrentClassifier`.

    The sum over layers of 2 · G (C + H) for each step and direction, G = 4H in an LSTM, 3H in a
    GRU, H in Elman's network; plus the dense layer.
    """
    ways = 2 if direction == 'both' else 1
    widths = [embed] + [ways * features] * (layers - 1)
    steps = sum(2 * GATES[cell] * features * (width + features) for width in widths)
    return length * ways * steps + 2 * ways * features * classes

"""Feed-forward networks for tables: regression (one output) or classification (one per class).

Legend: B rows, F features.
"""

from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from bigjax.nn.linear import Dense

# A table's columns and the outputs rarely divide over a mesh axis; the hidden widths do.
RULES = (
    (r'hidden_0/kernel', (None, 'mlp')),
    (r'hidden_\d+/kernel', ('embed', 'mlp')),
    (r'hidden_\d+/bias', ('mlp',)),
    (r'head/kernel', (None, None)),
    (r'head/bias', (None,)),
)

_ACTIVATIONS = {'relu': nn.relu, 'gelu': nn.gelu}


def hidden_widths(width: int, depth: int) -> tuple[int, ...]:
    """Widths of `depth` equal hidden layers."""
    return (width,) * depth


class MLP(nn.Module):
    """Dense layers with an activation ('relu' or 'gelu', tanh form) and dropout, then a dense head.

    Features [B, F] float; returns [B, outputs] float32: outputs=1 for regression, else the logits
    of the classes. Raises ValueError for another activation.
    """

    outputs: int
    widths: tuple[int, ...] = (128, 128)
    activation: str = 'relu'
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BF: jax.Array, *, train: bool) -> jax.Array:
        """Returns [B, outputs] in float32."""
        if self.activation not in _ACTIVATIONS:
            raise ValueError(
                f'activation={self.activation!r} is unknown; use one of {tuple(_ACTIVATIONS)}'
            )
        act = _ACTIVATIONS[self.activation]
        for i, width in enumerate(self.widths):
            x_BF = act(Dense(width, dtype=self.dtype, name=f'hidden_{i}')(x_BF))
            x_BF = nn.Dropout(self.dropout, deterministic=not train)(x_BF)
        return Dense(self.outputs, dtype=self.dtype, name='head')(x_BF).astype(jnp.float32)


def forward_flops(features: int, outputs: int, *, widths: tuple[int, ...] = (128, 128)) -> int:
    """Matrix-product FLOPs (2 × multiply-adds) of one row's forward pass."""
    sizes = (features, *widths, outputs)
    return sum(2 * a * b for a, b in pairwise(sizes))

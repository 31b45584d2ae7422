"""A small convolutional network for images: twice convolution, ReLU, max-pooling; dense; dense.

Legend: B batch, H W rows and columns, C channels, F flattened features.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from bigjax.nn.conv import Conv, conv_flops
from bigjax.nn.implementation import Implementation
from bigjax.nn.linear import Dense
from bigjax.nn.pooling import max_pool

# The first kernel has one or three input channels and the head has as many columns as classes:
# neither divides over a mesh axis.
RULES = (
    (r'conv_0/kernel', (None, None, None, 'channels')),
    (r'conv_\d+/kernel', (None, None, 'embed', 'channels')),
    (r'conv_\d+/bias', ('channels',)),
    (r'hidden/kernel', ('embed', 'mlp')),
    (r'hidden/bias', ('mlp',)),
    (r'head/kernel', ('embed', None)),
    (r'head/bias', (None,)),
)


class CNN(nn.Module):
    """Convolutions with ReLU and 2×2 max-pooling, one hidden dense layer, dropout, dense classes.

    Images [B, H, W, C] float, from 4×4 up (pooling stops at images under 4 pixels); logits
    [B, classes] float32. Dropout (rng 'dropout') acts on the hidden layer, `conv_dropout` on whole
    feature maps after each pooling. `conv_impl` is of the convolutions (`bigjax.nn.conv`). LeCun et
    al. 1998, "Gradient-based learning applied to document recognition".
    """

    classes: int
    features: tuple[int, ...] = (32, 64)
    hidden: int = 128
    dropout: float = 0.0
    conv_dropout: float = 0.0
    dtype: Any = jnp.float32
    conv_impl: Implementation = 'auto'

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, *, train: bool) -> jax.Array:
        """Returns logits [B, classes] in float32."""
        for i, features in enumerate(self.features):
            conv = Conv(features, dtype=self.dtype, impl=self.conv_impl, name=f'conv_{i}')
            x_BHWC = conv(x_BHWC)
            # relu(max_pool(x)) = max_pool(relu(x)), gradients too, on a quarter of the pixels.
            if min(x_BHWC.shape[1:3]) >= 4:
                x_BHWC = max_pool(x_BHWC)
            x_BHWC = nn.relu(x_BHWC)
            drop = nn.Dropout(self.conv_dropout, broadcast_dims=(1, 2), deterministic=not train)
            x_BHWC = drop(x_BHWC)
        x_BF = x_BHWC.reshape(x_BHWC.shape[0], -1)
        x_BF = nn.relu(Dense(self.hidden, dtype=self.dtype, name='hidden')(x_BF))
        x_BF = nn.Dropout(self.dropout, deterministic=not train)(x_BF)
        return Dense(self.classes, dtype=self.dtype, name='head')(x_BF).astype(jnp.float32)


def forward_flops(
    image_size: tuple[int, int],
    channels: int,
    classes: int,
    *,
    features: tuple[int, ...] = (32, 64),
    hidden: int = 128,
) -> int:
    """Convolution and matrix-product FLOPs (2 × multiply-adds) of one image's forward pass."""
    flops, size = 0, image_size
    for out in features:
        step, size = conv_flops(size, channels, out)
        flops, channels = flops + step, out
        if min(size) >= 4:
            size = (size[0] // 2, size[1] // 2)
    return flops + 2 * hidden * (size[0] * size[1] * channels + classes)

"""AlexNet in its single-tower form (Krizhevsky 2014), and a form of it for small images.

Krizhevsky et al. 2012, "ImageNet classification with deep convolutional neural networks", with the
widths of Krizhevsky 2014, "One weird trick for parallelizing convolutional neural networks"
(arXiv:1404.5997), as torchvision.

Legend: B batch, H W rows and columns, C channels, F features.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from bigjax.nn.conv import Conv, conv_flops
from bigjax.nn.implementation import Implementation
from bigjax.nn.linear import Dense
from bigjax.nn.pooling import adaptive_avg_pool, ceil_padding, max_pool

# The first kernel has three input channels or one, and the head as many columns as classes.
RULES = (
    (r'conv_0/kernel', (None, None, None, 'channels')),
    (r'conv_\d/kernel', (None, None, 'embed', 'channels')),
    (r'conv_\d/bias', ('channels',)),
    (r'hidden_0/kernel', (None, None, 'embed', 'mlp')),
    (r'hidden_1/kernel', ('embed', 'mlp')),
    (r'hidden_\d/bias', ('mlp',)),
    (r'head/kernel', ('embed', None)),
    (r'head/bias', (None,)),
)


class Layer(NamedTuple):
    """A convolution with `pad` pixels on all sides, and whether a max-pooling follows."""

    features: int
    kernel: int
    stride: int
    pad: int
    pooled: bool


# name: (the convolutions, units of the two hidden dense layers)
SIZES = {
    'one_tower': (
        (
            Layer(64, 11, 4, 2, True),
            Layer(192, 5, 1, 2, True),
            Layer(384, 3, 1, 1, False),
            Layer(256, 3, 1, 1, False),
            Layer(256, 3, 1, 1, True),
        ),
        4096,
    )
}
_SMALL_STEM: dict[str, Any] = {'kernel': 5, 'stride': 1, 'pad': 2}
_POOL: dict[str, Any] = {'window': (3, 3), 'strides': (2, 2)}
_MAP = (6, 6)  # what the dense layers read in the published form


class AlexNet(nn.Module):
    """AlexNet for images [B, H, W, C] of 63 pixels a side or more; logits [B, classes] float32.

    `width` is the first convolution's number of channels, with which the others scale, and `hidden`
    the units of the dense layers (0: the published ones). `small_stem` is for small images, from
    one pixel up: the first convolution is 5×5 with stride 1, pooling keeps the pixels at the far
    sides, and the dense layers read the last map as it is, not averaged to 6×6. Dropout (rng
    'dropout') acts before both hidden dense layers. `conv_impl` is of the convolutions
    (`bigjax.nn.conv`).
    """

    classes: int
    width: int = 0
    hidden: int = 0
    dropout: float = 0.5
    small_stem: bool = False
    dtype: Any = jnp.float32
    conv_impl: Implementation = 'auto'

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, *, train: bool) -> jax.Array:
        """Returns logits [B, classes] in float32."""
        layers, hidden = size(self.width, self.hidden, self.small_stem)
        for i, layer in enumerate(layers):
            x_BHWC = Conv(
                layer.features,
                kernel_size=(layer.kernel,) * 2,
                strides=(layer.stride,) * 2,
                padding=((layer.pad,) * 2,) * 2,
                activation=None if layer.pooled else 'relu',
                dtype=self.dtype,
                impl=self.conv_impl,
                name=f'conv_{i}',
            )(x_BHWC)
            # relu(max_pool(x)) = max_pool(relu(x)), gradients too, on fewer pixels.
            if layer.pooled:
                x_BHWC = max_pool(x_BHWC, padding='CEIL' if self.small_stem else 'VALID', **_POOL)
                x_BHWC = nn.relu(x_BHWC)
        x_BF = x_BHWC if self.small_stem else adaptive_avg_pool(x_BHWC, _MAP)
        for i in range(2):
            x_BF = nn.Dropout(self.dropout, deterministic=not train)(x_BF)
            dense = Dense(
                hidden,
                in_dims=x_BF.ndim - 1,
                dtype=self.dtype,
                kernel_init=nn.initializers.he_normal(),
                name=f'hidden_{i}',
            )
            x_BF = nn.relu(dense(x_BF))
        return Dense(self.classes, dtype=self.dtype, name='head')(x_BF).astype(jnp.float32)


def size(
    width: int = 0, hidden: int = 0, small_stem: bool = False
) -> tuple[tuple[Layer, ...], int]:
    """The convolutions and the units of a hidden dense layer; 0 takes the published ones."""
    layers: tuple[Layer, ...]
    layers, published = SIZES['one_tower']
    ratio = (width or layers[0].features) / layers[0].features
    layers = tuple(layer._replace(features=round(layer.features * ratio)) for layer in layers)
    if small_stem:
        layers = (layers[0]._replace(**_SMALL_STEM), *layers[1:])
    return layers, hidden or published


def forward_flops(
    image_size: tuple[int, int],
    channels: int,
    classes: int,
    *,
    width: int = 0,
    hidden: int = 0,
    small_stem: bool = False,
) -> int:
    """Convolution and dense-layer FLOPs (2 × multiply-adds) of one image's forward pass."""
    layers, hidden = size(width, hidden, small_stem)
    flops, hw = 0, image_size
    for layer in layers:
        step, hw = conv_flops(
            hw,
            channels,
            layer.features,
            kernel_size=(layer.kernel,) * 2,
            strides=(layer.stride,) * 2,
            padding=((layer.pad,) * 2,) * 2,
        )
        flops, channels = flops + step, layer.features
        if layer.pooled:
            pads = ceil_padding(hw, **_POOL) if small_stem else ((0, 0), (0, 0))
            hw = ((hw[0] + pads[0][1] - 3) // 2 + 1, (hw[1] + pads[1][1] - 3) // 2 + 1)
    pixels = hw[0] * hw[1] if small_stem else _MAP[0] * _MAP[1]
    return flops + 2 * hidden * (pixels * channels + hidden + classes)

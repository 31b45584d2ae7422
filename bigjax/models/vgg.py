"""VGG: 11 to 19 layers of 3×3 convolutions, with and without BatchNorm, and a small-image form.

Simonyan and Zisserman 2014, "Very deep convolutional networks for large-scale image recognition"
(arXiv:1409.1556), configurations A, B, D and E; with BatchNorm as torchvision.

Legend: B batch, H W rows and columns, C channels, F features.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from bigjax.experiment import UsageError
from bigjax.nn.conv import Conv, conv_flops
from bigjax.nn.implementation import Implementation
from bigjax.nn.linear import Dense
from bigjax.nn.pooling import adaptive_avg_pool, max_pool

# The first kernel has three input channels or one, and the head as many columns as classes.
RULES = (
    (r'stage_0_conv_0/kernel', (None, None, None, 'channels')),
    (r'conv_\d/kernel', (None, None, 'embed', 'channels')),
    (r'(conv|norm)_\d/(scale|bias)', ('channels',)),
    (r'hidden_0/kernel', (None, None, 'embed', 'mlp')),
    (r'hidden_1/kernel', ('embed', 'mlp')),
    (r'hidden_\d/bias', ('mlp',)),
    (r'head/kernel', ('embed', None)),
    (r'head/bias', (None,)),
)

# depth: convolutions per stage; a max-pooling ends each stage, three dense layers the network
SIZES = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
_WIDTH, _HIDDEN = 64, 4096
_FACTORS = (1, 2, 4, 8, 8)  # channels of a stage over those of the first
_MAP = (7, 7)  # what the dense layers read in the published form

_conv_init = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


class VGG(nn.Module):
    """VGG of a published depth (a key of SIZES) for images [B, H, W, C].

    `width` is the first stage's number of channels and `hidden` the units of the dense layers (0:
    64 and 4096). `small_stem` is for small images, from one pixel up: pooling keeps the pixels at
    the far sides of odd maps, and the dense layers read the last map (1×1 up to 32×32 pixels) as it
    is, not averaged to 7×7. Dropout (rng 'dropout') acts after both hidden dense layers.
    `conv_impl` is of the convolutions (`bigjax.nn.conv`). Variables: 'params' (float32) and, with
    `batch_norm`, 'batch_stats', updated when `train` under mutable=['batch_stats']. Logits
    [B, classes] float32. Raises UsageError for an unknown depth.
    """

    classes: int
    depth: int = 16
    batch_norm: bool = False
    width: int = 0
    hidden: int = 0
    dropout: float = 0.5
    small_stem: bool = False
    dtype: Any = jnp.float32
    conv_impl: Implementation = 'auto'

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, *, train: bool) -> jax.Array:
        """Returns logits [B, classes] in float32."""
        for s, (convs, features) in enumerate(size(self.depth, self.width)):
            for i in range(convs):
                pooled = i == convs - 1
                fused = not (self.batch_norm or pooled)
                conv = Conv(
                    features,
                    activation='relu' if fused else None,
                    dtype=self.dtype,
                    kernel_init=_conv_init,
                    impl=self.conv_impl,
                    name=f'stage_{s}_conv_{i}',
                )
                x_BHWC = conv(x_BHWC)
                if self.batch_norm:
                    x_BHWC = self._norm(f'stage_{s}_norm_{i}', train)(x_BHWC)
                if pooled:
                    # relu(max_pool(x)) = max_pool(relu(x)), gradients too, on a quarter of them.
                    x_BHWC = max_pool(x_BHWC, padding='CEIL' if self.small_stem else 'VALID')
                if not fused:
                    x_BHWC = nn.relu(x_BHWC)
        x_BF = x_BHWC if self.small_stem else adaptive_avg_pool(x_BHWC, _MAP)
        for i in range(2):
            dense = Dense(
                self.hidden or _HIDDEN,
                in_dims=x_BF.ndim - 1,
                dtype=self.dtype,
                kernel_init=nn.initializers.he_normal(),
                name=f'hidden_{i}',
            )
            x_BF = nn.Dropout(self.dropout, deterministic=not train)(nn.relu(dense(x_BF)))
        return Dense(self.classes, dtype=self.dtype, name='head')(x_BF).astype(jnp.float32)

    def _norm(self, name: str, train: bool) -> nn.BatchNorm:
        return nn.BatchNorm(
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
            name=name,
        )


def size(depth: int, width: int = 0) -> list[tuple[int, int]]:
    """Convolutions and channels of each stage; UsageError for an unknown depth."""
    if depth not in SIZES:
        raise UsageError(
            f'--depth={depth}: a VGG has one of {sorted(SIZES)} layers; try --depth=16'
        )
    widths = [(width or _WIDTH) * factor for factor in _FACTORS]
    return list(zip(SIZES[depth], widths, strict=True))


def forward_flops(
    image_size: tuple[int, int],
    channels: int,
    classes: int,
    *,
    depth: int = 16,
    width: int = 0,
    hidden: int = 0,
    small_stem: bool = False,
) -> int:
    """Convolution and dense-layer FLOPs (2 × multiply-adds) of one image's forward pass."""
    flops, (h, w) = 0, image_size
    for convs, features in size(depth, width):
        for _ in range(convs):
            flops += conv_flops((h, w), channels, features)[0]
            channels = features
        h, w = (-(-h // 2), -(-w // 2)) if small_stem else (h // 2, w // 2)
    hidden = hidden or _HIDDEN
    pixels = h * w if small_stem else _MAP[0] * _MAP[1]
    return flops + 2 * hidden * (pixels * channels + hidden + classes)

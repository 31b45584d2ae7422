"""Residual networks with BatchNorm: ResNet-18 to 152, and the 6n+2-layer form for small images.

He et al. 2015, "Deep residual learning for image recognition". Bottleneck blocks stride in their
3×3 convolution ("v1.5", as torchvision). Shortcuts that change shape are 1×1 convolutions (option
B) in every form. The last BatchNorm scale of each block starts at zero (Goyal et al. 2017), so that
every block starts as its shortcut.

Legend: B batch, H W rows and columns, C channels.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from bigjax.nn.conv import Conv, conv_flops
from bigjax.nn.implementation import Implementation
from bigjax.nn.linear import Dense
from bigjax.nn.pooling import global_avg_pool, max_pool

# The first kernel has three input channels or one, and the head as many columns as classes.
RULES = (
    (r'stem/kernel', (None, None, None, 'channels')),
    (r'(conv_\d|shortcut)/kernel', (None, None, 'embed', 'channels')),
    (r'norm(_\d)?/(scale|bias)', ('channels',)),
    (r'head/kernel', ('embed', None)),
    (r'head/bias', (None,)),
)

# depth: (blocks per stage, bottleneck blocks, width of the first stage)
SIZES = {
    18: ((2, 2, 2, 2), False, 64),
    34: ((3, 4, 6, 3), False, 64),
    50: ((3, 4, 6, 3), True, 64),
    101: ((3, 4, 23, 3), True, 64),
    152: ((3, 8, 36, 3), True, 64),
    # Small images (section 4.2 of the paper): 6n + 2 layers, three stages.
    20: ((3, 3, 3), False, 16),
    32: ((5, 5, 5), False, 16),
    44: ((7, 7, 7), False, 16),
    56: ((9, 9, 9), False, 16),
    110: ((18, 18, 18), False, 16),
}

_conv_init = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


class Block(nn.Module):
    """A residual block: two 3×3 convolutions, or 1×1, 3×3, 1×1 with 4 × width channels out.

    `stride` is that of the first 3×3 convolution and of the shortcut.
    """

    width: int
    stride: int
    bottleneck: bool
    dtype: Any
    conv_impl: Implementation = 'auto'

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, *, train: bool) -> jax.Array:
        """Returns [B, ⌈H / stride⌉, ⌈W / stride⌉, width (or 4 × width)]."""
        norm = partial(_norm, train=train, dtype=self.dtype)
        conv = partial(_conv, dtype=self.dtype, impl=self.conv_impl)
        plan = _plan(self.width, self.stride, self.bottleneck)
        y_BHWC = x_BHWC
        for i, (features, kernel, stride) in enumerate(plan):
            last = i == len(plan) - 1
            y_BHWC = conv(f'conv_{i}', features, kernel, stride)(y_BHWC)
            init = nn.initializers.zeros_init() if last else nn.initializers.ones_init()
            y_BHWC = norm(f'norm_{i}', scale_init=init)(y_BHWC)
            if not last:
                y_BHWC = nn.relu(y_BHWC)
        if x_BHWC.shape != y_BHWC.shape:
            x_BHWC = conv('shortcut', y_BHWC.shape[-1], 1, self.stride)(x_BHWC)
            x_BHWC = norm('shortcut_norm')(x_BHWC)
        return nn.relu(x_BHWC + y_BHWC)


class ResNet(nn.Module):
    """ResNet of a published depth (a key of SIZES) for images [B, H, W, C].

    `width` is the first stage's number of channels (0: the published one). `small_stem` replaces
    the stride-2 7×7 convolution and the max-pooling by one 3×3 convolution; the 6n+2 forms always
    have it. `conv_impl` is of the convolutions (`bigjax.nn.conv`). Variables: 'params' (float32)
    and 'batch_stats', updated when `train` under mutable=['batch_stats']; statistics are over the
    whole (global) batch. Logits [B, classes] float32. Raises ValueError for an unknown depth.
    """

    classes: int
    depth: int = 18
    width: int = 0
    small_stem: bool = False
    dtype: Any = jnp.float32
    conv_impl: Implementation = 'auto'

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, *, train: bool) -> jax.Array:
        """Returns logits [B, classes] in float32."""
        stages, bottleneck, width = size(self.depth, self.width)
        norm = partial(_norm, train=train, dtype=self.dtype)
        conv = partial(_conv, dtype=self.dtype, impl=self.conv_impl)
        if _has_small_stem(self.depth, self.small_stem):
            x_BHWC = conv('stem', width, 3, 1)(x_BHWC)
            x_BHWC = nn.relu(norm('stem_norm')(x_BHWC))
        else:
            x_BHWC = conv('stem', width, 7, 2)(x_BHWC)
            x_BHWC = nn.relu(norm('stem_norm')(x_BHWC))
            pads = ((1, 1), (1, 1))
            x_BHWC = max_pool(x_BHWC, window=(3, 3), strides=(2, 2), padding=pads)
        for s, blocks in enumerate(stages):
            for b in range(blocks):
                stride = 2 if s > 0 and b == 0 else 1
                name = f'stage_{s}_block_{b}'
                block = Block(
                    width * 2**s, stride, bottleneck, self.dtype, self.conv_impl, name=name
                )
                x_BHWC = block(x_BHWC, train=train)
        x_BC = global_avg_pool(x_BHWC)
        return Dense(self.classes, dtype=self.dtype, name='head')(x_BC).astype(jnp.float32)


def size(depth: int, width: int = 0) -> tuple[tuple[int, ...], bool, int]:
    """Blocks per stage, whether bottlenecks, and the first width; ValueError if unknown."""
    if depth not in SIZES:
        raise ValueError(
            f'--depth={depth}: a ResNet has one of {sorted(SIZES)} layers; try --depth=18'
        )
    stages, bottleneck, published = SIZES[depth]
    return stages, bottleneck, width or published


def forward_flops(
    image_size: tuple[int, int],
    channels: int,
    classes: int,
    *,
    depth: int = 18,
    width: int = 0,
    small_stem: bool = False,
) -> int:
    """Convolution and matrix-product FLOPs (2 × multiply-adds) of one image's forward pass."""
    stages, bottleneck, width = size(depth, width)

    def step(hw, c, features, kernel, stride):
        return conv_flops(hw, c, features, kernel_size=(kernel, kernel), strides=(stride, stride))

    if _has_small_stem(depth, small_stem):
        flops, hw = step(image_size, channels, width, 3, 1)
    else:
        flops, hw = step(image_size, channels, width, 7, 2)
        hw = (-(-hw[0] // 2), -(-hw[1] // 2))
    channels = width
    for s, blocks in enumerate(stages):
        for b in range(blocks):
            stride = 2 if s > 0 and b == 0 else 1
            c, inner = channels, hw
            for features, kernel, st in _plan(width * 2**s, stride, bottleneck):
                part, inner = step(inner, c, features, kernel, st)
                flops, c = flops + part, features
            if (c, inner) != (channels, hw):
                flops += step(hw, channels, c, 1, stride)[0]
            channels, hw = c, inner
    return flops + 2 * channels * classes


def _plan(width: int, stride: int, bottleneck: bool) -> tuple[tuple[int, int, int], ...]:
    """The convolutions of one block: (features, kernel size, stride)."""
    if bottleneck:
        return (width, 1, 1), (width, 3, stride), (4 * width, 1, 1)
    return (width, 3, stride), (width, 3, 1)


def _has_small_stem(depth: int, small_stem: bool) -> bool:
    return small_stem or len(SIZES[depth][0]) == 3


def _conv(
    name: str, features: int, kernel: int, stride: int, *, dtype: Any, impl: Implementation
) -> Conv:
    # Symmetric padding, as torchvision: 'SAME' pads only the far side under stride 2.
    pad = (kernel // 2, kernel // 2)
    return Conv(
        features,
        kernel_size=(kernel, kernel),
        strides=(stride, stride),
        padding=(pad, pad),
        use_bias=False,
        dtype=dtype,
        kernel_init=_conv_init,
        impl=impl,
        name=name,
    )


def _norm(name: str, *, train: bool, dtype: Any, scale_init: Callable | None = None):
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        dtype=dtype,
        scale_init=scale_init or nn.initializers.ones_init(),
        name=name,
    )

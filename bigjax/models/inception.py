"""Inception v1 (GoogLeNet) with BatchNorm and v3, with auxiliary heads, and small-image forms.

What they are made of is in `bigjax.models.inception_tables`. Legend: B batch, H W rows and columns,
C channels, F features.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from bigjax.experiment import UsageError
from bigjax.models.inception_tables import SIZES, Block, Branch, C, Pool, Size
from bigjax.nn.conv import Conv, conv_flops
from bigjax.nn.implementation import Implementation
from bigjax.nn.linear import Dense
from bigjax.nn.pooling import (
    adaptive_avg_pool,
    avg_pool,
    ceil_padding,
    global_avg_pool,
    max_pool,
)

# The first kernel has three input channels or one, and the head as many columns as classes.
RULES = (
    (r'stem_conv_0/kernel', (None, None, None, 'channels')),
    (r'conv_\d/kernel', (None, None, 'embed', 'channels')),
    (r'norm_\d/(scale|bias)', ('channels',)),
    (r'hidden/kernel', (None, None, 'embed', 'mlp')),
    (r'hidden/bias', ('mlp',)),
    (r'head/kernel', ('embed', None)),
    (r'head/bias', (None,)),
)

_EPSILON = 1e-3
_AUXILIARY_DROPOUT = 0.7


class Mixed(nn.Module):
    """A block of the tables: its branches side by side, their channels joined."""

    block: Block
    dtype: Any
    conv_impl: Implementation = 'auto'

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, *, train: bool) -> jax.Array:
        outputs = [
            _run(x_BHWC, branch, f'branch_{i}_', train, self.dtype, self.conv_impl)
            for i, branch in enumerate(self.block)
        ]
        return jnp.concatenate(outputs, -1)


class Auxiliary(nn.Module):
    """An auxiliary head: average to a few pixels, convolve, hidden layer or average, classes."""

    classes: int
    size: Size
    dtype: Any
    conv_impl: Implementation = 'auto'

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, *, train: bool) -> jax.Array:
        """Returns logits [B, classes] in float32."""
        own = self.size
        if own.auxiliary_map == (5, 5) == _strided_5x5((x_BHWC.shape[1], x_BHWC.shape[2])):
            x_BHWC = avg_pool(x_BHWC, window=(5, 5), strides=(3, 3))
        else:
            x_BHWC = adaptive_avg_pool(x_BHWC, own.auxiliary_map)
        x_BHWC = _run(x_BHWC, own.auxiliary_convs, '', train, self.dtype, self.conv_impl)
        if own.auxiliary_hidden:
            init = nn.initializers.he_normal()
            hidden = Dense(
                own.auxiliary_hidden, in_dims=3, kernel_init=init, dtype=self.dtype, name='hidden'
            )
            x_BF = nn.relu(hidden(x_BHWC))
            x_BF = nn.Dropout(_AUXILIARY_DROPOUT, deterministic=not train)(x_BF)
        else:
            x_BF = global_avg_pool(x_BHWC)
        return Dense(self.classes, dtype=self.dtype, name='head')(x_BF).astype(jnp.float32)


class Inception(nn.Module):
    """Inception network of a version (a key of SIZES) for images [B, H, W, C].

    `width` is the first convolution's number of channels, with which all others scale (0: 64 in
    version 1, 32 in version 3). `small_stem` is for small images: up to the first block it halves
    the image once in version 1 and keeps its size in version 3, not an eighth of it.

    With `auxiliary`, training gives a tuple: the logits, then those of each auxiliary head, all
    [B, classes] float32; without, and in evaluation, the logits alone. Dropout (rng 'dropout') is
    before the last layer (below 0: the published share) and in the auxiliary heads of version 1;
    `conv_impl` as in `bigjax.nn.conv`. Variables: 'params', 'batch_stats' (updated when `train`).
    Raises UsageError for an unknown version and for too small images.
    """

    classes: int
    version: int = 3
    width: int = 0
    auxiliary: bool = True
    dropout: float = -1.0
    small_stem: bool = False
    dtype: Any = jnp.float32
    conv_impl: Implementation = 'auto'

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, *, train: bool) -> jax.Array | tuple[jax.Array, ...]:
        """Returns logits [B, classes] in float32, or a tuple of them."""
        own = size(self.version, self.width)
        _check((x_BHWC.shape[1], x_BHWC.shape[2]), self.version, self.small_stem)
        heads: list[jax.Array] = []
        stem = own.small_stem if self.small_stem else own.stem
        x_BHWC = _run(x_BHWC, stem, 'stem_', train, self.dtype, self.conv_impl)
        for s, stage in enumerate(own.stages):
            for b, block in enumerate(stage):
                if isinstance(block, Pool):
                    x_BHWC = _pool(x_BHWC, block)
                    continue
                name = f'stage_{s}_block_{b}'
                mixed = Mixed(block, self.dtype, self.conv_impl, name=name)
                x_BHWC = mixed(x_BHWC, train=train)
                # Init is not training, but has to make the parameters of all heads.
                wanted = self.auxiliary and (train or self.is_initializing())
                if wanted and (s, b) in own.auxiliary:
                    name, impl = f'auxiliary_{len(heads)}', self.conv_impl
                    head = Auxiliary(self.classes, own, self.dtype, impl, name=name)
                    heads.append(head(x_BHWC, train=train))
        rate = own.dropout if self.dropout < 0 else self.dropout
        x_BF = nn.Dropout(rate, deterministic=not train)(global_avg_pool(x_BHWC))
        logits_BK = Dense(self.classes, dtype=self.dtype, name='head')(x_BF).astype(jnp.float32)
        return (logits_BK, *heads) if train and self.auxiliary else logits_BK


def size(version: int, width: int = 0) -> Size:
    """The tables of a version, all its features scaled so that the first has `width` (0: not)."""
    if version not in SIZES:
        raise UsageError(
            f'--version={version}: there are Inception versions {sorted(SIZES)}; try --version=3'
        )
    own = SIZES[version]
    first = own.stem[0]
    assert isinstance(first, C)  # the first layer is a convolution in every version
    return _scaled(own, (width or first.features) / first.features)


def _scaled(part: Any, ratio: float) -> Any:
    """Scales the features of every convolution in nested tables, and of the hidden layer."""
    if isinstance(part, C):
        return part._replace(features=max(1, round(part.features * ratio)))
    if isinstance(part, Size):
        names = ('stem', 'small_stem', 'stages', 'auxiliary_convs')
        scaled = {name: _scaled(getattr(part, name), ratio) for name in names}
        return part._replace(auxiliary_hidden=round(part.auxiliary_hidden * ratio), **scaled)
    if isinstance(part, Pool):
        return part
    return tuple(_scaled(each, ratio) for each in part)


def forward_flops(
    image_size: tuple[int, int],
    channels: int,
    classes: int,
    *,
    version: int = 3,
    width: int = 0,
    small_stem: bool = False,
    auxiliary: bool = False,
) -> int:
    """Convolution and dense-layer FLOPs (2 × multiply-adds) of one image's forward pass.

    With `auxiliary`, those of the auxiliary heads too, which run in training only.
    """
    own = size(version, width)
    _check(image_size, version, small_stem)
    total = 0

    def step(x, part, number):
        nonlocal total
        hw, channels = x
        if isinstance(part, Pool):
            return _pooled_size(hw, part), channels
        stride = (part.stride, part.stride)
        flops, hw = conv_flops(
            hw,
            channels,
            part.features,
            kernel_size=part.kernel,
            strides=stride,
            padding=_pads(part),
        )
        total += flops
        return hw, part.features

    def join(parts):
        return parts[0][0], sum(channels for _, channels in parts)

    x = _walk((image_size, channels), own.small_stem if small_stem else own.stem, step, join)
    for s, stage in enumerate(own.stages):
        for b, block in enumerate(stage):
            if isinstance(block, Pool):
                x = step(x, block, 0)
                continue
            x = join([_walk(x, branch, step, join) for branch in block])
            if auxiliary and (s, b) in own.auxiliary:
                (h, w), features = _walk((own.auxiliary_map, x[1]), own.auxiliary_convs, step, join)
                hidden = own.auxiliary_hidden
                total += 2 * hidden * (h * w * features) + 2 * (hidden or features) * classes
    return total + 2 * x[1] * classes


def _walk(x: Any, branch: Branch, step: Callable, join: Callable) -> Any:
    """Takes `x` through a branch by `step(x, convolution or pooling, number of convolution)`."""
    number = 0
    for part in branch:
        if isinstance(part, C | Pool):
            x = step(x, part, number)
            number += isinstance(part, C)
        else:
            x = join([step(x, conv, number + i) for i, conv in enumerate(part)])
            number += len(part)
    return x


def _run(
    x_BHWC: jax.Array,
    branch: Branch,
    prefix: str,
    train: bool,
    dtype: Any,
    impl: Implementation,
) -> jax.Array:
    """Runs a branch inside a compact method; its layers are called `<prefix>conv_0`, …."""

    def step(x_BHWC, part, number):
        if isinstance(part, Pool):
            return _pool(x_BHWC, part)
        conv = Conv(
            part.features,
            kernel_size=part.kernel,
            strides=(part.stride, part.stride),
            padding=_pads(part),
            use_bias=False,
            dtype=dtype,
            impl=impl,
            name=f'{prefix}conv_{number}',
        )
        norm = nn.BatchNorm(
            use_running_average=not train,
            momentum=0.9,
            epsilon=_EPSILON,
            dtype=dtype,
            name=f'{prefix}norm_{number}',
        )
        return nn.relu(norm(conv(x_BHWC)))

    return _walk(x_BHWC, branch, step, lambda parts: jnp.concatenate(parts, -1))


def _pads(conv: C) -> tuple[tuple[int, int], tuple[int, int]]:
    high, wide = (0, 0) if conv.valid else (conv.kernel[0] // 2, conv.kernel[1] // 2)
    return (high, high), (wide, wide)


def _pool_pads(size_HW: tuple[int, int], pool: Pool) -> tuple[tuple[int, int], tuple[int, int]]:
    if pool.ceil:
        return ceil_padding(size_HW, (pool.window,) * 2, (pool.stride,) * 2)
    same = pool.window // 2 if pool.stride == 1 else 0
    return (same, same), (same, same)


def _pool(x_BHWC: jax.Array, pool: Pool) -> jax.Array:
    run = max_pool if pool.kind == 'max' else avg_pool
    pads = _pool_pads((x_BHWC.shape[1], x_BHWC.shape[2]), pool)
    return run(x_BHWC, window=(pool.window,) * 2, strides=(pool.stride,) * 2, padding=pads)


def _pooled_size(size_HW: tuple[int, int], pool: Pool) -> tuple[int, int]:
    high, wide = (
        (side + sum(pad) - pool.window) // pool.stride + 1
        for side, pad in zip(size_HW, _pool_pads(size_HW, pool), strict=True)
    )
    return high, wide


def _strided_5x5(size_HW: tuple[int, int]) -> tuple[int, int]:
    """Output size of version 3's own 5×5 average with stride 3 (17×17 pixels at full size)."""
    return (size_HW[0] - 5) // 3 + 1, (size_HW[1] - 5) // 3 + 1


def _check(size_HW: tuple[int, int], version: int, small_stem: bool) -> None:
    smallest = SIZES[version].smallest[small_stem]
    if min(size_HW) < smallest:
        raise UsageError(
            f'--image_size={min(size_HW)}: Inception v{version} needs images of {smallest} pixels '
            f'a side or more; try --image_size={smallest}'
        )

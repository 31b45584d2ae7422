"""Convolution: the one place that calls its kernels, on whatever mesh is set.

Legend: B batch, H W input rows and columns, P Q output rows and columns, K L kernel rows and
columns, C input channels, D = C / groups channels of a kernel, O output channels, T positions,
S = (K - 1) * dilation positions before the first.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from bigjax.nn.implementation import Implementation, named, plain
from bigjax.sharding import BATCH_AXES, LOGICAL_TO_MESH
from pallas_kernels import conv as kernels
from pallas_kernels.conv.arguments import Padding, Pair, Spec, span
from pallas_kernels.conv.checks import check_padding

_on_the_mesh = kernels.shard(batch=BATCH_AXES, channels=LOGICAL_TO_MESH['channels'])


def conv(
    x_BHWC: jax.Array, w_KLDO: jax.Array, *, impl: Implementation = 'auto', **features: Any
) -> jax.Array:
    """Two-dimensional cross-correlation of images with a kernel.

    Args:
      x_BHWC: images.
      w_KLDO: kernel.
      impl: an implementation of `pallas_kernels.conv`; 'auto' takes the kernel of the chip that is
        there, where it is predicted to be faster than XLA's own convolution, else 'xla'.
      features: `stride`, `padding`, `bias` and so on; see `pallas_kernels.conv.conv2d`.

    Returns:
      [B, P, Q, O] in x's type.

    Raises:
      UsageError: the implementation named cannot run these arguments.
      ValueError: arguments do not fit.
    """
    call = kernels.conv2d if plain(impl) else _on_the_mesh.conv2d
    return named(call, impl, 'conv')(x_BHWC, w_KLDO, **features)


def conv1d(
    x_BTC: jax.Array, w_KDO: jax.Array, *, impl: Implementation = 'auto', **features: Any
) -> Any:
    """One-dimensional cross-correlation of sequences with a kernel.

    Takes what `pallas_kernels.conv.conv1d` takes and returns what it does, [B, T, O] in x's type
    and with `return_state` the next state; `impl` and errors are as in `conv`.
    """
    call = kernels.conv1d if plain(impl) else _on_the_mesh.conv1d
    return named(call, impl, 'conv')(x_BTC, w_KDO, **features)


class Conv(nn.Module):
    """Two-dimensional convolution layer over images [B, H, W, C], and an activation after it.

    Parameters are float32 (`kernel` [K, L, C / groups, features], `bias` [features]); the product
    is taken in `dtype` (None: the input's). `strides`, `padding`, `dilation` and `groups` are as in
    `pallas_kernels.conv.conv2d`, as is `activation`: None, 'relu', 'silu', 'gelu', 'tanh' or
    'sigmoid'. `impl` as in `conv`.
    """

    features: int
    kernel_size: Pair = (3, 3)
    strides: Pair = (1, 1)
    padding: Padding = 'SAME'
    dilation: Pair = (1, 1)
    groups: int = 1
    use_bias: bool = True
    activation: str | None = None
    dtype: Any = None
    kernel_init: nn.initializers.Initializer = nn.initializers.he_normal()
    impl: Implementation = 'auto'

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """Returns [B, P, Q, features]."""
        dtype = self.dtype or x_BHWC.dtype
        w_KLDO, bias_O = _parameters(self, self.kernel_size, x_BHWC.shape[-1], dtype)
        return conv(
            x_BHWC.astype(dtype),
            w_KLDO,
            stride=self.strides,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            bias=bias_O,
            activation=self.activation,
            impl=self.impl,
        )


class Conv1d(nn.Module):
    """One-dimensional convolution layer over sequences [B, T, C], and an activation after it.

    As `Conv`, with the paddings of `pallas_kernels.conv.conv1d`: 'CAUSAL' besides 'SAME', 'VALID'
    and (before, after).
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: str | Pair = 'SAME'
    dilation: int = 1
    groups: int = 1
    use_bias: bool = True
    activation: str | None = None
    dtype: Any = None
    kernel_init: nn.initializers.Initializer = nn.initializers.he_normal()
    impl: Implementation = 'auto'

    @nn.compact
    def __call__(
        self,
        x_BTC: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        state: jax.Array | None = None,
        return_state: bool = False,
    ) -> Any:
        """Returns [B, T / stride, features] and, with `return_state`, the state to go on from.

        Args:
          x_BTC: sequences.
          segment_ids: int [B, T]: an output reads inputs of its own id only (packed documents).
          state: [B, S, C], the inputs before x, for 'CAUSAL'; None is zeros.
          return_state: whether to return the state after x too.
        """
        dtype = self.dtype or x_BTC.dtype
        w_KDO, bias_O = _parameters(self, (self.kernel_size,), x_BTC.shape[-1], dtype)
        return conv1d(
            x_BTC.astype(dtype),
            w_KDO,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            bias=bias_O,
            activation=self.activation,
            segment_ids=segment_ids,
            state=state,
            return_state=return_state,
            impl=self.impl,
        )


def conv_flops(
    size_HW: Pair,
    channels: int,
    features: int,
    *,
    kernel_size: Pair = (3, 3),
    strides: Pair = (1, 1),
    padding: Padding = 'SAME',
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> tuple[int, Pair]:
    """FLOPs (2 × multiply-adds, padding included) and output size of a convolution."""
    over_K, over_L = (span(k, d) for k, d in zip(kernel_size, dilation, strict=True))
    pads = check_padding(padding, size_HW, (over_K, over_L), strides)
    high, wide = Spec(strides, pads, dilation).out_size(size_HW, kernel_size)
    taps = kernel_size[0] * kernel_size[1]
    return 2 * high * wide * taps * (channels // groups) * features, (high, wide)


def _parameters(layer: Any, kernel_size: tuple[int, ...], channels: int, dtype: Any) -> Any:
    """Returns a layer's kernel in the type of the product, and its bias or None."""
    # Channels that do not divide are complained of by the function, which knows its arguments.
    shape = (*kernel_size, max(1, channels // layer.groups), layer.features)
    kernel = layer.param('kernel', layer.kernel_init, shape, jnp.float32).astype(dtype)
    if not layer.use_bias:
        return kernel, None
    bias_O = layer.param('bias', nn.initializers.zeros_init(), (layer.features,), jnp.float32)
    return kernel, bias_O

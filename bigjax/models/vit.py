"""Vision Transformer: an image as a sequence of patches, through a Transformer encoder.

Dosovitskiy et al. 2020, "An image is worth 16×16 words" (arXiv:2010.11929), in the sizes of Touvron
et al. 2020 (arXiv:2012.12877) and Steiner et al. 2021 (arXiv:2106.10270): normalisation before each
branch (epsilon 1e-6), GELU as defined, biases everywhere. Mean pooling and fixed sine positions are
those of Beyer et al. 2022, "Better plain ViT baselines for ImageNet-1k" (arXiv:2205.01580).

Legend: B batch, H W rows and columns, N patches, T positions of the sequence, C width, H heads,
D = C / H, M = 4 C, P rows and columns of a patch, K image channels.
"""

import functools
import re
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigjax.experiment import UsageError
from bigjax.nn.activations import gelu_erf
from bigjax.nn.attention import Implementation, attention, check_heads, split_projections
from bigjax.nn.constrain import enter, leave
from bigjax.nn.linear import Dense
from bigjax.nn.norm import LayerNorm
from bigjax.nn.stack import stack, stacked_rules
from bigjax.strategy import Remat


class Size(NamedTuple):
    """Layers, attention heads and width; the MLP is four times as wide."""

    depth: int
    heads: int
    width: int


SIZES = {
    'Ti': Size(12, 3, 192),
    'S': Size(12, 6, 384),
    'B': Size(12, 12, 768),
    'L': Size(24, 16, 1024),
    'H': Size(32, 16, 1280),
}

RULES = stacked_rules(
    (
        (r'patch/kernel$', (None, None, None, 'embed')),
        (r'position$', (None, 'embed')),
        (r'qkv/kernel$', ('embed', 'heads', None, None)),
        (r'qkv/bias$', ('heads', None, None)),
        (r'attention/out/kernel$', ('heads', None, 'embed')),
        (r'mlp/up/kernel$', ('embed', 'mlp')),
        (r'mlp/up/bias$', ('mlp',)),
        (r'mlp/down/kernel$', ('mlp', 'embed')),
        (r'head/kernel$', ('embed', None)),
        (r'head/bias$', (None,)),
        (r'(class_token|scale|bias)$', ('embed',)),
    )
)

_EPSILON = 1e-6
_xavier = nn.initializers.xavier_uniform()
# Queries, keys and values are three square matrices, each of which Xavier's bound is for.
_qkv_init = nn.initializers.variance_scaling(1.0, 'fan_in', 'uniform')


class Attention(nn.Module):
    """Self-attention of every position to every other; `heads` divides the width."""

    heads: int
    dtype: Any
    impl: Implementation = 'auto'

    @nn.compact
    def __call__(self, x_BTC: jax.Array) -> jax.Array:
        C, H = x_BTC.shape[-1], self.heads
        qkv = Dense((H, 3, C // H), kernel_init=_qkv_init, dtype=self.dtype, name='qkv')(x_BTC)
        q_BTHD, k_BTHD, v_BTHD = split_projections(qkv)
        o_BTHD = attention(q_BTHD, k_BTHD, v_BTHD, impl=self.impl)
        options = {'kernel_init': _xavier, 'dtype': self.dtype, 'reads': 'heads'}
        return Dense(C, in_dims=2, name='out', **options)(o_BTHD)


class MLP(nn.Module):
    """Two dense layers with GELU between them, four times as wide inside."""

    dtype: Any

    @nn.compact
    def __call__(self, x_BTC: jax.Array) -> jax.Array:
        C = x_BTC.shape[-1]
        options = {
            'dtype': self.dtype,
            'kernel_init': _xavier,
            'bias_init': nn.initializers.normal(1e-6),
        }
        h_BTM = gelu_erf(Dense(4 * C, name='up', **options)(x_BTC))
        return Dense(C, reads='mlp', name='down', **options)(h_BTM)


class Block(nn.Module):
    """One layer: normalise, attend, add; normalise, MLP, add. A body for `bigjax.nn.stack.stack`.

    Attributes:
      heads: number of attention heads.
      dropout: share of each branch's values set to zero in training.
      dtype: type of the computation.
      impl: implementation of attention.
    """

    heads: int
    dropout: float
    dtype: Any
    impl: Implementation = 'auto'

    @nn.compact
    def __call__(
        self, x_BTC: jax.Array, drop_rate: jax.Array | None, *, train: bool
    ) -> tuple[jax.Array, None]:
        branches = (
            ('attention', Attention(self.heads, self.dtype, self.impl, name='attention')),
            ('mlp', MLP(self.dtype, name='mlp')),
        )
        for name, branch in branches:
            norm = LayerNorm(epsilon=_EPSILON, dtype=self.dtype, name=f'{name}_norm')
            h_BTC = leave(branch(enter(norm(x_BTC))))
            h_BTC = nn.Dropout(self.dropout, deterministic=not train)(h_BTC)
            x_BTC += self._drop_path(h_BTC, drop_rate) if train else h_BTC
        return x_BTC, None

    def _drop_path(self, h_BTC: jax.Array, rate: jax.Array | None) -> jax.Array:
        """Stochastic depth: leaves a branch out of some images (Huang et al. 2016)."""
        if rate is None:
            return h_BTC
        shape = (h_BTC.shape[0], 1, 1)
        kept_B11 = jax.random.bernoulli(self.make_rng('dropout'), 1 - rate, shape)
        return jnp.where(kept_B11, h_BTC / (1 - rate).astype(h_BTC.dtype), 0)


class ViT(nn.Module):
    """Vision Transformer for images [B, H, W, K]: logits [B, classes] float32.

    Parameters are float32. Initialised as Dosovitskiy et al.: Xavier, a head of zeros. The rng
    'dropout' is needed in training where `dropout` or `drop_path` is above zero. Raises UsageError
    for an unknown variant, or where patches or heads do not divide the image or the width.

    Attributes:
      classes: number of classes.
      variant: size and side of a patch in pixels, 'B/16'; the sizes are the keys of SIZES.
      depth: number of layers; 0 is the variant's.
      heads: number of attention heads; 0 is the variant's.
      width: width of the residual stream; 0 is the variant's.
      pool: what the head reads: a class token that stands before the patches, or their mean.
      positions: learned, or fixed sines and cosines of row and column (needs a width of 4 n).
      dropout: share of embeddings and branches set to zero in training.
      drop_path: share of images that skip the last layer's branches in training; 0 in the first
        layer, growing linearly between.
      scan: whether the layers are scanned; see `bigjax.nn.stack`.
      remat: what is computed again for the gradient; see `bigjax.nn.stack`.
      dtype: type of the computation, float32 or bfloat16.
      attention_impl: implementation of attention.
    """

    classes: int
    variant: str = 'B/16'
    depth: int = 0
    heads: int = 0
    width: int = 0
    pool: Literal['token', 'mean'] = 'token'
    positions: Literal['learned', 'sincos2d'] = 'learned'
    dropout: float = 0.0
    drop_path: float = 0.0
    scan: bool = False
    remat: Remat = 'none'
    dtype: Any = jnp.float32
    attention_impl: Implementation = 'auto'

    @nn.compact
    def __call__(self, x_BHWK: jax.Array, *, train: bool) -> jax.Array:
        """Returns logits [B, classes] in float32."""
        own, P = size(self.variant, depth=self.depth, heads=self.heads, width=self.width)
        grid = grid_of((x_BHWK.shape[1], x_BHWK.shape[2]), P, self.variant)
        patches_BNPPK = _patches(x_BHWK, grid, P)
        embed = Dense(own.width, in_dims=3, dtype=self.dtype, name='patch')
        x_BTC = self._add_positions(embed(patches_BNPPK), grid)
        x_BTC = nn.Dropout(self.dropout, deterministic=not train)(x_BTC)
        block = functools.partial(Block, own.heads, self.dropout, self.dtype, self.attention_impl)
        rates_L = jnp.linspace(0, self.drop_path, own.depth) if self.drop_path else None
        x_BTC, _ = stack(
            block,
            x_BTC,
            depth=own.depth,
            layers=rates_L,
            scan=self.scan,
            remat=self.remat,
            train=train,
        )
        if self.pool == 'token':
            x_BTC = x_BTC[:, :1]
        x_BTC = LayerNorm(epsilon=_EPSILON, dtype=self.dtype, name='norm')(x_BTC)
        x_BC = x_BTC.mean(1)
        zeros = nn.initializers.zeros_init()
        head = Dense(self.classes, kernel_init=zeros, dtype=self.dtype, name='head')
        return head(x_BC).astype(jnp.float32)

    def _add_positions(self, x_BNC: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """Puts the class token in front, if there is one, and adds the positions."""
        B, N, C = x_BNC.shape
        tokens = int(self.pool == 'token')
        if self.positions == 'learned':
            init = nn.initializers.normal(0.02)
            position_TC = self.param('position', init, (tokens + N, C), jnp.float32)
        else:
            position_TC = jnp.asarray(np.pad(sincos2d(grid, C), ((tokens, 0), (0, 0))))
        if tokens:
            token_C = self.param('class_token', nn.initializers.zeros_init(), (C,), jnp.float32)
            token_B1C = jnp.broadcast_to(token_C.astype(x_BNC.dtype)[None, None], (B, 1, C))
            x_BNC = jnp.concatenate([token_B1C, x_BNC], 1)
        return x_BNC + jnp.asarray(position_TC, x_BNC.dtype)[None]


def size(variant: str, *, depth: int = 0, heads: int = 0, width: int = 0) -> tuple[Size, int]:
    """The size of a variant such as 'B/16', what is above 0 replaced, and the side of a patch."""
    match = re.fullmatch(r'(\w+)/([1-9]\d*)', variant)
    if not match or match[1] not in SIZES:
        raise UsageError(
            f'--variant={variant}: must be {", ".join(SIZES)}, a slash and the side of a patch in '
            f'pixels; try --variant=B/16'
        )
    published = SIZES[match[1]]
    own = Size(depth or published.depth, heads or published.heads, width or published.width)
    check_heads(own.heads, own.width)
    return own, int(match[2])


def grid_of(image_size: tuple[int, int], patch: int, variant: str) -> tuple[int, int]:
    """Rows and columns of patches; UsageError where patches do not divide the image."""
    height, width = image_size
    if height % patch or width % patch:
        good = max(p for p in range(1, patch) if height % p == width % p == 0)
        raise UsageError(
            f'--variant={variant}: patches of {patch} pixels do not divide images of {height} × '
            f'{width}; try --variant={variant.partition("/")[0]}/{good}'
        )
    return height // patch, width // patch


def sincos2d(grid: tuple[int, int], width: int) -> np.ndarray:
    """Sines and cosines of column and row, [N, width] (Chen et al. 2021, arXiv:2104.02057)."""
    if width % 4 or width < 8:
        raise UsageError(
            f'--width={width}: must be 8, 12, 16, … for --positions=sincos2d; '
            f'try --width={max(width // 4 * 4, 8)}'
        )
    row_N, column_N = (axis.reshape(-1, 1) for axis in np.mgrid[: grid[0], : grid[1]])
    wave = 1 / 10_000 ** (np.arange(width // 4) / (width // 4 - 1))[None]
    waves = (f(axis * wave) for axis in (column_N, row_N) for f in (np.sin, np.cos))
    return np.concatenate(list(waves), 1)


def _patches(x_BHWK: jax.Array, grid: tuple[int, int], P: int) -> jax.Array:
    B, K, (rows, columns) = x_BHWK.shape[0], x_BHWK.shape[3], grid
    x = x_BHWK.reshape(B, rows, P, columns, P, K).swapaxes(2, 3)
    return x.reshape(B, rows * columns, P, P, K)


def forward_flops(
    image_size: tuple[int, int],
    channels: int,
    classes: int,
    *,
    variant: str = 'B/16',
    depth: int = 0,
    heads: int = 0,
    width: int = 0,
    pool: str = 'token',
) -> int:
    """Matrix-product FLOPs (2 × multiply-adds) of one image's forward pass."""
    own, patch = size(variant, depth=depth, heads=heads, width=width)
    rows, columns = grid_of(image_size, patch, variant)
    C, N = own.width, rows * columns
    T = N + (pool == 'token')
    layer = 2 * T * 12 * C**2 + 2 * 2 * T**2 * C
    return 2 * N * patch**2 * channels * C + own.depth * layer + 2 * C * classes

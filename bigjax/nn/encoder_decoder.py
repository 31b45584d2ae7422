"""The layers of an encoder-decoder Transformer (Vaswani et al. 2017), both sides' in one block.

Legend: B source texts, N rows of the decoder (B, or B times the beam), S source positions, T target
positions, C width, H heads, D = C / H, Q queries of a text, M width of the hidden layer.
"""

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from bigjax.nn.activations import gelu_erf
from bigjax.nn.attention import Implementation, attention, cached_attention, split_projections
from bigjax.nn.constrain import enter, leave
from bigjax.nn.linear import Dense
from bigjax.nn.norm import LayerNorm
from bigjax.nn.stack import stack
from bigjax.strategy import Remat

Norm = Literal['post', 'pre']
Activation = Literal['relu', 'swish', 'gelu']

_xavier = nn.initializers.xavier_uniform()


class SelfAttention(nn.Module):
    """Self-attention, of all positions at once or of one more with a cache of those before it.

    Attributes:
      heads: number of heads; divides the width.
      causal: whether a position sees only itself and those before it.
      dtype: type of the computation.
      impl: implementation of attention.
    """

    heads: int
    causal: bool
    dtype: Any
    impl: Implementation

    @nn.compact
    def __call__(self, x_NTC, mask=None, cache=None, position=None):
        C, H = x_NTC.shape[-1], self.heads
        qkv = Dense((H, 3, C // H), dtype=self.dtype, kernel_init=_xavier, name='qkv')(x_NTC)
        q_NTHD, k_NTHD, v_NTHD = split_projections(qkv)
        if cache is None:
            o_NTHD = attention(
                q_NTHD, k_NTHD, v_NTHD, causal=self.causal, mask=mask, impl=self.impl
            )
        else:
            cache = tuple(
                jax.lax.dynamic_update_slice_in_dim(
                    old, new.reshape(*new.shape[:2], C).astype(old.dtype), position, 1
                )
                for old, new in zip(cache, (k_NTHD, v_NTHD), strict=True)
            )
            start_N = jnp.full(x_NTC.shape[:1], position, jnp.int32)
            o_NTHD = cached_attention(q_NTHD, *cache, start_B=start_N, impl=self.impl)
        options = {'dtype': self.dtype, 'kernel_init': _xavier, 'reads': 'heads'}
        out = Dense(C, in_dims=2, name='out', **options)
        return out(o_NTHD), cache


class CrossAttention(nn.Module):
    """Attention of the decoder to the encoder's outputs.

    Attributes:
      heads: number of heads; divides the width.
      dtype: type of the computation.
      impl: implementation of attention.
    """

    heads: int
    dtype: Any
    impl: Implementation

    @nn.compact
    def __call__(self, x_NTC, memory_BSC, real_BS, kv=None):
        """Returns [N, T, C] and keys and values: those given, else those of `memory_BSC`."""
        C, H = x_NTC.shape[-1], self.heads
        options = {'dtype': self.dtype, 'kernel_init': _xavier}
        q_NTHD = Dense((H, C // H), name='q', **options)(x_NTC)
        if kv is None:
            both = Dense((H, 2, C // H), name='kv', **options)(memory_BSC)
            kv = split_projections(both)
        # The beams of a text are so many queries to the same keys, of which there is one copy.
        q_BQHD = q_NTHD.reshape(real_BS.shape[0], -1, H, C // H)
        mask = real_BS[:, None, None]
        o_BQHD = attention(q_BQHD, *kv, mask=mask, impl=self.impl)
        out = Dense(C, in_dims=2, reads='heads', name='out', **options)
        return out(o_BQHD.reshape(q_NTHD.shape)), kv


class MLP(nn.Module):
    """Two dense layers with an activation between them.

    Attributes:
      hidden: width between the layers.
      activation: function between them.
      dtype: type of the computation.
    """

    hidden: int
    activation: Activation
    dtype: Any

    @nn.compact
    def __call__(self, x_NTC: jax.Array) -> jax.Array:
        options = {'dtype': self.dtype, 'kernel_init': _xavier}
        table: dict[str, Any] = {'relu': nn.relu, 'swish': nn.swish, 'gelu': gelu_erf}
        act = table[self.activation]
        h_NTM = act(Dense(self.hidden, name='up', **options)(x_NTC))
        return Dense(x_NTC.shape[-1], reads='mlp', name='down', **options)(h_NTM)


class Block(nn.Module):
    """A layer of the encoder or of the decoder, called as `bigjax.nn.stack.stack` does.

    Attributes:
      heads: number of attention heads.
      hidden: width of the hidden layer.
      decodes: whether it is one of the decoder: causal, with attention to the source.
      norm: whether normalization follows each residual sum or precedes each branch.
      activation: of the hidden layer.
      dropout: share of each residual branch set to zero in training.
      dtype: type of the computation.
      impl: implementation of attention.
      keeps: what the block's own output is: nothing, the keys and values of the source ('memory')
        or the cache of those decoded so far.
    """

    heads: int
    hidden: int
    decodes: bool
    norm: Norm
    activation: Activation
    dropout: float
    dtype: Any
    impl: Implementation
    keeps: Literal['nothing', 'memory', 'cache'] = 'nothing'

    @nn.compact
    def __call__(self, x_NTC, layer, memory_BSC=None, real_BS=None, position=None, *, train=False):
        cache, kv = layer or (None, None)
        drop = nn.Dropout(self.dropout, deterministic=not train)

        def add(x_NTC, name, branch):
            """The residual sum of a branch, normalized before or after."""
            norm = LayerNorm(dtype=self.dtype, name=f'{name}_norm')
            if self.norm == 'pre':
                h_NTC, kept = branch(enter(norm(x_NTC)))
                return x_NTC + drop(leave(h_NTC)), kept
            h_NTC, kept = branch(enter(x_NTC))
            return norm(x_NTC + drop(leave(h_NTC))), kept

        attend = SelfAttention(self.heads, self.decodes, self.dtype, self.impl, name='attention')
        mask = None if self.decodes else real_BS[:, None, None]
        x_NTC, cache = add(x_NTC, 'attention', lambda h: attend(h, mask, cache, position))
        if self.decodes:
            cross = CrossAttention(self.heads, self.dtype, self.impl, name='cross')
            x_NTC, kv = add(x_NTC, 'cross', lambda h: cross(h, memory_BSC, real_BS, kv))
        mlp = MLP(self.hidden, self.activation, self.dtype, name='mlp')
        x_NTC, _ = add(x_NTC, 'mlp', lambda h: (mlp(h), None))
        return x_NTC, {'nothing': None, 'memory': kv, 'cache': cache}[self.keeps]


class Layers(nn.Module):
    """The stack of one side, and with `norm='pre'` the norm behind it.

    Attributes:
      depth: number of layers.
      block: makes one, given its name and what it keeps.
      scan: whether the layers are scanned.
      remat: what is recomputed for the gradient.
      final_norm: whether a norm follows the last layer.
      dtype: type of the computation.
    """

    depth: int
    block: Any
    scan: bool
    remat: Remat
    final_norm: bool
    dtype: Any

    @nn.compact
    def __call__(self, x_NTC, *shared, layers=None, keeps='nothing', train=False):
        x_NTC, kept = stack(
            functools.partial(self.block, keeps=keeps),
            x_NTC,
            *shared,
            depth=self.depth,
            layers=layers,
            scan=self.scan,
            remat=self.remat,
            train=train,
        )
        if self.final_norm:
            x_NTC = LayerNorm(dtype=self.dtype, name='norm')(x_NTC)
        return x_NTC, kept

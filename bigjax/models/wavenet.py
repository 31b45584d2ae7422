"""WaveNet (van den Oord et al. 2016): tokens in, logits out, by dilated causal convolutions.

Shape legend: B batch, T time, K taps, C residual channels, G gate channels, S skip channels,
V vocabulary, R positions that a convolution reads before its own.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bigjax.nn.conv import Conv1d
from bigjax.nn.gated_conv import GatedConv1d
from bigjax.nn.implementation import Implementation
from bigjax.nn.linear import Dense

RULES = (
    (r'embedding$', ('vocab', 'embed')),
    (r'(first/|gate_)kernel$', (None, 'embed', 'channels')),
    (r'residual_kernel$', ('channels', 'embed')),
    (r'(skip_|hidden/|output/)kernel$', ('embed', 'channels')),
    (r'bias$', (None,)),
)

Cache = tuple[jax.Array, ...]


class WaveNet(nn.Module):
    """Embedding, a causal convolution, gated units of growing dilation, and the sum of their skips.

    A block's units have dilations 1, 2, 4, ..., 2^(depth - 1) (§2.1: 512 at most, and then anew).
    Two 1x1 convolutions with rectifiers before them end in the logits (fig. 4). Parameters and
    logits are float32.

    Attributes:
      vocab_size: V; 256 for bytes, or for audio by the mu-law (§2.2).
      width: C, of the embedding, too.
      gates: G.
      skip: S.
      depth: units of a block.
      blocks: how often dilations begin anew.
      kernel_size: K.
      dtype: type of the computation, float32 or bfloat16.
      impl: implementation of the convolutions.
    """

    vocab_size: int = 256
    width: int = 64
    gates: int = 64
    skip: int = 128
    depth: int = 10
    blocks: int = 1
    kernel_size: int = 2
    dtype: Any = jnp.float32
    impl: Implementation = 'auto'

    @property
    def dilations(self) -> tuple[int, ...]:
        """The dilation of every unit."""
        return tuple(2**n for n in range(self.depth)) * self.blocks

    @property
    def receptive_field(self) -> int:
        """How many tokens a logit sees."""
        return (self.kernel_size - 1) * (1 + sum(self.dilations)) + 1

    def setup(self) -> None:
        init = nn.initializers.normal(1.0)
        self.embedding = self.param('embedding', init, (self.vocab_size, self.width))
        self.first = Conv1d(
            self.width,
            self.kernel_size,
            padding='CAUSAL',
            dtype=self.dtype,
            kernel_init=nn.initializers.lecun_normal(),
            impl=self.impl,
        )
        self.unit = [
            GatedConv1d(
                self.gates,
                self.skip,
                kernel_size=self.kernel_size,
                dilation=dilation,
                dtype=self.dtype,
                impl=self.impl,
            )
            for dilation in self.dilations
        ]
        self.hidden = Dense(self.skip, dtype=self.dtype)
        self.output = Dense(self.vocab_size)

    def __call__(self, tokens_BT: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns float32 logits [B, T, V] for int32 tokens [B, T], with zeros before them."""
        del train
        return self._run(tokens_BT, None)[0]

    def decode(self, tokens_BT: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Returns the logits [B, T, V] of tokens that follow those in the cache, and the new cache.

        Used as `model.apply(variables, tokens, cache, method='decode')`. A token costs one position
        of every convolution, however many came before it.
        """
        return self._run(tokens_BT, cache)

    def init_cache(self, batch: int) -> Cache:
        """Returns what the convolutions of `batch` rows read before the first token: zeros.

        One [B, R, C] for each of them; call it without `apply`.
        """
        reaches = [(self.kernel_size - 1) * dilation for dilation in (1, *self.dilations)]
        return tuple(jnp.zeros((batch, R, self.width), self.dtype) for R in reaches)

    def _run(self, tokens_BT: jax.Array, cache: Cache | None) -> tuple[jax.Array, Cache]:
        x_BTC = self.embedding.astype(self.dtype)[tokens_BT]
        layers, kept = (self.first, *self.unit), cache is not None
        states, skip_BTS = [], jnp.zeros((), jnp.float32)
        for layer, state in zip(layers, cache or (None,) * len(layers), strict=True):
            x_BTC, *more = _listed(layer(x_BTC, state=state, return_state=kept))
            states += [more.pop()] if kept else []
            for one_BTS in more:
                skip_BTS = one_BTS.astype(jnp.float32) + skip_BTS
        x_BTS = jax.nn.relu(self.hidden(jax.nn.relu(skip_BTS).astype(self.dtype)))
        return self.output(x_BTS.astype(jnp.float32)), tuple(states)


def _listed(outputs: Any) -> tuple[jax.Array, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def forward_flops(
    *,
    vocab_size: int,
    length: int,
    width: int,
    gates: int,
    skip: int,
    depth: int,
    blocks: int,
    kernel_size: int = 2,
) -> int:
    """Matrix-product FLOPs of one example's forward pass, two for a multiply-add.

    For each token 2 · K · C · C for the first convolution, 2 · G (2 K · C + C + S) a unit, but for
    2 · G · C of the last one, whose stream nothing reads, and 2 · S (S + V) for the output. The
    embedding is a look-up and counts nothing.
    """
    unit = 2 * gates * (2 * kernel_size * width + width + skip)
    ends = 2 * kernel_size * width * width + 2 * skip * (skip + vocab_size)
    return length * (ends + depth * blocks * unit - 2 * gates * width)

"""Llama 3: a decoder-only transformer with rotary positions (Grattafiori et al. 2024).

Legend: B batch, T positions of the input, C width, H query heads, K key-value heads, D size of a
head, M width of the hidden MLP layer, V vocabulary.
"""

import functools
from typing import Any

import flax.linen as nn
import jax

from bigjax.experiment import UsageError
from bigjax.models.decoder import Cache, DecoderLM, attend, positions
from bigjax.nn.attention import Implementation, KeyValue, check_heads
from bigjax.nn.constrain import constrain, enter, leave
from bigjax.nn.linear import Dense
from bigjax.nn.logits import logits
from bigjax.nn.look_up import look_up
from bigjax.nn.moe import DENSE, MoE, Routing
from bigjax.nn.norm import RMSNorm
from bigjax.nn.rotary import RotaryScaling, frequencies, rotate, rotation
from bigjax.nn.stack import stack, stacked_rules
from bigjax.nn.together import together
from bigjax.strategy import Context, Matmul

# The published variants: Llama 3.2 (1B, 3B) and 3.1 (8B, 70B, 405B). All have 128,256 tokens, 8
# key-value heads, a base of 500,000 and 131,072 positions, 8,192 of them before the scaling. Llama
# 2 (Touvron et al. 2023) has 32,000 tokens, a base of 10,000 and 4,096 positions.
_LLAMA_2 = {'tied': False, 'factor': 1.0, 'theta': 10_000.0, 'vocab_size': 32_000}
SIZES: dict[str, dict[str, Any]] = {
    '1B': {'depth': 16, 'heads': 32, 'width': 2048, 'hidden': 8192, 'tied': True, 'factor': 32.0},
    '3B': {'depth': 28, 'heads': 24, 'width': 3072, 'hidden': 8192, 'tied': True, 'factor': 32.0},
    '8B': {'depth': 32, 'heads': 32, 'width': 4096, 'hidden': 14336, 'tied': False, 'factor': 8.0},
    '70B': {'depth': 80, 'heads': 64, 'width': 8192, 'hidden': 28672, 'tied': False, 'factor': 8.0},
    '405B': {
        'depth': 126, 'heads': 128, 'width': 16384, 'hidden': 53248, 'tied': False, 'factor': 8.0,
    },
    '2-7B': {'depth': 32, 'heads': 32, 'kv_heads': 32, 'width': 4096, 'hidden': 11008, **_LLAMA_2},
    '2-13B': {'depth': 40, 'heads': 40, 'kv_heads': 40, 'width': 5120, 'hidden': 13824, **_LLAMA_2},
    '2-70B': {'depth': 80, 'heads': 64, 'kv_heads': 8, 'width': 8192, 'hidden': 28672, **_LLAMA_2},
}  # fmt: skip

_BLOCK_RULES = (
    (r'router_kernel$', ('embed', None)),
    (r'experts/(gate|up)/kernel$', ('experts', 'embed', 'mlp')),
    (r'experts/down/kernel$', ('experts', 'mlp', 'embed')),
    (r'attention/(query|key|value)/kernel$', ('embed', 'heads', None)),
    (r'attention/out/kernel$', ('heads', None, 'embed')),
    (r'mlp/(gate|up)/kernel$', ('embed', 'mlp')),
    (r'mlp/down/kernel$', ('mlp', 'embed')),
    (r'scale$', ('embed',)),
)
RULES = ((r'embedding$', ('vocab', 'embed')), *stacked_rules(_BLOCK_RULES))
INIT = nn.initializers.normal(0.02)


class Attention(nn.Module):
    """Causal attention of grouped queries with rotary positions.

    Attributes:
      heads: query heads; divides the width.
      kv_heads: key-value heads; divides `heads` (Ainslie et al. 2023).
      dtype: type of the computation.
      impl: implementation of attention.
      context: how it sees positions on other devices.
      head_dim: D; 0 is the width over `heads`.
      matmul: precision of the dense layers.
    """

    heads: int
    kv_heads: int
    dtype: Any
    impl: Implementation = 'auto'
    context: Context = 'ring'
    head_dim: int = 0
    matmul: Matmul = 'default'

    @nn.compact
    def __call__(self, x_BTC, kv, turned, start_B) -> tuple[jax.Array, KeyValue | None]:
        C = x_BTC.shape[-1]
        D = self.head_dim or C // self.heads
        dense = functools.partial(
            Dense, use_bias=False, dtype=self.dtype, kernel_init=INIT, matmul=self.matmul
        )
        H, K = (self.heads, D), (self.kv_heads, D)
        features = {'query': H, 'key': K, 'value': K}
        q_BTHD, k_BTKD, v_BTKD = together(dense, x_BTC, 'heads', features)
        q_BTHD, k_BTKD = rotate(q_BTHD, turned), rotate(k_BTKD, turned)
        q_BTHD, k_BTKD, v_BTKD = (
            constrain(x, 'batch', 'length', 'heads', None) for x in (q_BTHD, k_BTKD, v_BTKD)
        )
        o_BTHD, kv = attend(q_BTHD, k_BTKD, v_BTKD, kv, start_B, self.impl, self.context)
        return dense(C, in_dims=2, reads='heads', name='out')(o_BTHD), kv


class MLP(nn.Module):
    """Dense layers with SwiGLU between: (silu(x W_gate) * x W_up) W_down (Shazeer 2020).

    Attributes:
      hidden: M.
      dtype: type of the computation.
      matmul: precision of the three.
    """

    hidden: int
    dtype: Any
    matmul: Matmul = 'default'

    @nn.compact
    def __call__(self, x_BTC: jax.Array) -> jax.Array:
        dense = functools.partial(
            Dense, use_bias=False, dtype=self.dtype, kernel_init=INIT, matmul=self.matmul
        )
        features = {'gate': self.hidden, 'up': self.hidden}
        gate_BTM, up_BTM = together(dense, x_BTC, 'mlp', features)
        return dense(x_BTC.shape[-1], reads='mlp', name='down')(nn.silu(gate_BTM) * up_BTM)


class Block(nn.Module):
    """One layer: normalise, attend, add; normalise, MLP (or a mixture of them), add.

    Attributes:
      heads: query heads.
      kv_heads: key-value heads.
      hidden: width of the hidden MLP layer.
      epsilon: added to the mean square in the norms.
      dtype: type of the computation.
      impl: implementation of attention.
      routing: mixture of experts, if any.
      context: how attention sees positions on other devices.
      head_dim: size of a head; 0 is the width over `heads`.
      matmul: precision of the dense layers.
    """

    heads: int
    kv_heads: int
    hidden: int
    epsilon: float
    dtype: Any
    impl: Implementation = 'auto'
    routing: Routing = DENSE
    context: Context = 'ring'
    head_dim: int = 0
    matmul: Matmul = 'default'

    @nn.compact
    def __call__(self, x_BTC, kv, turned, start_B, *, train: bool):
        norm = functools.partial(RMSNorm, epsilon=self.epsilon, dtype=self.dtype)
        h_BTC = enter(norm(name='attention_norm')(x_BTC))
        attention = Attention(
            self.heads,
            self.kv_heads,
            self.dtype,
            self.impl,
            self.context,
            self.head_dim,
            self.matmul,
            name='attention',
        )
        h_BTC, kv = attention(h_BTC, kv, turned, start_B)
        x_BTC += leave(h_BTC)
        h_BTC = enter(norm(name='mlp_norm')(x_BTC))
        if self.routing.experts:
            expert = functools.partial(MLP, self.hidden, self.dtype, self.matmul)
            moe = MoE(expert, self.routing, name='moe')
            h_BTC = moe(h_BTC, drop=kv is None, train=train)
        else:
            h_BTC = MLP(self.hidden, self.dtype, self.matmul, name='mlp')(h_BTC)
        return x_BTC + leave(h_BTC), kv


class Llama(DecoderLM):
    """Decoder-only transformer language model (Grattafiori et al. 2024): tokens in, logits out.

    Parameters are float32; so are logits, softmax, rotations and the statistics of the norms,
    whatever `dtype`. Initialized normal with deviation 0.02.

    Attributes, beside those of `DecoderLM`, whose `heads` must be of even size here:
      kv_heads: number of key-value heads; divides `heads`.
      hidden: width of the hidden MLP layer.
      tied: whether the output layer is the embedding, transposed.
      theta: base of the rotary frequencies.
      scaling: of the rotary frequencies, for a longer context.
      epsilon: added to the mean square in the norms.
      head_dim: size of a head; 0 is the width over `heads`.
    """

    depth: int = 16
    heads: int = 32
    width: int = 2048
    kv_heads: int = 8
    hidden: int = 8192
    tied: bool = True
    theta: float = 500_000.0
    scaling: RotaryScaling | None = None
    epsilon: float = 1e-5
    head_dim: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim < 0 or self.head_dim % 2:
            raise UsageError(
                f'--head_dim={self.head_dim}: must be even, and not negative; '
                f'try --head_dim={max(2, self.head_dim + self.head_dim % 2)}'
            )
        if not self.head_dim:
            check_heads(self.heads, self.width, even=True)
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            good = max(k for k in range(1, max(2, self.kv_heads)) if self.heads % k == 0)
            raise UsageError(
                f'--kv_heads={self.kv_heads}: must divide the {self.heads} heads; '
                f'try --kv_heads={good}'
            )

    @property
    def _kv_heads(self) -> int:
        return self.kv_heads

    @property
    def _head_dim(self) -> int:
        return self.head_dim or self.width // self.heads

    @nn.compact
    def _run(self, tokens_BT: jax.Array, cache: Cache | None, train: bool) -> tuple[jax.Array, Any]:
        table = (self.vocab_size, self.width)
        embedding_VC = self.param('embedding', INIT, table)
        output_VC = embedding_VC if self.tied else self.param('output_embedding', INIT, table)
        x_BTC = look_up(embedding_VC, tokens_BT, self.dtype)
        frequency = frequencies(self._head_dim, self.theta, self.scaling)
        turned = rotation(positions(tokens_BT, cache), frequency)
        block = functools.partial(
            Block, self.heads, self.kv_heads, self.hidden, self.epsilon, self.dtype,
            self.attention_impl, self.routing, self.context, self.head_dim, self.matmul,
        )  # fmt: skip
        x_BTC, layers = stack(
            block, x_BTC, turned, cache and cache.length_B, layers=cache and cache.layers,
            depth=self.depth, scan=self.scan, remat=self.remat, microbatches=self.microbatches,
            train=train,
        )  # fmt: skip
        x_BTC = RMSNorm(epsilon=self.epsilon, dtype=self.dtype, name='norm')(x_BTC)
        return logits(x_BTC, output_VC), layers


def forward_flops(
    *,
    vocab_size: int,
    length: int,
    depth: int,
    heads: int,
    kv_heads: int,
    width: int,
    hidden: int,
    head_dim: int = 0,
    routing: Routing = DENSE,
) -> int:
    """FLOPs of the matrix products in one example's forward pass, two for a multiply-add.

    All T^2 scores count, the masked ones too (the convention of Chowdhery et al. 2022, appendix
    B); the embedding is a look-up and does not; of a mixture, what a token's experts compute.
    """
    size = head_dim or width // heads
    projections = 2 * width * 2 * (heads + kv_heads) * size
    mlp = routing.flops(2 * 3 * width * hidden, width)
    layer = length * (projections + mlp) + 2 * 2 * length**2 * heads * size
    return depth * layer + 2 * length * width * vocab_size

"""WaveNet's gated residual unit: the one place that calls its kernel.

Legend: B batch, T positions, K taps, C channels, G gate channels, S skip channels,
R = (K - 1) * dilation positions before the first.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from bigjax.nn.implementation import Implementation, named, plain
from bigjax.sharding import BATCH_AXES, LOGICAL_TO_MESH
from pallas_kernels import conv as kernels

_on_the_mesh = kernels.shard(batch=BATCH_AXES, channels=LOGICAL_TO_MESH['channels'])


class GatedConv1d(nn.Module):
    """WaveNet's residual unit over sequences [B, T, C] (van den Oord et al. 2016, eq. 2, fig. 4).

    A causal convolution to twice `gates` channels, the tanh of one half times the sigmoid of the
    other, and of that product 1x1 convolutions to the residual and to `skip` channels. Parameters
    are float32; products are taken in `dtype` (None: the input's).

    Attributes:
      gates: G.
      skip: S.
      kernel_size: K.
      dilation: distance between the positions that taps read.
      dtype: type of the computation and of both outputs.
      impl: an implementation of `pallas_kernels.conv.gated_conv1d`; 'auto' takes the kernel of the
        chip that is there, where it is predicted to be faster than XLA, else 'xla'.
    """

    gates: int
    skip: int
    kernel_size: int = 2
    dilation: int = 1
    dtype: Any = None
    impl: Implementation = 'auto'

    @nn.compact
    def __call__(
        self,
        x_BTC: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        state: jax.Array | None = None,
        return_state: bool = False,
    ) -> tuple[jax.Array, ...]:
        """Returns [B, T, C] for the next unit, [B, T, S] for the output, and the state if asked to.

        Args:
          x_BTC: sequences.
          segment_ids: int [B, T]: a tap reads positions of its output's id only.
          state: [B, R, C], the inputs before x; None is zeros.
          return_state: whether to return the state after x too.
        """
        dtype = self.dtype or x_BTC.dtype
        C, G = x_BTC.shape[2], self.gates
        kernel, bias_F = self._weights('gate', (self.kernel_size, C, 2 * G))
        residual, bias_C = self._weights('residual', (G, C))
        skip, bias_S = self._weights('skip', (G, self.skip))
        call = kernels.gated_conv1d if plain(self.impl) else _on_the_mesh.gated_conv1d
        return named(call, self.impl, 'conv')(
            *(x.astype(dtype) for x in (x_BTC, kernel, residual, skip)),
            dilation=self.dilation,
            bias_F=bias_F,
            bias_residual_C=bias_C,
            bias_skip_S=bias_S,
            segment_ids=segment_ids,
            state=state,
            return_state=return_state,
        )

    def _weights(self, name: str, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        kernel = self.param(f'{name}_kernel', nn.initializers.lecun_normal(), shape, jnp.float32)
        zeros = nn.initializers.zeros_init()
        return kernel, self.param(f'{name}_bias', zeros, shape[-1:], jnp.float32)

"""WaveNet's gated unit in plain JAX: the specification, and the form that a CPU runs.

Legend: B batch, T positions, K taps, C channels, G gate channels, F = 2 G, S skip channels,
R = (K - 1) * dilation positions before the first.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.arrays import accumulator
from pallas_kernels.conv.gated_arguments import GatedOperands, reach, same_segment_BKT


def reference(operands: GatedOperands, dilation: int) -> tuple[jax.Array, jax.Array]:
    """Returns the unit's two outputs in x's type; all in between is float32 (float64 for it)."""
    dtype = accumulator(operands.x_BTC.dtype)
    return _unit(operands, dilation, dtype)


def xla(operands: GatedOperands, dilation: int) -> tuple[jax.Array, jax.Array]:
    """Returns what `reference` does, of products whose factors are in x's type."""
    return _unit(operands, dilation, operands.x_BTC.dtype)


def _unit(operands, dilation, dtype) -> tuple[jax.Array, jax.Array]:
    x_BTC, w_KCF, w_residual_GC, w_skip_GS, *biases, state_BRC, _ = operands
    (B, T, C), R = x_BTC.shape, reach(operands, dilation)
    if state_BRC is None:
        state_BRC = jnp.zeros((B, R, C), x_BTC.dtype)
    x_padded = jnp.concatenate([state_BRC, x_BTC], axis=1)
    same_BKT = same_segment_BKT(operands, dilation)
    taps = []
    for k in range(w_KCF.shape[0]):
        tap_BTC = x_padded[:, k * dilation : k * dilation + T]
        if same_BKT is not None:
            tap_BTC = jnp.where(same_BKT[:, k, :, None], tap_BTC, 0)
        taps.append(tap_BTC)
    # One contraction over taps and channels, whose sums do not depend on how many positions go.
    product = functools.partial(
        jnp.matmul, precision='highest', preferred_element_type=accumulator(dtype)
    )

    def times(x_BTN, w_NM, bias_M):
        y_BTM = product(x_BTN.astype(dtype), w_NM.astype(dtype))
        return y_BTM if bias_M is None else y_BTM + bias_M.astype(y_BTM.dtype)[None, None]

    a_BTF = times(jnp.concatenate(taps, axis=2), w_KCF.reshape(-1, w_KCF.shape[2]), biases[0])
    tanh_BTG, sigmoid_BTG = jnp.split(a_BTF, 2, axis=2)
    z_BTG = jnp.tanh(tanh_BTG) * jax.nn.sigmoid(sigmoid_BTG)
    residual_BTC = times(z_BTG, w_residual_GC, biases[1])
    skip_BTS = times(z_BTG, w_skip_GS, biases[2])
    y_BTC = x_BTC.astype(residual_BTC.dtype) + residual_BTC
    return y_BTC.astype(x_BTC.dtype), skip_BTS.astype(x_BTC.dtype)

"""What WaveNet's gated unit takes: its arrays, and the checks of them.

Legend: B batch, T positions, K taps, C channels, G gate channels, F = 2 G, S skip channels,
R = (K - 1) * dilation positions before the first.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.arrays import FLOATS, wrong
from pallas_kernels.conv.checks import check_segment_ids, check_state


class GatedOperands(NamedTuple):
    """The arrays of one call; None where absent.

    w_KCF's first G features are those of tanh, the others those of the sigmoid. The last tap of
    K reads the output's own position. Segment ids are int32.
    """

    x_BTC: jax.Array
    w_KCF: jax.Array
    w_residual_GC: jax.Array
    w_skip_GS: jax.Array
    bias_F: jax.Array | None = None
    bias_residual_C: jax.Array | None = None
    bias_skip_S: jax.Array | None = None
    state_BRC: jax.Array | None = None
    segment_ids_BT: jax.Array | None = None


def reach(operands: GatedOperands, dilation: int) -> int:
    """Returns R, how many positions before its own an output reads from."""
    return (operands.w_KCF.shape[0] - 1) * dilation


def same_segment_BKT(operands: GatedOperands, dilation: int) -> jax.Array | None:
    """Returns where a tap reads a position of the output's own segment; None where all do.

    What stands before the first position is of its segment.
    """
    ids_BT = operands.segment_ids_BT
    R = reach(operands, dilation)
    if ids_BT is None or not R:
        return None
    (B, T), K = ids_BT.shape, operands.w_KCF.shape[0]
    before_BR = jnp.broadcast_to(ids_BT[:, :1], (B, R))
    ids_padded = jnp.concatenate([before_BR, ids_BT], axis=1)
    taps = [ids_padded[:, k * dilation : k * dilation + T] == ids_BT for k in range(K)]
    return jnp.stack(taps, axis=1)


def check_gated(
    x: jax.Array,
    w: jax.Array,
    w_residual: jax.Array,
    w_skip: jax.Array,
    *,
    dilation: int = 1,
    bias_F: jax.Array | None = None,
    bias_residual_C: jax.Array | None = None,
    bias_skip_S: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    state: jax.Array | None = None,
) -> GatedOperands:
    """Returns the operands that `gated_conv1d`'s arguments come to.

    Raises:
      ValueError: an argument does not fit; the message names it, its value, the rule, and a value
        that works.
    """
    x, w, w_residual, w_skip = map(jnp.asarray, (x, w, w_residual, w_skip))
    if x.ndim != 3 or not x.size:
        rule = 'must have 3 dimensions [B, T, C], none of them 0'
        raise wrong('x_BTC', x, rule, f'{x.dtype}[2, 16, 8]')
    if x.dtype.name not in FLOATS:
        rule = f'must be one of {", ".join(FLOATS)}'
        raise wrong('x_BTC', x, rule, "x_BTC.astype('float32')")
    if not isinstance(dilation, int) or isinstance(dilation, bool) or dilation < 1:
        raise wrong('dilation', dilation, 'must be a Python int >= 1', '1')
    C = x.shape[2]
    if w.ndim != 3 or not w.size or w.shape[1] != C or w.shape[2] % 2:
        rule = f'must be [K, C = {C}, F], F twice the gate channels'
        raise wrong('w_KCF', w, rule, f'{x.dtype}{[2, C, 2 * C]}')
    G = w.shape[2] // 2
    if w_residual.shape != (G, C):
        rule = f'must be [G, C], G = {G} being half of the features of w_KCF'
        raise wrong('w_residual_GC', w_residual, rule, f'{x.dtype}{[G, C]}')
    if w_skip.ndim != 2 or not w_skip.size or w_skip.shape[0] != G:
        rule = f'must be [G, S], G = {G} being half of the features of w_KCF'
        raise wrong('w_skip_GS', w_skip, rule, f'{x.dtype}{[G, C]}')
    weights = {'w_KCF': w, 'w_residual_GC': w_residual, 'w_skip_GS': w_skip}
    for name, array in weights.items():
        if array.dtype != x.dtype:
            good = f'{x.dtype}{list(array.shape)}'
            raise wrong(name, array, f'must have the type of x_BTC, {x.dtype}', good)
    check_state(state, x, (w.shape[0] - 1) * dilation)
    return GatedOperands(
        x,
        w,
        w_residual,
        w_skip,
        bias_F=_check_bias('bias_F', bias_F, 2 * G),
        bias_residual_C=_check_bias('bias_residual_C', bias_residual_C, C),
        bias_skip_S=_check_bias('bias_skip_S', bias_skip_S, w_skip.shape[1]),
        state_BRC=None if state is None else jnp.asarray(state),
        segment_ids_BT=None if segment_ids is None else check_segment_ids(segment_ids, x),
    )


def _check_bias(name: str, bias: jax.Array | None, size: int) -> jax.Array | None:
    if bias is None:
        return None
    bias = jnp.asarray(bias)
    if bias.shape != (size,) or not jnp.issubdtype(bias.dtype, jnp.floating):
        raise wrong(name, bias, f'must be None or float of shape [{size}]', f'float32[{size}]')
    return bias

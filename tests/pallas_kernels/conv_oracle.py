"""Convolution once more, twice: in float64, and as one writes it down in XLA.

Nothing of `pallas_kernels` is used but its names of activations.

Legend: B batch, T positions, K kernel positions, C input channels, D = C / G channels of a kernel,
G groups, F output channels of a group.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from conv_cases import Case, Sequence, with_gradients

ACTIVATIONS = {
    None: lambda z: z,
    'relu': jax.nn.relu,
    'silu': lambda z: z * jax.nn.sigmoid(z),
    'gelu': lambda z: 0.5 * z * (1 + jnp.tanh(float(np.sqrt(2 / np.pi)) * (z + 0.044715 * z**3))),
    'tanh': jnp.tanh,
    'sigmoid': jax.nn.sigmoid,
}


def oracle(case: Case | Sequence, arrays, others, dy) -> dict[str, np.ndarray]:
    """Returns y and the gradients in float64."""
    with jax.enable_x64(True):
        exact, dy = jax.tree.map(_float64, (arrays, dy))
        made = with_gradients('plain', lambda arrays: plain(case, arrays, others), exact, dy)()
        return {name: np.asarray(x) for name, x in made.items()}


def plain(case: Case | Sequence, arrays, others) -> jax.Array:
    """Returns y as one writes a convolution down in XLA, in the type of the arrays."""
    if isinstance(case, Sequence):
        u = _sequence(case, arrays, others)
    else:
        u = jax.lax.conv_general_dilated(
            arrays['x'],
            arrays['w'],
            case.stride,
            case.padding,
            rhs_dilation=case.dilation,
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
            feature_group_count=case.channels[2],
        )
    wide = lambda name: arrays[name].reshape((1,) * (u.ndim - 1) + (-1,))  # noqa: E731
    if 'bias' in arrays:
        u += wide('bias')
    if 'scale' in arrays:
        u = u * wide('scale') + wide('shift')
    if 'residual' in arrays:
        u += arrays['residual']
    return ACTIVATIONS[case.activation](u)


def _sequence(case: Sequence, arrays: dict[str, Any], others: dict[str, Any]) -> jax.Array:
    """Gathers what every output reads, position by position, and multiplies it all at once."""
    x, w, (C, _, G) = arrays['x'], arrays['w'], case.channels
    T, K, S = x.shape[1], case.kernel, (case.kernel - 1) * case.dilation
    left = S
    if case.padding == 'SAME':
        whole = max(0, (-(-T // case.stride) - 1) * case.stride + S + 1 - T)
        left, outputs = whole // 2, -(-T // case.stride)
    else:
        low, high = {'VALID': (0, 0), 'CAUSAL': (S, 0)}.get(case.padding, case.padding)
        left, outputs = low, (T + low + high - S - 1) // case.stride + 1
    at = np.arange(outputs)[:, None] * case.stride + np.arange(K)[None] * case.dilation - left
    inside = np.broadcast_to((at >= 0) & (at < T), (x.shape[0], *at.shape))
    if 'segment_ids' in others:
        ids = np.asarray(others['segment_ids'])
        inside = inside & (ids[:, np.clip(at, 0, T - 1)] == ids[:, :, None])
    x_BTKC = jnp.where(inside[..., None], x[:, np.clip(at, 0, T - 1)], 0)
    if 'state' in arrays:
        before = (at < 0)[None] & np.ones(inside.shape, bool)
        if 'segment_ids' in others:
            before &= (ids == ids[:, :1])[:, :, None]
        past = arrays['state'][:, np.clip(at + S, 0, max(S - 1, 0))] if S else x_BTKC
        x_BTKC = jnp.where(before[..., None], past, x_BTKC)
    x_BTKGD = x_BTKC.reshape(*x_BTKC.shape[:3], G, C // G)
    w_KDGF = w.reshape(K, C // G, G, -1)
    y_BTGF = jnp.einsum('btkgd,kdgf->btgf', x_BTKGD, w_KDGF)
    return y_BTGF.reshape(*y_BTGF.shape[:2], -1)


def _float64(x: jax.Array) -> jax.Array:
    return jnp.asarray(np.asarray(x.astype(jnp.float32), np.float64))

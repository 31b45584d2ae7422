"""What XLA runs: its own convolution and, on a CPU, the form that is fastest there (`xla_form`).

Legend: B batch, H W input rows and columns, K L kernel rows and columns, P Q output rows and
columns, D input channels of a kernel, O output channels, T positions.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.arrays import accumulator
from pallas_kernels.chip import accelerator
from pallas_kernels.conv.arguments import ConvBlockSizes, Operands, Spec
from pallas_kernels.conv.epilogue import finish
from pallas_kernels.conv.reference import features
from pallas_kernels.conv.xla_form import LAX, Form, form


def refuses(operands: Operands, spec: Spec) -> str | None:
    """Returns None: XLA runs every feature."""
    del operands, spec


def forward(
    operands: Operands,
    spec: Spec,
    block_sizes: ConvBlockSizes | None = None,
    keep: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns y_BPQO in x's type and, with `keep`, u_BPQO, the convolution with its bias, in it."""
    return forward_keeping(operands, spec, block_sizes, keep)[:2]


def forward_keeping(
    operands: Operands,
    spec: Spec,
    block_sizes: ConvBlockSizes | None = None,
    keep: bool = False,
) -> tuple[jax.Array, jax.Array | None, Any]:
    """Returns y_BPQO, u_BPQO, and what `gradients` needs besides: transformed images, or None."""
    del block_sizes
    dtype = operands.x_BHWC.dtype
    u_BPQO, kept = _convolve(operands, spec)
    if operands.bias_O is not None:
        u_BPQO += features(operands.bias_O).astype(u_BPQO.dtype)
    y_BPQO = finish(
        u_BPQO,
        spec.activation,
        scale=features(operands.scale_O),
        shift=features(operands.shift_O),
        residual=operands.residual_BPQO,
    )
    return y_BPQO.astype(dtype), u_BPQO.astype(dtype) if keep else None, kept


def gradients(
    du_BPQO: jax.Array,
    operands: Operands,
    spec: Spec,
    block_sizes: ConvBlockSizes | None = None,
    kept: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the cotangents of x and w.

    `kept` is what `forward_keeping` returned; without it, that is computed again.
    """
    del block_sizes
    if kept is None:
        kept = _convolve(operands, spec)[1]
    if operands.segment_ids_BT is not None:
        return _segments_gradients(du_BPQO, operands, spec, kept)
    x_BHWC, w_KLDO = operands[:2]
    return _form(x_BHWC, w_KLDO, spec).gradients(du_BPQO, x_BHWC, w_KLDO, spec, kept)


def input_gradient(
    du_BPQO: jax.Array,
    operands: Operands,
    spec: Spec,
    block_sizes: ConvBlockSizes | None = None,
) -> jax.Array:
    """Returns the cotangent of x, in its type."""
    return gradients(du_BPQO, operands, spec, block_sizes)[0]


def weight_gradient(
    du_BPQO: jax.Array,
    operands: Operands,
    spec: Spec,
    block_sizes: ConvBlockSizes | None = None,
) -> jax.Array:
    """Returns the cotangent of w, in its type."""
    return gradients(du_BPQO, operands, spec, block_sizes)[1]


def _form(x_BHWC: jax.Array, w_KLDO: jax.Array, spec: Spec) -> Form:
    return form(x_BHWC, w_KLDO, spec) if accelerator() is None else LAX


def _convolve(operands: Operands, spec: Spec) -> tuple[jax.Array, Any]:
    """Returns the convolution alone in the type of the sum, and what the gradients need."""
    if operands.segment_ids_BT is None:
        x_BHWC, w_KLDO = operands[:2]
        return _form(x_BHWC, w_KLDO, spec).forward(x_BHWC, w_KLDO, spec)
    total, kept = None, []
    for x_B1TC, w_11DO, one, _ in _taps(operands, spec):
        part, needed = _form(x_B1TC, w_11DO, one).forward(x_B1TC, w_11DO, one)
        total = part if total is None else total + part
        kept.append(needed)
    return total, kept


def _segments_gradients(du_B1TO, operands, spec, kept) -> tuple[jax.Array, jax.Array]:
    dx_B1TC, dw_1LDO, dtype = 0, [], accumulator(du_B1TO.dtype)
    left = spec.padding[1][0]
    for tap, needed in zip(_taps(operands, spec), kept, strict=True):
        x_B1TC, w_11DO, one, (first, same_B1T1) = tap
        dx, dw = _form(x_B1TC, w_11DO, one).gradients(du_B1TO, x_B1TC, w_11DO, one, needed)
        dw_1LDO.append(dw)
        dx = jnp.where(same_B1T1, dx.astype(dtype), 0)
        config = [(0, 0, 0), (0, 0, 0), (first - left, left - first, 0), (0, 0, 0)]
        dx_B1TC += jax.lax.pad(dx, jnp.zeros((), dtype), config)
    return dx_B1TC.astype(operands.x_BHWC.dtype), jnp.concatenate(dw_1LDO, axis=1)


def _taps(operands: Operands, spec: Spec):
    """Returns, for each kernel position, what it reads within the segment, and its own weights."""
    (left, right), x_B1TC, w_1LDO = spec.padding[1], *operands[:2]
    ids_BT, T, taps = operands.segment_ids_BT, x_B1TC.shape[2], []
    one = dataclasses.replace(spec, padding=((0, 0), (0, 0)), dilation=(1, 1))
    shifted = lambda x, first, axis: jax.lax.slice_in_dim(x, first, first + T, axis=axis)  # noqa: E731
    x_padded = jnp.pad(x_B1TC, ((0, 0), (0, 0), (left, right), (0, 0)))
    ids_padded = jnp.pad(ids_BT, ((0, 0), (left, right)))
    for tap in range(w_1LDO.shape[1]):
        first = tap * spec.dilation[1]
        same_B1T1 = (shifted(ids_padded, first, 1) == ids_BT)[:, None, :, None]
        x_tap = jnp.where(same_B1T1, shifted(x_padded, first, 2), 0)
        taps.append((x_tap, w_1LDO[:, tap : tap + 1], one, (first, same_B1T1)))
    return taps

"""The specification of a convolution: `jax.lax`'s own at float32, every feature, no trick.

Legend: B batch, H W input rows and columns, K L kernel rows and columns, P Q output rows and
columns, D input channels of a kernel, O output channels, T positions.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.arrays import accumulator
from pallas_kernels.conv.arguments import ConvBlockSizes, Operands, Spec
from pallas_kernels.conv.epilogue import finish


def refuses(operands: Operands, spec: Spec) -> str | None:
    """Returns None: the specification has every feature."""
    del operands, spec


def forward(
    operands: Operands,
    spec: Spec,
    block_sizes: ConvBlockSizes | None = None,
    keep: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns y_BPQO in x's type and, with `keep`, u_BPQO, the convolution with its bias, in it."""
    del block_sizes
    dtype = operands.x_BHWC.dtype
    u_BPQO = convolution(operands, spec)
    if operands.bias_O is not None:
        u_BPQO += features(operands.bias_O).astype(u_BPQO.dtype)
    y_BPQO = finish(
        u_BPQO,
        spec.activation,
        scale=features(operands.scale_O),
        shift=features(operands.shift_O),
        residual=operands.residual_BPQO,
    )
    return y_BPQO.astype(dtype), u_BPQO.astype(dtype) if keep else None


def input_gradient(
    du_BPQO: jax.Array,
    operands: Operands,
    spec: Spec,
    block_sizes: ConvBlockSizes | None = None,
) -> jax.Array:
    """Returns the cotangent of x, that JAX derives from `convolution`, which does not need x."""
    del block_sizes
    x_BHWC = jnp.zeros_like(operands.x_BHWC)
    _, vjp = jax.vjp(lambda x: convolution(operands._replace(x_BHWC=x), spec), x_BHWC)
    return vjp(du_BPQO.astype(accumulator(du_BPQO.dtype)))[0]


def weight_gradient(
    du_BPQO: jax.Array,
    operands: Operands,
    spec: Spec,
    block_sizes: ConvBlockSizes | None = None,
) -> jax.Array:
    """Returns the cotangent of w, that JAX derives from `convolution`, which does not need w."""
    del block_sizes
    w_KLDO = jnp.zeros_like(operands.w_KLDO)
    _, vjp = jax.vjp(lambda w: convolution(operands._replace(w_KLDO=w), spec), w_KLDO)
    return vjp(du_BPQO.astype(accumulator(du_BPQO.dtype)))[0]


def convolution(operands: Operands, spec: Spec) -> jax.Array:
    """Returns the convolution alone, [B, P, Q, O] in the accumulator's type."""
    dtype = accumulator(operands.x_BHWC.dtype)
    x_BHWC, w_KLDO = operands.x_BHWC.astype(dtype), operands.w_KLDO.astype(dtype)
    if operands.segment_ids_BT is None:
        return _convolve(x_BHWC, w_KLDO, spec.stride, spec.padding, spec.dilation, spec.groups)
    # One kernel position after the other: its inputs are hidden from outputs of other segments.
    (low, high), dilation, T = spec.padding[1], spec.dilation[1], x_BHWC.shape[2]
    ids_BT, y_BPQO = operands.segment_ids_BT, 0
    ids_padded = jnp.pad(ids_BT, ((0, 0), (low, high)))
    x_padded = jnp.pad(x_BHWC, ((0, 0), (0, 0), (low, high), (0, 0)))
    for tap in range(w_KLDO.shape[1]):
        here = slice(tap * dilation, tap * dilation + T)
        same_BT = ids_padded[:, here] == ids_BT
        x_tap = jnp.where(same_BT[:, None, :, None], x_padded[:, :, here], 0)
        y_BPQO += _convolve(
            x_tap, w_KLDO[:, tap : tap + 1], (1, 1), ((0, 0), (0, 0)), (1, 1), spec.groups
        )
    return y_BPQO


def features(x_O: jax.Array | None) -> jax.Array | None:
    """Returns x as [1, 1, 1, O]."""
    return None if x_O is None else x_O[None, None, None]


def _convolve(x_BHWC, w_KLDO, stride, padding, dilation, groups) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x_BHWC,
        w_KLDO,
        stride,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=groups,
        precision='highest',
    )

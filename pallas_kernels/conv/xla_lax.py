"""XLA's own convolution: off the CPU the only form, and on it one of several.

Legend: B batch, H W input rows and columns, K L kernel rows and columns, P Q output rows and
columns, D input channels of a kernel, O output channels.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.conv.arguments import Spec

_PART = 16  # images of one part of a sum over the batch


def convolution(
    x_BHWC: jax.Array, w_KLDO: jax.Array, spec: Spec, dtype: jnp.dtype | None = None
) -> jax.Array:
    """Returns XLA's own convolution, [B, P, Q, O]; `dtype` is of the result, None is x's."""
    return jax.lax.conv_general_dilated(
        x_BHWC,
        w_KLDO,
        spec.stride,
        spec.padding,
        rhs_dilation=spec.dilation,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=spec.groups,
        preferred_element_type=dtype,
    )


def forward(x_BHWC: jax.Array, w_KLDO: jax.Array, spec: Spec) -> tuple[jax.Array, None]:
    """Returns u_BPQO in the type of the sum, and None."""
    return convolution(x_BHWC, w_KLDO, spec, jnp.promote_types(x_BHWC.dtype, jnp.float32)), None


def gradients(
    du_BPQO: jax.Array, x_BHWC: jax.Array, w_KLDO: jax.Array, spec: Spec, kept: None
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients that JAX derives."""
    del kept
    return jax.vjp(lambda x, w: convolution(x, w, spec), x_BHWC, w_KLDO)[1](du_BPQO)


def gradients_in_parts(
    du_BPQO: jax.Array, x_BHWC: jax.Array, w_KLDO: jax.Array, spec: Spec, kept: None
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients, the kernel's summed over parts of the batch."""
    del kept
    dx_BHWC = jax.vjp(lambda x: convolution(x, w_KLDO, spec), x_BHWC)[1](du_BPQO)[0]
    dw_KLDO = jnp.zeros_like(w_KLDO)
    # XLA transposes all images for the kernel's gradient: parts of them stay in a core's cache.
    for i in range(0, x_BHWC.shape[0], _PART):
        x, du = x_BHWC[i : i + _PART], du_BPQO[i : i + _PART]
        dw_KLDO += jax.vjp(lambda w, x=x: convolution(x, w, spec), w_KLDO)[1](du)[0]
    return dx_BHWC, dw_KLDO

"""The forms of a convolution on a CPU, and which one is taken: by shape and type alone.

A form knows no epilogue: it sums products, and has both gradients of that. Measured on two cores;
each comment says of what.

Legend: B batch, H W input rows and columns, K L kernel rows and columns, P Q output rows and
columns, C input channels, D = C / groups channels of a kernel, O output channels.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.conv import xla_depthwise, xla_lax, xla_taps, xla_winograd
from pallas_kernels.conv.arguments import Spec

_FEW_CHANNELS, _FEW_PIXELS = 64, 16


class Form(NamedTuple):
    """How to convolve.

    Attributes:
      forward: of x_BHWC, w_KLDO and the specification to u_BPQO, float32 or x's type, and what
        `gradients` needs besides.
      gradients: of du_BPQO, x_BHWC, w_KLDO, the specification and that to the cotangents of x and w
        in their type.
    """

    forward: Callable[[jax.Array, jax.Array, Spec], tuple[jax.Array, Any]]
    gradients: Callable[[jax.Array, jax.Array, jax.Array, Spec, Any], tuple[jax.Array, jax.Array]]


LAX = Form(xla_lax.forward, xla_lax.gradients)
LAX_IN_PARTS = Form(xla_lax.forward, xla_lax.gradients_in_parts)
TAPS = Form(xla_taps.forward, xla_taps.gradients)
TAPS_BACKWARD = Form(xla_lax.forward, xla_taps.gradients)
WINOGRAD = Form(xla_winograd.forward, xla_winograd.gradients)
DEPTHWISE = Form(xla_depthwise.forward, xla_depthwise.gradients)


def form(x_BHWC: jax.Array, w_KLDO: jax.Array, spec: Spec) -> Form:
    """Returns the form that is fastest on a CPU."""
    B, H, W, C = x_BHWC.shape
    features, sequence = w_KLDO.shape[3], H == w_KLDO.shape[0] == 1
    if spec.groups > 1:
        # XLA's own takes 40 to 180 times as long for a depthwise kernel's passes, and 100 to 500
        # times for the kernel's gradient of any grouped one.
        return DEPTHWISE if spec.groups == C else GROUPED
    if x_BHWC.dtype != jnp.float32:
        return LAX
    # One matrix product, which XLA's own convolution reaches half the speed of, also when narrow.
    if w_KLDO.shape[:2] == (1, 1):
        return TAPS
    if sequence and B * spec.out_size((H, W), w_KLDO.shape[:2])[1] == 1:
        return ALONE
    # With 64 channels or more, XLA's own convolution packs and pads slowly.
    if min(C, features) < _FEW_CHANNELS:
        return LAX_IN_PARTS
    # Odd sides leave part of the last tiles unused, which with 64 channels is not worth it.
    tiled = H % 2 == W % 2 == 0 or min(C, features) > _FEW_CHANNELS
    if tiled and H * W >= _FEW_PIXELS and xla_winograd.fits(w_KLDO, spec):
        return WINOGRAD
    # But not of a sequence, whose steps are to have the bits that they have within the whole: XLA's
    # own sums in an order that does not depend on the length.
    if H * W <= _FEW_PIXELS and not sequence:
        return TAPS
    if not tiled:
        return LAX_IN_PARTS
    # XLA transposes the whole image for a kernel's gradient, and dilates for a strided input's.
    return TAPS_BACKWARD if max(spec.stride) > 1 else LAX


def _alone_forward(x_B1TC: jax.Array, w_1LDO: jax.Array, spec: Spec) -> tuple[jax.Array, None]:
    """Convolves two equal ones: a row alone has a routine that sums in another order."""
    u_B1TO, _ = xla_lax.forward(jnp.concatenate([x_B1TC, x_B1TC]), w_1LDO, spec)
    return u_B1TO[:1], None


def _grouped_forward(
    x_BHWC: jax.Array, w_KLDO: jax.Array, spec: Spec
) -> tuple[jax.Array, list[Any]]:
    """Convolves each group by itself."""
    parts = [form(x, w, one).forward(x, w, one) for x, w, one in _groups(x_BHWC, w_KLDO, spec)]
    u, kept = zip(*parts, strict=True)
    return jnp.concatenate(u, axis=3), list(kept)


def _grouped_gradients(
    du_BPQO: jax.Array, x_BHWC: jax.Array, w_KLDO: jax.Array, spec: Spec, kept: list[Any]
) -> tuple[jax.Array, jax.Array]:
    parts = zip(
        jnp.split(du_BPQO, spec.groups, axis=3), _groups(x_BHWC, w_KLDO, spec), kept, strict=True
    )
    made = [form(x, w, one).gradients(du, x, w, one, k) for du, (x, w, one), k in parts]
    dx, dw = zip(*made, strict=True)
    return jnp.concatenate(dx, axis=3), jnp.concatenate(dw, axis=3)


def _groups(x_BHWC, w_KLDO, spec):
    parts = (jnp.split(a, spec.groups, axis=3) for a in (x_BHWC, w_KLDO))
    return [(x, w, dataclasses.replace(spec, groups=1)) for x, w in zip(*parts, strict=True)]


ALONE = Form(_alone_forward, xla_lax.gradients)
GROUPED = Form(_grouped_forward, _grouped_gradients)

"""What follows the sum of a convolution, and its derivatives; for kernels and for plain JAX alike.

u = convolution + bias; z = u * scale + shift + residual; y = activation(z), all in the type of the
sum. Arrays here must be of one rank: a caller, a kernel's block among them, gives bias, scale and
shift the dimensions that they lack.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    'relu': jax.nn.relu,
    'silu': jax.nn.silu,
    'gelu': lambda z: jax.nn.gelu(z, approximate=True),
    'tanh': jnp.tanh,
    'sigmoid': jax.nn.sigmoid,
}
# Those whose derivative is known from what they return.
_FROM_RESULT: dict[str | None, Callable[[jax.Array], jax.Array]] = {
    None: jnp.ones_like,
    'relu': lambda y: (y > 0).astype(y.dtype),
    'tanh': lambda y: 1 - y * y,
    'sigmoid': lambda y: y * (1 - y),
}


def before_activation(
    u: jax.Array,
    scale: jax.Array | None = None,
    shift: jax.Array | None = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    """Returns z in u's type, from u, the convolution with its bias."""
    if scale is not None:
        u = u * scale.astype(u.dtype) + shift.astype(u.dtype)
    return u if residual is None else u + residual.astype(u.dtype)


def activate(z: jax.Array, activation: str | None) -> jax.Array:
    """Returns the activation of z, in z's type."""
    return z if activation is None else ACTIVATIONS[activation](z)


def finish(
    u: jax.Array,
    activation: str | None = None,
    *,
    scale: jax.Array | None = None,
    shift: jax.Array | None = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    """Returns y in u's type, from u, the convolution with its bias."""
    return activate(before_activation(u, scale, shift, residual), activation)


def needs_u(activation: str | None, scaled: bool) -> bool:
    """Whether the derivatives need u: of a scale, or of an activation not known from its result."""
    return scaled or activation not in _FROM_RESULT


def slope(activation: str | None, y: jax.Array | None, z: jax.Array | None) -> jax.Array:
    """Returns the activation's derivative, from its result where that tells it, else from z."""
    if activation in _FROM_RESULT:
        return _FROM_RESULT[activation](y)
    _, derivative = jax.jvp(ACTIVATIONS[activation], (z,), (jnp.ones_like(z),))
    return derivative

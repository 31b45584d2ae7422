"""The gradient of attention sinks, which no kernel needs to make."""

import jax
import jax.numpy as jnp

from pallas_kernels.arrays import accumulator


def sinks_gradient(sinks_H: jax.Array, lse_BHT: jax.Array, delta_BHT: jax.Array) -> jax.Array:
    """Returns minus the sinks' weights in the rows times the rows' delta, in the sinks' type.

    `delta_BHT` is the sum of o * do over a head, less the gradient of lse; a row whose lse is
    -inf sees nothing, its sink included.
    """
    weights_BHT = jnp.exp(sinks_H.astype(accumulator(sinks_H.dtype))[None, :, None] - lse_BHT)
    weights_BHT = jnp.where(jnp.isinf(lse_BHT), 0, weights_BHT)
    return -(weights_BHT * delta_BHT).sum((0, 2)).astype(sinks_H.dtype)

"""LayerNorm and RMSNorm over the last dimension, with gradients written out.

Legend: N rows (all leading dimensions flattened, or those that there are: see `bigjax.nn.rows`),
C channels, 1 a reduced dimension.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bigjax.nn.rows import rows

Gradients = tuple[jax.Array, jax.Array, jax.Array | None]


def _moments(x_NC: jax.Array, centre: bool, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """Centred input and reciprocal root of its second moment, at least in float32."""
    x_NC = x_NC.astype(jnp.promote_types(x_NC.dtype, jnp.float32))
    if centre:
        x_NC = x_NC - x_NC.mean(-1, keepdims=True)
    return x_NC, jax.lax.rsqrt(jnp.mean(x_NC * x_NC, -1, keepdims=True) + epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _normalize(
    x_NC: jax.Array, scale_C: jax.Array, bias_C: jax.Array | None, centre: bool, epsilon: float
) -> jax.Array:
    centred_NC, rstd_N1 = _moments(x_NC, centre, epsilon)
    y_NC = centred_NC * rstd_N1 * _each(scale_C, x_NC)
    if bias_C is not None:
        y_NC += _each(bias_C, x_NC)
    return y_NC


def _normalize_fwd(x_NC, scale_C, bias_C, centre, epsilon):
    # Only the input is kept: its moments cost less to take again than to store and fetch.
    return _normalize(x_NC, scale_C, bias_C, centre, epsilon), (x_NC, scale_C, bias_C)


def _normalize_bwd(centre: bool, epsilon: float, residuals, g_NC: jax.Array) -> Gradients:
    x_NC, scale_C, bias_C = residuals
    centred_NC, rstd_N1 = _moments(x_NC, centre, epsilon)
    unit_NC = centred_NC * rstd_N1
    d_unit_NC = g_NC * _each(scale_C, x_NC)
    # The input's scale and mean have no effect, so the gradient loses its component along the
    # normalised row and, where the mean is taken off, its own mean.
    d_NC = d_unit_NC - unit_NC * jnp.mean(d_unit_NC * unit_NC, -1, keepdims=True)
    if centre:
        d_NC -= d_unit_NC.mean(-1, keepdims=True)
    every = tuple(range(x_NC.ndim - 1))
    d_scale_C = jnp.sum(g_NC * unit_NC, every).astype(scale_C.dtype)
    d_bias_C = None if bias_C is None else g_NC.sum(every).astype(bias_C.dtype)
    return (d_NC * rstd_N1).astype(x_NC.dtype), d_scale_C, d_bias_C


_normalize.defvjp(_normalize_fwd, _normalize_bwd)


def _each(x_C: jax.Array, like_NC: jax.Array) -> jax.Array:
    """Returns a value a channel with as many dimensions as rows have."""
    return x_C.reshape(*(1,) * (like_NC.ndim - 1), -1)


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(*rows(x.shape[:-1]), x.shape[-1])


def layer_norm(
    x: jax.Array, scale_C: jax.Array, bias_C: jax.Array | None = None, *, epsilon: float = 1e-5
) -> jax.Array:
    """Layer normalisation `(x - mean) / sqrt(variance + epsilon) * scale + bias` (Ba et al. 2016).

    `x` [..., C] of any float type; `scale_C` and `bias_C` [C]. The statistics are taken in
    float32 (float64 for such input) and the result has that type, in the shape of `x`.
    """
    return _normalize(_rows(x), scale_C, bias_C, True, epsilon).reshape(x.shape)


def rms_norm(x: jax.Array, scale_C: jax.Array, *, epsilon: float = 1e-6) -> jax.Array:
    """Root-mean-square normalisation `x / sqrt(mean(x^2) + epsilon) * scale` (Zhang et al. 2019).

    `x` [..., C] of any float type; `scale_C` [C]. The mean square is taken in float32 (float64 for
    such input) and the result has that type, in the shape of `x`.
    """
    return _normalize(_rows(x), scale_C, None, False, epsilon).reshape(x.shape)


class LayerNorm(nn.Module):
    """`layer_norm` with a learned scale, and a learned bias if wanted.

    Attributes:
      use_bias: adds a learned bias.
      epsilon: added to the variance.
      dtype: type of the output; None takes the input's. The statistics are float32 at least.
      param_dtype: type of the parameters.
    """

    use_bias: bool = True
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape[-1:]
        scale_C = self.param('scale', nn.initializers.ones_init(), shape, self.param_dtype)
        bias_C = None
        if self.use_bias:
            bias_C = self.param('bias', nn.initializers.zeros_init(), shape, self.param_dtype)
        y = layer_norm(x, scale_C, bias_C, epsilon=self.epsilon)
        return y.astype(self.dtype or x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` with a learned scale.

    Attributes:
      epsilon: added to the mean square.
      dtype: type of the output; None takes the input's. The mean square is float32 at least.
      param_dtype: type of the parameters.
    """

    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.ones_init()
        scale_C = self.param('scale', init, x.shape[-1:], self.param_dtype)
        return rms_norm(x, scale_C, epsilon=self.epsilon).astype(self.dtype or x.dtype)

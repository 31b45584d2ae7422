"""Activation functions, where XLA's own differentiation leaves speed on the table."""

import math

import jax
import jax.numpy as jnp

_C0, _C1 = math.sqrt(2 / math.pi), 0.044715


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """Gaussian error linear unit in its tanh form (Hendrycks and Gimpel 2016), as GPT-2 has it.

    `x` of any shape and float type; the result has both.
    """
    return 0.5 * x * (1 + jnp.tanh(_C0 * x * (1 + _C1 * x * x)))


def _gelu_fwd(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gelu(x), x


def _gelu_bwd(x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    tanh = jnp.tanh(_C0 * x * (1 + _C1 * x * x))
    slope = 0.5 * x * (1 - tanh * tanh) * _C0 * (1 + 3 * _C1 * x * x)
    return (g * (0.5 * (1 + tanh) + slope),)


gelu.defvjp(_gelu_fwd, _gelu_bwd)


@jax.custom_vjp
def gelu_erf(x: jax.Array) -> jax.Array:
    """Gaussian error linear unit as it is defined, `x Φ(x)`: as BERT, RoBERTa and ViT have it.

    `x` of any shape and float type; the result has both.
    """
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def _gelu_erf_fwd(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gelu_erf(x), x


def _gelu_erf_bwd(x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    density = math.sqrt(0.5 / math.pi) * jnp.exp(-0.5 * x * x)
    return (g * (0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5))) + x * density),)


gelu_erf.defvjp(_gelu_erf_fwd, _gelu_erf_bwd)

"""Matrix products in int8 or fp8, forward and backward, of float operands (by qwix).

Legend: ... rows (any leading dimensions), I inputs, O outputs.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import qwix

Quantized = Literal['int8', 'fp8']

# Of the operands, and of the gradient: what fp8 gradients need is range, not digits (Micikevicius
# et al. 2022, arXiv:2209.05433, section 3.1).
_TYPES = {'int8': (jnp.int8, jnp.int8), 'fp8': (jnp.float8_e4m3fn, jnp.float8_e5m2)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def quantized_matmul(x: jax.Array, w_IO: jax.Array, how: Quantized) -> jax.Array:
    """Product `x w`, both rounded to 8 bits.

    Every row of `x` and every column of `w` is divided by its largest magnitude, so that the terms
    of one sum have one scale; int8 is summed in int32. The gradient is that of the exact product
    (straight-through, Bengio et al. 2013, arXiv:1308.3432), and the two products that it takes are
    rounded likewise, to nearest.

    Args:
      x: [..., I], float32 or bfloat16.
      w_IO: of the same type.
      how: 'int8', or 'fp8' (e4m3, and e5m2 for the gradient that comes in).

    Returns:
      [..., O] in the type of the operands.
    """
    operand, _ = _TYPES[how]
    return _product((x, operand), (w_IO, operand), [x.ndim - 1], [0])


def _product(a: tuple[jax.Array, Any], b: tuple[jax.Array, Any], over_a, over_b) -> jax.Array:
    """Returns the product of two (array, type to round to), summed over some axes of each."""

    def quantized(x: jax.Array, qtype: Any, over: list[int]) -> qwix.QArray:
        kept = [axis for axis in range(x.ndim) if axis not in over]
        return qwix.quantize(x, qtype, channelwise_axes=kept)

    dimensions = ((over_a, over_b), ((), ()))
    return qwix.dot_general(quantized(*a, over_a), quantized(*b, over_b), dimensions)


def _forward(x: jax.Array, w_IO: jax.Array, how: Quantized):
    return quantized_matmul(x, w_IO, how), (x, w_IO)


def _backward(how: Quantized, residuals: tuple[jax.Array, jax.Array], g: jax.Array):
    x, w_IO = residuals
    operand, gradient = _TYPES[how]
    rows = list(range(x.ndim - 1))
    d_x = _product((g, gradient), (w_IO, operand), [g.ndim - 1], [1])
    return d_x, _product((x, operand), (g, gradient), rows, rows)


quantized_matmul.defvjp(_forward, _backward)

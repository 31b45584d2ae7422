"""What the arguments of every kernel have in common: their types, and complaints about them."""

import jax
import jax.numpy as jnp

FLOATS = ('bfloat16', 'float16', 'float32', 'float64')


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
    """Returns the type in which sums are held: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def wrong(name: str, value: object, rule: str, good: str) -> ValueError:
    """Returns the error that names an argument, its value, the rule, and a value that works."""
    if isinstance(value, jax.Array):
        value = f'{value.dtype}{list(value.shape)}'
    return ValueError(f'{name}={value}: {rule}; try {name}={good}')

"""What loops over time share: the order of steps, buffers written in place, and padding.

Legend: B batch, T time, X any features.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def step_at(n: Array, T: int, *, reverse: bool) -> Array:
    """The place in time of a loop's n-th step."""
    return T - 1 - n if reverse else n


def put(buffer_TBX: Array, value_BX: Array, t: Array) -> Array:
    """The buffer with step `t` replaced, in the buffer's type."""
    return lax.dynamic_update_index_in_dim(buffer_TBX, value_BX.astype(buffer_TBX.dtype), t, 0)


def before(x_TBX: Array, first_BX: Array, *, reverse: bool) -> Array:
    """What each step started from, [T, B, X]: the step before it, or `first_BX`."""
    if reverse:
        return jnp.concatenate([x_TBX[1:], first_BX[None]])
    return jnp.concatenate([first_BX[None], x_TBX[:-1]])


def hold(mask_TB: Array | None, t: Array, new_BX: Array, old_BX: Array) -> Array:
    """The new state of rows that have a step `t`, and the old one of those that are padding."""
    if mask_TB is None:
        return new_BX
    return jnp.where(mask_TB[t][:, None], new_BX, old_BX)


def split_gradient(mask_TB: Array | None, t: Array, d_BX: Array) -> tuple[Array, Any]:
    """The gradient of `hold`: what goes through step `t`, and what goes past it."""
    if mask_TB is None:
        return d_BX, 0
    mask_B1 = mask_TB[t][:, None]
    return jnp.where(mask_B1, d_BX, 0), jnp.where(mask_B1, 0, d_BX)

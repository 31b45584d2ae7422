"""`jax.vmap` of a kernel that reads through im2col: such a reference has no room for another axis.

Legend: B batch.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def folds(
    function: Callable[[Any, Any], Any], *, summed: bool = False
) -> Callable[[Any, Any], Any]:
    """Returns `function` with a rule for `jax.vmap`: the mapped axis becomes a part of the batch.

    Where that cannot be, because the kernel's weights are mapped or the batch is summed over, one
    call follows the other.

    Args:
      function: takes arrays that have a batch [B, ...], and others; returns arrays that have it.
      summed: whether those returned have none.
    """
    wrapped = jax.custom_batching.custom_vmap(function)

    @wrapped.def_vmap
    def _(size: int, is_mapped: tuple, along: Any, others: Any) -> tuple:
        def result(found: Any) -> tuple:
            return found, jax.tree.map(lambda _: True, found)

        if summed or any(jax.tree.leaves(is_mapped[1])):
            arrays, tree = jax.tree.flatten((along, others))
            mapped = jax.tree.leaves(is_mapped)

            def one(given: list) -> Any:
                given = iter(given)
                every = [next(given) if m else x for m, x in zip(mapped, arrays, strict=True)]
                return wrapped(*jax.tree.unflatten(tree, every))

            return result(lax.map(one, [x for m, x in zip(mapped, arrays, strict=True) if m]))

        def fold(x: jax.Array, mapped: bool) -> jax.Array:
            x = x if mapped else jnp.broadcast_to(x[None], (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        found = wrapped(jax.tree.map(fold, along, is_mapped[0]), others)
        return result(jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), found))

    return wrapped

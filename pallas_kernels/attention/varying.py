"""Types of arrays in a `jax.shard_map` that checks along which mesh axes they vary."""

from typing import Any

import jax


def varying(tree: Any) -> frozenset[str]:
    """Returns the axes of an enclosing `jax.shard_map` along which some array is known to vary."""
    return frozenset().union(*(jax.typeof(x).mat.varying for x in jax.tree.leaves(tree)))


def vary(tree: Any, axes: frozenset[str]) -> Any:
    """Returns the arrays with the types of such that vary along `axes`."""

    def one(x):
        missing = tuple(sorted(axes - varying(x)))
        return jax.lax.pcast(x, missing, to='varying') if missing else x

    return jax.tree.map(one, tree)


def result(shape: tuple[int, ...], dtype: Any, given: Any) -> jax.ShapeDtypeStruct:
    """Returns the type of what a kernel makes of the arrays `given`."""
    axes = jax.sharding.ManualAxisType(varying=varying(given))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes)

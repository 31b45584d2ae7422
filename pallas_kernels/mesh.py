"""Mesh axes: for kernels that are cut into parts, and for the types of what is a part already.

In a `jax.shard_map` that checks types, an array's type says along which axes it varies.
"""

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

Names = tuple[str, ...]


def names(axes: str | Names | None) -> Names:
    """Returns one name, several or none as a tuple."""
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def check_axes(mesh: AbstractMesh, fields: dict[str, Names]) -> None:
    """Raises ValueError unless every axis is one of the mesh's; `fields` are by argument."""
    for field, axes in fields.items():
        for name in axes:
            if name not in mesh.axis_names:
                raise ValueError(
                    f'{field}={name!r}: is no axis of the mesh, which has '
                    f'{", ".join(map(repr, mesh.axis_names))}; try {field}={mesh.axis_names[0]!r}'
                )


def check_once(fields: dict[str, Names], good: str) -> None:
    """Raises ValueError where an axis splits two dimensions; `good` is what to try."""
    every = [name for axes in fields.values() for name in axes]
    for name in every:
        if every.count(name) > 1:
            shown = ', '.join(f'{field}={axes}' for field, axes in fields.items())
            raise ValueError(f'{shown}: axis {name!r} splits two dimensions; try {good}')


def manual(mesh: AbstractMesh) -> Names:
    """Returns the axes of a `jax.shard_map` around the code that is traced."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Manual)


def reshard(tree: Any, specs: Any) -> Any:
    """Returns arrays as `jax.shard_map` takes them where axes are Explicit."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = [name for name, kind in kinds if kind == AxisType.Explicit]
    if not explicit:
        return tree
    keep = lambda dim: tuple(n for n in names(dim) if n in explicit) or None  # noqa: E731
    return jax.tree.map(lambda x, spec: jax.sharding.reshard(x, P(*map(keep, spec))), tree, specs)


def part(tree: Any, specs: Any) -> Any:
    """Returns the shapes and types of one device's part of arrays."""
    mesh = jax.sharding.get_abstract_mesh()

    def one(x, spec):
        parts = [math.prod(mesh.shape[n] for n in names(dim)) for dim in spec]
        shape = tuple(n // p for n, p in zip(x.shape, parts, strict=True))
        return jax.ShapeDtypeStruct(shape, x.dtype)

    return jax.tree.map(one, tree, specs)


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

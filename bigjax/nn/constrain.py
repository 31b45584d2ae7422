"""Where activations lie on the mesh: what a model says of their dimensions, by logical names.

Legend: B batch, T positions, C width.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax

from bigjax.sharding import activation_spec


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Returns `x` split over the mesh that is set as the names of its dimensions say.

    The compiler places everything else by what is said here and in the rules for parameters; the
    values do not change. It is the identity where no mesh is set, where all axes are 1, and in a
    `jax.shard_map` over all of them. An axis that does not divide its dimension is left out, so
    that a few rows can be decoded on any mesh.

    Args:
      x: any array.
      *names: per dimension a name of `bigjax.sharding.ACTIVATIONS`, or None for one that every
        device holds whole: 'batch', 'sequence' (positions, between blocks), 'length' (positions,
        within a block), 'heads', 'mlp', 'vocab', 'embed', 'experts', 'stages' and so on.

    Raises:
      ValueError: not one name per dimension, or an unknown one.
    """
    mesh = jax.sharding.get_abstract_mesh()
    spec = activation_spec(names, x.shape, mesh)
    return jax.lax.with_sharding_constraint(x, spec) if _large(mesh) else x


def axes(name: str, size: int) -> tuple[str, ...]:
    """Returns the axes of the mesh that is set which split a dimension of an activation.

    Args:
      name: of the dimension, as in `constrain`.
      size: its size.
    """
    (found,) = activation_spec((name,), (size,), jax.sharding.get_abstract_mesh())
    return (found,) if isinstance(found, str) else found or ()


def parts(name: str, size: int) -> int:
    """Returns how many parts `axes` splits a dimension of an activation into."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in axes(name, size))


def on_each(local: Any, inputs: Sequence[jax.P], outputs: Any) -> Any:
    """Returns a function of whole arrays that each device computes by `local` from its parts.

    Args:
      local: function of the parts that a device has; it says what devices send each other.
      inputs: how each argument is split.
      outputs: how its result is, a PartitionSpec or several.
    """
    free = free_axes(jax.sharding.get_abstract_mesh())
    return jax.shard_map(
        local, in_specs=tuple(inputs), out_specs=outputs, axis_names=free, check_vma=False
    )


def free_axes(mesh: Any) -> set[str]:
    """Returns the axes that no `jax.shard_map` around has taken: the compiler places along them."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {axis for axis, kind in kinds if kind == jax.sharding.AxisType.Auto}


def _large(mesh: Any) -> bool:
    return any(mesh.shape[axis] > 1 for axis in free_axes(mesh))


def both_ways(
    x: jax.Array, there: tuple[str | None, ...], back: tuple[str | None, ...]
) -> jax.Array:
    """Returns `x` as `constrain` places it by the names `there`, its gradient by those `back`."""
    return _both_ways(x, there, back) if mesh_is_large() else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _both_ways(x: jax.Array, there: tuple[str | None, ...], back: tuple[str | None, ...]):
    return constrain(x, *there)


_both_ways.defvjp(
    lambda x, there, back: (constrain(x, *there), None),
    lambda there, back, _, dx: (constrain(dx, *back),),
)


def enter(x_BTC: jax.Array, rows: str = 'batch') -> jax.Array:
    """Returns the normalised residual stream with all positions, for attention or an MLP to read.

    Between blocks positions are split over the axes that split heads within them. So what a norm
    gives is gathered here, and its gradient, a sum over these axes, scattered: g of Korthikanti et
    al. 2022 (arXiv:2205.05198, §4.2.2). `rows` is the name of B.
    """
    return both_ways(x_BTC, (rows, 'length', None), (rows, 'sequence', None))


def leave(x_BTC: jax.Array) -> jax.Array:
    """Returns what attention or an MLP adds to the residual stream, each device its positions.

    It is a sum over the axes that split heads and hidden layer, which is scattered; its gradient is
    gathered: the conjugate of `enter`.
    """
    return both_ways(x_BTC, ('batch', 'sequence', None), ('batch', 'length', None))


def mesh_is_large() -> bool:
    """Returns whether a mesh is set on which the compiler has anything to place."""
    return _large(jax.sharding.get_abstract_mesh())

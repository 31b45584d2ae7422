"""Where activations lie on the mesh: what a model says of their dimensions, by logical names.

Legend: B batch, T positions, C width, V vocabulary.
"""

import functools
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


def parts(name: str, size: int) -> int:
    """Returns how many parts the mesh that is set splits a dimension of an activation into.

    Args:
      name: of the dimension, as in `constrain`.
      size: its size.
    """
    mesh = jax.sharding.get_abstract_mesh()
    spec = activation_spec((name,), (size,), mesh)
    return size // jax.NamedSharding(mesh, spec).shard_shape((size,))[0]


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


def gather_width(table_VC: jax.Array) -> jax.Array:
    """Returns an embedding that each device holds for its rows at their whole width.

    It is gathered in the type that it has here; its gradient is scattered.
    """
    return constrain(constrain(table_VC, 'vocab', 'embed'), 'vocab', None)

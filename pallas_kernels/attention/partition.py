"""How the arrays of one call of attention lie on a mesh, and what is said when they cannot.

Legend: B batch, T queries, S keys and values, H query heads, K key-value heads.
"""

import dataclasses
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from pallas_kernels.attention.arguments import Operands
from pallas_kernels.attention.layouts import LAYOUTS, Layout
from pallas_kernels.mesh import Names, check_axes, check_once, manual, names, part

Exchange = Literal['ring', 'gather']


@dataclasses.dataclass(frozen=True)
class Axes:
    """Names of the mesh axes over which rows, heads and positions are split.

    Raises:
      ValueError: an unknown layout or exchange, or an axis that is named twice.
    """

    batch: Names
    heads: Names
    context: Names  # one or none
    layout: Layout
    exchange: Exchange = 'ring'

    def __post_init__(self):
        if self.exchange not in get_args(Exchange):
            raise ValueError(
                f"exchange={self.exchange!r}: must be 'ring' or 'gather'; try exchange='ring'"
            )
        if self.layout not in LAYOUTS:
            known = ' or '.join(map(repr, LAYOUTS))
            raise ValueError(f"layout={self.layout!r}: must be {known}; try layout='zigzag'")
        if len(self.context) > 1:
            raise ValueError(
                f'context={self.context}: must be one axis; try context={self.context[0]!r}'
            )
        check_once(self.fields, 'context=None')

    @property
    def fields(self) -> dict[str, Names]:
        """The axes by the argument that named them."""
        return {'batch': self.batch, 'heads': self.heads, 'context': self.context}


@dataclasses.dataclass(frozen=True)
class Partition:
    """Which axes split which dimension of one call's arrays.

    `manual` axes are those of a `jax.shard_map` around the call: what it sees is split over them
    already. The others are split by the call itself, but for dimensions of one, and for a batch
    of fewer rows than there are devices to take them.
    """

    axes: Axes
    manual: Names
    mapped: Names  # all other axes of the mesh
    batch: Names
    heads: Names
    kv_heads: Names
    context: Names

    def specs(self, operands: Operands) -> Operands:
        """Returns the PartitionSpec of every operand that is there."""
        broadcast = (self.batch, self.heads, self.context, ())
        dims = Operands(
            q_BTHD=(self.batch, self.context, self.heads, ()),
            k_BSKD=(self.batch, self.context, self.kv_heads, ()),
            v_BSKV=(self.batch, self.context, self.kv_heads, ()),
            segment_ids_BT=(self.batch, self.context),
            kv_segment_ids_BS=(self.batch, self.context),
            mask_BHTS=broadcast,
            bias_BHTS=broadcast,
            sinks_H=(self.heads,),
            dropout_seed=(),
            start=((),),
        )
        full = zip(operands, dims, strict=True)
        return Operands(*[None if x is None else _spec(x.shape, dim) for x, dim in full])

    @property
    def outputs(self) -> tuple[P, P]:
        """The PartitionSpecs of o_BTHV and lse_BHT."""
        b, c, h = (axes or None for axes in (self.batch, self.context, self.heads))
        return P(b, c, h, None), P(b, h, c)

    def local(self, operands: Operands) -> Operands:
        """Returns the shapes and types of one device's part."""
        here = part(operands, self.specs(operands))
        k_BSKD, v_BSKV = here.k_BSKD, here.v_BSKV
        if self.kv_heads != self.heads:
            H, K = here.q_BTHD.shape[2], k_BSKD.shape[2]
            used = H // math.gcd(H, operands.q_BTHD.shape[2] // K)
            k_BSKD, v_BSKV = (
                jax.ShapeDtypeStruct((*x.shape[:2], used, x.shape[3]), x.dtype)
                for x in (k_BSKD, v_BSKV)
            )
        start = jax.ShapeDtypeStruct((4,), jnp.int32)
        return here._replace(k_BSKD=k_BSKD, v_BSKV=v_BSKV, start=start)

    def split(self, spec: P | None) -> Names:
        """Returns the axes that split the queries but not an operand with this PartitionSpec."""
        if spec is None:
            return ()
        held = [name for dim in spec for name in names(dim)]
        return tuple(n for n in self.batch + self.heads + self.context if n not in held)


def partition(axes: Axes, operands: Operands) -> Partition | None:
    """Returns how the mesh that is set splits a call; None where there is nothing to split over.

    Raises:
      ValueError: an axis is not in the mesh, or does not divide what it shall split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    check_axes(mesh, axes.fields)
    around = manual(mesh)
    mapped = tuple(n for n in mesh.axis_names if n not in around)
    if not around and mesh.size == 1:
        return None
    free = lambda axes: tuple(n for n in axes if n not in around)  # noqa: E731
    size = lambda axes: math.prod(mesh.shape[n] for n in axes)  # noqa: E731
    (B, T, H, _), (_, S, K, _) = operands.q_BTHD.shape, operands.k_BSKD.shape
    batch, heads, context = (free(n) for n in (axes.batch, axes.heads, axes.context))
    # A model is often initialised with a row or two.
    batch = () if size(batch) > B else batch
    _divides('batch', batch, 'batch rows', B, size(batch))
    _divides('heads', heads, 'heads of q', H, size(heads))
    # In a shard_map, the axis has split T and S, but each part is still cut into chunks.
    chunks = 2 if axes.layout == 'zigzag' and axes.context else 1
    for name, length in (('q', T), ('k', S)):
        parts = chunks * size(context)
        _divides('context', axes.context, f'positions of {name}', length, parts, chunks > 1)
    kv_heads = heads if K % size(heads) == 0 else ()
    return Partition(axes, around, mapped, batch, heads, kv_heads, context)


def _divides(
    field: str, names: Names, what: str, count: int, parts: int, chunks: bool = False
) -> None:
    if count % parts:
        good = max(1, round(count / parts)) * parts
        of = ', two chunks a device' if chunks else ', the devices along the axis'
        shown = repr(names[0]) if len(names) == 1 else repr(names)
        raise ValueError(
            f'{field}={shown}: the {count} {what} must be a multiple of {parts}{of}; try {good}'
        )


def _spec(shape: tuple[int, ...], dims: tuple[Names, ...]) -> P:
    return P(*[names if names and n > 1 else None for n, names in zip(shape, dims, strict=True)])

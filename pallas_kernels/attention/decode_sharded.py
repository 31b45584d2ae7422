"""Decode attention on arrays that are split over a mesh, by `jax.shard_map` around each part's.

Rows are split over batch axes and heads over head axes, as in `sharded.py`; the cache is never
exchanged. Legend: B rows, T new tokens, H query heads, K key-value heads, D and V sizes of heads.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from pallas_kernels.attention.arguments import Operands
from pallas_kernels.attention.choice import Implementation
from pallas_kernels.attention.decode import attend
from pallas_kernels.attention.decode_arguments import (
    Cache,
    DecodeOperands,
    DecodeSpec,
    check_decode,
)
from pallas_kernels.attention.mapped import kv_heads_here
from pallas_kernels.attention.partition import Axes, Partition, partition
from pallas_kernels.mesh import Names, check_axes, manual, names, reshard, vary, varying


def shard_decode(
    *, batch: str | Names = (), heads: str | Names = ()
) -> Callable[..., jax.Array | tuple[jax.Array, jax.Array]]:
    """Returns `decode_attention` for arrays that are split over the mesh set when it is called.

    What is returned takes `decode_attention`'s arguments and gives its results, on the same
    (global) arrays. Where no mesh is set, or all its axes are 1, it is `decode_attention`. Within
    `jax.shard_map` over some of the axes it takes that map's local arrays. Each device reads the
    cache of its own rows and heads. A pool of pages has no rows: every device of a batch axis
    holds the pages of its heads, for the rows of all of them.

    Args:
      batch: mesh axes that split the rows; one that does not divide them is left out, and its
        devices compute the same.
      heads: mesh axes that split the query heads, and the key-value heads where they divide these,
        else every device holds all key-value heads and uses its own.

    Raises:
      ValueError: an axis is not in the mesh or named twice, or does not divide the query heads.
    """
    axes = Axes(names(batch), names(heads), (), 'contiguous')

    def decode_attention(
        q_BTHD: jax.Array,
        k_BSKD: jax.Array,
        v_BSKV: jax.Array,
        *,
        impl: Implementation | None = None,
        return_lse: bool = False,
        **features,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        operands, spec = check_decode(q_BTHD, k_BSKD, v_BSKV, **features)
        parts = _partition(axes, operands)
        if parts is None:
            o_BTHV, lse_BHT = attend(operands, spec, impl, return_lse)
        else:
            o_BTHV, lse_BHT = _mapped(parts, operands, spec, impl, return_lse)
        return (o_BTHV, lse_BHT) if return_lse else o_BTHV

    return decode_attention


def _partition(axes: Axes, operands: DecodeOperands) -> Partition | None:
    """Returns how the mesh that is set splits a call; None where there is nothing to split over."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    check_axes(mesh, axes.fields)
    rows, kept = operands.q_BTHD.shape[0], []
    for name in axes.batch:
        if name in manual(mesh):
            kept.append(name)
        elif rows % mesh.shape[name] == 0:
            rows //= mesh.shape[name]
            kept.append(name)
    return partition(Axes(tuple(kept), axes.heads, (), axes.layout), _as_attention(operands))


def _as_attention(operands: DecodeOperands) -> Operands:
    return Operands(operands.q_BTHD, operands.cache.k, operands.cache.v)


def _mapped(
    parts: Partition, operands: DecodeOperands, spec: DecodeSpec, impl: str | None, lse: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Returns o_BTHV and, where `lse`, lse_BHT, each device's part by itself."""

    def local(operands):
        return attend(_own_heads(parts, operands), spec, impl, lse)

    if not parts.mapped:
        return local(operands)
    specs = _specs(parts, operands)
    o_spec, lse_spec = parts.outputs
    along = varying(operands)
    # As in `mapped.Sharded`: nothing rests on the types of what varies.
    mapped = jax.shard_map(
        local,
        in_specs=(specs,),
        out_specs=(o_spec, lse_spec if lse else None),
        axis_names=set(parts.mapped),
        check_vma=False,
    )
    return vary(mapped(vary(reshard(operands, specs), along)), along)


def _specs(parts: Partition, operands: DecodeOperands) -> DecodeOperands:
    """Returns the PartitionSpec of every operand that is there."""
    batch, heads, kv_heads = (x or None for x in (parts.batch, parts.heads, parts.kv_heads))
    table = operands.cache.page_table_BL
    cache = P(batch if table is None else None, None, kv_heads, None)
    return DecodeOperands(
        P(batch, None, heads, None),
        Cache(cache, cache, P(batch), None if table is None else P(batch, None)),
        None if operands.sinks_H is None else P(heads),
    )


def _own_heads(parts: Partition, operands: DecodeOperands) -> DecodeOperands:
    """Returns a device's operands with the key-value heads that its query heads use."""
    cache = operands.cache
    if parts.kv_heads == parts.heads or cache.k.shape[2] == 1:
        return operands
    heads_K = kv_heads_here(parts, _as_attention(operands))
    k, v = (jnp.take(x, heads_K, axis=2) for x in (cache.k, cache.v))
    return operands._replace(cache=cache._replace(k=k, v=v))

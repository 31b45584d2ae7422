"""Attention on arrays that are split over a mesh, by `jax.shard_map` around any implementation.

The compiler does not partition a kernel, so the call is cut here: rows over batch axes, heads over
head axes, and positions over a context axis, around which the keys then travel (`ring.py`) or over
which they are gathered (`gathered.py`). Who sees whom, and what is dropped, is decided by global
indices and does not depend on the mesh.

Legend: B batch, T queries, S keys and values, H query heads, K key-value heads, D size of a query
and key head, V size of a value head.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from pallas_kernels.attention.arguments import Operands, Spec, check_arguments
from pallas_kernels.attention.choice import Implementation, chosen
from pallas_kernels.attention.differentiable import attend, named_residuals
from pallas_kernels.attention.layouts import Layout
from pallas_kernels.attention.mapped import Sharded
from pallas_kernels.attention.partition import Axes, Exchange, partition
from pallas_kernels.block_sizes import BlockSizes
from pallas_kernels.mesh import Names, manual, names, reshard


def shard(
    *,
    batch: str | Names = (),
    heads: str | Names = (),
    context: str | None = None,
    layout: Layout = 'contiguous',
    exchange: Exchange = 'ring',
) -> Callable[..., jax.Array | tuple[jax.Array, jax.Array]]:
    """Returns `attention` for arrays that are split over the mesh that is set when it is called.

    What is returned takes `attention`'s arguments and gives its results, on the same (global)
    arrays. Where no mesh is set, or all its axes are 1, it is `attention`. Within `jax.shard_map`
    over some of the axes it takes that map's local arrays, and a `mask` or `bias` with the columns
    of all keys; second derivatives are then those of the local operations, if they have any.

    Args:
      batch: mesh axes that split the batch; one of fewer rows than that is computed by all.
      heads: mesh axes that split the query heads, and the key-value heads where they divide these,
        else every device holds all key-value heads and uses its own.
      context: mesh axis that splits queries and keys.
      layout: order of positions on the context axis: 'contiguous', or 'zigzag', which balances
        causal masks; the arrays are then in the order that `layouts.zigzag` gives.
      exchange: how queries meet the keys of other devices: 'ring' hands these round, beside the
        arithmetic; 'gather' brings all of them to every device, at once.

    Raises:
      ValueError: an axis is not in the mesh or named twice, or a dimension does not divide.
    """
    axes = Axes(names(batch), names(heads), names(context), layout, exchange)

    def attention(
        q_BTHD: jax.Array,
        k_BSKD: jax.Array,
        v_BSKV: jax.Array,
        *,
        block_sizes: BlockSizes | None = None,
        impl: Implementation | None = None,
        return_lse: bool = False,
        **features,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        operands, spec = _arguments(axes, q_BTHD, k_BSKD, v_BSKV, features)
        parts = partition(axes, operands)
        if parts is None:
            module = chosen(impl, operands, spec)
            results = attend(module, operands, spec, block_sizes, return_lse)
        else:
            implementation = Sharded(chosen(impl, parts.local(operands), spec), axes)
            operands = reshard(operands, parts.specs(operands))
            if parts.manual or layout == 'zigzag':
                results = _attend_once(implementation, operands, spec, block_sizes)
            else:
                results = attend(implementation, operands, spec, block_sizes, return_lse)
        return results if return_lse else results[0]

    return attention


def _arguments(axes: Axes, q, k, v, features) -> tuple[Operands, Spec]:
    """Returns the checked arguments; a part's mask or bias may have the columns of all keys."""
    mesh = jax.sharding.get_abstract_mesh()
    around = [n for n in axes.context if n in manual(mesh)]
    if not around or jnp.ndim(k) != 4:
        return check_arguments(q, k, v, **features)
    here, kept = k.shape[1], {}
    keys = here * mesh.shape[around[0]]
    for name in ('mask', 'bias'):
        x = features.get(name)
        if x is not None and jnp.ndim(x) == 4 and x.shape[3] > 1:
            if x.shape[3] != keys:
                raise ValueError(
                    f'{name}={x.dtype}{list(x.shape)}: in a shard_map over {around[0]!r} it must '
                    f'have the columns of all {keys} keys, or one; try in_specs that do not split '
                    f'its last dimension'
                )
            kept[f'{name}_BHTS'] = x
            features = features | {name: x[..., :here]}
    operands, spec = check_arguments(q, k, v, **features)
    return operands._replace(**kept), spec


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 2, 3))
def _attend_once(impl, operands, spec, block_sizes):
    """Like `attend`, whose second derivative would take a part's arrays for the whole."""
    return impl.forward(operands, spec, block_sizes)


def _attend_once_fwd(impl, operands, spec, block_sizes):
    bias = operands.bias_BHTS
    bias_varies = () if bias is not None and bias.perturbed else None
    operands = jax.tree.map(lambda x: x.value, operands, is_leaf=lambda x: hasattr(x, 'perturbed'))
    o_BTHV, lse_BHT = named_residuals(impl.forward(operands, spec, block_sizes))
    return (o_BTHV, lse_BHT), (operands, o_BTHV, lse_BHT, bias_varies)


def _attend_once_bwd(impl, spec, block_sizes, residuals, cotangents):
    operands, o_BTHV, lse_BHT, bias_varies = residuals
    do_BTHV, dlse_BHT = cotangents
    if isinstance(do_BTHV, SymbolicZero):
        do_BTHV = jnp.zeros_like(o_BTHV)
    if isinstance(dlse_BHT, SymbolicZero):
        dlse_BHT = None
    spec = dataclasses.replace(spec, bias_gradient=bias_varies is not None)
    rows = o_BTHV, lse_BHT, do_BTHV, dlse_BHT
    gradients = impl.backward(operands, spec, block_sizes, *rows)
    nothing = Operands(*[None] * len(operands))
    names = 'q_BTHD', 'k_BSKD', 'v_BSKV', 'bias_BHTS', 'sinks_H'
    return (nothing._replace(**dict(zip(names, gradients, strict=True))),)


_attend_once.defvjp(_attend_once_fwd, _attend_once_bwd, symbolic_zeros=True)

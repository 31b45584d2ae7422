"""The gradient of the bias: a kernel of its own, run only when there is a bias that wants one.

It computes dS^T anew, as the backward kernel does, and sums it over the dimensions in which the
bias is broadcast: those of batch, heads and blocks are the last axes of the grid, so that a sum
stays in VMEM until it is complete. Legend: B batch, H query heads, T queries, S keys.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.tpu import side, tile
from pallas_kernels.attention.tpu.backward_kernel import Step, named_refs
from pallas_kernels.attention.tpu.backward_plan import Plan
from pallas_kernels.attention.tpu.blocks import Body
from pallas_kernels.mesh import result

BLOCK = 512  # rows of a block at most: bias, its gradient and the sum are all whole tiles


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which dimensions of (batch, heads, queries, keys) the gradient keeps, and the grid's order.

    Attributes:
      kept: the dimensions that are not summed.
      sizes: steps that each dimension takes.
    """

    kept: tuple[bool, bool, bool, bool]
    sizes: tuple[int, int, int, int]

    @property
    def order(self) -> list[int]:
        """Dimensions as the grid's axes go: the summed ones last."""
        return sorted(range(4), key=lambda dim: not self.kept[dim])

    @property
    def grid(self) -> tuple[int, ...]:
        """Steps of each axis."""
        return tuple(self.sizes[dim] for dim in self.order)

    def where(self, *ids: Any) -> tuple[Any, Any, Any, Any]:
        """Grid indices, with or without a reference behind them, by dimension."""
        return tuple(ids[self.order.index(dim)] for dim in range(4))

    def at_end(self, last: bool) -> jax.Array:
        """Whether a grid step is the first, or the last, of a sum."""
        at = self.where(*(pl.program_id(axis) for axis in range(4)))
        ends = True
        for dim in range(4):
            if not self.kept[dim]:
                ends &= at[dim] == (self.sizes[dim] - 1 if last else 0)
        return ends


def bias_gradient(
    plan: Plan, arrays: dict[str, jax.Array], scalars: jax.Array, like: jax.Array, **params: Any
) -> jax.Array:
    """Returns the gradient of a bias.

    Args:
      plan: that of the backward kernel, without parts of the keys.
      arrays: what the backward kernel reads, by name.
      scalars: its scalars.
      like: the bias [B, H, T, S], each dimension full or 1.
      **params: further arguments of `pallas_call`.
    """
    blocks = plan.blocks
    q, kv = min(blocks.q, BLOCK), min(blocks.kv, BLOCK)
    blocks = dataclasses.replace(blocks, q=q, kv=kv)
    plan = dataclasses.replace(plan, blocks=blocks, sub=kv, chunk=q)
    heads = plan.heads
    layout = Layout(plan.side.full['bias'], (blocks.batch, heads.steps, blocks.n_q, blocks.n_kv))
    _, has_heads, has_queries, has_keys = layout.kept
    out_heads = heads.q if has_heads else 1
    specs = _specs(plan, layout, arrays)
    sides = side.specs(plan.side, blocks, heads, layout.where)
    specs |= sides
    rows, lanes = (
        (blocks.queries if has_queries and has_keys else 1),
        (blocks.keys if has_keys else blocks.queries),
    )
    shape = (like.shape[0], heads.n_q if has_heads else 1, rows, lanes)
    scratch = _scratch(plan, out_heads, layout, arrays['q'].dtype)
    out = pl.pallas_call(
        functools.partial(_kernel, plan, layout, (*specs, 'dbias', *scratch)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=layout.grid,
            in_specs=list(specs.values()),
            out_specs=sides['bias'],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=result(shape, jnp.float32, arrays),
        name='attention_backward_bias',
        **params,
    )(scalars, *(arrays[name] for name in specs))
    out = out[:, : like.shape[1]]
    if not has_keys:
        out = out.swapaxes(2, 3)
    summed = tuple(dim for dim in range(4) if out.shape[dim] != like.shape[dim])
    return out.sum(summed, keepdims=True).astype(like.dtype)


def _specs(plan: Plan, layout: Layout, arrays) -> dict[str, pl.BlockSpec]:
    """Blocks of what the kernel reads beside mask, bias and segment ids."""
    heads, blocks = plan.heads, plan.blocks

    def queries(*ids):
        b, g, i, _ = layout.where(*ids)
        return b, i, g

    def keys(*ids):
        b, g, _, j = layout.where(*ids)
        return b, j, heads.kv_step(g)

    def rows(*ids):
        b, g, i, _ = layout.where(*ids)
        return b, g, 0, i

    shapes = {
        'q': ((1, blocks.q, heads.q * heads.D), queries),
        'k': ((1, blocks.kv, heads.kv * heads.D), keys),
        'v': ((1, blocks.kv, heads.kv * heads.V), keys),
        'o': ((1, blocks.q, heads.q * heads.V), queries),
        'do': ((1, blocks.q, heads.q * heads.V), queries),
        'lse': ((1, heads.q, 1, blocks.q), rows),
        'dlse': ((1, heads.q, 1, blocks.q), rows),
    }
    return {name: pl.BlockSpec(*args) for name, args in shapes.items() if name in arrays}


def _scratch(plan: Plan, out_heads: int, layout: Layout, dtype) -> dict[str, Any]:
    blocks = plan.blocks
    _, _, has_queries, has_keys = layout.kept
    shape = (out_heads, blocks.kv if has_keys else 1, blocks.q if has_queries else 1)
    return plan.query_scratch(dtype) | {'sum': pltpu.VMEM(shape, jnp.float32)}


def _kernel(plan: Plan, layout: Layout, names: tuple[str, ...], scalars: Any, *refs: Any) -> None:
    """One grid step."""
    where = layout.where(*(pl.program_id(axis) for axis in range(4)))
    step = Step(plan, named_refs(names, scalars, refs), where)
    total = step.refs.sum

    @pl.when(layout.at_end(last=False))
    def _():
        total[...] = jnp.zeros(total.shape, total.dtype)

    blocks = plan.blocks
    offset = step.reader.offset(step.i, step.j)

    def add():
        step.prepare()
        step.begin()
        body = Body()
        for item in step.tiles(body):
            _, ds_ST = step.gradient(*step.products(*item, body), *item, body)
            for dim, axis in ((2, 1), (3, 0)):
                if not layout.kept[dim]:
                    ds_ST = ds_ST.sum(axis, keepdims=True)
            total[item[0] if layout.kept[1] else 0] += ds_ST

    misses = tile.misses(blocks.band, offset, blocks.kv, blocks.q)
    pl.when(jnp.logical_not(misses))(add)

    @pl.when(layout.at_end(last=True))
    def _():
        for n in range(total.shape[0]):
            sum_ST = total[n]
            if layout.kept[3]:
                wide = (sum_ST.shape[0], max(sum_ST.shape[1], 128))
                turned = jnp.broadcast_to(sum_ST, wide).T
                sum_ST = turned if layout.kept[2] else turned[:1]
            step.refs.dbias[0, n] = sum_ST

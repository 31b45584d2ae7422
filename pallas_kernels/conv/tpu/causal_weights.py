"""The gradient of a depthwise kernel over positions: a sum over batch and positions for every tap.

Legend: B batch, T inputs, Q outputs, C channels, L taps.
"""

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.conv.tpu import causal_rows, causal_segments
from pallas_kernels.conv.tpu.causal_kernel import each_piece, in_specs
from pallas_kernels.conv.tpu.causal_plan import Plan
from pallas_kernels.conv.tpu.layout import LANES
from pallas_kernels.mesh import result

# The sums go on over the batch, or a share of it, and positions.
SEMANTICS = ('parallel', 'parallel', 'arbitrary', 'arbitrary')
SUBLANES = 8


def call(
    plan: Plan,
    x_BTC: jax.Array,
    du_BQC: jax.Array,
    ids_BT: jax.Array | None,
    *,
    cores: int,
    limit: int | None,
    interpret: Any,
) -> jax.Array:
    """Returns dw_LC in float32, of the taps of the plan; see `causal_kernel.call`.

    `cores` share the channels, or where these are too few for it the batch.
    """
    inputs, scratch = {'x': x_BTC, 'du': du_BQC}, causal_rows.scratch(plan)
    specs, taps = in_specs(plan, 1), len(plan.taps.shift)
    specs['du'] = specs['out']
    if plan.view:
        inputs['view'] = x_BTC
    if ids_BT is not None:
        inputs['bits'] = causal_segments.bits(ids_BT, plan.taps, plan.rows)
        specs['bits'] = causal_segments.spec(plan, lambda b, c, t: (b, plan.block(t)))
        scratch |= causal_segments.scratch(plan)
    scratch['sums'] = pltpu.VMEM((plan.groups, taps, SUBLANES, LANES), jnp.float32)
    (_, C), (batches, columns, blocks) = plan.size, plan.steps
    shares = cores if columns % cores and batches % cores == 0 else 1
    each = batches // shares

    def turned(spec: pl.BlockSpec) -> pl.BlockSpec:
        return pl.BlockSpec(spec.block_shape, lambda c, s, b, t: spec.index_map(s * each + b, c, t))

    dw_SLC = pl.pallas_call(
        functools.partial(_kernel, plan, [*inputs, 'dw', *scratch]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0,
            grid=(columns, shares, each, blocks),
            in_specs=[turned(specs[name]) for name in inputs],
            out_specs=pl.BlockSpec((None, taps, plan.lanes), lambda c, s, b, t: (s, 0, c)),
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=result((shares, taps, C), jnp.float32, [*inputs.values()]),
        compiler_params=pltpu.CompilerParams(dimension_semantics=SEMANTICS, vmem_limit_bytes=limit),
        interpret=interpret,
        name='causal_conv1d_weight_gradient',
    )(*inputs.values())
    return dw_SLC.sum(axis=0)


def _kernel(plan: Plan, names: list[str], *refs: Any) -> None:
    """One grid step."""
    row, rows, step = pl.program_id(2), pl.num_programs(2), pl.program_id(3)
    refs = types.SimpleNamespace(**dict(zip(names, refs, strict=True)), step=step)
    refs.row = pl.program_id(1) * rows + row
    start = plan.block(step) * plan.rows
    pl.when((row == 0) & (step == 0))(lambda: _clear(refs.sums))

    def piece(b: Any, first: Any) -> None:
        def make(column: int, at: Any, masked: bool) -> None:
            here = (b, pl.ds(at, plan.chunk), causal_rows.lanes(first + column))
            du = refs.du[here].astype(jnp.float32)
            if masked:
                there = causal_rows.iota(plan.chunk) < plan.taps.outputs - start - at
                du = jnp.where(there, du, 0.0)
            for tap in range(len(plan.taps.shift)):
                found = causal_segments.read(plan, refs, column, tap, at) * du
                sums = found.reshape(-1, SUBLANES, LANES).sum(axis=0)
                refs.sums[first + column, tap] += sums

        causal_rows.sweep(plan, refs, b, first, make)

    each_piece(plan, refs, piece)

    @pl.when((row == rows - 1) & (step == plan.steps[2] - 1))
    def _():
        for g in range(plan.groups):
            refs.dw[:, g * LANES : (g + 1) * LANES] = refs.sums[g].sum(axis=1)


def _clear(ref: Any) -> None:
    ref[...] = jnp.zeros(ref.shape, ref.dtype)

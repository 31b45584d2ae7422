"""The kernel of a depthwise convolution over positions, with what follows it, and its call.

Legend: B batch, T inputs, Q outputs, C channels, N rows of parameters.
"""

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.conv.epilogue import finish
from pallas_kernels.conv.tpu import causal_rows, causal_segments
from pallas_kernels.conv.tpu.causal_plan import Plan
from pallas_kernels.mesh import result

# Rows are carried from one block of positions to the next.
SEMANTICS = ('parallel', 'parallel', 'arbitrary')


def call(
    plan: Plan,
    x_BTC: jax.Array,
    w_LC: jax.Array,
    *,
    bias_C: jax.Array | None = None,
    scale_C: jax.Array | None = None,
    shift_C: jax.Array | None = None,
    residual_BQC: jax.Array | None = None,
    ids_BT: jax.Array | None = None,
    activation: str | None = None,
    keep: bool = False,
    limit: int | None,
    interpret: Any,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns y_BQC and, with `keep`, u_BQC in x's type.

    Args:
      plan: how the work is cut.
      x_BTC: bfloat16 or float32.
      w_LC: the taps of the plan.
      bias_C, scale_C, shift_C, residual_BQC, activation: see `epilogue`.
      ids_BT: segment ids, or None.
      keep: whether u is wanted.
      limit: of VMEM, in bytes.
      interpret: passed to `pallas_call`.
    """
    names = ['bias'] * (bias_C is not None) + ['scale', 'shift'] * (scale_C is not None)
    given = {'bias': bias_C, 'scale': scale_C, 'shift': shift_C}
    rows = [w_LC.astype(jnp.float32)]
    rows += [given[name].astype(jnp.float32)[None] for name in names]
    parameters_NC = jnp.concatenate(rows) if names else rows[0]
    inputs = {'x': x_BTC, 'parameters': parameters_NC}
    specs = in_specs(plan, parameters_NC.shape[0])
    scratch = causal_rows.scratch(plan)
    if plan.view:
        inputs['view'] = x_BTC
    if residual_BQC is not None:
        inputs['residual'] = residual_BQC
        specs['residual'] = specs['out']
    if ids_BT is not None:
        inputs['bits'] = causal_segments.bits(ids_BT, plan.taps, plan.rows)
        specs['bits'] = causal_segments.spec(plan, lambda b, c, t: (b, plan.block(t)))
        scratch |= causal_segments.scratch(plan)
    outs = ['y', 'u'] if keep else ['y']
    (B, C), Q = plan.size, plan.taps.outputs
    found = pl.pallas_call(
        functools.partial(_kernel, plan, [*inputs, *outs, *scratch], names, activation),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0,
            grid=plan.steps,
            in_specs=[specs[name] for name in inputs],
            out_specs=[specs['out']] * len(outs),
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[result((B, Q, C), x_BTC.dtype, [*inputs.values()])] * len(outs),
        compiler_params=pltpu.CompilerParams(dimension_semantics=SEMANTICS, vmem_limit_bytes=limit),
        interpret=interpret,
        name='causal_conv1d',
    )(*inputs.values())
    return found[0], found[1] if keep else None


def in_specs(plan: Plan, parameters: int) -> dict[str, pl.BlockSpec]:
    """Returns the blocks by their names; the grid is of batch, channels, positions."""
    shape = (plan.batch, plan.rows, plan.lanes)
    last = -(-plan.taps.inputs // plan.rows) - 1
    found = {
        'x': pl.BlockSpec(shape, lambda b, c, t: (b, jnp.minimum(plan.block(t), last), c)),
        'parameters': pl.BlockSpec((parameters, plan.lanes), lambda b, c, t: (0, c)),
        'out': pl.BlockSpec(shape, lambda b, c, t: (b, plan.block(t), c)),
    }
    if plan.view:
        behind = plan.steps[2] * plan.rows // plan.view
        end = -(-plan.taps.inputs // plan.view) - 1

        def view(b, c, t):
            at = behind if plan.down else jnp.minimum((t + 1) * (plan.rows // plan.view), end)
            return b, at, c

        found['view'] = pl.BlockSpec((plan.batch, plan.view, plan.lanes), view)
    return found


def _kernel(
    plan: Plan, names: list[str], extra: list[str], activation: str | None, *refs: Any
) -> None:
    """One grid step."""
    refs = types.SimpleNamespace(
        **dict(zip(names, refs, strict=True)), row=pl.program_id(0), step=pl.program_id(2)
    )

    n = len(plan.taps.shift)

    def piece(b: Any, first: Any) -> None:
        lanes = [causal_rows.lanes(first + k) for k in range(plan.columns)]
        parameters = [
            [refs.parameters[row : row + 1, at] for row in range(n + len(extra))] for at in lanes
        ]

        def make(column: int, at: Any, masked: bool) -> None:
            del masked
            here, w = (b, pl.ds(at, plan.chunk), lanes[column]), parameters[column]
            given = dict(zip(extra, w[n:], strict=True))
            # Taps in their order, whatever the blocks are: the same bits for the same inputs.
            u = causal_segments.read(plan, refs, column, 0, at) * w[0]
            for tap in range(1, n):
                u += causal_segments.read(plan, refs, column, tap, at) * w[tap]
            if 'bias' in given:
                u += given.pop('bias')
            residual = refs.residual[here] if 'residual' in names else None
            y = finish(u, activation, residual=residual, **given)
            refs.y[here] = y.astype(refs.y.dtype)
            if 'u' in names:
                refs.u[here] = u.astype(refs.u.dtype)

        causal_rows.sweep(plan, refs, b, first, make)

    each_piece(plan, refs, piece)


def each_piece(plan: Plan, refs: Any, piece: Any) -> None:
    """Calls `piece(b, first)` for all of a block's batch and pieces of register columns."""
    causal_rows.begin(plan, refs)
    pieces = plan.groups // plan.columns

    def row(b, _):
        if hasattr(refs, 'bits'):
            causal_segments.expand(plan, refs, b)
        jax.lax.fori_loop(0, pieces, lambda k, _: piece(b, k * plan.columns), None)

    # Of a batch that does not exist, nothing may be summed.
    B, last = plan.size[0], plan.steps[0] - 1
    batch = plan.batch
    if B % batch:
        batch = jnp.where(refs.row == last, B - last * batch, batch)
    jax.lax.fori_loop(0, batch, row, None)

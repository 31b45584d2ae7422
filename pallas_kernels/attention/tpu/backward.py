"""The backward pass on TPU: gradients of q, k and v by one kernel, of bias and sinks beside it.

Legend: B batch, T queries, S keys, H and K query and key-value heads, D and V their sizes, F heads
side by side in the lanes.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import block_sizes as sizing
from pallas_kernels.attention.arguments import Gradients, Operands, Spec
from pallas_kernels.attention.sinks import sinks_gradient
from pallas_kernels.attention.tpu import blocks as blocking
from pallas_kernels.attention.tpu import layout, side, tile
from pallas_kernels.attention.tpu.backward_bias import bias_gradient
from pallas_kernels.attention.tpu.backward_kernel import kernel
from pallas_kernels.attention.tpu.backward_plan import Plan
from pallas_kernels.block_sizes import BlockSizes
from pallas_kernels.chip import CHIPS, Chip, current_chip
from pallas_kernels.mesh import result

STATIC_OFFSETS = 3  # more ways for the band to cross a block than this share one body
SEMANTICS = ('parallel', 'parallel', 'arbitrary', 'arbitrary')
SUMS_BYTES = None  # of VMEM for the sums of dK and dV; None is half of what the chip gives


def backward(
    operands: Operands,
    spec: Spec,
    block_sizes: BlockSizes | None,
    o_BTHV: jax.Array,
    lse_BHT: jax.Array,
    do_BTHV: jax.Array,
    dlse_BHT: jax.Array | None = None,
    *,
    interpret: Any = None,
) -> Gradients:
    """Returns the gradients of attention, from what its forward pass returned.

    Args:
      operands: what was attended to; bfloat16 or float32.
      spec: what is static in the call.
      block_sizes: the call's; `block_sizes.backward` is what counts. None is chosen for the chip.
      o_BTHV: the forward pass's output.
      lse_BHT: its logarithm of the sum of exponentials, float32.
      do_BTHV: gradient of the output.
      dlse_BHT: gradient of the logarithm; None is zero.
      interpret: what `pallas_call` takes; None interprets where there is no TPU.

    Returns:
      gradients, each in the shape and type of its operand.
    """
    H, D = operands.q_BTHD.shape[2:]
    K, V = operands.v_BSKV.shape[2:]
    chip = current_chip()
    if interpret is None:
        interpret = chip is None or not chip.is_tpu
    chip = chip if chip is not None and chip.is_tpu else CHIPS['v5e']
    sizes = _sizes(operands, spec, block_sizes, chip, interpret)
    heads = layout.heads(H, K, D, V, sizes.heads or 1)
    rows_BHT = {'lse': lse_BHT} if dlse_BHT is None else {'lse': lse_BHT, 'dlse': dlse_BHT}
    inputs = _Inputs(
        layout.pad(operands, heads),
        *(_pad(x, heads.n_q, heads.V) for x in (o_BTHV, do_BTHV)),
        {name: _pad_rows(x, heads.n_q) for name, x in rows_BHT.items()},
    )
    params = {'vmem_limit_bytes': chip.vmem_limit}, interpret
    dq, dk, dv = _over_keys(inputs, spec, sizes, heads, params)
    dbias = None
    if operands.bias_BHTS is not None and spec.bias_gradient:
        call = _Call(inputs, spec, sizes, heads)
        dbias = bias_gradient(
            call.plan,
            call.arrays,
            call.scalars,
            operands.bias_BHTS,
            compiler_params=pltpu.CompilerParams(**params[0]),
            interpret=interpret,
        )
    return Gradients(
        dq[:, :, :H, :D],
        dk[:, :, :K, :D],
        dv[:, :, :K, :V],
        bias=dbias,
        sinks=_sink_gradient(operands, o_BTHV, lse_BHT, do_BTHV, dlse_BHT),
    )


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """What a kernel reads, heads padded."""

    operands: Operands
    o_BTHV: jax.Array
    do_BTHV: jax.Array
    rows_BHT: dict[str, jax.Array]


def _sizes(operands, spec, given: BlockSizes | None, chip: Chip, interpret) -> BlockSizes:
    (B, T, H, D), (S, K, V) = operands.q_BTHD.shape, operands.v_BSKV.shape[1:]
    shape, dtype = sizing.AttentionShape(B, T, S, H, K, D, V), operands.q_BTHD.dtype
    options = {'logit_bytes': _logit_bytes(operands), 'chip': chip}
    if given is None or given.backward is None:
        options |= {'causal': spec.causal, 'window': spec.window}
        return sizing.choose('attention', shape, dtype, **options).backward
    sizing.check(given)
    if not interpret:
        sizing.check_fit(given.backward, shape, dtype, backward=True, **options)
    return given.backward


def _logit_bytes(operands: Operands) -> int:
    """Bytes that a kernel reads for each logit."""
    found, arrays = side.arrays(operands)
    return sum(arrays[n].dtype.itemsize for n, full in found.full.items() if full[2] and full[3])


def _over_keys(inputs, spec, sizes, heads, params):
    """Gradients of q, k and v; keys too many for VMEM to hold their sums are taken in parts."""
    S = inputs.operands.k_BSKD.shape[1]
    sums = 4 * heads.kv * (heads.D + heads.V)
    room = SUMS_BYTES or params[0]['vmem_limit_bytes'] // 2
    most = max(1, room // (sums * sizes.kv)) * sizes.kv
    parts = -(-S // most)
    dtype = inputs.operands.q_BTHD.dtype
    if parts == 1:
        return _gradients(_Call(inputs, spec, sizes, heads), params, dtype)
    size = -(-S // (parts * sizes.kv)) * sizes.kv
    dq, dks, dvs = 0, [], []
    for low in range(0, S, size):
        part = dataclasses.replace(inputs, operands=_keys(inputs.operands, low, size))
        # Position `low` is the part's 0.
        moved = dataclasses.replace(spec, shift=spec.shift - low)
        call = _Call(part, moved, sizes, heads, key_start=low)
        dq_part, dk, dv = _gradients(call, params, jnp.float32)
        dq, dks, dvs = dq + dq_part, [*dks, dk], [*dvs, dv]
    return dq.astype(dtype), jnp.concatenate(dks, 1), jnp.concatenate(dvs, 1)


def _keys(operands: Operands, low: int, size: int) -> Operands:
    """The operands, with these keys only."""
    cut = slice(low, low + size)

    def logits(x):
        return x if x is None or x.shape[3] == 1 else x[..., cut]

    ids_BS = operands.kv_segment_ids_BS
    return operands._replace(
        k_BSKD=operands.k_BSKD[:, cut],
        v_BSKV=operands.v_BSKV[:, cut],
        kv_segment_ids_BS=None if ids_BS is None else ids_BS[:, cut],
        mask_BHTS=logits(operands.mask_BHTS),
        bias_BHTS=logits(operands.bias_BHTS),
    )


class _Call:
    """What is passed to a kernel: a plan, arrays by name, and scalars."""

    def __init__(self, inputs, spec, sizes, heads, key_start=0):
        operands = inputs.operands
        beside, beside_arrays = side.arrays(operands)
        blocks = blocking.blocks(operands, spec, sizes.q, sizes.kv)
        inside, offsets = _places(blocks)
        self.plan = Plan(
            spec=spec,
            blocks=blocks,
            heads=heads,
            side=beside,
            sub=sizes.sub,
            chunk=sizes.chunk,
            inside=inside,
            offsets=offsets,
            key_start=key_start,
            dlse='dlse' in inputs.rows_BHT,
        )
        self.scalars = blocking.scalars(operands, blocks)
        self.arrays = {
            'q': layout.flat(operands.q_BTHD),
            'k': layout.flat(operands.k_BSKD),
            'v': layout.flat(operands.v_BSKV),
            'o': layout.flat(inputs.o_BTHV),
            'do': layout.flat(inputs.do_BTHV),
            **{name: x[:, :, None] for name, x in inputs.rows_BHT.items()},
            **beside_arrays,
        }


def _gradients(call: _Call, params, dtype):
    """Runs the kernel: gradients of q (of type `dtype`), k and v, heads still padded."""
    plan, heads, blocks = call.plan, call.plan.heads, call.plan.blocks
    B, T, S = blocks.batch, blocks.queries, blocks.keys
    kv_dtype = call.arrays['k'].dtype
    specs, out_specs = _specs(plan, call.arrays)
    outs = {
        'dq': result((B, T, heads.n_q * heads.D), dtype, call.arrays),
        'dk': result((B, S, heads.n_kv * heads.D), kv_dtype, call.arrays),
        'dv': result((B, S, heads.n_kv * heads.V), kv_dtype, call.arrays),
    }
    scratch = plan.scratch(kv_dtype)
    dq, dk, dv = pl.pallas_call(
        functools.partial(kernel, plan, (*specs, *outs, *scratch)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, heads.n_kv // heads.kv, plan.rows + plan.flushes, blocks.steps()),
            in_specs=list(specs.values()),
            out_specs=out_specs,
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=list(outs.values()),
        compiler_params=pltpu.CompilerParams(dimension_semantics=SEMANTICS, **params[0]),
        interpret=params[1],
        name='attention_backward',
        metadata={'causal': str(plan.spec.causal)},
    )(call.scalars, *(call.arrays[name] for name in specs))
    return (
        dq.reshape(B, T, heads.n_q, heads.D),
        dk.reshape(B, S, heads.n_kv, heads.D),
        dv.reshape(B, S, heads.n_kv, heads.V),
    )


def _specs(plan: Plan, arrays) -> tuple[dict[str, pl.BlockSpec], list[pl.BlockSpec]]:
    """Blocks of what the kernel reads, by name, and of what it writes."""
    heads, blocks = plan.heads, plan.blocks

    def queries(*ids):
        b, g, i, _ = plan.fetched(*ids)
        return b, i, g

    def keys(*ids):
        b, g, _, j = plan.fetched(*ids)
        return b, j, plan.group(g)

    def rows(*ids):
        b, g, i, _ = plan.fetched(*ids)
        return b, g, 0, i

    def finished(*ids):
        b, g, i, _ = plan.where(*ids)
        return b, i, g

    def written(b, group, row, step, scalars):
        return b, plan.written(row, step), group

    q, kv = (1, blocks.q, heads.q * heads.D), (1, blocks.kv, heads.kv * heads.D)
    o, v = (1, blocks.q, heads.q * heads.V), (1, blocks.kv, heads.kv * heads.V)
    specs = {
        'q': pl.BlockSpec(q, queries),
        'k': pl.BlockSpec(kv, keys),
        'v': pl.BlockSpec(v, keys),
        'o': pl.BlockSpec(o, queries),
        'do': pl.BlockSpec(o, queries),
        'lse': pl.BlockSpec((1, heads.q, 1, blocks.q), rows),
        'dlse': pl.BlockSpec((1, heads.q, 1, blocks.q), rows),
        **side.specs(plan.side, blocks, heads, plan.fetched),
    }
    outs = [pl.BlockSpec(q, finished), pl.BlockSpec(kv, written), pl.BlockSpec(v, written)]
    return {name: spec for name, spec in specs.items() if name in arrays}, outs


def _places(at: blocking.Blocks) -> tuple[bool, tuple[int, ...] | None]:
    """Whether any block lies inside the band, and the offsets of those that its edges cross."""
    if at.moved:
        return True, None
    if not at.banded:
        return True, ()
    offset_IJ = at.offset(np.arange(at.n_q)[:, None], np.arange(at.n_kv)[None])
    covered_IJ = tile.covers(at.band, offset_IJ, at.kv, at.q)
    crossed_IJ = ~covered_IJ & ~tile.misses(at.band, offset_IJ, at.kv, at.q)
    offsets = tuple(int(n) for n in np.unique(offset_IJ[crossed_IJ]))
    return bool(covered_IJ.any()), offsets if len(offsets) <= STATIC_OFFSETS else None


def _pad(x_BTHV: jax.Array, H: int, V: int) -> jax.Array:
    extra = (H - x_BTHV.shape[2], V - x_BTHV.shape[3])
    return jnp.pad(x_BTHV, ((0, 0), (0, 0), (0, extra[0]), (0, extra[1])))


def _pad_rows(x_BHT: jax.Array, H: int) -> jax.Array:
    return jnp.pad(x_BHT.astype(jnp.float32), ((0, 0), (0, H - x_BHT.shape[1]), (0, 0)))


def _sink_gradient(operands, o_BTHV, lse_BHT, do_BTHV, dlse_BHT) -> jax.Array | None:
    """Gradient of the sinks: minus their weight in a row, times the row's delta."""
    if operands.sinks_H is None:
        return None
    delta_BHT = jnp.einsum('bthv,bthv->bht', o_BTHV, do_BTHV, preferred_element_type=jnp.float32)
    if dlse_BHT is not None:
        delta_BHT -= dlse_BHT
    return sinks_gradient(operands.sinks_H, lse_BHT, delta_BHT)

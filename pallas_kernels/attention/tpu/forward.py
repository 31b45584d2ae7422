"""Attention forward on TPU: which kernel a call comes to, and its call.

Legend: B batch, T queries, S keys, H and K query and key-value heads, D and V their sizes.
"""

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import block_sizes as block_sizes_lib
from pallas_kernels import chip as chip_lib
from pallas_kernels.attention.arguments import Operands, Spec
from pallas_kernels.attention.tpu import blocks as blocks_lib
from pallas_kernels.attention.tpu import forward_edges as edges
from pallas_kernels.attention.tpu import layout, side, tile
from pallas_kernels.attention.tpu.blocks import Body
from pallas_kernels.attention.tpu.forward_kernel import SUBLANES, Plan, Step
from pallas_kernels.block_sizes import BlockSizes
from pallas_kernels.mesh import result

# State is carried from one block of keys to the next, and nothing else depends on the order.
SEMANTICS = ('parallel', 'parallel', 'parallel', 'arbitrary')
MOST_BODIES = 3  # of blocks that the band's edge passes through; more share one that masks all


def forward(
    operands: Operands,
    spec: Spec,
    block_sizes: BlockSizes | None = None,
    *,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns o_BTHV, in q's type, and lse_BHT, in float32; see `attention`.

    Args:
      operands: bfloat16 or float32.
      spec: what is static.
      block_sizes: None chooses.
      interpret: passed to `pallas_call`; None interprets unless the current chip is a TPU.
    """
    B, T, H, _ = operands.q_BTHD.shape
    chip = chip_lib.current_chip()
    compiled = chip is not None and chip.is_tpu
    sizes = _sizes(operands, spec, block_sizes, chip)
    heads = layout.heads(H, *operands.k_BSKD.shape[2:], operands.v_BSKV.shape[3], sizes.heads or 1)
    padded = layout.pad(operands, heads)
    blocks = blocks_lib.blocks(operands, spec, sizes.q, sizes.kv)
    aside, arrays = side.arrays(operands)
    bf16 = operands.q_BTHD.dtype == jnp.bfloat16
    plan = Plan(
        spec=spec,
        blocks=blocks,
        heads=heads,
        side=aside,
        sub=sizes.sub,
        chunk=sizes.chunk,
        # A 256 wide unit has room for the rows of ones; a 128 wide one would need another pass.
        ones=bf16 and not spec.dropout_rate and compiled and chip.mxu == 256,
        diagonal=_diagonal(operands, spec, blocks),
    )
    limit = chip.vmem_limit if compiled else None
    call = _call(plan, padded, arrays, limit)
    o_BTF, lse_BH1T = call(interpret=not compiled if interpret is None else interpret)
    o_BTHV = o_BTF.reshape(B, T, heads.n_q, heads.V)[:, :, :H, : operands.v_BSKV.shape[3]]
    return o_BTHV, lse_BH1T[:, :H, 0]


def _sizes(
    operands: Operands, spec: Spec, given: BlockSizes | None, chip: chip_lib.Chip | None
) -> BlockSizes:
    """Block sizes for the call on `chip`: those given, if it can run them."""
    (B, T, H, D), (_, S, K, V) = operands.q_BTHD.shape, operands.v_BSKV.shape
    shape, dtype = block_sizes_lib.AttentionShape(B, T, S, H, K, D, V), operands.q_BTHD.dtype
    logit_bytes = sum(
        x.dtype.itemsize
        for x in (operands.mask_BHTS, operands.bias_BHTS)
        if x is not None and x.shape[2] > 1 and x.shape[3] > 1
    )
    if given is None:
        return block_sizes_lib.choose(
            'attention', shape, dtype, causal=spec.causal, window=spec.window,
            logit_bytes=logit_bytes, chip=chip,
        )  # fmt: skip
    block_sizes_lib.check(given)
    if chip is not None and chip.is_tpu:
        block_sizes_lib.check_fit(given, shape, dtype, chip=chip, logit_bytes=logit_bytes)
    return given


def _diagonal(operands: Operands, spec: Spec, blocks: blocks_lib.Blocks) -> bool:
    """Whether a query is known to see the key at its own position, and few others surely."""
    aligned = not blocks.moved and not spec.shift and operands.q_BTHD.shape[1] > 1
    sparse = blocks.segments or blocks.band.low is not None
    # A mask may hide that key, and a bias that is left out would make m more than the maximum.
    plain = operands.mask_BHTS is None and operands.bias_BHTS is None
    return aligned and sparse and plain


def _call(plan: Plan, operands: Operands, arrays: dict[str, jax.Array], limit: int | None):
    """The `pallas_call` of a plan, to be called with `interpret`."""
    blocks, heads = plan.blocks, plan.heads
    B, T = operands.q_BTHD.shape[:2]

    def where(b, g, row, step, scalars):
        place = blocks_lib.Reader(blocks, scalars).place(b, row, step)
        return b, g, place.i, place.j

    def q_block(*ids):
        b, g, i, _ = where(*ids)
        return b, i, g

    def kv_block(*ids):
        b, g, _, j = where(*ids)
        return b, j, heads.kv_step(g)

    def lse_block(*ids):
        b, g, i, _ = where(*ids)
        return b, g, 0, i

    def diagonal(*ids):
        b, g, i, _ = where(*ids)
        return b, i, heads.kv_step(g)

    D, V = heads.D, heads.V
    inputs = {
        'q': (layout.flat(operands.q_BTHD), pl.BlockSpec((1, blocks.q, heads.q * D), q_block)),
        'k': (layout.flat(operands.k_BSKD), pl.BlockSpec((1, blocks.kv, heads.kv * D), kv_block)),
        'v': (layout.flat(operands.v_BSKV), pl.BlockSpec((1, blocks.kv, heads.kv * V), kv_block)),
    }
    if operands.sinks_H is not None:
        sinks_H = operands.sinks_H.astype(jnp.float32)
        inputs['sinks'] = (sinks_H, pl.BlockSpec(memory_space=pltpu.SMEM))
    if plan.diagonal:
        inputs['k_diagonal'] = (
            inputs['k'][0],
            pl.BlockSpec((1, blocks.q, heads.kv * D), diagonal),
        )
        if blocks.segments:
            spec = pl.BlockSpec((1, 1, 1, blocks.q), lambda *ids: (ids[0], 0, 0, where(*ids)[2]))
            inputs['key_ids_diagonal'] = (arrays['key_ids'], spec)
    side_specs = side.specs(plan.side, blocks, heads, where)
    inputs |= {name: (arrays[name], spec) for name, spec in side_specs.items()}
    values, specs = zip(*inputs.values(), strict=True)
    scratch = {
        'qt': pltpu.VMEM((heads.q, heads.width, blocks.q), operands.q_BTHD.dtype),
        'm': pltpu.VMEM((heads.q, SUBLANES, blocks.q), jnp.float32),
        'l': pltpu.VMEM((2, heads.q, SUBLANES, blocks.q), jnp.float32),
        'acc': pltpu.VMEM((2, heads.q * V, blocks.q), jnp.float32),
        'flags': pltpu.SMEM((2,), jnp.int32),
    }
    call = functools.partial(
        pl.pallas_call,
        functools.partial(_kernel, plan, [*inputs, 'o', 'lse', *scratch]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, heads.steps, *blocks.grid),
            in_specs=specs,
            out_specs=[
                pl.BlockSpec((1, blocks.q, heads.q * V), q_block),
                pl.BlockSpec((1, heads.q, 1, blocks.q), lse_block),
            ],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[
            result((B, T, heads.n_q * V), operands.q_BTHD.dtype, operands),
            result((B, heads.n_q, 1, T), jnp.float32, operands),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=SEMANTICS,
            vmem_limit_bytes=limit,
        ),
        name='attention_forward',
        metadata={'causal': str(plan.spec.causal)},
    )
    scalars = blocks_lib.scalars(operands, blocks)
    return lambda interpret: call(interpret=interpret)(scalars, *values)


def _kernel(plan: Plan, names: list[str], scalars: Any, *refs: Any) -> None:
    """One grid step."""
    named = dict(zip(names, refs, strict=True))
    side_refs = {name: named[name] for name in plan.side.full}
    step = Step(plan, types.SimpleNamespace(scalars=scalars, **{'sinks': None} | named), side_refs)
    if plan.whole:  # one basic block, but for the redoing
        edges.start(step)
        step.accumulate(_whole_body(plan.blocks))
        edges.finish(step)

        @pl.when(named['flags'][1] != 0)
        def _():
            edges.redo(step)
            edges.finish(step)

        return
    runs, first, last = step.place[2:]
    pl.when(first)(lambda: edges.start(step))
    for predicate, body in _bodies(step):
        predicate = predicate & runs
        if predicate is True:
            step.accumulate(body)
        else:
            pl.when(predicate)(functools.partial(step.accumulate, body))
    pl.when(named['flags'][1] != 0)(lambda: edges.redo(step))
    pl.when(last)(lambda: edges.finish(step))


def _whole_body(blocks: blocks_lib.Blocks) -> Body:
    """How the only block there is is done."""
    offset = blocks.offset(0, 0)
    inside = bool(tile.covers(blocks.band, offset, blocks.kv, blocks.q))
    checked = blocks.segments or blocks.keys % blocks.kv > 0
    return Body(offset=None if inside else offset, inside=inside, checked=checked)


def _bodies(step: Step) -> list[tuple[Any, Body]]:
    """The bodies of a kernel, each with when it is the one to run."""
    blocks = step.plan.blocks
    covered = step.reader.covered(step.b, step.i, step.j)
    bodies = [(covered, Body(inside=True, checked=False))]
    if covered is True:
        return bodies
    partial = jnp.logical_not(covered)
    offset = step.reader.offset(step.i, step.j)
    edge = _edge(blocks)
    if edge is None:
        return [*bodies, (partial, Body())]
    for static in edge:
        bodies.append((partial & (offset == static), Body(offset=static)))
    if blocks.segments or blocks.keys % blocks.kv:
        inside = tile.covers(blocks.band, offset, blocks.kv, blocks.q)
        bodies.append((partial & inside, Body(inside=True)))
    return bodies


def _edge(blocks: blocks_lib.Blocks) -> list[int] | None:
    """The offsets of blocks that the band's edge passes through; None if they are too many."""
    if blocks.moved:
        return None if blocks.banded else []
    offsets = {
        blocks.offset(i, j)
        for i in range(blocks.n_q)
        for j in range(blocks.n_kv)
        if not tile.misses(blocks.band, blocks.offset(i, j), blocks.kv, blocks.q)
        and not tile.covers(blocks.band, blocks.offset(i, j), blocks.kv, blocks.q)
    }
    return sorted(offsets) if len(offsets) <= MOST_BODIES else None

"""Decode attention as a Mosaic TPU kernel: the filled pages of a cache, each read once.

Legend: B rows, T new tokens, H query heads, K key-value heads, G = H / K, D and V sizes of heads,
S tokens of a contiguous cache, N pages of P tokens, A pages of a block, L pages of a row, M
key-value heads in one product, C = K / M products, R = M * G * T rows of a product, W = M * D
lanes, X blocks to work on, Z cores, F = K * D or K * V, 1 a single dimension.

The grid runs over a list of the blocks that hold something, made from the lengths, so that neither
a fetch nor a step is spent on the others. Of a block, only its filled pages are copied, while
those before it are worked on. A contiguous cache is one whose pages lie in order.

All query heads of M key-value heads go into one product with the cache as it lies, [P, K * D]:
the queries of one head have zeros in the lanes of the others. So the systolic arrays multiply by
zeros, while they wait for memory anyway, and the logits [R, A * P] come out dense, however small
G is.

A long row is not split for its own sake, as flash-decoding (Dao et al. 2023) does to fill a GPU's
many processors: a TPU core works on one block at a time and its copies never pause, along a row as
well as from row to row. Where a device has two cores (v5p), the list is cut into halves, if need
be within a row, and the parts are joined at the end.

The cache is read where it lies if it is kept as [B, S, K * D] (pages as [N, P, K * D]) and only
reshaped for the call, and K * D is a multiple of 128. Otherwise XLA copies it first, for a TPU
array is laid out in tiles of its last two dimensions, and those of odd sizes the other way round.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.decode_arguments import DecodeSpec
from pallas_kernels.attention.tpu.decode_kernel import LOG2_E, kernel
from pallas_kernels.attention.tpu.decode_plan import (
    LANES,
    SLOTS,
    Plan,
    choose,
    planned_chip,
    quotient_up,
)
from pallas_kernels.chip import current_chip
from pallas_kernels.mesh import result


def forward(
    q_BTHD: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths_B: jax.Array,
    page_table_BL: jax.Array | None,
    sinks_H: jax.Array | None,
    spec: DecodeSpec,
    *,
    lse: bool = False,
    block_keys: int | None = None,
    cores: int | None = None,
    interpret=None,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns o_BTHV in q's type and, where `lse`, lse_BHT.

    Args:
      q_BTHD: queries; rounded to the cache's type for the products.
      k: [B, S, K, D], or with a page table [N, P, K, D].
      v: [B, S, K, V] or [N, P, K, V].
      lengths_B: int32, filled positions, in [0, S].
      page_table_BL: int32, the pages of each row.
      sinks_H: float logits without a value.
      spec: what is static.
      lse: whether the logarithm of the sum of exponentials is wanted.
      block_keys: keys of a block; None chooses.
      cores: parts that the list of blocks is cut into; None is the chip's cores.
      interpret: Pallas's; None interprets where no TPU is.

    Raises:
      ValueError: a derivative is asked for.
    """
    function = functools.partial(
        _forward, spec=spec, lse=lse, block_keys=block_keys, cores=cores, interpret=interpret
    )
    function = jax.custom_jvp(_batched(function))
    function.defjvp(_no_derivative)
    return function(q_BTHD, k, v, lengths_B, page_table_BL, sinks_H)


def _no_derivative(primals, tangents):
    raise ValueError("impl='tpu': decode attention has no derivative; try impl='xla'")


def _batched(function):
    """Returns `function` with a rule for vmap: a batch of calls is one of more rows."""
    batched = jax.custom_batching.custom_vmap(function)

    @batched.def_vmap
    def rule(size, mapped, *args):
        names = 'q', 'k', 'v', 'lengths', 'page_table', 'sinks'
        x, mapped = dict(zip(names, args, strict=True)), dict(zip(names, mapped, strict=True))
        if mapped['sinks']:  # sinks are a head's, not a row's
            full = [_full(x[n], mapped[n], size) for n in names]
            outputs = jax.lax.map(lambda args: _batched(function)(*args), tuple(full))
            return outputs, jax.tree.map(lambda _: True, outputs)
        pages = ('k', 'v') if mapped['k'] or mapped['v'] or x['page_table'] is None else ()
        for name in ('q', 'lengths', 'page_table', *pages):
            x[name] = _full(x[name], mapped[name], size)
        if pages and x['page_table'] is not None:
            first = jnp.arange(size, dtype=jnp.int32) * x['k'].shape[1]
            x['page_table'] = x['page_table'] + first[:, None, None]
        for name in ('q', 'lengths', 'page_table', *pages):
            if x[name] is not None:
                x[name] = x[name].reshape(-1, *x[name].shape[2:])
        outputs = _batched(function)(*x.values())
        outputs = jax.tree.map(lambda o: o.reshape(size, -1, *o.shape[1:]), outputs)
        return outputs, jax.tree.map(lambda _: True, outputs)

    return batched


def _full(x: jax.Array | None, mapped: bool, size: int) -> jax.Array | None:
    return x if mapped or x is None else jnp.broadcast_to(x[None], (size, *x.shape))


def _forward(
    q_BTHD, k, v, lengths_B, page_table_BL, sinks_H, *, spec, lse, block_keys, cores, interpret
) -> tuple[jax.Array, jax.Array | None]:
    chip = planned_chip()
    plan = choose(q_BTHD, k, v, page_table_BL, spec, chip, block_keys)
    on_tpu = current_chip() is not None and current_chip().is_tpu
    plan = dataclasses.replace(plan, cores=cores or (chip.cores if on_tpu else 1))
    o_ZBCRV, lse_ZBCR1, start_B = run(
        plan, q_BTHD, _pages(plan, k), _pages(plan, v), lengths_B, page_table_BL, sinks_H,
        lse=lse, interpret=not on_tpu if interpret is None else interpret,
        vmem_limit=chip.vmem_limit,
    )  # fmt: skip
    o_BCRV, lse_BCR1 = _join(plan, o_ZBCRV, lse_ZBCR1, start_B)
    B, T, H, _ = q_BTHD.shape
    o_BKGTV = o_BCRV.reshape(B, plan.K, plan.G, T, plan.V)
    o_BTHV = o_BKGTV.transpose(0, 3, 1, 2, 4).reshape(B, T, H, plan.V).astype(q_BTHD.dtype)
    return o_BTHV, lse_BCR1.reshape(B, H, T) if lse else None


def run(
    plan: Plan,
    q_BTHD: jax.Array,
    k_NPF: jax.Array,
    v_NPF: jax.Array,
    lengths_B: jax.Array,
    page_table_BL: jax.Array | None,
    sinks_H: jax.Array | None,
    *,
    lse: bool,
    interpret,
    vmem_limit: int,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Returns o_ZBCRV, lse_ZBCR1 and the list's starts, of `_blocks`."""
    B, C, R, Z = q_BTHD.shape[0], plan.C, plan.R, plan.cores
    lse = lse or Z > 1
    row_X, start_B = _blocks(plan, lengths_B)
    scalars = [row_X, start_B, lengths_B]
    if plan.paged:
        # A wrong page must not be a fault of the whole chip.
        scalars.append(jnp.clip(page_table_BL.reshape(-1), 0, k_NPF.shape[0] - 1))

    def row(z, x, row_X, start_B, *_):
        item = z * quotient_up(start_B[B], Z) + x
        return row_X[jnp.minimum(item, start_B[B] - 1)]

    operands = [_spread(plan, q_BTHD.astype(k_NPF.dtype))]
    in_specs = [pl.BlockSpec((1, *operands[0].shape[1:]), lambda *i: (row(*i), 0, 0, 0))]
    if sinks_H is not None:
        sinks_CM = (sinks_H.astype(jnp.float32) * LOG2_E).reshape(C, -1)
        operands.append(jnp.repeat(sinks_CM, plan.T, axis=1)[..., None])
        in_specs.append(pl.BlockSpec((C, R, 1), lambda *i: (0, 0, 0)))
    given = *scalars, *operands, k_NPF, v_NPF
    dtype = q_BTHD.dtype if Z == 1 else jnp.float32
    out_shape = [result((Z, B, C, R, plan.V), dtype, given)]
    out_shape += [result((Z, B, C, R, 1), jnp.float32, given)] * lse
    call = pl.pallas_call(
        functools.partial(kernel, plan, sinks_H is not None, lse),
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(Z, quotient_up(start_B[B], Z)),
            in_specs=[*in_specs, *[pl.BlockSpec(memory_space=pltpu.HBM)] * 2],
            out_specs=[
                pl.BlockSpec((1, 1, *s.shape[2:]), lambda z, *i: (z, row(z, *i), 0, 0, 0))
                for s in out_shape
            ],
            scratch_shapes=_scratch(plan, k_NPF.dtype),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'arbitrary'),
            vmem_limit_bytes=vmem_limit,
            # Every page was clipped; the checks would cost a quarter of the scalar work.
            disable_bounds_checks=True,
        ),
        cost_estimate=_cost(plan, B, k_NPF.dtype),
        interpret=interpret,
        name='decode_attention',
    )
    outputs = call(*given)
    return outputs[0], outputs[1] if lse else None, start_B


def _scratch(plan: Plan, dtype) -> list:
    """Blocks of keys and values, their semaphores; maximum, sum and output of the softmax."""
    return [
        pltpu.VMEM((SLOTS, plan.A, plan.P, plan.K * plan.D), dtype),
        pltpu.VMEM((SLOTS, plan.A, plan.P, plan.K * plan.V), dtype),
        pltpu.SemaphoreType.DMA((SLOTS, 2)),
        pltpu.VMEM((plan.C, plan.R, LANES), jnp.float32),
        pltpu.VMEM((plan.C, plan.R, LANES), jnp.float32),
        pltpu.VMEM((plan.C, plan.R, plan.M * plan.V), jnp.float32),
    ]


def _cost(plan: Plan, B: int, dtype) -> pl.CostEstimate:
    """What full caches cost; how full they are is not known to the compiler."""
    pairs, sizes = B * plan.L * plan.P * plan.K, plan.D + plan.V
    return pl.CostEstimate(
        flops=2 * pairs * plan.G * plan.T * sizes,
        transcendentals=pairs * plan.G * plan.T,
        bytes_accessed=pairs * sizes * jnp.dtype(dtype).itemsize,
    )


def _blocks(plan: Plan, lengths_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the row of each block to work on [X], and where the blocks of a row start [B + 1].

    The last start is how many there are. A row without any has one, that its output is written.
    """
    B = lengths_B.shape[0]
    count_B = jnp.maximum(quotient_up(plan.pages(lengths_B), plan.A), 1)
    end_B = jnp.cumsum(count_B)
    x_X = jnp.arange(B * pl.cdiv(plan.L, plan.A))
    row_X = jnp.minimum((x_X[:, None] >= end_B[None]).sum(1), B - 1)
    start_B = jnp.concatenate([end_B - count_B, end_B[-1:]])
    return row_X.astype(jnp.int32), start_B.astype(jnp.int32)


def _spread(plan: Plan, q_BTHD: jax.Array) -> jax.Array:
    """Returns the queries [B, C, R, W], with zeros in the lanes of other key-value heads."""
    B = q_BTHD.shape[0]
    q_BTCMGD = q_BTHD.reshape(B, plan.T, plan.C, plan.M, plan.G, plan.D)
    q_BCMGT1D = q_BTCMGD.transpose(0, 2, 3, 4, 1, 5)[..., None, :]
    own_1M11M1 = jnp.eye(plan.M, dtype=bool)[None, None, :, None, None, :, None]
    return jnp.where(own_1M11M1, q_BCMGT1D, 0).reshape(B, plan.C, plan.R, plan.M * plan.D)


def _join(
    plan: Plan, o_ZBCRV: jax.Array, lse_ZBCR1: jax.Array | None, start_B: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Returns what the cores found, joined where two of them worked on a row."""
    if plan.cores == 1:
        return o_ZBCRV[0], None if lse_ZBCR1 is None else lse_ZBCR1[0]
    share, z_Z1 = quotient_up(start_B[-1], plan.cores), jnp.arange(plan.cores)[:, None]
    # A core has written the rows that it had blocks of; the rest of its output is undefined.
    begin_Z1, end_Z1 = z_Z1 * share, jnp.minimum((z_Z1 + 1) * share, start_B[-1])
    has_ZB = (start_B[None, :-1] < end_Z1) & (start_B[None, 1:] > begin_Z1)
    has_ZB111 = has_ZB[:, :, None, None, None]
    lse_ZBCR1 = jnp.where(has_ZB111, lse_ZBCR1, -jnp.inf)
    m_BCR1 = jnp.maximum(lse_ZBCR1.max(0), jnp.finfo(jnp.float32).min)
    p_ZBCR1 = jnp.exp(lse_ZBCR1 - m_BCR1[None])
    sum_BCR1 = p_ZBCR1.sum(0)
    o_BCRV = (jnp.where(has_ZB111, o_ZBCRV, 0) * p_ZBCR1).sum(0)
    o_BCRV /= jnp.where(sum_BCR1 > 0, sum_BCR1, 1)
    return o_BCRV, m_BCR1 + jnp.log(sum_BCR1)


def _pages(plan: Plan, x: jax.Array) -> jax.Array:
    if not plan.paged:
        missing = plan.L * plan.P - x.shape[1]
        if missing:
            x = jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0)))
    return x.reshape(-1, plan.P, x.shape[2] * x.shape[3])

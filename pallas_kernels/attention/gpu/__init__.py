"""Attention on NVIDIA Hopper, forward and backward, in Mosaic GPU.

bfloat16 and float16; causal, sliding window, grouped heads, segment ids with whole tiles skipped at
run time, soft cap, sinks, lse with its gradient, any head sizes up to 256, any lengths. Off the GPU
it runs in the interpreter of Pallas, which is for tests. What it lacks, `refuses` names.

Legend: B batch, T queries, S keys and values, H query heads, K key-value heads, D size of a query
and key head, V size of a value head.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.arguments import Gradients, Operands, Spec
from pallas_kernels.attention.gpu import tiles
from pallas_kernels.attention.gpu.backward_keys import key_gradients
from pallas_kernels.attention.gpu.backward_queries import query_gradient
from pallas_kernels.attention.gpu.forward_kernel import forward as _forward
from pallas_kernels.attention.gpu.logits import LOG2_E
from pallas_kernels.attention.sinks import sinks_gradient
from pallas_kernels.block_sizes import BlockSizes
from pallas_kernels.hopper import SHARED_MEMORY, interpretation, other_chip
from pallas_kernels.mesh import vary, varying

LARGEST_HEAD = 256
STAGES = 2


def refuses(operands: Operands, spec: Spec) -> str | None:
    """Returns why this path cannot run the call, in words for its caller, or None."""
    for name, x in {'mask': operands.mask_BHTS, 'bias': operands.bias_BHTS}.items():
        if x is not None:
            return f'has no {name}'
    if spec.dropout_rate:
        return f'has no dropout (dropout_rate={spec.dropout_rate})'
    q, v = operands.q_BTHD, operands.v_BSKV
    if jnp.dtype(q.dtype) not in (jnp.bfloat16, jnp.float16):
        return f'takes bfloat16 and float16, and q is {jnp.dtype(q.dtype)}'
    if max(q.shape[3], v.shape[3]) > LARGEST_HEAD:
        return f'takes heads of up to {LARGEST_HEAD}, and these have {q.shape[3]} and {v.shape[3]}'
    if spec.scale <= 0:
        return f'takes a positive scale, not {spec.scale}'
    return other_chip()


def _columns(sizes: BlockSizes | None, bytes_a_key: int, held: int) -> int:
    """Returns how many keys, or queries, a tile has: what is asked for, or 128 or 64 by memory."""
    fits = (SHARED_MEMORY - held) // (STAGES * bytes_a_key) // 64 * 64
    if sizes is None:
        return min(fits, 128)
    if sizes.kv % 64 or not 0 < sizes.kv <= fits:
        rule = f'must have kv a multiple of 64 up to {fits} for these heads on the GPU'
        raise ValueError(f'block_sizes={sizes}: {rule}; try block_sizes=None')
    return sizes.kv


def _padded(operands: Operands) -> Operands:
    """Returns operands with head sizes a multiple of 64 and lengths a multiple of 8, as TMA needs.

    Zeros add nothing to a product, and the band (`tiles.py`) still ends at the true lengths.
    """

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, -x.shape[3] % 64)))

    q, k, v = operands.q_BTHD, operands.k_BSKD, operands.v_BSKV
    return operands._replace(q_BTHD=pad(q), k_BSKD=pad(k), v_BSKV=pad(v))


def forward(
    operands: Operands,
    spec: Spec,
    block_sizes: BlockSizes | None = None,
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the output [B, T, H, V] in q's type and float32 lse [B, H, T].

    Of `block_sizes` only `kv`, the keys of a tile, has a meaning here. `interpret` says how to
    interpret, which is done wherever there is no GPU.

    Raises:
      ValueError: `block_sizes` do not fit the shared memory.
    """
    T, V = operands.q_BTHD.shape[1], operands.v_BSKV.shape[3]
    padded = _padded(operands)
    Dp, Vp = padded.q_BTHD.shape[3], padded.v_BSKV.shape[3]
    held = 2 * 128 * (Dp + (Vp if Dp != Vp else 0))
    columns = _columns(block_sizes, 2 * (Dp + Vp), held)
    if block_sizes is None and max(Dp, Vp) > 128:
        columns = 64  # a tile of 128 keys beside so wide a sum would not fit the registers
    o, lse = _forward(
        padded,
        spec,
        tiles.band(operands, spec),
        columns=columns,
        stages=STAGES,
        interpret=interpretation(interpret),
    )
    return vary((o[:, :T, :, :V], lse[..., :T]), varying(operands))


def backward(
    operands: Operands,
    spec: Spec,
    block_sizes: BlockSizes | None,
    o_BTHV: jax.Array,
    lse_BHT: jax.Array,
    do_BTHV: jax.Array,
    dlse_BHT: jax.Array | None = None,
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Gradients:
    """Returns the gradients of q, k, v and sinks; the same bits each time.

    `block_sizes` have no meaning here: what fits the registers leaves no choice.
    """
    del block_sizes
    T, S, V = o_BTHV.shape[1], operands.k_BSKD.shape[1], o_BTHV.shape[3]
    D, interpret = operands.q_BTHD.shape[3], interpretation(interpret)
    delta = jnp.einsum(
        'BTHV,BTHV->BHT',
        o_BTHV,
        do_BTHV,
        preferred_element_type=jnp.float32,
    )
    if dlse_BHT is not None:
        delta -= dlse_BHT.astype(jnp.float32)
    padded, band = _padded(operands), tiles.band(operands, spec)
    do = _padded(operands._replace(q_BTHD=do_BTHV.astype(o_BTHV.dtype))).q_BTHD
    # A query that sees nothing, or is not there, has a lse of +inf here: all its p are then 0.
    lse = jnp.where(lse_BHT == -jnp.inf, jnp.inf, lse_BHT * LOG2_E)
    tail = ((0, 0), (0, 0), (0, -T % 128))
    lse, ends = jnp.pad(lse, tail, constant_values=jnp.inf), jnp.pad(delta, tail)
    common = (padded, do, lse, ends, spec, band)
    Dp, Vp = padded.q_BTHD.shape[3], padded.v_BSKV.shape[3]
    wide = Dp + Vp > 256
    columns = 128 if Dp + Vp <= 128 else 64
    options = {'stages': STAGES, 'interpret': interpret}
    dq = query_gradient(*common, groups=1 if wide else 2, columns=columns, **options)
    if wide:  # two sums of this width do not fit the registers at once
        dkv = key_gradients(*common, outputs=('dk',), groups=1, columns=64, **options)
        dkv |= key_gradients(*common, outputs=('dv',), groups=2, columns=64, **options)
    else:
        dkv = key_gradients(*common, groups=2, columns=64, **options)
    sinks_H = operands.sinks_H
    dsinks = None if sinks_H is None else sinks_gradient(sinks_H, lse_BHT, delta)
    dk, dv = dkv['dk'][:, :S, :, :D], dkv['dv'][:, :S, :, :V]
    gradients = Gradients(dq[:, :T, :, :D], dk, dv, None, dsinks)
    return vary(gradients, varying((operands, do_BTHV)))

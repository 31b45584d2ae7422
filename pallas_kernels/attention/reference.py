"""The specification of attention: plain jnp at float32, every feature, no trick.

Legend: B batch, T queries, S keys and values, H query heads, K key-value heads, G = H / K query
heads of a key-value head, D size of a query and key head, V size of a value head, 1 a reduced or
broadcast dimension.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.arrays import accumulator
from pallas_kernels.attention import dropout
from pallas_kernels.attention.arguments import Gradients, Operands, Spec
from pallas_kernels.block_sizes import BlockSizes


def refuses(operands: Operands, spec: Spec) -> str | None:
    """Returns None: the specification has every feature."""
    del operands, spec


def forward(
    operands: Operands, spec: Spec, block_sizes: BlockSizes | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns o_BTHV in q's type, and lse_BHT, the logarithm of the sum of the exponentials.

    A row that sees nothing has o = 0, lse = -inf, and no gradients.
    """
    del block_sizes
    dtype = accumulator(operands.q_BTHD.dtype)
    logits_BHTS = jnp.where(visible(operands, spec), logits(operands, spec), -jnp.inf)
    m_BHT1 = logits_BHTS.max(-1, keepdims=True)
    sink_1H11 = None
    if operands.sinks_H is not None:
        sink_1H11 = operands.sinks_H.astype(dtype)[None, :, None, None]
        m_BHT1 = jnp.maximum(m_BHT1, sink_1H11)
    # Any finite number serves; the derivatives of all orders are those without it.
    m_BHT1 = jax.lax.stop_gradient(jnp.where(jnp.isfinite(m_BHT1), m_BHT1, 0))
    p_BHTS = jnp.exp(logits_BHTS - m_BHT1)
    sum_BHT1 = p_BHTS.sum(-1, keepdims=True)
    if sink_1H11 is not None:
        sum_BHT1 += jnp.exp(sink_1H11 - m_BHT1)
    sees_BHT1 = sum_BHT1 > 0
    sum_BHT1 = jnp.where(sees_BHT1, sum_BHT1, 1)
    lse_BHT1 = jnp.where(sees_BHT1, m_BHT1 + jnp.log(sum_BHT1), -jnp.inf)
    p_BHTS /= sum_BHT1
    if spec.dropout_rate:
        p_BHTS = jnp.where(kept(operands, spec), p_BHTS / (1 - spec.dropout_rate), 0)
    p_BKGTS = _split(p_BHTS, operands.k_BSKD.shape[2], axis=1)
    v_BSKV = operands.v_BSKV.astype(dtype)
    o_BTKGV = jnp.einsum('bkgts,bskv->btkgv', p_BKGTS, v_BSKV, precision='highest')
    o_BTHV = o_BTKGV.reshape(*operands.q_BTHD.shape[:3], -1)
    return o_BTHV.astype(operands.q_BTHD.dtype), lse_BHT1[..., 0]


def backward(
    operands: Operands,
    spec: Spec,
    block_sizes: BlockSizes | None,
    o_BTHV: jax.Array,
    lse_BHT: jax.Array,
    do_BTHV: jax.Array,
    dlse_BHT: jax.Array | None = None,
) -> Gradients:
    """Returns the gradients, those that JAX derives from `forward`; it needs neither o nor lse."""
    del block_sizes, o_BTHV
    bias_BHTS = operands.bias_BHTS if spec.bias_gradient else None
    if dlse_BHT is None:
        dlse_BHT = jnp.zeros_like(lse_BHT)

    def function(q_BTHD, k_BSKD, v_BSKV, bias_BHTS, sinks_H):
        varied = operands._replace(q_BTHD=q_BTHD, k_BSKD=k_BSKD, v_BSKV=v_BSKV, sinks_H=sinks_H)
        if bias_BHTS is not None:
            varied = varied._replace(bias_BHTS=bias_BHTS)
        return forward(varied, spec)

    _, vjp = jax.vjp(function, *operands[:3], bias_BHTS, operands.sinks_H)
    return Gradients(*vjp((do_BTHV, dlse_BHT)))


def logits(operands: Operands, spec: Spec) -> jax.Array:
    """Returns what goes into the softmax, before anything is hidden: [B, H, T, S]."""
    dtype = accumulator(operands.q_BTHD.dtype)
    k_BSKD = operands.k_BSKD.astype(dtype)
    q_BTKGD = _split(operands.q_BTHD.astype(dtype), k_BSKD.shape[2], axis=2)
    logits_BKGTS = spec.scale * jnp.einsum(
        'btkgd,bskd->bkgts', q_BTKGD, k_BSKD, precision='highest'
    )
    B, K, G, T, S = logits_BKGTS.shape
    logits_BHTS = logits_BKGTS.reshape(B, K * G, T, S)
    if spec.softcap is not None:
        logits_BHTS = spec.softcap * jnp.tanh(logits_BHTS / spec.softcap)
    if operands.bias_BHTS is not None:
        logits_BHTS += operands.bias_BHTS.astype(dtype)
    return logits_BHTS


def visible(operands: Operands, spec: Spec) -> jax.Array:
    """Returns which query sees which key: bool, [B, H, T, S] or with dimensions of 1."""
    _, _, t_11T1, s_111S = _indices(operands)
    distance_11TS = s_111S - (t_11T1 + spec.shift)
    seen_BHTS = jnp.ones(distance_11TS.shape, bool)
    if spec.right is not None:
        seen_BHTS &= distance_11TS <= spec.right
    if spec.left is not None:
        seen_BHTS &= distance_11TS >= -spec.left
    if operands.segment_ids_BT is not None:
        queries_B1T1 = operands.segment_ids_BT[:, None, :, None]
        seen_BHTS = seen_BHTS & (queries_B1T1 == operands.kv_segment_ids_BS[:, None, None])
    if operands.mask_BHTS is not None:
        seen_BHTS = seen_BHTS & operands.mask_BHTS
    return seen_BHTS


def kept(operands: Operands, spec: Spec) -> jax.Array:
    """Returns which weights survive dropout: bool, [B, H, T, S]."""
    return dropout.keep(operands.dropout_seed, *_indices(operands), spec.dropout_rate)


def _indices(operands: Operands) -> list[jax.Array]:
    """Returns the global indices of rows, heads, queries and keys, each along its own axis."""
    sizes = *(operands.q_BTHD.shape[n] for n in (0, 2, 1)), operands.k_BSKD.shape[1]
    shapes = [[size if n == axis else 1 for n in range(4)] for axis, size in enumerate(sizes)]
    indices = [jax.lax.broadcasted_iota(jnp.int32, s, axis) for axis, s in enumerate(shapes)]
    if operands.start is None:
        return indices
    return [index + operands.start[axis] for axis, index in enumerate(indices)]


def _split(x: jax.Array, K: int, axis: int) -> jax.Array:
    """Returns x with its axis of query heads as two: key-value heads, and the heads of each."""
    return x.reshape(*x.shape[:axis], K, -1, *x.shape[axis + 1 :])

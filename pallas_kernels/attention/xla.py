"""What a CPU runs: heads-major products over the visible keys, done again in the backward pass.

Dao et al. 2022, appendix B, without blocks of keys: a chunk of queries meets all its keys at once.

Legend: B batch, T queries, S keys and values, H query heads, K key-value heads, G = H / K query
heads of a key-value head, D size of a query and key head, V size of a value head, Q queries of a
chunk, N keys of a chunk, 1 a reduced or broadcast dimension.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.arrays import accumulator
from pallas_kernels.attention.arguments import Gradients, Operands, Spec
from pallas_kernels.attention.sinks import sinks_gradient
from pallas_kernels.attention.xla_chunk import (
    Place,
    kept,
    logits,
    over_keys,
    over_queries,
    with_keys,
)
from pallas_kernels.attention.xla_runs import Run, is_short, runs
from pallas_kernels.block_sizes import BlockSizes


class _Totals(NamedTuple):
    """Sums over chunks of queries, in the accumulator's type; None before the first."""

    dk_BKSD: jax.Array | None = None
    dv_BKSV: jax.Array | None = None
    dbias_BKGTS: jax.Array | None = None


class _Kept(NamedTuple):
    """Weights before they are divided by their sum, and what to multiply them by."""

    w_BKGQN: jax.Array
    norm_BKGQ1: jax.Array


def refuses(operands: Operands, spec: Spec) -> str | None:
    """Returns None: XLA runs every feature."""
    del operands, spec


def forward(
    operands: Operands, spec: Spec, block_sizes: BlockSizes | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns o_BTHV in q's type, and lse_BHT, the logarithm of the sum of the exponentials."""
    return forward_keeping(operands, spec, block_sizes)[:2]


def forward_keeping(
    operands: Operands, spec: Spec, block_sizes: BlockSizes | None = None
) -> tuple[jax.Array, jax.Array, list[_Kept] | None]:
    """Returns o_BTHV, lse_BHT, and weights for `backward`, where they are not many."""
    del block_sizes
    B, T, H, _ = operands.q_BTHD.shape
    keeps = _keeps(operands, spec)
    operands, spec = _heads_major(operands, spec)
    found = []
    for run in _runs(operands, spec):
        if run.count == 1:
            found.append(_forward_chunk(operands, spec, run, 0))
        else:
            chunk = lambda i, run=run: _forward_chunk(operands, spec, run, i)[:2]  # noqa: E731
            parts = jax.lax.map(chunk, jnp.arange(run.count))
            found.append((*map(_join, parts), None))
    o, lse, kept = zip(*found, strict=True)
    o_BKGTV, lse_BKGT1 = jnp.concatenate(o, 3), jnp.concatenate(lse, 3)
    o_BTHV = o_BKGTV.reshape(B, H, T, -1).swapaxes(1, 2)
    return o_BTHV, lse_BKGT1.reshape(B, H, T), list(kept) if keeps else None


def backward(
    operands: Operands,
    spec: Spec,
    block_sizes: BlockSizes | None,
    o_BTHV: jax.Array,
    lse_BHT: jax.Array,
    do_BTHV: jax.Array,
    dlse_BHT: jax.Array | None = None,
    kept: list[_Kept] | None = None,
) -> Gradients:
    """Returns the gradients; nothing of size T * S is held but a chunk, and the bias's own.

    `kept` is what `forward_keeping` returned; without it, the weights are computed again.
    """
    del block_sizes
    q_BTHD, bias_BHTS, sinks_H = operands.q_BTHD, operands.bias_BHTS, operands.sinks_H
    dtype = accumulator(q_BTHD.dtype)
    dot_BHT = jnp.einsum('bthv,bthv->bht', o_BTHV, do_BTHV, preferred_element_type=dtype)
    if dlse_BHT is not None:
        dot_BHT -= dlse_BHT
    # The weights of a row that sees nothing are exp(-inf - inf) = 0, not exp(-inf + inf).
    lse_BHT = jnp.where(lse_BHT == -jnp.inf, jnp.inf, lse_BHT)
    dsinks_H = None if sinks_H is None else sinks_gradient(sinks_H, lse_BHT, dot_BHT)
    operands, left = _heads_major(operands, spec)
    rows = tuple(
        _split(x, operands.k_BSKD.shape[1])
        for x in (lse_BHT[..., None], dot_BHT[..., None], do_BTHV.swapaxes(1, 2))
    )
    totals, dq = _Totals(), []
    # From the last run, which often sees all keys, so that sums start at full size.
    cut = _runs(operands, spec)
    for run, weights in zip(cut[::-1], (kept or [None] * len(cut))[::-1], strict=True):
        chunk = functools.partial(_backward_chunk, operands, left, run, rows, weights)
        if run.count == 1:
            totals, dq_BKGQD = chunk(totals, 0)
        else:
            totals, dq_BKGQD = jax.lax.scan(
                chunk, _zeros(operands, spec, totals), jnp.arange(run.count)
            )
            dq_BKGQD = _join(dq_BKGQD)
        dq.append(dq_BKGQD)
    dq_BHTD = jnp.concatenate(dq[::-1], 3).reshape(q_BTHD.swapaxes(1, 2).shape)
    dq_BTHD = (spec.scale * dq_BHTD.swapaxes(1, 2)).astype(q_BTHD.dtype)
    dk_BSKD = (left.scale * totals.dk_BKSD.swapaxes(1, 2)).astype(q_BTHD.dtype)
    dv_BSKV = totals.dv_BKSV.swapaxes(1, 2).astype(q_BTHD.dtype)
    dbias_BHTS = None
    if totals.dbias_BKGTS is not None:
        dbias_BHTS = totals.dbias_BKGTS.reshape(bias_BHTS.shape).astype(bias_BHTS.dtype)
    return Gradients(dq_BTHD, dk_BSKD, dv_BSKV, dbias_BHTS, dsinks_H)


def _forward_chunk(operands, spec, run: Run, i) -> tuple[jax.Array, jax.Array, _Kept]:
    place = Place.of(run, i, operands.k_BSKD.shape[2])
    dtype, v_BKNV = accumulator(operands.q_BTHD.dtype), place.cut(operands.v_BSKV, s=2)
    s_BKGQN, _ = logits(operands, spec, place)
    # From the least finite number, not -inf: a row that sees nothing has weights exp(-inf) = 0.
    least = np.array(jnp.finfo(dtype).min, dtype)
    m_BKGQ1 = jax.lax.reduce(s_BKGQN, least, jax.lax.max, (4,))[..., None]
    sink_1KG11 = operands.sinks_H
    if sink_1KG11 is not None:
        sink_1KG11 = sink_1KG11.astype(dtype)
        m_BKGQ1 = jnp.maximum(m_BKGQ1, sink_1KG11)
    w_BKGQN = jnp.exp(s_BKGQN - m_BKGQ1)
    sum_BKGQ1 = w_BKGQN.sum(-1, keepdims=True)
    if sink_1KG11 is not None:
        sum_BKGQ1 += jnp.exp(sink_1KG11 - m_BKGQ1)
    lse_BKGQ1 = m_BKGQ1 + jnp.log(sum_BKGQ1)
    norm_BKGQ1 = 1 / jnp.where(sum_BKGQ1 == 0, 1, sum_BKGQ1)
    w_BKGQN = w_BKGQN.astype(v_BKNV.dtype)
    kept_weights = _Kept(w_BKGQN, norm_BKGQ1)
    if spec.dropout_rate:
        w_BKGQN = jnp.where(kept(operands, spec, place), w_BKGQN, 0)
        norm_BKGQ1 /= 1 - spec.dropout_rate
    o_BKGQV = over_keys(w_BKGQN, v_BKNV)
    return (o_BKGQV * norm_BKGQ1).astype(v_BKNV.dtype), lse_BKGQ1, kept_weights


def _backward_chunk(operands, spec, run: Run, rows, weights: _Kept | None, totals, i):
    place = Place.of(run, i, operands.k_BSKD.shape[2])
    dtype = operands.q_BTHD.dtype
    q_BKGQD = place.cut(operands.q_BTHD, t=3)
    k_BKND, v_BKNV = (place.cut(x, s=2) for x in (operands.k_BSKD, operands.v_BSKV))
    lse_BKGQ1, dot_BKGQ1, do_BKGQV = (place.cut(x, t=3) for x in rows)
    slope_BKGQN = None
    if weights is None:
        s_BKGQN, slope_BKGQN = logits(operands, spec, place)
        p_BKGQN = jnp.exp(s_BKGQN - lse_BKGQ1)
    else:
        # The division moves from the weights to the far smaller cotangents.
        p_BKGQN = weights.w_BKGQN
        do_BKGQV = (do_BKGQV * weights.norm_BKGQ1).astype(dtype)
        dot_BKGQ1 *= weights.norm_BKGQ1
    dp_BKGQN = with_keys(do_BKGQV, v_BKNV)
    dropped_BKGQN = p_BKGQN
    if spec.dropout_rate:
        scale_BKGQN = kept(operands, spec, place) / (1 - spec.dropout_rate)
        dropped_BKGQN, dp_BKGQN = p_BKGQN * scale_BKGQN, dp_BKGQN * scale_BKGQN
    dv_BKNV = over_queries(dropped_BKGQN.astype(dtype), do_BKGQV)
    ds_BKGQN = p_BKGQN * (dp_BKGQN - dot_BKGQ1)
    dbias_BKGTS = totals.dbias_BKGTS
    if operands.bias_BHTS is not None and spec.bias_gradient:
        shape = operands.bias_BHTS.shape
        ones = tuple(axis for axis, n in enumerate(shape) if n == 1)
        dbias_BKGTS = place.add(dbias_BKGTS, ds_BKGQN.sum(ones, keepdims=True), shape, t=3, s=4)
    if slope_BKGQN is not None:
        ds_BKGQN *= slope_BKGQN
    ds_BKGQN = ds_BKGQN.astype(dtype)
    dq_BKGQD, dk_BKND = over_keys(ds_BKGQN, k_BKND), over_queries(ds_BKGQN, q_BKGQD)
    totals = _Totals(
        place.add(totals.dk_BKSD, dk_BKND, operands.k_BSKD.shape, s=2),
        place.add(totals.dv_BKSV, dv_BKNV, operands.v_BSKV.shape, s=2),
        dbias_BKGTS,
    )
    return totals, dq_BKGQD


def _heads_major(operands: Operands, spec: Spec) -> tuple[Operands, Spec]:
    """Returns the operands as [B, K, G, T, …] and [B, K, S, …], where they have such dimensions.

    The scale goes from the specification into the queries, far fewer than the logits, unless
    rounding them once more would cost precision.
    """
    K, q_BTHD, sinks_H = operands.k_BSKD.shape[2], operands.q_BTHD, operands.sinks_H
    if accumulator(q_BTHD.dtype) == q_BTHD.dtype or abs(math.frexp(spec.scale)[0]) == 0.5:
        q_BTHD *= jnp.asarray(spec.scale, q_BTHD.dtype)
        spec = dataclasses.replace(spec, scale=1.0)
    operands = operands._replace(
        q_BTHD=_split(q_BTHD.swapaxes(1, 2), K),
        k_BSKD=operands.k_BSKD.swapaxes(1, 2),
        v_BSKV=operands.v_BSKV.swapaxes(1, 2),
        mask_BHTS=_split(operands.mask_BHTS, K),
        bias_BHTS=_split(operands.bias_BHTS, K),
        sinks_H=None if sinks_H is None else sinks_H.reshape(1, K, -1, 1, 1),
    )
    return operands, spec


def _split(x_BHTS: jax.Array | None, K: int) -> jax.Array | None:
    """Returns [B, K, G, T, S], or K and G of 1 where H is 1 against more heads."""
    if x_BHTS is None:
        return None
    B, H, T, S = x_BHTS.shape
    return x_BHTS.reshape(B, K if H > 1 else 1, -1, T, S)


def _keeps(operands: Operands, spec: Spec) -> bool:
    """Whether weights are kept: of short sequences, and where they are all that is needed."""
    T, S = operands.q_BTHD.shape[1], operands.k_BSKD.shape[1]
    return is_short(T, S) and spec.softcap is None


def _runs(operands: Operands, spec: Spec) -> list[Run]:
    B, K, G, T, _ = operands.q_BTHD.shape
    # Of a shard whose positions are known at run time only, any key may be seen.
    left, right = (spec.left, spec.right) if operands.start is None else (None, None)
    return runs(B, T, operands.k_BSKD.shape[2], K * G, left, right, spec.shift)


def _join(x_NBKGQV: jax.Array) -> jax.Array:
    """Returns chunks one behind the other, along their queries."""
    x_BKGNQV = jnp.moveaxis(x_NBKGQV, 0, 3)
    B, K, G, N, Q, V = x_BKGNQV.shape
    return x_BKGNQV.reshape(B, K, G, N * Q, V)


def _zeros(operands: Operands, spec: Spec, totals: _Totals) -> _Totals:
    """Returns the totals with zeros where nothing has been summed yet."""
    bias = operands.bias_BHTS if spec.bias_gradient else None
    dtype = accumulator(operands.q_BTHD.dtype)
    like = operands.k_BSKD, operands.v_BSKV, bias
    return _Totals(
        *(
            jnp.zeros_like(x, dtype) if total is None and x is not None else total
            for total, x in zip(totals, like, strict=True)
        )
    )

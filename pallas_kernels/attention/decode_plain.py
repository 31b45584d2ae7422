"""Decode attention in plain JAX: the specification, and by blocks of keys for XLA.

Legend: B rows, T new tokens, S tokens that a row's cache can hold, H query heads, K key-value
heads, G = H / K query heads of a key-value head, D size of a query and key head, V size of a value
head, N pages of P tokens, L pages of a row, W tokens of a block, 1 a single dimension.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.arrays import accumulator
from pallas_kernels.attention import arguments
from pallas_kernels.attention import reference as specification
from pallas_kernels.attention.decode_arguments import Cache, DecodeSpec
from pallas_kernels.mesh import vary, varying

# Tokens of a block on the XLA path: its keys, values and logits stay in a core's cache.
XLA_BLOCK = 256


def _block(cache: Cache, start: jax.Array, W: int) -> tuple[jax.Array, jax.Array]:
    """Returns W tokens of each row's cache from `start` on, which is a multiple of a page."""
    if cache.page_table_BL is None:
        return tuple(jax.lax.dynamic_slice_in_dim(x, start, W, 1) for x in (cache.k, cache.v))
    B, page = cache.lengths_B.shape[0], cache.k.shape[1]
    pages_BL = jax.lax.dynamic_slice_in_dim(cache.page_table_BL, start // page, W // page, 1)
    return tuple(
        jnp.take(x, pages_BL, axis=0, mode='clip').reshape(B, W, *x.shape[2:])
        for x in (cache.k, cache.v)
    )


def reference(
    q_BTHD: jax.Array, cache: Cache, sinks_H: jax.Array | None, spec: DecodeSpec
) -> tuple[jax.Array, jax.Array]:
    """The specification: that of attention, with a mask."""
    T, S, dtype = q_BTHD.shape[1], cache.size, accumulator(cache.k.dtype)
    s_S, t_T = jnp.arange(S), jnp.arange(T)
    filled_BS11 = (s_S[None] < cache.lengths_B[:, None])[..., None, None]
    k_BSKD, v_BSKV = (
        jnp.where(filled_BS11, x.astype(dtype), 0) for x in _block(cache, jnp.int32(0), S)
    )
    after_BTS = s_S[None, None] - (cache.lengths_B[:, None] - T + t_T[None])[..., None]
    seen_BTS = after_BTS <= 0
    if spec.left is not None:
        seen_BTS &= after_BTS >= -spec.left
    operands = arguments.Operands(
        q_BTHD.astype(cache.k.dtype).astype(dtype), k_BSKD, v_BSKV,
        mask_BHTS=seen_BTS[:, None], sinks_H=sinks_H,
    )  # fmt: skip
    static = arguments.Spec(
        causal=False, window=(None, None), softcap=spec.softcap, dropout_rate=0.0,
        scale=spec.scale, shift=S - T,
    )  # fmt: skip
    o_BTHV, lse_BHT = specification.forward(operands, static)
    return o_BTHV.astype(q_BTHD.dtype), lse_BHT


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def xla(
    q_BTHD: jax.Array, cache: Cache, sinks_H: jax.Array | None, spec: DecodeSpec
) -> tuple[jax.Array, jax.Array]:
    """Online softmax over blocks of keys, from the first that is seen to the longest length."""
    (B, T, H, _), K, S = q_BTHD.shape, cache.k.shape[2], cache.size
    dtype = accumulator(cache.k.dtype)
    einsum = functools.partial(jnp.einsum, preferred_element_type=dtype, precision='highest')
    page = 1 if cache.page_table_BL is None else cache.k.shape[1]
    W = min(S, max(1, (spec.keys or XLA_BLOCK) // page) * page)
    q_BTKGD = q_BTHD.astype(cache.k.dtype).reshape(B, T, K, H // K, -1)
    end_B = cache.lengths_B
    t_BT = end_B[:, None] - T + jnp.arange(T)[None]

    def block_of(n):
        """Returns maximum, sum and output of the softmax over one block, not divided by the sum."""
        # The last block is moved back, to end where the cache does; nothing is counted twice.
        start = jnp.minimum(n * W, S - W)
        k_BWKD, v_BWKV = _block(cache, start, W)
        s_W = start + jnp.arange(W)
        after_BTW = s_W[None, None] - t_BT[..., None]
        seen_BTW = (after_BTW <= 0) & (s_W >= n * W)[None, None]
        if spec.left is not None:
            seen_BTW &= after_BTW >= -spec.left
        logits_BKGTW = spec.scale * einsum('btkgd,bwkd->bkgtw', q_BTKGD, k_BWKD)
        if spec.softcap is not None:
            logits_BKGTW = spec.softcap * jnp.tanh(logits_BKGTW / spec.softcap)
        logits_BKGTW = jnp.where(seen_BTW[:, None, None], logits_BKGTW, -jnp.inf)
        # Finite, so that no difference of two maxima is NaN.
        m_BKGT1 = jnp.maximum(logits_BKGTW.max(-1, keepdims=True), jnp.finfo(dtype).min / 2)
        p_BKGTW = jnp.exp(logits_BKGTW - m_BKGT1)
        # Zero times what lies behind the length may be NaN.
        v_BWKV = jnp.where((s_W[None] < end_B[:, None])[..., None, None], v_BWKV, 0)
        o_BKGTV = einsum('bkgtw,bwkv->bkgtv', p_BKGTW.astype(v_BWKV.dtype), v_BWKV)
        return m_BKGT1, p_BKGTW.sum(-1, keepdims=True), o_BKGTV

    if W == S:
        state = block_of(0)
    else:
        first_B = jnp.maximum(end_B - T - spec.left, 0) if spec.left is not None else 0 * end_B
        first = jnp.where(end_B > 0, first_B, S).min() // W
        empty_BKGT1 = jnp.zeros((B, K, H // K, T, 1), dtype)
        low_BKGT1 = empty_BKGT1 + jnp.finfo(dtype).min / 2
        o_BKGTV = jnp.zeros((*empty_BKGT1.shape[:-1], cache.v.shape[3]), dtype)
        nothing = vary((low_BKGT1, empty_BKGT1, o_BKGTV), varying((q_BTHD, cache)))
        state = jax.lax.fori_loop(
            first, -(-end_B.max() // W), lambda n, state: _merged(state, block_of(n)), nothing
        )
    if sinks_H is not None:
        sinks_BKGT1 = sinks_H.astype(dtype).reshape(1, K, -1, 1, 1) + 0 * state[0]
        state = _merged(state, (sinks_BKGT1, jnp.ones_like(sinks_BKGT1), 0 * state[2]))
    m_BKGT1, l_BKGT1, o_BKGTV = state
    o_BKGTV /= jnp.where(l_BKGT1 > 0, l_BKGT1, 1)
    lse_BKGT1 = jnp.where(l_BKGT1 > 0, m_BKGT1 + jnp.log(l_BKGT1), -jnp.inf)
    o_BTHV = o_BKGTV.transpose(0, 3, 1, 2, 4).reshape(B, T, H, -1)
    return o_BTHV.astype(q_BTHD.dtype), lse_BKGT1.reshape(B, H, T)


def _merged(a, b):
    """Returns maximum, sum and output of a softmax over both of two sets of keys."""
    m = jnp.maximum(a[0], b[0])
    a_share, b_share = jnp.exp(a[0] - m), jnp.exp(b[0] - m)
    return m, a[1] * a_share + b[1] * b_share, a[2] * a_share + b[2] * b_share


@xla.defjvp
def _xla_jvp(spec, primals, tangents):
    # A loop of unknown length has no reverse derivative; that of the specification is the same.
    return jax.jvp(functools.partial(reference, spec=spec), primals, tangents)

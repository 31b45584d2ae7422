"""Attention: the one place it is called from, and the choice of implementation.

Legend: B batch, T queries, S keys and values, H query heads, K key-value heads (K divides H),
G = H / K, D size of a head, N = B * H, Q queries in a block.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp

Implementation = Literal['reference', 'xla', 'blocked']

_BLOCK = 64  # queries; a [64, 256] tile of scores stays in a core's cache


def attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    *,
    causal: bool,
    scale: float | None = None,
    impl: Implementation | None = None,
) -> jax.Array:
    """Scaled dot-product attention `softmax(q k^T * scale) v` (Vaswani et al. 2017, eq. 1).

    With fewer key-value heads than query heads, each serves H / K query heads in turn (Ainslie et
    al. 2023). Scores and softmax are float32 at least; the result is [B, T, H, D] in q's type.

    Args:
      q_BTHD: queries.
      k_BSKD: keys.
      v_BSKD: values.
      causal: query t sees the keys up to t + S - T, so that the last query sees them all.
      scale: factor on the scores; None is 1 / sqrt(D).
      impl: 'reference' (the specification), 'xla' (one batched product, left to the compiler) or
        'blocked' (head by head in blocks of queries that fit a CPU's cache; causal, T = S, T a
        multiple of 64). None chooses by shape and platform.

    Raises:
      ValueError: shapes do not fit, or the named implementation cannot run them.
    """
    _check_shapes(q_BTHD, k_BSKD, v_BSKD)
    scale = 1 / math.sqrt(q_BTHD.shape[-1]) if scale is None else scale
    if impl is None:
        impl = 'blocked' if _blocked_pays(q_BTHD, k_BSKD, causal) else 'xla'
    match impl:
        case 'reference':
            return _reference(q_BTHD, k_BSKD, v_BSKD, causal=causal, scale=scale)
        case 'xla':
            mask_11TS = _causal_mask(q_BTHD.shape[1], k_BSKD.shape[1]) if causal else None
            return _batched(q_BTHD, k_BSKD, v_BSKD, mask_11TS, scale)
        case 'blocked':
            if reason := _blocked_refuses(q_BTHD, k_BSKD, causal):
                raise ValueError(f"impl='blocked': {reason}; try impl='xla'")
            return _blocked(q_BTHD, k_BSKD, v_BSKD, scale)
    raise ValueError(f"impl={impl!r}: must be 'reference', 'xla' or 'blocked'; try impl='xla'")


def cached_attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    *,
    start_B: jax.Array,
    scale: float | None = None,
) -> jax.Array:
    """Causal attention of a few new queries to a key-value cache that is filled in part.

    Query t of row b is at position `start_B[b] + t` and sees the cache up to and including that
    position; what lies behind is ignored, whatever it holds.

    Args:
      q_BTHD: queries.
      k_BSKD: cached keys, those of the queries included.
      v_BSKD: cached values, likewise.
      start_B: int32, how many positions were filled before these queries.
      scale: factor on the scores; None is 1 / sqrt(D).

    Returns:
      [B, T, H, D] in q's type.
    """
    _check_shapes(q_BTHD, k_BSKD, v_BSKD)
    scale = 1 / math.sqrt(q_BTHD.shape[-1]) if scale is None else scale
    t_T, s_S = jnp.arange(q_BTHD.shape[1]), jnp.arange(k_BSKD.shape[1])
    last_BT = start_B[:, None] + t_T[None]
    mask_B1TS = s_S[None, None, None] <= last_BT[:, None, :, None]
    return _batched(q_BTHD, k_BSKD, v_BSKD, mask_B1TS, scale)


def _check_shapes(q_BTHD: jax.Array, k_BSKD: jax.Array, v_BSKD: jax.Array) -> None:
    shapes = f'q {q_BTHD.shape}, k {k_BSKD.shape}, v {v_BSKD.shape}'
    if not q_BTHD.ndim == k_BSKD.ndim == v_BSKD.ndim == 4 or k_BSKD.shape != v_BSKD.shape:
        raise ValueError(f'attention takes [B, T, H, D] and twice [B, S, K, D], not {shapes}')
    (B, _, H, D), (b, _, K, d) = q_BTHD.shape, k_BSKD.shape
    if B != b or D != d or H % K:
        raise ValueError(f'attention needs equal B and D, and K dividing H, not {shapes}')


def _causal_mask(T: int, S: int) -> jax.Array:
    t_T, s_S = jnp.arange(T), jnp.arange(S)
    return (s_S[None] <= t_T[:, None] + (S - T))[None, None]


def _accumulator(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def _repeat_heads(x_BSKD: jax.Array, H: int) -> jax.Array:
    repeats = H // x_BSKD.shape[2]
    return x_BSKD if repeats == 1 else jnp.repeat(x_BSKD, repeats, axis=2)


def _reference(q_BTHD, k_BSKD, v_BSKD, *, causal: bool, scale: float) -> jax.Array:
    """The specification: no trick, everything in the accumulator's type."""
    dtype, (_, T, H, _), S = _accumulator(q_BTHD.dtype), q_BTHD.shape, k_BSKD.shape[1]
    k_BSHD, v_BSHD = _repeat_heads(k_BSKD, H), _repeat_heads(v_BSKD, H)
    q_BTHD, k_BSHD, v_BSHD = (x.astype(dtype) for x in (q_BTHD, k_BSHD, v_BSHD))
    s_BHTS = jnp.einsum('bthd,bshd->bhts', q_BTHD, k_BSHD) * scale
    if causal:
        s_BHTS = jnp.where(_causal_mask(T, S), s_BHTS, -jnp.inf)
    return jnp.einsum('bhts,bshd->bthd', jax.nn.softmax(s_BHTS, -1), v_BSHD).astype(q_BTHD.dtype)


def _batched(q_BTHD, k_BSKD, v_BSKD, mask_B1TS: jax.Array | None, scale: float) -> jax.Array:
    """One batched product over batch and heads."""
    dtype, H = _accumulator(q_BTHD.dtype), q_BTHD.shape[2]
    k_BSHD, v_BSHD = _repeat_heads(k_BSKD, H), _repeat_heads(v_BSKD, H)
    q_BTHD = q_BTHD * jnp.asarray(scale, q_BTHD.dtype)
    s_BHTS = jnp.einsum('bthd,bshd->bhts', q_BTHD, k_BSHD, preferred_element_type=dtype)
    if mask_B1TS is not None:
        s_BHTS = jnp.where(mask_B1TS, s_BHTS, -jnp.inf)
    p_BHTS = jax.nn.softmax(s_BHTS, -1).astype(v_BSHD.dtype)
    return jnp.einsum('bhts,bshd->bthd', p_BHTS, v_BSHD)


def _blocked_refuses(q_BTHD: jax.Array, k_BSKD: jax.Array, causal: bool) -> str | None:
    T, S = q_BTHD.shape[1], k_BSKD.shape[1]
    if not causal or T != S:
        return f'needs causal=True and as many keys as queries, not causal={causal}, T={T}, S={S}'
    if T % _BLOCK:
        return f'T={T} must be a multiple of {_BLOCK}'
    return None


def _blocked_pays(q_BTHD: jax.Array, k_BSKD: jax.Array, causal: bool) -> bool:
    if jax.default_backend() != 'cpu' or q_BTHD.shape[1] < 256:
        return False
    # A loop over heads would gather what a mesh has spread out.
    mesh = jax.sharding.get_abstract_mesh()
    return (mesh.empty or mesh.size == 1) and not _blocked_refuses(q_BTHD, k_BSKD, causal)


def _blocked(q_BTHD, k_BSKD, v_BSKD, scale: float) -> jax.Array:
    B, T, H, D = q_BTHD.shape
    k_BSHD, v_BSHD = _repeat_heads(k_BSKD, H), _repeat_heads(v_BSKD, H)
    heads = (x.transpose(0, 2, 1, 3).reshape(B * H, T, D) for x in (q_BTHD, k_BSHD, v_BSHD))
    return _scan_heads(*heads, scale).reshape(B, H, T, D).transpose(0, 2, 1, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _scan_heads(q_NTD, k_NTD, v_NTD, scale: float) -> jax.Array:
    return _scan_heads_fwd(q_NTD, k_NTD, v_NTD, scale)[0]


def _scan_heads_fwd(q_NTD, k_NTD, v_NTD, scale: float):
    def head(_, qkv):
        q_TD, k_TD, v_TD = qkv
        out, probs = [], []
        for start in range(0, q_TD.shape[0], _BLOCK):
            end = start + _BLOCK
            s_QS = (q_TD[start:end] * scale) @ k_TD[:end].T
            mask_QS = _causal_mask(_BLOCK, end)[0, 0]
            p_QS = jax.nn.softmax(jnp.where(mask_QS, s_QS.astype(jnp.float32), -jnp.inf), -1)
            p_QS = p_QS.astype(v_TD.dtype)
            probs.append(p_QS)
            out.append(p_QS @ v_TD[:end])
        return None, (jnp.concatenate(out), tuple(probs))

    _, (o_NTD, probs) = jax.lax.scan(head, None, (q_NTD, k_NTD, v_NTD))
    return o_NTD, (q_NTD, k_NTD, v_NTD, o_NTD, probs)


def _scan_heads_bwd(scale: float, residuals, g_NTD):
    def head(_, xs):
        q_TD, k_TD, v_TD, o_TD, probs, g_TD = xs
        dot_T1 = jnp.sum(o_TD * g_TD, 1, keepdims=True)
        dq, dk_TD, dv_TD = [], jnp.zeros_like(k_TD), jnp.zeros_like(v_TD)
        for p_QS, start in zip(probs, range(0, q_TD.shape[0], _BLOCK), strict=True):
            end = start + _BLOCK
            g_QD = g_TD[start:end]
            ds_QS = p_QS * (g_QD @ v_TD[:end].T - dot_T1[start:end]) * scale
            ds_QS = ds_QS.astype(k_TD.dtype)
            dq.append(ds_QS @ k_TD[:end])
            dk_TD = dk_TD.at[:end].add(ds_QS.T @ q_TD[start:end])
            dv_TD = dv_TD.at[:end].add(p_QS.T @ g_QD)
        return None, (jnp.concatenate(dq), dk_TD, dv_TD)

    q_NTD, k_NTD, v_NTD, o_NTD, probs = residuals
    _, grads = jax.lax.scan(head, None, (q_NTD, k_NTD, v_NTD, o_NTD, probs, g_NTD))
    return grads


_scan_heads.defvjp(_scan_heads_fwd, _scan_heads_bwd)

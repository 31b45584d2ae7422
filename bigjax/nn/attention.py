"""Attention: the one place it is called from, and the choice of implementation.

Legend: B batch, T queries, S keys and values, H query heads, K key-value heads (K divides H),
D size of a head, Q queries in a block, L layers, N arrays, 1 a reduced dimension.
"""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from bigjax.experiment import UsageError

Implementation = Literal['reference', 'xla', 'blocked']
KeyValue = tuple[jax.Array, jax.Array]


def attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    *,
    causal: bool,
    mask: jax.Array | None = None,
    scale: float | None = None,
    impl: Implementation | None = None,
) -> jax.Array:
    """Scaled dot-product attention `softmax(q k^T * scale) v` (Vaswani et al. 2017, eq. 1).

    With fewer key-value heads than query heads, each serves H / K query heads in turn (Ainslie et
    al. 2023). Scores and softmax are float32 at least; the result is [B, T, H, D] in q's type, and
    zero (with no gradient) for a query that sees no key.

    Args:
      q_BTHD: queries.
      k_BSKD: keys.
      v_BSKD: values.
      causal: query t sees the keys up to t + S - T, so that the last query sees them all.
      mask: bool, broadcast to [B, H, T, S] (its dimensions are full or 1): true where the key is
        seen; together with `causal`, a key must be seen by both. `real_BS[:, None, None]` hides
        padding. None hides nothing.
      scale: factor on the scores; None is 1 / sqrt(D).
      impl: 'reference' (the specification), 'xla' (one batched product, left to the compiler) or
        'blocked' (in blocks of queries that fit a CPU's cache, without the keys that lie behind
        them; causal, no mask, T = S, T a multiple of 64 and of T // 8). None chooses by shape and
        platform.

    Raises:
      ValueError: shapes do not fit, or the named implementation cannot run them.
    """
    _check_shapes(q_BTHD, k_BSKD, v_BSKD, mask)
    scale = 1 / math.sqrt(q_BTHD.shape[-1]) if scale is None else scale
    if impl is None:
        impl = 'blocked' if _blocked_pays(q_BTHD, k_BSKD, causal, mask) else 'xla'
    match impl:
        case 'reference':
            return _reference(q_BTHD, k_BSKD, v_BSKD, _visible(q_BTHD, k_BSKD, causal, mask), scale)
        case 'xla':
            visible_BHTS = _visible(q_BTHD, k_BSKD, causal, mask)
            o_BTHD = _batched(q_BTHD, k_BSKD, v_BSKD, visible_BHTS, scale)
            if visible_BHTS is None or (mask is None and q_BTHD.shape[1] <= k_BSKD.shape[1]):
                return o_BTHD
            return jnp.where(visible_BHTS.any(-1, keepdims=True).swapaxes(1, 2), o_BTHD, 0)
        case 'blocked':
            if reason := _blocked_refuses(q_BTHD, k_BSKD, causal, mask):
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


def empty_layers(
    shape: tuple[int, int, int, int], dtype: Any, *, depth: int, scan: bool
) -> tuple[KeyValue, ...] | KeyValue:
    """Returns zeros for keys and values [B, S, K, D] of `depth` layers, to be decoded into.

    As `bigjax.nn.stack.stack` takes them: unrolled, one pair a layer; scanned, one pair
    [L, B, S, K, D].
    """
    if scan:
        return jnp.zeros((depth, *shape), dtype), jnp.zeros((depth, *shape), dtype)
    return tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(depth))


def check_heads(heads: int, width: int, *, even: bool = False) -> None:
    """Raises UsageError where `heads` do not divide `width`, into heads of `even` size if asked."""
    fits = lambda h: width % (2 * h if even else h) == 0  # noqa: E731
    if heads < 1 or not fits(heads):
        good = max(filter(fits, range(1, heads)), default=1)
        raise UsageError(
            f'--heads={heads}: width {width} must be {"an even" if even else "a"} multiple of '
            f'heads; try --heads={good}'
        )


def split_projections(x_BTHND: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the N parts [B, T, H, D] of queries, keys and values that one product made."""
    # Not x[:, :, :, i], whose gradient is a sum of zero-padded arrays; this one's is a join.
    return tuple(x.squeeze(3) for x in jnp.split(x_BTHND, x_BTHND.shape[3], axis=3))


def _check_shapes(
    q_BTHD: jax.Array, k_BSKD: jax.Array, v_BSKD: jax.Array, mask: jax.Array | None = None
) -> None:
    shapes = f'q {q_BTHD.shape}, k {k_BSKD.shape}, v {v_BSKD.shape}'
    if not q_BTHD.ndim == k_BSKD.ndim == v_BSKD.ndim == 4 or k_BSKD.shape != v_BSKD.shape:
        raise ValueError(f'attention takes [B, T, H, D] and twice [B, S, K, D], not {shapes}')
    (B, T, H, D), (b, S, K, d) = q_BTHD.shape, k_BSKD.shape
    if (b, d) != (B, D) or H % K:
        raise ValueError(f'attention needs equal B and D, and K dividing H, not {shapes}')
    if mask is None:
        return
    fits = mask.ndim == 4 and all(
        m in (1, n) for m, n in zip(mask.shape, (B, H, T, S), strict=True)
    )
    if not fits or mask.dtype != bool:
        raise ValueError(
            f'attention takes a mask of bool that broadcasts to {[B, H, T, S]}, '
            f'not {mask.dtype} {mask.shape}'
        )


def _visible(q_BTHD, k_BSKD, causal: bool, mask: jax.Array | None) -> jax.Array | None:
    """Returns what each query sees, broadcast to [B, H, T, S]; None is everything."""
    if not causal:
        return mask
    causal_11TS = _causal_mask(q_BTHD.shape[1], k_BSKD.shape[1])
    return causal_11TS if mask is None else causal_11TS & mask


def _causal_mask(T: int, S: int) -> jax.Array:
    t_T, s_S = jnp.arange(T), jnp.arange(S)
    return (s_S[None] <= t_T[:, None] + (S - T))[None, None]


def _accumulator(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def _repeat_heads(x_BSKD: jax.Array, H: int) -> jax.Array:
    repeats = H // x_BSKD.shape[2]
    return x_BSKD if repeats == 1 else jnp.repeat(x_BSKD, repeats, axis=2)


def _reference(q_BTHD, k_BSKD, v_BSKD, mask_BHTS: jax.Array | None, scale: float) -> jax.Array:
    """The specification: no trick, everything in the accumulator's type."""
    dtype, H = _accumulator(q_BTHD.dtype), q_BTHD.shape[2]
    k_BSHD, v_BSHD = _repeat_heads(k_BSKD, H), _repeat_heads(v_BSKD, H)
    q_BTHD, k_BSHD, v_BSHD = (x.astype(dtype) for x in (q_BTHD, k_BSHD, v_BSHD))
    s_BHTS = jnp.einsum('bthd,bshd->bhts', q_BTHD, k_BSHD) * scale
    if mask_BHTS is None:
        p_BHTS = jax.nn.softmax(s_BHTS, -1)
    else:
        # The softmax of a query that sees nothing is of all its keys, and then hidden: never NaN.
        mask_BHTS = jnp.broadcast_to(mask_BHTS, s_BHTS.shape)
        softened_BHTS = mask_BHTS | ~mask_BHTS.any(-1, keepdims=True)
        p_BHTS = jax.nn.softmax(jnp.where(softened_BHTS, s_BHTS, -jnp.inf), -1) * mask_BHTS
    return jnp.einsum('bhts,bshd->bthd', p_BHTS, v_BSHD).astype(q_BTHD.dtype)


def _batched(q_BTHD, k_BSKD, v_BSKD, mask_BHTS: jax.Array | None, scale: float) -> jax.Array:
    """One batched product over batch and heads."""
    dtype, H = _accumulator(q_BTHD.dtype), q_BTHD.shape[2]
    k_BSHD, v_BSHD = _repeat_heads(k_BSKD, H), _repeat_heads(v_BSKD, H)
    q_BTHD = q_BTHD * jnp.asarray(scale, q_BTHD.dtype)
    s_BHTS = jnp.einsum('bthd,bshd->bhts', q_BTHD, k_BSHD, preferred_element_type=dtype)
    if mask_BHTS is not None:
        # Finite, so that a query that sees nothing has no NaN: it gets the mean of all values,
        # which `attention` puts to zero, there being fewer outputs than scores.
        s_BHTS = jnp.where(mask_BHTS, s_BHTS, jnp.finfo(dtype).min)
    p_BHTS = jax.nn.softmax(s_BHTS, -1).astype(v_BSHD.dtype)
    return jnp.einsum('bhts,bshd->bthd', p_BHTS, v_BSHD)


def _block_size(T: int) -> int:
    # Scores [64, 256] of a head stay in a core's cache; more than eight blocks only cost compile
    # time, for the share of masked scores computed is down to a sixteenth by then.
    return max(64, T // 8)


def _blocked_refuses(
    q_BTHD: jax.Array, k_BSKD: jax.Array, causal: bool, mask: jax.Array | None
) -> str | None:
    T, S = q_BTHD.shape[1], k_BSKD.shape[1]
    if mask is not None:
        return 'takes no mask'
    if not causal or T != S:
        return f'needs causal=True and as many keys as queries, not causal={causal}, T={T}, S={S}'
    if T % _block_size(T):
        return f'T={T} must be a multiple of {_block_size(T)}'
    return None


def _blocked_pays(
    q_BTHD: jax.Array, k_BSKD: jax.Array, causal: bool, mask: jax.Array | None
) -> bool:
    on_cpu = jax.default_backend() == 'cpu'
    return on_cpu and q_BTHD.shape[1] >= 128 and not _blocked_refuses(q_BTHD, k_BSKD, causal, mask)


def _blocked(q_BTHD, k_BSKD, v_BSKD, scale: float) -> jax.Array:
    H = q_BTHD.shape[2]
    k_BSHD, v_BSHD = _repeat_heads(k_BSKD, H), _repeat_heads(v_BSKD, H)
    heads = (x.swapaxes(1, 2) for x in (q_BTHD, k_BSHD, v_BSHD))
    return _causal_blocks(*heads, scale).swapaxes(1, 2)


def _blocks(T: int) -> list[tuple[int, int]]:
    return [(start, start + _block_size(T)) for start in range(0, T, _block_size(T))]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _causal_blocks(q_BHTD, k_BHTD, v_BHTD, scale: float) -> jax.Array:
    """Causal attention in blocks of queries, each taken with the keys up to its end only.

    The gradient is that of Dao et al. 2022, appendix B.2, with two products moved from the scores
    to the far smaller queries and outputs: the scale, and the division by the sum of the weights.
    """
    return _causal_blocks_fwd(q_BHTD, k_BHTD, v_BHTD, scale)[0]


def _causal_blocks_fwd(q_BHTD, k_BHTD, v_BHTD, scale: float):
    accumulator = _accumulator(q_BHTD.dtype)
    q_BHTD = q_BHTD * jnp.asarray(scale, q_BHTD.dtype)
    outputs, weights, norms = [], [], []
    for start, end in _blocks(q_BHTD.shape[2]):
        q_BHQD, k_BHSD, v_BHSD = q_BHTD[:, :, start:end], k_BHTD[:, :, :end], v_BHTD[:, :, :end]
        s_BHQS = jnp.einsum('bhqd,bhsd->bhqs', q_BHQD, k_BHSD, preferred_element_type=accumulator)
        s_BHQS = jnp.where(_causal_mask(end - start, end), s_BHQS, -jnp.inf)
        w_BHQS = jnp.exp(s_BHQS - s_BHQS.max(-1, keepdims=True))
        norm_BHQ1 = 1 / w_BHQS.sum(-1, keepdims=True)
        w_BHQS = w_BHQS.astype(q_BHTD.dtype)
        o_BHQD = jnp.einsum('bhqs,bhsd->bhqd', w_BHQS, v_BHSD, preferred_element_type=accumulator)
        outputs.append((o_BHQD * norm_BHQ1).astype(q_BHTD.dtype))
        weights.append(w_BHQS)
        norms.append(norm_BHQ1)
    o_BHTD = jnp.concatenate(outputs, 2)
    return o_BHTD, (q_BHTD, k_BHTD, v_BHTD, o_BHTD, weights, norms)


def _causal_blocks_bwd(scale: float, residuals, g_BHTD):
    q_BHTD, k_BHTD, v_BHTD, o_BHTD, weights, norms = residuals
    dtype, accumulator = q_BHTD.dtype, _accumulator(q_BHTD.dtype)
    einsum = functools.partial(jnp.einsum, preferred_element_type=accumulator)
    dot_BHT1 = einsum('bhtd,bhtd->bht', o_BHTD, g_BHTD)[..., None]
    dq, dk_BHTD, dv_BHTD = [], jnp.zeros((), accumulator), jnp.zeros((), accumulator)
    # From the last block, which sees all keys, so that the sums over blocks start at full size.
    blocks = zip(_blocks(q_BHTD.shape[2]), weights, norms, strict=True)
    for (start, end), w_BHQS, norm_BHQ1 in reversed(list(blocks)):
        q_BHQD, k_BHSD, v_BHSD = q_BHTD[:, :, start:end], k_BHTD[:, :, :end], v_BHTD[:, :, :end]
        g_BHQD = (g_BHTD[:, :, start:end] * norm_BHQ1).astype(dtype)
        dot_BHQ1 = dot_BHT1[:, :, start:end] * norm_BHQ1
        ds_BHQS = w_BHQS * (einsum('bhqd,bhsd->bhqs', g_BHQD, v_BHSD) - dot_BHQ1)
        ds_BHQS = ds_BHQS.astype(dtype)
        dq.append(einsum('bhqs,bhsd->bhqd', ds_BHQS, k_BHSD) * scale)
        dk_BHSD = einsum('bhqs,bhqd->bhsd', ds_BHQS, q_BHQD)
        dv_BHSD = einsum('bhqs,bhqd->bhsd', w_BHQS, g_BHQD)
        if end == q_BHTD.shape[2]:
            dk_BHTD, dv_BHTD = dk_BHSD, dv_BHSD
        else:
            dk_BHTD = dk_BHTD.at[:, :, :end].add(dk_BHSD)
            dv_BHTD = dv_BHTD.at[:, :, :end].add(dv_BHSD)
    dq_BHTD = jnp.concatenate(dq[::-1], 2)
    return dq_BHTD.astype(dtype), dk_BHTD.astype(dtype), dv_BHTD.astype(dtype)


_causal_blocks.defvjp(_causal_blocks_fwd, _causal_blocks_bwd)

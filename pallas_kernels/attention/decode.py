"""Attention of a few new tokens to a key-value cache: ragged lengths, contiguous or paged.

Legend: B rows, T new tokens, S tokens that a row's cache can hold, H query heads, K key-value
heads, G = H / K query heads of a key-value head, D size of a query and key head, V size of a value
head, N pages of P tokens, L pages of a row, W tokens of a block, 1 a single dimension.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.arrays import accumulator, wrong
from pallas_kernels.attention import arguments, reference
from pallas_kernels.block_sizes import BlockSizes
from pallas_kernels.chip import current_chip

# Tokens of a block on the XLA path: its keys, values and logits stay in a core's cache.
XLA_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class DecodeSpec:
    """What is static in a call, for every implementation; `left` is the window's."""

    left: int | None
    softcap: float | None
    scale: float


class _Cache(NamedTuple):
    """Keys and values [B, S, K, *], or pages of them [N, P, K, *] with a table; lengths."""

    k: jax.Array
    v: jax.Array
    lengths_B: jax.Array
    page_table_BL: jax.Array | None

    @property
    def size(self) -> int:
        """S, tokens that a row can hold."""
        return self.k.shape[1] * (1 if self.page_table_BL is None else self.page_table_BL.shape[1])


def decode_attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKV: jax.Array,
    *,
    lengths_B: jax.Array,
    page_table_BP: jax.Array | None = None,
    window: int | arguments.Window | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    block_sizes: BlockSizes | None = None,
    impl: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Causal attention of the newest T tokens of each row to the row's key-value cache.

    Query t of row b stands at position `lengths_B[b] - T + t` and sees the cache up to and
    including it. What lies behind the length may be anything, NaN included. Products are of the
    cache's type with float32 sums. Works under `vmap`.

    Args:
      q_BTHD: queries of the newest tokens, any float type; rounded to the cache's.
      k_BSKD: keys, the newest tokens' included; K divides H. With a page table [N, P, K, D]. For a
        TPU, keep caches as [B, S, K * D] (pages as [N, P, K * D]), K * D being a multiple of 128,
        and reshape them for this call: then they are read where they lie. Others are copied.
      v_BSKV: values, of k's type; likewise [N, P, K, V].
      lengths_B: integers in [0, S]: filled positions, the newest tokens' included.
      page_table_BP: integers in [0, N): the pages that hold a row's tokens, in order (Kwon et al.
        2023). Entries behind the length are not looked at; rows may share pages.
      window: how many keys before its own position a query sees, or the pair (that, anything);
        None is all.
      softcap: c: logits become c tanh(logits / c).
      sinks: float [H]: a logit a head in the softmax's sum, with no value.
      scale: factor on the products; None is 1 / sqrt(D).
      return_lse: whether to return lse too.
      block_sizes: `kv` is how many tokens of a row are worked on at once; None chooses.
      impl: 'reference' (the specification), 'xla' (in blocks up to the longest length; what a CPU
        runs, and the one with derivatives) or 'tpu' (Mosaic; interpreted where there is no TPU).
        None takes 'tpu' on a TPU where it runs these arguments, else 'xla'.

    Returns:
      o_BTHV in q's type, 0 for a query that sees nothing (of a row of length 0, say); with
      `return_lse` also lse_BHT, float32, the logarithm of the sum of the exponentials, or -inf.

    Raises:
      ValueError: an argument does not fit, or the implementation named cannot run these.
    """
    q_BTHD, cache = _check(q_BTHD, k_BSKD, v_BSKV, lengths_B, page_table_BP)
    left, _ = arguments._check_window(window)
    softcap = arguments._check_softcap(softcap)
    sinks = arguments._check_sinks(sinks, q_BTHD.shape[2])
    if scale is None:
        scale = 1 / math.sqrt(q_BTHD.shape[3])
    spec = DecodeSpec(left, softcap, arguments._check_number('scale', scale, 'None'))
    keys = None if block_sizes is None else block_sizes.kv
    impl = impl or _choose(q_BTHD, cache, spec, keys)
    match impl:
        case 'reference':
            o_BTHV, lse_BHT = _reference(q_BTHD, cache, sinks, spec)
        case 'xla':
            o_BTHV, lse_BHT = _xla(q_BTHD, cache, sinks, spec, keys or XLA_BLOCK)
        case 'tpu':
            from pallas_kernels.attention.tpu import decode as tpu

            if reason := _refused(q_BTHD, cache, spec, keys):
                raise ValueError(f"impl='tpu': {reason}; try impl='xla'")
            o_BTHV, lse_BHT = tpu.forward(
                q_BTHD, *cache, sinks, spec, lse=return_lse, block_keys=keys
            )
        case 'gpu':
            raise ValueError("impl='gpu': there is no decode kernel for GPUs; try impl='xla'")
        case _:
            raise ValueError(
                f"impl={impl!r}: must be 'reference', 'xla', 'tpu' or None; try impl='xla'"
            )
    return (o_BTHV, lse_BHT) if return_lse else o_BTHV


def _choose(q_BTHD: jax.Array, cache: _Cache, spec: DecodeSpec, keys: int | None) -> str:
    chip = current_chip()
    if chip is None or not chip.is_tpu:
        return 'xla'
    return 'xla' if _refused(q_BTHD, cache, spec, keys) else 'tpu'


def _refused(q_BTHD: jax.Array, cache: _Cache, spec: DecodeSpec, keys: int | None) -> str | None:
    # Imported when it is used: a CPU has no use for Pallas.
    from pallas_kernels.attention.tpu.decode_plan import refuses

    return refuses(q_BTHD, cache.k, cache.v, cache.page_table_BL, spec, keys)


def _check(q, k, v, lengths_B, page_table_BP) -> tuple[jax.Array, _Cache]:
    q, k, v, lengths_B = (jnp.asarray(x) for x in (q, k, v, lengths_B))
    letters = {'q': '[B, T, H, D]'}
    paged = page_table_BP is not None
    letters |= {n: f'[{"N, P" if paged else "B, S"}, K, {s}]' for n, s in (('k', 'D'), ('v', 'V'))}
    for name, x in (('q', q), ('k', k), ('v', v)):
        if x.ndim != 4 or not x.size or not jnp.issubdtype(x.dtype, jnp.floating):
            rule = f'must be float {letters[name]}, no dimension of them 0'
            raise wrong(name, x, rule, f'{q.dtype}[2, 16, 4, 64]')
    (B, _, H, D), (n, s, K, _) = q.shape, k.shape
    fits = (n if paged else B, s, K, D)
    if k.shape != fits:
        rule = f'must have the {"head size" if paged else "rows and head size"} of q'
        raise wrong('k', k, rule, f'{k.dtype}{list(fits)}')
    if v.shape[:3] != k.shape[:3] or v.dtype != k.dtype:
        fits = f'{k.dtype}{[*k.shape[:3], v.shape[3]]}'
        raise wrong('v', v, 'must have the type of k and its first dimensions', fits)
    if H % K:
        good = max(n for n in range(1, K) if H % n == 0)
        rule = f'its {K} heads must divide the {H} heads of q'
        raise wrong('k', k, rule, f'{k.dtype}{[n, s, good, D]}')
    if not jnp.issubdtype(lengths_B.dtype, jnp.integer) or lengths_B.shape != (B,):
        raise wrong('lengths_B', lengths_B, 'must be integers [B]', f'int32[{B}]')
    if paged:
        page_table_BP = jnp.asarray(page_table_BP)
        shape = page_table_BP.shape
        if not jnp.issubdtype(page_table_BP.dtype, jnp.integer) or len(shape) != 2 or (
            shape[0] != B or not shape[1]
        ):  # fmt: skip
            rule = 'must be integers [B, pages of a row]'
            raise wrong('page_table_BP', page_table_BP, rule, f'int32[{B}, 8]')
        page_table_BP = page_table_BP.astype(jnp.int32)
    cache = _Cache(k, v, lengths_B, page_table_BP)
    return q, cache._replace(lengths_B=jnp.clip(lengths_B, 0, cache.size).astype(jnp.int32))


def _block(cache: _Cache, start: jax.Array, W: int) -> tuple[jax.Array, jax.Array]:
    """Returns W tokens of each row's cache from `start` on, which is a multiple of a page."""
    if cache.page_table_BL is None:
        return tuple(jax.lax.dynamic_slice_in_dim(x, start, W, 1) for x in (cache.k, cache.v))
    B, page = cache.lengths_B.shape[0], cache.k.shape[1]
    pages_BL = jax.lax.dynamic_slice_in_dim(cache.page_table_BL, start // page, W // page, 1)
    return tuple(
        jnp.take(x, pages_BL, axis=0, mode='clip').reshape(B, W, *x.shape[2:])
        for x in (cache.k, cache.v)
    )


def _reference(
    q_BTHD: jax.Array, cache: _Cache, sinks_H: jax.Array | None, spec: DecodeSpec
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
    o_BTHV, lse_BHT = reference.forward(operands, static)
    return o_BTHV.astype(q_BTHD.dtype), lse_BHT


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _xla(
    q_BTHD: jax.Array, cache: _Cache, sinks_H: jax.Array | None, spec: DecodeSpec, block: int
) -> tuple[jax.Array, jax.Array]:
    """Online softmax over blocks of keys, from the first that is seen to the longest length."""
    (B, T, H, _), K, S = q_BTHD.shape, cache.k.shape[2], cache.size
    dtype = accumulator(cache.k.dtype)
    einsum = functools.partial(jnp.einsum, preferred_element_type=dtype, precision='highest')
    page = 1 if cache.page_table_BL is None else cache.k.shape[1]
    W = min(S, max(1, block // page) * page)
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
        state = jax.lax.fori_loop(
            first, -(-end_B.max() // W), lambda n, state: _merged(state, block_of(n)),
            (low_BKGT1, empty_BKGT1, o_BKGTV),
        )  # fmt: skip
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


@_xla.defjvp
def _xla_jvp(spec, block, primals, tangents):
    # A loop of unknown length has no reverse derivative; that of the specification is the same.
    return jax.jvp(functools.partial(_reference, spec=spec), primals, tangents)

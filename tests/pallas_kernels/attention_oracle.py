"""Attention once more, twice: in float64 numpy, and as one writes it down in XLA.

Nothing of `pallas_kernels` is used, not even for the bits of dropout.

Legend: B batch, T queries, S keys, H query heads, K key-value heads, D, V sizes of heads.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from attention_cases import DIFFERENTIABLE, SEED, B, Case


def seen(others: dict[str, Any], H: int, T: int, S: int) -> np.ndarray:
    """Returns the specification of who sees whom, [B, H, T, S], element by element."""
    left, right = others.get('window') or (None, None)
    seen_BHTS = np.zeros((B, H, T, S), bool)
    for b, t, s in itertools.product(range(B), range(T), range(S)):
        position = t + S - T
        seen_BHTS[b, :, t, s] = not (
            (others.get('causal') and s > position)
            or (left is not None and s < position - left)
            or (right is not None and s > position + right)
            or (
                'segment_ids' in others
                and others['segment_ids'][b, t] != others['kv_segment_ids'][b, s]
            )
        )
    return seen_BHTS & np.broadcast_to(others.get('mask', True), seen_BHTS.shape)


def kept(seed: int, rate: float, shape: tuple[int, ...], start=(0, 0, 0, 0)) -> np.ndarray:
    """Returns dropout's bits once more, in numpy's unsigned arithmetic."""

    def mix(x):
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
        x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
        return x ^ (x >> np.uint32(16))

    with np.errstate(over='ignore'):
        *rows, keys = (
            np.uint32(n) + i.astype(np.uint32)
            for n, i in zip(start, np.indices(shape), strict=True)
        )
        words = []
        for stream in (0x9E3779B9, 0x3C6EF372):
            word = mix(np.array([seed], np.int32).view(np.uint32) ^ np.uint32(stream))
            for index in rows:
                word = mix(word ^ index)
            words.append(word)
        bits = (words[0] ^ keys * np.uint32(0xDAA66D2B)) * np.uint32(0x7FEB352D)
        bits = ((bits ^ (bits >> np.uint32(15))) + words[1]) * np.uint32(0x846CA68B)
    return bits.view(np.int32) >= rate * 2**32 - 2**31


def oracle(case: Case, arrays, others, do_BTHV, dlse_BHT) -> dict[str, np.ndarray]:
    """Returns o, lse and the gradients in float64 numpy, one head at a time."""
    q, k, v, bias, sinks, do, dlse = (
        None
        if x is None
        else np.asarray(x.astype(jnp.promote_types(x.dtype, 'float32')), np.float64)
        for x in (*map(arrays.get, DIFFERENTIABLE), do_BTHV, dlse_BHT)
    )
    (H, K), (T, S), (D, V), cap = case.heads, case.lengths, case.sizes, case.softcap
    seen_BHTS, keep_BHTS = seen(others, H, T, S), np.ones((B, H, T, S))
    if case.dropout_rate:
        keep_BHTS = kept(SEED, case.dropout_rate, keep_BHTS.shape) / (1 - case.dropout_rate)
    out = {'o': np.zeros((B, T, H, V)), 'lse': np.zeros((B, H, T)), 'bias': np.zeros((B, H, T, S))}
    out |= {'q': np.zeros(q.shape), 'k': np.zeros(k.shape), 'v': np.zeros(v.shape)}
    out['sinks'] = np.zeros(H)
    for b, h in itertools.product(range(B), range(H)):
        n, keep = h // (H // K), keep_BHTS[b, h]
        x = slope = q[b, :, h] @ k[b, :, n].T / np.sqrt(D)
        if cap:
            x, slope = cap * np.tanh(x / cap), 1 - np.tanh(x / cap) ** 2
        if bias is not None:
            x = x + np.broadcast_to(bias, seen_BHTS.shape)[b, h]
        sink = np.full((T, 1), -np.inf if sinks is None else sinks[h])
        x = np.concatenate([np.where(seen_BHTS[b, h], x, -np.inf), sink], 1)
        top = np.maximum(x.max(1, keepdims=True), -1e30)
        p = np.exp(x - top)
        total = p.sum(1, keepdims=True)
        with np.errstate(divide='ignore'):
            out['lse'][b, h] = (top + np.log(total))[:, 0]
        p /= np.where(total == 0, 1, total)
        out['o'][b, :, h] = p[:, :S] * keep @ v[b, :, n]
        dp = np.concatenate([do[b, :, h] @ v[b, :, n].T * keep, np.zeros((T, 1))], 1)
        dx = p * (dp - (p * dp).sum(1, keepdims=True) + dlse[b, h, :, None])
        out['bias'][b, h], out['sinks'][h] = dx[:, :S], out['sinks'][h] + dx[:, S].sum()
        dx = dx[:, :S] * (slope if cap else 1) / np.sqrt(D)
        out['q'][b, :, h] = dx @ k[b, :, n]
        out['k'][b, :, n] += dx.T @ q[b, :, h]
        out['v'][b, :, n] += (p[:, :S] * keep).T @ do[b, :, h]
    if bias is not None:
        ones = tuple(axis for axis, size in enumerate(bias.shape) if size == 1)
        out['bias'] = out['bias'].sum(ones, keepdims=True)
    return {name: out[name] for name in ('o', 'lse', *arrays)}


def plain(case: Case, arrays, others) -> tuple[jax.Array, jax.Array]:
    """Returns o and lse as one writes attention down in XLA, products in the case's type."""
    (H, K), (T, S), (D, _) = case.heads, case.lengths, case.sizes
    k, v = (jnp.repeat(arrays[name], H // K, axis=2) for name in 'kv')
    x = jnp.einsum('bthd,bshd->bhts', arrays['q'], k, preferred_element_type=jnp.float32)
    x /= np.sqrt(D)
    if case.softcap:
        x = case.softcap * jnp.tanh(x / case.softcap)
    if case.bias:
        x += arrays['bias'].astype(jnp.float32)
    seen_BHTS = seen(others, H, T, S)
    x = jnp.where(seen_BHTS, x, -1e30)
    sinks = arrays['sinks'] if case.sinks else jnp.full(H, -jnp.inf)
    sinks = jnp.broadcast_to(sinks.astype(jnp.float32)[None, :, None, None], (B, H, T, 1))
    lse = jax.nn.logsumexp(jnp.concatenate([x, sinks], -1), -1)
    p = jnp.where(seen_BHTS, jnp.exp(x - lse[..., None]), 0)
    if case.dropout_rate:
        p *= kept(SEED, case.dropout_rate, p.shape) / (1 - case.dropout_rate)
    o = jnp.einsum('bhts,bshv->bthv', p.astype(v.dtype), v)
    return o, jnp.where(lse < -1e29, -jnp.inf, lse)

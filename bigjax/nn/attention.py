"""Attention: the one place that calls its kernels, on whatever mesh is set.

Legend: B batch, T queries, S keys and values, H query heads, K key-value heads (K divides H),
D size of a head, F = K D features of all key-value heads, L layers, N arrays.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from bigjax.nn.context import CONTEXT, context_size, refusal
from bigjax.nn.implementation import Implementation, named, plain
from bigjax.run import UsageError
from bigjax.sharding import BATCH_AXES, LOGICAL_TO_MESH
from bigjax.strategy import Context
from pallas_kernels import attention as kernels

KeyValue = tuple[jax.Array, jax.Array]

_HEADS = LOGICAL_TO_MESH['heads']
_on_the_mesh = functools.partial(kernels.shard, batch=BATCH_AXES, heads=_HEADS)
_decode_on_the_mesh = kernels.shard_decode(batch=BATCH_AXES, heads=_HEADS)


def attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    *,
    impl: Implementation = 'auto',
    context: Context | None = None,
    **features: Any,
) -> jax.Array:
    """Scaled dot-product attention `softmax(q k^T * scale) v` (Vaswani et al. 2017, eq. 1).

    On a mesh that splits positions, the arrays are in the order of `bigjax.nn.context`.

    Args:
      q_BTHD: queries.
      k_BSKD: keys.
      v_BSKD: values.
      impl: an implementation of `pallas_kernels.attention`; 'auto' takes the kernel of the chip
        that is there, if it runs these arguments, else 'xla'.
      context: how queries meet the keys that other devices hold: 'ring' hands these round the
        devices (Liu et al. 2023), 'gather' brings all to each; None if positions stay whole.
      features: `causal`, `mask`, `window` and so on; see `pallas_kernels.attention.attention`.

    Returns:
      [B, T, H, D] in q's type, and zero (with no gradient) for a query that sees no key.

    Raises:
      UsageError: the implementation named cannot run these arguments, or the mesh splits positions
        and `context` is None.
      ValueError: arguments do not fit.
    """
    if context_size() > 1:
        if context is None:
            raise refusal()
        call = _on_the_mesh(context=CONTEXT, layout='zigzag', exchange=context)
    else:
        call = kernels.attention if plain(impl) else _on_the_mesh()
    return named(call, impl, 'attention')(q_BTHD, k_BSKD, v_BSKD, **features)


def cached_attention(
    q_BTHD: jax.Array,
    k_BSF: jax.Array,
    v_BSF: jax.Array,
    *,
    start_B: jax.Array,
    impl: Implementation = 'auto',
    **features: Any,
) -> jax.Array:
    """Causal attention of a few new queries to a key-value cache that is filled in part.

    Query t of row b is at position `start_B[b] + t` and sees the cache up to and including that
    position; what lies behind is ignored, whatever it holds.

    Args:
      q_BTHD: queries.
      k_BSF: cached keys, those of the queries included, their heads side by side: a TPU's kernel
        reads them so, and would copy a cache that has heads as a dimension at every call.
      v_BSF: cached values, likewise.
      start_B: int32, how many positions were filled before these queries.
      impl: as in `attention`.
      features: `window`, `scale` and so on; see `pallas_kernels.attention.decode_attention`.

    Returns:
      [B, T, H, D] in q's type.
    """
    decode = kernels.decode_attention if plain(impl) else _decode_on_the_mesh
    call = named(decode, impl, 'attention')
    lengths_B = start_B.astype(jnp.int32) + q_BTHD.shape[1]
    B, S, D = *k_BSF.shape[:2], q_BTHD.shape[3]
    k_BSKD, v_BSKD = k_BSF.reshape(B, S, -1, D), v_BSF.reshape(B, S, -1, D)
    return call(q_BTHD, k_BSKD, v_BSKD, lengths_B=lengths_B, **features)


def empty_layers(
    shape: tuple[int, int, int], dtype: Any, *, depth: int, scan: bool
) -> tuple[KeyValue, ...] | KeyValue:
    """Returns zeros for keys and values [B, S, F] of `depth` layers, to be decoded into.

    As `bigjax.nn.stack.stack` takes them: unrolled, one pair a layer; scanned, one pair
    [L, B, S, F].
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

"""Attention with every usual feature and its derivatives: the public function."""

import jax

from pallas_kernels.attention.arguments import Window, check_arguments
from pallas_kernels.attention.choice import Implementation, chosen, implementation
from pallas_kernels.attention.decode import decode_attention
from pallas_kernels.attention.decode_sharded import shard_decode
from pallas_kernels.attention.differentiable import RESIDUALS, attend
from pallas_kernels.attention.sharded import shard
from pallas_kernels.block_sizes import BlockSizes

__all__ = [
    'RESIDUALS',
    'Implementation',
    'attention',
    'decode_attention',
    'implementation',
    'shard',
    'shard_decode',
]


def attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKV: jax.Array,
    *,
    causal: bool = False,
    window: int | Window | None = None,
    segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_seed: jax.Array | int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    block_sizes: BlockSizes | None = None,
    impl: Implementation | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Scaled dot-product attention `softmax(q k^T * scale) v` (Vaswani et al. 2017, eq. 1).

    Logits, softmax and sums are float32 (float64 for float64). Everything has derivatives of any
    order in q, k, v, bias and sinks, and works under `vmap`.

    Args:
      q_BTHD: queries; bfloat16, float16, float32 or float64.
      k_BSKD: keys, of q's type. K divides H: each serves H / K query heads in turn (Ainslie et al.
        2023).
      v_BSKV: values, of q's type; V may differ from D.
      causal: query t sees the keys up to t + S - T, so that the last query sees them all.
      window: (left, right): a query sees so many keys before and behind its own position (Beltagy
        et al. 2020); None in either is all, and an int stands for both.
      segment_ids: int [B, T]: a query sees the keys of its own id only (packed documents).
      kv_segment_ids: int [B, S]; None is `segment_ids`, where T = S.
      mask: bool [B, H, T, S], each dimension full or 1: true where the key is seen. A key must be
        seen by causal, window, segments and mask together.
      bias: float [B, H, T, S], each dimension full or 1, added to the logits (Press et al. 2022).
      softcap: c: logits become c tanh(logits / c), before the bias (Gemma Team 2024).
      sinks: float [H]: a logit a head in the softmax's sum, with no value (Xiao et al. 2024).
      dropout_rate: which share of the weights becomes 0, the others being divided by 1 - rate.
      dropout_seed: int or (u)int32 scalar; needed with dropout_rate > 0. The bits depend on it and
        on the positions only, not on `impl`.
      scale: factor on the products; None is 1 / sqrt(D).
      return_lse: whether to return lse too.
      block_sizes: of the TPU's kernels, by `BlockSizes`' rules and within the chip's VMEM; a GPU's
        reads `kv` alone. None chooses by shape and chip.
      impl: 'reference' (the specification), 'xla' (for a CPU), 'tpu' (Mosaic; interpreted where
        there is no TPU) or 'gpu' (Mosaic GPU). None takes the kernel of the chip at hand if it runs
        these arguments, else 'xla'.

    Returns:
      o_BTHV in q's type, 0 for a query that sees no key; with `return_lse` also lse_BHT, float32:
      the logarithm of the sum of the exponentials of a query's logits, its sink's among them.

    Raises:
      ValueError: an argument does not fit, or the implementation named cannot run these.
    """
    operands, spec = check_arguments(
        q_BTHD,
        k_BSKD,
        v_BSKV,
        causal=causal,
        window=window,
        segment_ids=segment_ids,
        kv_segment_ids=kv_segment_ids,
        mask=mask,
        bias=bias,
        softcap=softcap,
        sinks=sinks,
        dropout_rate=dropout_rate,
        dropout_seed=dropout_seed,
        scale=scale,
        block_sizes=block_sizes,
    )
    module = chosen(impl, operands, spec)
    o_BTHV, lse_BHT = attend(module, operands, spec, block_sizes, return_lse)
    return (o_BTHV, lse_BHT) if return_lse else o_BTHV

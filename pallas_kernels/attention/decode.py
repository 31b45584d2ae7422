"""Attention of a few new tokens to a key-value cache: ragged lengths, contiguous or paged.

Legend: B rows, T new tokens, S tokens that a row's cache can hold, H query heads, K key-value
heads, D size of a query and key head, V size of a value head, N pages of P tokens.
"""

import jax

from pallas_kernels.attention import arguments
from pallas_kernels.attention import decode_plain as plain
from pallas_kernels.attention.decode_arguments import DecodeOperands, DecodeSpec, check_decode
from pallas_kernels.block_sizes import BlockSizes
from pallas_kernels.chip import current_chip
from pallas_kernels.mesh import vary, varying


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
      block_sizes: `kv` is how many tokens of a row are worked on at once at most: whole pages, and
        what VMEM holds. The other sizes have no meaning here. None chooses.
      impl: 'reference' (the specification), 'xla' (in blocks up to the longest length; what a CPU
        runs, and the one with derivatives) or 'tpu' (Mosaic; interpreted where there is no TPU).
        None takes 'tpu' on a TPU where it runs these arguments, else 'xla'.

    Returns:
      o_BTHV in q's type, 0 for a query that sees nothing (of a row of length 0, say); with
      `return_lse` also lse_BHT, float32, the logarithm of the sum of the exponentials, or -inf.

    Raises:
      ValueError: an argument does not fit, or the implementation named cannot run these.
    """
    operands, spec = check_decode(
        q_BTHD, k_BSKD, v_BSKV, lengths_B=lengths_B, page_table_BP=page_table_BP, window=window,
        softcap=softcap, sinks=sinks, scale=scale, block_sizes=block_sizes,
    )  # fmt: skip
    o_BTHV, lse_BHT = attend(operands, spec, impl, return_lse)
    return (o_BTHV, lse_BHT) if return_lse else o_BTHV


def attend(
    operands: DecodeOperands, spec: DecodeSpec, impl: str | None, lse: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Returns o_BTHV and, where `lse`, lse_BHT, by the implementation named or chosen.

    Raises:
      ValueError: the implementation named cannot run these.
    """
    # A kernel takes no arrays that vary along different axes of a `jax.shard_map`.
    q_BTHD, cache, sinks_H = vary(operands, varying(operands))
    match impl or _choose(operands, spec):
        case 'reference':
            o_BTHV, lse_BHT = plain.reference(q_BTHD, cache, sinks_H, spec)
        case 'xla':
            o_BTHV, lse_BHT = plain.xla(q_BTHD, cache, sinks_H, spec)
        case 'tpu':
            from pallas_kernels.attention.tpu import decode as tpu

            if reason := _refused(operands, spec):
                raise ValueError(f"impl='tpu': {reason}; try impl='xla'")
            o_BTHV, lse_BHT = tpu.forward(
                q_BTHD, *cache, sinks_H, spec, lse=lse, block_keys=spec.keys
            )
        case 'gpu':
            raise ValueError("impl='gpu': there is no decode kernel for GPUs; try impl='xla'")
        case _:
            raise ValueError(
                f"impl={impl!r}: must be 'reference', 'xla', 'tpu' or None; try impl='xla'"
            )
    return o_BTHV, lse_BHT if lse else None


def _choose(operands: DecodeOperands, spec: DecodeSpec) -> str:
    chip = current_chip()
    if chip is None or not chip.is_tpu:
        return 'xla'
    return 'xla' if _refused(operands, spec) else 'tpu'


def _refused(operands: DecodeOperands, spec: DecodeSpec) -> str | None:
    # Imported when it is used: a CPU has no use for Pallas.
    from pallas_kernels.attention.tpu.decode_plan import refuses

    cache = operands.cache
    return refuses(operands.q_BTHD, cache.k, cache.v, cache.page_table_BL, spec, spec.keys)

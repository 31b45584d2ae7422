"""How attention's operands lie in HBM and in blocks: heads side by side in the lanes.

[B, T, H, D] is viewed as [B, T, H * D], which costs nothing, and a block takes the lanes of the
heads of one grid step. Those add up to a multiple of 128 lanes, or are all there are. Head sizes
that do not fit are padded with zeros. Legend: B batch, T queries, S keys, H and K query and
key-value heads, D and V their sizes.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from pallas_kernels.attention.arguments import Operands

LANES = 128


@dataclasses.dataclass(frozen=True)
class Heads:
    """Heads of one grid step, after padding; all static.

    Attributes:
      n_q, n_kv: heads that there are.
      D, V: lanes of a head.
      q, kv: heads of a step; either all query heads of `kv` key-value heads, or `q` of the query
        heads that share one key-value head.
    """

    n_q: int
    n_kv: int
    D: int
    V: int
    q: int
    kv: int

    @property
    def share(self) -> int:
        """Query heads that share a key-value head."""
        return self.n_q // self.n_kv

    @property
    def steps(self) -> int:
        """Grid steps that it takes to see all heads."""
        return self.n_q // self.q

    def kv_step(self, step):
        """Which block of key-value heads a step reads."""
        return step if self.kv > 1 or self.q == self.share else step * self.q // self.share

    def kv_head(self, n: int) -> int:
        """Which of the step's key-value heads its query head n uses."""
        return n // self.share if self.kv > 1 else 0

    @property
    def width(self) -> int:
        """Lanes of keys that a matmul contracts: a head's, or the 128 that a small head lies in."""
        return self.D if self.D >= LANES else min(LANES, self.kv * self.D)

    def window(self, kv_head: int) -> tuple[int, int]:
        """First lane of the `width` that hold a key-value head, and of the head in them."""
        lane = kv_head * self.D
        if self.D >= LANES:
            return lane, 0
        # The last of heads that fill no whole number of windows share the one that ends with them.
        low = min(lane // self.width * self.width, self.kv * self.D - self.width)
        return low, lane - low


def heads(H: int, K: int, D: int, V: int, wanted: int = 1) -> Heads:
    """Returns the heads of a step: as few as fill the lanes, and up to `wanted` query heads."""
    D, V = _lanes(D), _lanes(V)
    least = math.lcm(LANES // math.gcd(D, LANES), LANES // math.gcd(V, LANES))
    share = H // K
    if 1 < K <= least:  # all heads in a step: blocks as wide as arrays need no multiple of 128
        return Heads(H, K, D, V, H, K)
    if K == 1 or least == 1:
        counts = [n for n in range(1, share + 1) if share % n == 0 and n % least == 0] or [share]
        q = max(n for n in counts if n <= max(wanted, counts[0]))
    else:
        q = share
    K += -K % least if K > 1 else 0
    kv = 1
    if q == share and K > 1:
        kv = max(n for n in range(least, K + 1) if _fits(n, least, K, max(wanted // share, least)))
        q = kv * share
    return Heads(K * share, K, D, V, q, kv)


def _fits(n: int, least: int, K: int, most: int) -> bool:
    return n % least == 0 and K % n == 0 and n <= most


def _lanes(size: int) -> int:
    """The size a head is padded to: a power of two from 16 on, or a multiple of 128."""
    return max(16, 1 << (size - 1).bit_length()) if size <= LANES else -(-size // LANES) * LANES


def pad(operands: Operands, to: Heads) -> Operands:
    """Returns the operands with heads padded as `to` says, by zeros."""

    def pad_heads(x: jax.Array, n: int, size: int) -> jax.Array:
        extra = (n - x.shape[2], size - x.shape[3])
        return jnp.pad(x, ((0, 0), (0, 0), (0, extra[0]), (0, extra[1]))) if any(extra) else x

    sinks_H = operands.sinks_H
    if sinks_H is not None:
        sinks_H = jnp.pad(sinks_H, (0, to.n_q - sinks_H.shape[0]))
    return operands._replace(
        q_BTHD=pad_heads(operands.q_BTHD, to.n_q, to.D),
        k_BSKD=pad_heads(operands.k_BSKD, to.n_kv, to.D),
        v_BSKV=pad_heads(operands.v_BSKV, to.n_kv, to.V),
        sinks_H=sinks_H,
    )


def flat(x_BTHD: jax.Array) -> jax.Array:
    """Returns heads side by side, [B, T, H, D] -> [B, T, H * D]."""
    return x_BTHD.reshape(*x_BTHD.shape[:2], -1)

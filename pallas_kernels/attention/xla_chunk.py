"""One chunk of attention on a CPU: where it stands, what it sees, its logits and dropout.

Arrays are heads-major here: queries [B, K, G, T, D], keys [B, K, S, D], masks [B, K, G, T, S].

Legend: B batch, T queries, S keys and values, H query heads, K key-value heads, G = H / K query
heads of a key-value head, D size of a head, Q queries of the chunk, N keys of the chunk, 1 a
broadcast dimension.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.arrays import accumulator
from pallas_kernels.attention import dropout
from pallas_kernels.attention.arguments import Operands, Spec
from pallas_kernels.attention.xla_runs import Run

Index = int | jax.Array


class Place(NamedTuple):
    """A chunk: `queries` queries from `first`, and `keys` keys from `first_key`."""

    first: Index
    queries: int
    first_key: Index
    keys: int

    @classmethod
    def of(cls, run: Run, i: Index, S: int) -> 'Place':
        """Returns chunk i of a run over S keys."""
        first_key = run.first_key
        if run.slides:
            first_key = jnp.clip(first_key + i * run.queries, 0, S - run.keys)
        return cls(run.first + i * run.queries, run.queries, first_key, run.keys)

    def cut(self, x: jax.Array, t: int | None = None, s: int | None = None) -> jax.Array:
        """Returns what the chunk has of x, whose axes of queries and keys are t and s.

        An axis of size 1 is broadcast, and left.
        """
        for axis, first, size in (t, self.first, self.queries), (s, self.first_key, self.keys):
            if axis is None or x.shape[axis] in (1, size):
                continue
            if isinstance(first, int):
                x = jax.lax.slice_in_dim(x, first, first + size, axis=axis)
            else:
                x = jax.lax.dynamic_slice_in_dim(x, first, size, axis)
        return x

    def add(
        self,
        total: jax.Array | None,
        part: jax.Array,
        shape: tuple[int, ...],
        t: int | None = None,
        s: int | None = None,
    ) -> jax.Array:
        """Returns the total, of the given shape, with the chunk's part added at its place."""
        if total is None:
            if part.shape == shape:
                return part
            total = jnp.zeros(shape, part.dtype)
        starts = [0] * len(shape)
        for axis, first in (t, self.first), (s, self.first_key):
            if axis is not None and shape[axis] > 1:
                starts[axis] = first
        sum_so_far = jax.lax.dynamic_slice(total, starts, part.shape)
        return jax.lax.dynamic_update_slice(total, sum_so_far + part, starts)


def with_keys(q_BKGQD: jax.Array, k_BKND: jax.Array) -> jax.Array:
    """Returns every query's products with every key, [B, K, G, Q, N]."""
    return _product('bkrd,bknd->bkrn', _rows(q_BKGQD), k_BKND).reshape(
        *q_BKGQD.shape[:4], k_BKND.shape[2]
    )


def over_keys(w_BKGQN: jax.Array, v_BKNV: jax.Array) -> jax.Array:
    """Returns each query's weighted sum over keys, [B, K, G, Q, V]."""
    return _product('bkrn,bknv->bkrv', _rows(w_BKGQN), v_BKNV).reshape(
        *w_BKGQN.shape[:4], v_BKNV.shape[3]
    )


def over_queries(w_BKGQN: jax.Array, q_BKGQD: jax.Array) -> jax.Array:
    """Returns each key's weighted sum over the queries of all its heads, [B, K, N, D]."""
    return _product('bkrn,bkrd->bknd', _rows(w_BKGQN), _rows(q_BKGQD))


def _rows(x_BKGQN: jax.Array) -> jax.Array:
    # XLA makes fewer copies of a product that is plainly one of matrices.
    B, K, G, Q, N = x_BKGQN.shape
    return x_BKGQN.reshape(B, K, G * Q, N)


def _product(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, x, y, preferred_element_type=accumulator(x.dtype))


def logits(operands: Operands, spec: Spec, place: Place) -> tuple[jax.Array, jax.Array | None]:
    """Returns logits, -inf where hidden, and the soft cap's derivative where there is one."""
    q_BKGQD, k_BKND = place.cut(operands.q_BTHD, t=3), place.cut(operands.k_BSKD, s=2)
    s_BKGQN = with_keys(q_BKGQD, k_BKND)
    if spec.scale != 1:
        s_BKGQN *= spec.scale
    slope_BKGQN = None
    if spec.softcap is not None:
        tanh_BKGQN = jnp.tanh(s_BKGQN / spec.softcap)
        s_BKGQN, slope_BKGQN = spec.softcap * tanh_BKGQN, 1 - tanh_BKGQN**2
    if operands.bias_BHTS is not None:
        s_BKGQN += place.cut(operands.bias_BHTS, t=3, s=4).astype(s_BKGQN.dtype)
    for seen_BKGQN in _seen(operands, spec, place):
        s_BKGQN = jnp.where(seen_BKGQN, s_BKGQN, -jnp.inf)
    return s_BKGQN, slope_BKGQN


def kept(operands: Operands, spec: Spec, place: Place) -> jax.Array:
    """Returns which weights survive dropout: bool, [B, K, G, Q, N]."""
    B, K, G, _, _ = operands.q_BTHD.shape
    rows_B, heads_H = (jnp.arange(n, dtype=jnp.int32) for n in (B, K * G))
    if operands.start is not None:
        rows_B, heads_H = rows_B + operands.start[0], heads_H + operands.start[1]
    queries_Q, keys_N = _positions(operands, place)
    return dropout.keep(
        operands.dropout_seed,
        rows_B[:, None, None, None, None],
        heads_H.reshape(1, K, G, 1, 1),
        queries_Q[None, None, None, :, None],
        keys_N[None, None, None, None],
        spec.dropout_rate,
    )


def _seen(operands: Operands, spec: Spec, place: Place) -> list[jax.Array]:
    """Returns conditions on the visible keys, each to be broadcast to [B, K, G, Q, N]."""
    found = []
    queries_Q, keys_N = _positions(operands, place)
    distance_QN = keys_N[None] - (queries_Q[:, None] + spec.shift)
    if spec.right is not None:
        found.append((distance_QN <= spec.right)[None, None, None])
    if spec.left is not None:
        found.append((distance_QN >= -spec.left)[None, None, None])
    if operands.segment_ids_BT is not None:
        ids_BQ = place.cut(operands.segment_ids_BT, t=1)
        kv_ids_BN = place.cut(operands.kv_segment_ids_BS, s=1)
        same_BQN = ids_BQ[:, :, None] == kv_ids_BN[:, None]
        found.append(same_BQN[:, None, None])
    if operands.mask_BHTS is not None:
        found.append(place.cut(operands.mask_BHTS, t=3, s=4))
    return found


def _positions(operands: Operands, place: Place) -> tuple[jax.Array, jax.Array]:
    """Returns the global indices of the chunk's queries and keys."""
    queries_Q = place.first + jnp.arange(place.queries, dtype=jnp.int32)
    keys_N = place.first_key + jnp.arange(place.keys, dtype=jnp.int32)
    if operands.start is not None:
        return queries_Q + operands.start[2], keys_N + operands.start[3]
    return queries_Q, keys_N

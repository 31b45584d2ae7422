"""Attention over positions on several devices: queries stay, every device gets all keys and values.

Runs on one device's part of the arrays, inside `jax.shard_map`. Keys and values are gathered before
each pass, and their gradients summed and shared out after the backward one: one exchange where a
ring has many, and the memory of all keys and values of a layer (Grattafiori et al. 2024, "The Llama
3 Herd of Models", section 3.3.2).

Legend: B batch, T queries and S keys and values on this device, H query heads, K key-value heads,
D size of a query and key head, V size of a value head, N devices, C chunks a device holds.
"""

import dataclasses
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.arrays import accumulator
from pallas_kernels.attention.arguments import Gradients, Operands, Spec
from pallas_kernels.attention.layouts import Layout, chunks, unzigzag, zigzag
from pallas_kernels.block_sizes import BlockSizes
from pallas_kernels.mesh import vary, varying


@dataclasses.dataclass(frozen=True)
class Gathered:
    """An implementation over a mesh axis, made of one for a single device; see `ring.Ring`."""

    impl: ModuleType
    axis: str
    layout: Layout = 'contiguous'

    def forward(
        self, operands: Operands, spec: Spec, block_sizes: BlockSizes | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns o_BTHV in q's type, and lse_BHT."""
        whole = self._whole(operands)
        parts = [self.impl.forward(self._chunk(whole, c), spec, block_sizes) for c in self._chunks]
        o_BTHV, lse_BHT = zip(*parts, strict=True)
        return jnp.concatenate(o_BTHV, 1), jnp.concatenate(lse_BHT, 2)

    def backward(
        self,
        operands: Operands,
        spec: Spec,
        block_sizes: BlockSizes | None,
        o_BTHV: jax.Array,
        lse_BHT: jax.Array,
        do_BTHV: jax.Array,
        dlse_BHT: jax.Array | None = None,
    ) -> Gradients:
        """Returns the gradients; of what all devices have in common, this device's share."""
        # Gathered again: the compiler would else keep all keys of every layer for this.
        whole, found = self._whole(jax.lax.optimization_barrier(operands)), []
        rows = (o_BTHV, 1), (lse_BHT, 2), (do_BTHV, 1), (dlse_BHT, 2)
        for c in self._chunks:
            here = [self._rows(x, c, axis) for x, axis in rows]
            found.append(self.impl.backward(self._chunk(whole, c), spec, block_sizes, *here))
        q, k, v, bias, sinks = zip(*found, strict=True)
        return Gradients(
            jnp.concatenate(q, 1),
            self._shared_out(k),
            self._shared_out(v),
            self._bias_gradient(operands, bias),
            _total(sinks),
        )

    @property
    def _devices(self) -> int:
        return jax.lax.axis_size(self.axis)

    @property
    def _chunks(self) -> range:
        return range(chunks(self.layout, self._devices).shape[1])

    def _whole(self, operands: Operands) -> Operands:
        """Returns the operands with all keys, in the sequence's order, beside the queries here."""
        operands = vary(operands, varying((operands, jax.lax.axis_index(self.axis))))
        gather = lambda x: jax.lax.all_gather(x, self.axis, axis=1, tiled=True)  # noqa: E731
        ids_BS = operands.kv_segment_ids_BS
        return operands._replace(
            k_BSKD=self._ordered(gather(operands.k_BSKD), 1),
            v_BSKV=self._ordered(gather(operands.v_BSKV), 1),
            kv_segment_ids_BS=None if ids_BS is None else self._ordered(gather(ids_BS), 1),
            mask_BHTS=self._ordered(operands.mask_BHTS, 3),
            bias_BHTS=self._ordered(operands.bias_BHTS, 3),
        )

    def _ordered(self, x: jax.Array | None, axis: int) -> jax.Array | None:
        """Returns what has a place for each key, from the layout's order to the sequence's."""
        if x is None or x.shape[axis] == 1 or self.layout == 'contiguous':
            return x
        return unzigzag(x, self._devices, axis=axis)

    def _laid_out(self, x: jax.Array, axis: int) -> jax.Array:
        """Undoes `_ordered`."""
        if x.shape[axis] == 1 or self.layout == 'contiguous':
            return x
        return zigzag(x, self._devices, axis=axis)

    def _chunk(self, whole: Operands, c: int) -> Operands:
        """Returns the operands of one chunk of the queries here, and where it starts."""
        q_BTHD = self._rows(whole.q_BTHD, c, 1)
        held_NC = jnp.asarray(chunks(self.layout, self._devices), jnp.int32)
        first_query = held_NC[jax.lax.axis_index(self.axis), c] * q_BTHD.shape[1]
        start = jnp.zeros(4, jnp.int32) if whole.start is None else whole.start
        return whole._replace(
            q_BTHD=q_BTHD,
            segment_ids_BT=self._rows(whole.segment_ids_BT, c, 1),
            mask_BHTS=self._rows(whole.mask_BHTS, c, 2),
            bias_BHTS=self._rows(whole.bias_BHTS, c, 2),
            start=jnp.stack([start[0], start[1], first_query, jnp.zeros_like(first_query)]),
        )

    def _rows(self, x: jax.Array | None, c: int, axis: int) -> jax.Array | None:
        """Returns the rows of a chunk; the only row that serves all of them, whole."""
        if x is None or x.shape[axis] == 1:
            return x
        size = x.shape[axis] // len(self._chunks)
        return jax.lax.slice_in_dim(x, c * size, (c + 1) * size, axis=axis)

    def _shared_out(self, parts: tuple[jax.Array, ...]) -> jax.Array:
        """Returns the sum of gradients of all keys over chunks and devices, for the keys here."""
        total = self._laid_out(_total(parts), 1)
        shared = jax.lax.psum_scatter(total, self.axis, scatter_dimension=1, tiled=True)
        return shared.astype(parts[0].dtype)

    def _bias_gradient(self, operands: Operands, parts: tuple[Any, ...]) -> jax.Array | None:
        if operands.bias_BHTS is None or parts[0] is None:
            return None
        rows = operands.bias_BHTS.shape[2] > 1
        return self._laid_out(jnp.concatenate(parts, 2) if rows else _total(parts), 3)


def _total(parts: tuple[Any, ...]) -> jax.Array | None:
    """Returns the sum of gradients, in the type in which they are to be summed."""
    if parts[0] is None:
        return None
    dtype = accumulator(parts[0].dtype)
    return sum(x.astype(dtype) for x in parts)

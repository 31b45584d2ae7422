"""Where a device stands in a ring: what it sends, which chunks it pairs, and where those lie.

Legend: B batch, T queries and S keys and values on this device, H query heads, K key-value heads,
D size of a query and key head, V size of a value head, N devices of the ring, C chunks a device
holds, n = N * C chunks of the sequence.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.arguments import Operands, Spec
from pallas_kernels.attention.layouts import Layout, Route, route
from pallas_kernels.mesh import vary, varying


class Keys(NamedTuple):
    """What goes round."""

    k_BSKD: jax.Array
    v_BSKV: jax.Array
    segment_ids_BS: jax.Array | None


class Pair(NamedTuple):
    """Chunk `a` of the queries here and chunk `b` of the keys that are here at `step`."""

    step: jax.Array | int
    a: jax.Array | int
    b: jax.Array | int


@dataclasses.dataclass(frozen=True)
class Place:
    """One device of a ring over the mesh axis `axis`."""

    axis: str
    route: Route
    index: jax.Array  # int32 scalar, among the N devices
    varying: frozenset[str]  # mesh axes along which some operand differs

    @classmethod
    def of(cls, axis: str, layout: Layout, operands: Operands, spec: Spec) -> 'Place':
        T, S = operands.q_BTHD.shape[1], operands.k_BSKD.shape[1]
        way = route(spec, layout, jax.lax.axis_size(axis), T, S)
        index = jax.lax.axis_index(axis)
        return cls(axis, way, index, varying((operands, index)))

    def vary(self, tree):
        """Marks arrays as different on all devices, as the types of loops and branches need."""
        return vary(tree, self.varying)

    def zeros(self, x: jax.Array | None, dtype: jnp.dtype) -> jax.Array | None:
        """Returns zeros of x's shape, or None for None."""
        return None if x is None else self.vary(jnp.zeros(x.shape, dtype))

    def send(self, tree, distance: int):
        """Returns what the device `distance` places before this one has."""
        devices = len(self.route.chunks_NC)
        if distance % devices == 0:
            return tree
        ways = [(i, (i + distance) % devices) for i in range(devices)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, ways), tree)

    def visit(self, compute: Callable, carry, step):
        """Returns `carry` after `carry = compute(carry, pair)` for all pairs that see something."""
        C = self.route.chunks_NC.shape[1]
        seen_nn = jnp.asarray(self.route.seen_nn)

        def one(carry, ab):
            pair = Pair(step, *ab)
            if self.route.seen_nn.all():
                return compute(carry, pair), None
            seen = seen_nn[self._chunk(self.index, pair.a), self._chunk(self._owner(pair), pair.b)]
            return jax.lax.cond(seen, lambda x: compute(x, pair), lambda x: x, carry), None

        if C == 1:
            return one(carry, (0, 0))[0]
        # A loop, not four copies of the kernel in the program.
        a, b = np.divmod(np.arange(C * C, dtype=np.int32), C)
        return jax.lax.scan(one, carry, (jnp.asarray(a), jnp.asarray(b)))[0]

    def operands(self, operands: Operands, keys: Keys, pair: Pair) -> Operands:
        """Returns the operands of one pair, without sinks, and where it starts."""
        q_BTHD, k_BSKD = self.rows(operands.q_BTHD, pair.a, 1), self.rows(keys.k_BSKD, pair.b, 1)
        start = jnp.zeros(4, jnp.int32) if operands.start is None else operands.start
        first_query = self._chunk(self.index, pair.a) * q_BTHD.shape[1]
        first_key = self._chunk(self._owner(pair), pair.b) * k_BSKD.shape[1]
        return operands._replace(
            q_BTHD=q_BTHD,
            k_BSKD=k_BSKD,
            v_BSKV=self.rows(keys.v_BSKV, pair.b, 1),
            segment_ids_BT=self.rows(operands.segment_ids_BT, pair.a, 1),
            kv_segment_ids_BS=self.rows(keys.segment_ids_BS, pair.b, 1),
            mask_BHTS=self._part(operands.mask_BHTS, pair),
            bias_BHTS=self._part(operands.bias_BHTS, pair),
            sinks_H=None,
            start=jnp.stack([start[0], start[1], first_query, first_key]),
        )

    def rows(self, x: jax.Array | None, chunk, axis: int) -> jax.Array | None:
        """Returns one chunk of what this device holds along `axis`."""
        C = self.route.chunks_NC.shape[1]
        if x is None or C == 1:
            return x
        size = x.shape[axis] // C
        return jax.lax.dynamic_slice_in_dim(x, chunk * size, size, axis)

    def corner(self, x_BHTS: jax.Array, pair: Pair) -> tuple[list, list[int]]:
        """Returns where a pair's part of a mask or bias begins, and its shape."""
        N, C = self.route.chunks_NC.shape
        begin, shape = [0, 0, 0, 0], list(x_BHTS.shape)
        if shape[2] > 1:
            shape[2] //= C
            begin[2] = pair.a * shape[2]
        if shape[3] > 1:
            shape[3] //= N * C
            begin[3] = (self._owner(pair) * C + pair.b) * shape[3]
        return begin, shape

    def _part(self, x_BHTS: jax.Array | None, pair: Pair) -> jax.Array | None:
        if x_BHTS is None:
            return None
        return cut(x_BHTS, *self.corner(x_BHTS, pair))

    def _owner(self, pair: Pair) -> jax.Array:
        """Returns the device whose keys are here."""
        return (self.index - self.route.first - pair.step) % len(self.route.chunks_NC)

    def _chunk(self, device: jax.Array, which) -> jax.Array:
        return jnp.asarray(self.route.chunks_NC, jnp.int32)[device, which]


def cut(x: jax.Array, corner, shape) -> jax.Array:
    """Returns the part of `x` of a shape that begins at a corner."""
    return jax.lax.dynamic_slice(x, [jnp.int32(i) for i in corner], shape)


def put(x: jax.Array, part: jax.Array, corner) -> jax.Array:
    """Returns `x` with a part replaced that begins at a corner."""
    return jax.lax.dynamic_update_slice(x, part, [jnp.int32(i) for i in corner])

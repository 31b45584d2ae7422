"""Ring attention (Liu et al. 2023): queries stay, keys and values go round a mesh axis.

Runs on one device's part of the arrays, inside `jax.shard_map`. Each step sends the keys on before
it computes with them, so that the transfer runs beside the arithmetic. The parts' outputs are
merged by their log-sum-exp, at float32; the gradients of keys and values travel with these.

Legend: B batch, T queries and S keys and values on this device, H query heads, K key-value heads,
D size of a query and key head, V size of a value head; 1 is a broadcast dimension.
"""

import dataclasses
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.arrays import accumulator
from pallas_kernels.attention import reference
from pallas_kernels.attention.arguments import Gradients, Operands, Spec
from pallas_kernels.attention.layouts import Layout
from pallas_kernels.attention.ring_place import Keys, Pair, Place, cut, put
from pallas_kernels.block_sizes import BlockSizes


class _Sums(NamedTuple):
    """Gradients in the accumulator's type: of what stays here, then of the keys at hand."""

    q_BTHD: jax.Array
    bias_BHTS: jax.Array | None
    k_BSKD: jax.Array
    v_BSKV: jax.Array


@dataclasses.dataclass(frozen=True)
class Ring:
    """An implementation over a mesh axis, made of one for a single device.

    The operands are this device's: `operands.start` tells its first batch row and head; `mask` and
    `bias` have the columns of all keys, in the layout's order, or one. `spec.shift` is that of the
    whole sequence. Gradients of what all devices of the axis have in common (sinks, a bias with one
    row) are this device's share. The backward pass of `impl` gets o and lse of whole rows.
    """

    impl: ModuleType
    axis: str
    layout: Layout = 'contiguous'

    def forward(
        self, operands: Operands, spec: Spec, block_sizes: BlockSizes | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns o_BTHV in q's type, and lse_BHT."""
        place = Place.of(self.axis, self.layout, operands, spec)
        (B, T, H, _), V = operands.q_BTHD.shape, operands.v_BSKV.shape[3]
        dtype, sinks_H = accumulator(operands.q_BTHD.dtype), operands.sinks_H
        # A sink is one more part, with a weight and without a value: it is merged before all.
        sinks_H = jnp.full(H, -jnp.inf) if sinks_H is None else sinks_H
        lse_BHT = jnp.broadcast_to(sinks_H.astype(dtype)[None, :, None], (B, H, T))
        totals = place.vary((jnp.zeros((B, T, H, V), dtype), lse_BHT))
        keys = place.vary(Keys(*operands[1:3], operands.kv_segment_ids_BS))

        def compute(totals, keys, step):
            def one(totals, pair):
                part = self.impl.forward(place.operands(operands, keys, pair), spec, block_sizes)
                o_BTHV, lse_BHT = (x.astype(dtype) for x in place.vary(part))
                old = place.rows(totals[0], pair.a, 1), place.rows(totals[1], pair.a, 2)
                new = _merge(*old, o_BTHV, lse_BHT)
                return tuple(
                    jax.lax.dynamic_update_slice_in_dim(x, y, pair.a * y.shape[axis], axis)
                    for x, y, axis in zip(totals, new, (1, 2), strict=True)
                )

            return place.visit(one, totals, step)

        def advance(carry, step):
            totals, keys = carry
            sent = place.send(keys, 1)
            return (compute(totals, keys, step), sent), None

        last = place.route.steps - 1
        if last >= 0:
            keys = place.send(keys, place.route.first)
            # The last step sends nothing; so it stands outside the loop.
            (totals, keys), _ = jax.lax.scan(advance, (totals, keys), jnp.arange(last))
            totals = compute(totals, keys, last)
        return totals[0].astype(operands.q_BTHD.dtype), totals[1]

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
        """Returns the gradients, after the keys' have come home."""
        place = Place.of(self.axis, self.layout, operands, spec)
        dtype = accumulator(operands.q_BTHD.dtype)
        bias_BHTS = operands.bias_BHTS if spec.bias_gradient else None
        stay, go = (operands.q_BTHD, bias_BHTS), operands[1:3]
        sums = _Sums(*(place.zeros(x, dtype) for x in (*stay, *go)))
        keys = place.vary(Keys(*go, operands.kv_segment_ids_BS))
        rows = place.vary((o_BTHV, lse_BHT, do_BTHV, dlse_BHT))

        def compute(sums, keys, step):
            def one(sums, pair):
                here = place.operands(operands, keys, pair)
                of_rows = [
                    place.rows(x, pair.a, axis) for x, axis in zip(rows, (1, 2, 1, 2), strict=True)
                ]
                gradients = _backward(self.impl, here, spec, block_sizes, *of_rows)
                return _add_pair(place, sums, place.vary(gradients), pair)

            return place.visit(one, sums, step)

        def advance(carry, step):
            sums, keys = carry
            # What arrives is first needed at the sum, behind all the arithmetic.
            arriving, sent = place.send(sums[2:], 1), place.send(keys, 1)
            sums = _Sums(*sums[:2], *(place.zeros(x, dtype) for x in go))
            sums = compute(sums, keys, step)
            return (_Sums(*sums[:2], *map(jnp.add, sums[2:], arriving)), sent), None

        first, steps = place.route.first, place.route.steps
        if steps:
            keys = place.send(keys, first)
            sent = place.send(keys, 1) if steps > 1 else keys
            sums = compute(sums, keys, 0)
            (sums, _), _ = jax.lax.scan(advance, (sums, sent), jnp.arange(1, steps))
            sums = _Sums(*sums[:2], *place.send(sums[2:], 1 - first - steps))
        return Gradients(
            sums.q_BTHD.astype(operands.q_BTHD.dtype),
            sums.k_BSKD.astype(operands.k_BSKD.dtype),
            sums.v_BSKV.astype(operands.v_BSKV.dtype),
            None if bias_BHTS is None else sums.bias_BHTS.astype(bias_BHTS.dtype),
            _sinks_gradient(operands.sinks_H, o_BTHV, lse_BHT, do_BTHV, dlse_BHT),
        )


def _merge(o_BTHV, lse_BHT, part_BTHV, part_BHT) -> tuple[jax.Array, jax.Array]:
    """Returns output and log-sum-exp of two sets of keys taken as one."""
    both_BHT = jnp.logaddexp(lse_BHT, part_BHT)
    # Where neither set has a visible key, both weights are exp(-inf).
    finite_BHT = jnp.where(jnp.isfinite(both_BHT), both_BHT, 0)
    weight = lambda x_BHT: jnp.exp(x_BHT - finite_BHT).swapaxes(1, 2)[..., None]  # noqa: E731
    return o_BTHV * weight(lse_BHT) + part_BTHV * weight(part_BHT), both_BHT


def _add_pair(place: Place, sums: _Sums, gradients: Gradients, pair: Pair) -> _Sums:
    """Returns the sums with one pair's gradients added in their places."""

    def added(total, part, corner):
        part = part.astype(total.dtype)
        return put(total, cut(total, corner, part.shape) + part, corner)

    rows = lambda total, part, chunk: added(total, part, (0, chunk * part.shape[1], 0, 0))  # noqa: E731
    bias_BHTS = sums.bias_BHTS
    if bias_BHTS is not None:
        bias_BHTS = added(bias_BHTS, gradients.bias, place.corner(bias_BHTS, pair)[0])
    return _Sums(
        rows(sums.q_BTHD, gradients.q, pair.a),
        bias_BHTS,
        rows(sums.k_BSKD, gradients.k, pair.b),
        rows(sums.v_BSKV, gradients.v, pair.b),
    )


def _sinks_gradient(sinks_H, o_BTHV, lse_BHT, do_BTHV, dlse_BHT) -> jax.Array | None:
    """Returns this device's share: of a row, a sink has weight exp(sink - lse) and value 0."""
    if sinks_H is None:
        return None
    dtype = lse_BHT.dtype
    gradient_BHT = -(do_BTHV.astype(dtype) * o_BTHV.astype(dtype)).sum(-1).swapaxes(1, 2)
    if dlse_BHT is not None:
        gradient_BHT += dlse_BHT
    finite_BHT = jnp.where(jnp.isfinite(lse_BHT), lse_BHT, 0)
    p_BHT = jnp.exp(sinks_H.astype(dtype)[None, :, None] - finite_BHT)
    return (p_BHT * gradient_BHT).sum((0, 2)).astype(sinks_H.dtype)


def _backward(impl, operands, spec, block_sizes, o_BTHV, lse_BHT, do_BTHV, dlse_BHT) -> Gradients:
    """Returns the gradients of one part of the keys, given the whole rows' o and lse."""
    if impl is not reference:
        return impl.backward(operands, spec, block_sizes, o_BTHV, lse_BHT, do_BTHV, dlse_BHT)
    # Its backward pass is JAX's, which takes the part for the whole. So it gets the cotangents of
    # the part's o and lse: with w = exp(part's lse - lse), o is the sum of w times the part's o.
    part_BTHV, part_BHT = impl.forward(operands, spec, block_sizes)
    w_BHT = jnp.exp(part_BHT - jnp.where(jnp.isfinite(lse_BHT), lse_BHT, 0))
    do_BTHV, o_BTHV = (x.astype(lse_BHT.dtype) for x in (do_BTHV, o_BTHV))
    dlse_part_BHT = (do_BTHV * (part_BTHV - o_BTHV)).sum(-1).swapaxes(1, 2)
    if dlse_BHT is not None:
        dlse_part_BHT += dlse_BHT
    do_BTHV = (do_BTHV * w_BHT.swapaxes(1, 2)[..., None]).astype(part_BTHV.dtype)
    rows = part_BTHV, part_BHT, do_BTHV, w_BHT * dlse_part_BHT
    return impl.backward(operands, spec, block_sizes, *rows)

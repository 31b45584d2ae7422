"""An implementation of attention that runs another one on each device's part of the arrays.

Legend: B batch, S keys and values, H query heads, K key-value heads, D size of a head.
"""

import dataclasses
import functools
import math
from types import ModuleType

import jax
import jax.numpy as jnp

from pallas_kernels.arrays import accumulator
from pallas_kernels.attention.arguments import Gradients, Operands, Spec
from pallas_kernels.attention.gathered import Gathered
from pallas_kernels.attention.partition import Axes, Partition, partition
from pallas_kernels.attention.ring import Ring
from pallas_kernels.block_sizes import BlockSizes
from pallas_kernels.mesh import vary, varying


@dataclasses.dataclass(frozen=True)
class Sharded:
    """An implementation that runs another one on each device's part of the arrays."""

    impl: ModuleType
    axes: Axes

    def forward(
        self, operands: Operands, spec: Spec, block_sizes: BlockSizes | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns o_BTHV in q's type and lse_BHT."""
        parts = partition(self.axes, operands)

        def local(operands):
            impl, here, local_spec = self._local(parts, operands, spec)
            return impl.forward(here, local_spec, block_sizes)

        along = varying(operands)
        mapped = self._mapped(local, parts, (parts.specs(operands),), parts.outputs)
        return vary(mapped(vary(operands, along)), along)

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
        """Returns the gradients, each summed over the devices that share its operand."""
        parts = partition(self.axes, operands)
        specs = parts.specs(operands)

        def local(operands, *rows):
            impl, here, local_spec = self._local(parts, operands, spec)
            rows = vary(rows, varying(here))
            gradients = impl.backward(here, local_spec, block_sizes, *rows)
            if parts.kv_heads != parts.heads:
                put = functools.partial(_put_heads, parts, operands)
                gradients = gradients._replace(k=put(gradients.k), v=put(gradients.v))
            if not spec.bias_gradient:
                gradients = gradients._replace(bias=None)
            shared = map(parts.split, _varied(specs))
            return Gradients(*map(_summed, gradients, _varied(operands), shared))

        o_spec, lse_spec = parts.outputs
        rows = (o_BTHV, lse_BHT, do_BTHV, dlse_BHT)
        row_specs = (o_spec, lse_spec, o_spec, None if dlse_BHT is None else lse_spec)
        out_specs = Gradients(*_varied(specs))
        if not spec.bias_gradient:
            out_specs = out_specs._replace(bias=None)
        along = varying((operands, rows))
        mapped = self._mapped(local, parts, (specs, *row_specs), out_specs)
        gradients = vary(mapped(*vary((operands, *rows), along)), along)
        # The axes of an enclosing map: what is equal along one has the sum as its gradient.
        shared = [() if x is None else along - varying(x) for x in _varied(operands)]
        return Gradients(*map(_summed, gradients, _varied(operands), shared))

    def _mapped(self, local, parts: Partition, in_specs, out_specs):
        if not parts.mapped:
            return local
        # Nothing rests on the types of what varies: derivatives do not pass through here, and
        # Pallas' interpreter does not know them.
        return jax.shard_map(
            local,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=set(parts.mapped),
            check_vma=False,
        )

    def _local(self, parts: Partition, operands: Operands, spec: Spec):
        """Returns implementation, operands and specification as they are on one device."""
        # Only where it counts: an implementation may know less of the tiles of a shard.
        if spec.dropout_rate or self.axes.context:
            operands = operands._replace(start=self._start(parts, operands))
        operands = vary(operands, varying(operands))
        if parts.kv_heads != parts.heads:
            heads_K = kv_heads_here(parts, operands)
            k_BSKD, v_BSKV = (jnp.take(x, heads_K, axis=2) for x in operands[1:3])
            operands = operands._replace(k_BSKD=k_BSKD, v_BSKV=v_BSKV)
        if not self.axes.context:
            return self.impl, operands, spec
        (axis,) = self.axes.context
        if axis in parts.manual:
            spec = dataclasses.replace(spec, shift=spec.shift * jax.lax.axis_size(axis))
        if jax.lax.axis_size(axis) == 1:
            return self.impl, operands, spec
        around = {'ring': Ring, 'gather': Gathered}[self.axes.exchange]
        return around(self.impl, axis, self.axes.layout), operands, spec

    def _start(self, parts: Partition, operands: Operands) -> jax.Array:
        """Returns the global indices of this device's first batch row and head, and zeros."""
        (B, _, H, _), first = operands.q_BTHD.shape, []
        split = parts.batch + parts.heads + parts.manual
        for size, names in (B, self.axes.batch), (H, self.axes.heads):
            here = tuple(n for n in names if n in split)
            first.append(size * jax.lax.axis_index(here) if here else 0)
        start = jnp.array([*first, 0, 0], jnp.int32)
        return start if operands.start is None else operands.start + start


def _varied(x: Operands) -> tuple:
    """Returns what has a gradient, in the order of `Gradients`."""
    return x.q_BTHD, x.k_BSKD, x.v_BSKV, x.bias_BHTS, x.sinks_H


def _summed(gradient, operand, axes):
    """Returns a gradient summed over axes, in its operand's type."""
    if gradient is None:
        return None
    gradient = gradient.astype(accumulator(operand.dtype))
    return (jax.lax.psum(gradient, tuple(axes)) if axes else gradient).astype(operand.dtype)


def kv_heads_here(parts: Partition, operands: Operands) -> jax.Array:
    """Returns the key-value heads of this device's query heads, where all are at hand.

    So few that each serves as many query heads: all of a group's or, where the device holds parts
    of groups, the largest number that cuts groups and devices alike.
    """
    H, K = operands.q_BTHD.shape[2], operands.k_BSKD.shape[2]
    group = H * jax.lax.axis_size(parts.heads) // K
    serves = math.gcd(H, group)
    first = jax.lax.axis_index(parts.heads) * H
    return (first + serves * jnp.arange(H // serves)) // group


def _put_heads(parts: Partition, operands: Operands, gradient_BSKD):
    """Returns gradients of the key-value heads here as gradients of all of them."""
    B, S, K, _ = operands.k_BSKD.shape
    D = gradient_BSKD.shape[3]
    zeros_BSKD = jnp.zeros((B, S, K, D), accumulator(gradient_BSKD.dtype))
    heads_K = kv_heads_here(parts, operands)
    return zeros_BSKD.at[:, :, heads_K].add(gradient_BSKD.astype(zeros_BSKD.dtype))

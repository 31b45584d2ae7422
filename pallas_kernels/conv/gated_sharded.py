"""WaveNet's gated unit for arrays that are split over a mesh: `jax.shard_map` around its kernels.

The batch is cut, and the gates: each device makes the outputs that come from its own gates, and the
sum over devices is the unit's. XLA partitions the plain forms by itself.

Legend: B batch, T positions, K taps, C channels, G gate channels, F = 2 G, S skip channels,
R positions before the first.
"""

import dataclasses
import functools
import math
from types import ModuleType

import jax
from jax.sharding import PartitionSpec as P

from pallas_kernels import mesh
from pallas_kernels.arrays import accumulator
from pallas_kernels.conv.gated_arguments import GatedOperands
from pallas_kernels.conv.partition import Axes, divides
from pallas_kernels.mesh import Names

# Operands that all devices add to, over the batch or over the gates.
_WEIGHTS = ('w_KCF', 'w_residual_GC', 'w_skip_GS', 'bias_F', 'bias_residual_C', 'bias_skip_S')


@dataclasses.dataclass(frozen=True)
class Sharded:
    """The kernels' two passes on each device's part of the arrays.

    Attributes:
      kernels: module with `forward`, `backward` and `refuses`.
      mapped: all axes of the mesh that no `jax.shard_map` around the call has split.
      batch, gates: those that split it here.
    """

    kernels: ModuleType
    mapped: Names
    batch: Names
    gates: Names

    @property
    def specs(self) -> GatedOperands:
        """The PartitionSpec of every operand, tanh and sigmoid in a dimension of their own."""
        b, g = self.batch or None, self.gates or None
        return GatedOperands(
            x_BTC=P(b, None, None),
            w_KCF=P(None, None, None, g),
            w_residual_GC=P(g, None),
            w_skip_GS=P(g, None),
            bias_F=P(None, g),
            bias_residual_C=P(None),
            bias_skip_S=P(None),
            state_BRC=P(b, None, None),
            segment_ids_BT=P(b, None),
        )

    def placed(self, operands: GatedOperands) -> GatedOperands:
        """Returns the operands as the passes take them, and give their gradients, on Explicit axes.

        That of F features is whole: its halves are split, which its own order does not allow.
        """
        whole = self.specs._replace(w_KCF=P(*[None] * 3), bias_F=P(None))
        return mesh.reshard(operands, _there(operands, whole))

    def refuses(self, operands: GatedOperands, dilation: int) -> str | None:
        """Returns why the kernels do not take a part of a call, None if they do."""
        halves = jax.eval_shape(_halves, operands)
        here = jax.eval_shape(_joined, mesh.part(halves, _there(halves, self.specs)))
        return self.kernels.refuses(here, dilation)

    def forward(self, operands: GatedOperands, dilation: int) -> tuple[jax.Array, jax.Array]:
        """Returns the residual output [B, T, C] and the skip output [B, T, S] in x's type."""

        def local(halves: GatedOperands) -> tuple[jax.Array, jax.Array]:
            here = _joined(halves)
            if not self.gates:
                return self.kernels.forward(here, dilation)
            once = here._replace(bias_residual_C=None, bias_skip_S=None)
            y_BTC, skip_BTS = self.kernels.forward(once, dilation, partial=True)
            biases = here.bias_residual_C, here.bias_skip_S
            y_BTC, skip_BTS = (
                self._sum(x, bias) for x, bias in zip((y_BTC, skip_BTS), biases, strict=True)
            )
            y_BTC += here.x_BTC.astype(y_BTC.dtype)
            return y_BTC.astype(here.x_BTC.dtype), skip_BTS.astype(here.x_BTC.dtype)

        halves = _halves(operands)
        specs = _there(halves, self.specs)
        return self._mapped(local, (specs,), (self.specs.x_BTC,) * 2)(mesh.reshard(halves, specs))

    def backward(
        self, operands: GatedOperands, dilation: int, dy_BTC: jax.Array, dskip_BTS: jax.Array
    ) -> GatedOperands:
        """Returns the gradients of all arrays but the segment ids, each in its own type."""

        def local(halves, dy_BTC, dskip_BTS):
            here = _joined(halves)
            more = {'partial': True} if self.gates else {}
            made = self.kernels.backward(here, dilation, dy_BTC, dskip_BTS, **more)
            if self.gates:
                dx_BTC = self._sum(made.x_BTC) + dy_BTC.astype(accumulator(dy_BTC.dtype))
                made = made._replace(x_BTC=dx_BTC.astype(dy_BTC.dtype))
                if (dstate := made.state_BRC) is not None:
                    made = made._replace(state_BRC=self._sum(dstate).astype(dstate.dtype))
            if self.batch:
                sums = {n: getattr(made, n) for n in _WEIGHTS if getattr(made, n) is not None}
                total = {
                    n: jax.lax.psum(x.astype(accumulator(x.dtype)), self.batch).astype(x.dtype)
                    for n, x in sums.items()
                }
                made = made._replace(**total)
            return _halves(made)

        halves = _halves(operands)
        specs, row = _there(halves, self.specs), self.specs.x_BTC
        given = specs, row, row
        run = self._mapped(local, given, specs._replace(segment_ids_BT=None))
        made = run(*mesh.reshard((halves, dy_BTC, dskip_BTS), given))
        apart = self.specs._replace(w_KCF=P(*[None] * 4), bias_F=P(None, None))
        return _joined(mesh.reshard(made, _there(made, apart)))

    def _sum(self, part: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """Returns the sum over the devices' gates, and a bias added once, in the accumulator."""
        total = jax.lax.psum(part.astype(accumulator(part.dtype)), self.gates)
        return total if bias is None else total + bias.astype(total.dtype)[None, None]

    def _mapped(self, local, in_specs, out_specs):
        if not self.mapped:
            return local
        # As in `sharded`: no derivative passes through here, so nothing rests on what varies.
        return jax.shard_map(
            local, in_specs=in_specs, out_specs=out_specs, axis_names=set(self.mapped),
            check_vma=False,
        )  # fmt: skip


def sharded(axes: Axes, operands: GatedOperands, kernels: ModuleType) -> Sharded | None:
    """Returns how the mesh that is set splits a call; None where there is nothing to split over.

    Raises:
      ValueError: an axis is not in the mesh, splits positions, or does not divide the gates or the
        batch.
    """
    around_mesh = jax.sharding.get_abstract_mesh()
    if around_mesh.empty:
        return None
    mesh.check_axes(around_mesh, vars(axes))
    around = mesh.manual(around_mesh)
    if not around and around_mesh.size == 1:
        return None
    size = lambda names: math.prod(around_mesh.shape[n] for n in names)  # noqa: E731
    for field in ('rows', 'cols'):
        names = getattr(axes, field)
        if size(names) > 1:
            raise ValueError(
                f'{field}={names[0]!r}: the gated unit splits batch and gates only; '
                f'try {field}=None'
            )
    batch, gates = (tuple(n for n in x if n not in around) for x in (axes.batch, axes.channels))
    batch = () if size(batch) > operands.x_BTC.shape[0] else batch
    divides('batch', batch, 'sequences', operands.x_BTC.shape[0], size(batch))
    divides('channels', gates, 'gate channels', operands.w_residual_GC.shape[0], size(gates))
    mapped = tuple(n for n in around_mesh.axis_names if n not in around)
    return Sharded(kernels, mapped, batch, gates if size(gates) > 1 else ())


def _there(operands: GatedOperands, specs: GatedOperands) -> GatedOperands:
    """Returns the specs of the operands that are there."""
    full = zip(operands, specs, strict=True)
    return GatedOperands(*[None if x is None else spec for x, spec in full])


def _cut(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2)


def _joint(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:-2], -1)


def _features(change, operands: GatedOperands) -> GatedOperands:
    """Returns the operands with those changed that have F features."""
    bias = None if operands.bias_F is None else change(operands.bias_F)
    return operands._replace(w_KCF=change(operands.w_KCF), bias_F=bias)


# Between [.., F], as the kernels take it, and [.., 2, G], which a mesh can split by gates.
_halves = functools.partial(_features, _cut)
_joined = functools.partial(_features, _joint)

"""Convolution of arrays that are split over a mesh, by `jax.shard_map` around any implementation.

The compiler does not partition a kernel, so the call is cut here: images over batch axes, output
channels (and groups) over channel axes, rows and columns over spatial ones, where each part gets
the positions that it needs of its neighbours (`halo`) first.

Legend: B batch, H W input rows and columns, P Q output rows and columns, K L kernel rows and
columns, D channels of a kernel, O output channels, T positions.
"""

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import mesh
from pallas_kernels.arrays import accumulator, wrong
from pallas_kernels.conv import gated, halo
from pallas_kernels.conv.arguments import ConvBlockSizes, Operands, Spec
from pallas_kernels.conv.checks import check_conv1d, check_conv2d
from pallas_kernels.conv.choice import Implementation, chosen
from pallas_kernels.conv.differentiable import convolve
from pallas_kernels.conv.gated_arguments import check_gated
from pallas_kernels.conv.partition import Axes, Partition, partition
from pallas_kernels.conv.state import carried


class Convolutions(NamedTuple):
    """The functions of `pallas_kernels.conv` for arrays that are split over a mesh."""

    conv2d: Callable[..., jax.Array]
    conv1d: Callable[..., jax.Array | tuple[jax.Array, jax.Array]]
    gated_conv1d: Callable[..., tuple[jax.Array, ...]]


def shard(
    *,
    batch: str | mesh.Names = (),
    rows: str | None = None,
    cols: str | None = None,
    channels: str | mesh.Names = (),
) -> Convolutions:
    """Returns `conv2d`, `conv1d` and `gated_conv1d` for arrays that are split over a mesh.

    They take and return the same (global) arrays, and have derivatives of any order. The mesh is
    the one that is set when they are called; where none is, or all its axes are 1, they are those
    of `pallas_kernels.conv`.

    Args:
      batch: mesh axes that split the batch; one of fewer rows than that is computed by all.
      rows: mesh axis that splits the rows of images, with an exchange of those at the parts' edges.
      cols: mesh axis that splits their columns, or a sequence's positions, likewise.
      channels: mesh axes that split the output channels; with groups, the groups; the gates of the
        gated unit, which takes no split of positions.

    Raises:
      ValueError: an axis is not in the mesh or named twice, or a dimension does not divide.
    """
    axes = Axes(*map(mesh.names, (batch, rows, cols, channels)))

    def run(impl, operands: Operands, spec: Spec, block_sizes) -> jax.Array:
        parts = partition(axes, operands, spec)
        if parts is None:
            return convolve(chosen(impl, operands, spec), operands, spec, block_sizes)
        module = Sharded(chosen(impl, parts.local(operands), parts.spec), axes)
        operands = mesh.reshard(operands, parts.specs(operands))
        return convolve(module, operands, spec, block_sizes)

    def conv2d(
        x_BHWC: jax.Array,
        w_KLDO: jax.Array,
        *,
        block_sizes: ConvBlockSizes | None = None,
        impl: Implementation | None = None,
        **features,
    ) -> jax.Array:
        operands, spec = check_conv2d(x_BHWC, w_KLDO, block_sizes=block_sizes, **features)
        return run(impl, operands, spec, block_sizes)

    def conv1d(
        x_BTC: jax.Array,
        w_KDO: jax.Array,
        *,
        block_sizes: ConvBlockSizes | None = None,
        impl: Implementation | None = None,
        state: jax.Array | None = None,
        return_state: bool = False,
        **features,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        if state is not None and axes.cols:
            rule = f'must be None where cols={axes.cols[0]!r} splits the positions'
            raise wrong('state', state, rule, 'None')
        given = {'state': state, 'return_state': return_state, 'block_sizes': block_sizes}
        operands, spec = check_conv1d(x_BTC, w_KDO, **given, **features)
        call = lambda operands, spec: run(impl, operands, spec, block_sizes)  # noqa: E731
        return carried(call, operands, spec, state, return_state)

    def gated_conv1d(
        x_BTC: jax.Array,
        w_KCF: jax.Array,
        w_residual_GC: jax.Array,
        w_skip_GS: jax.Array,
        *,
        dilation: int = 1,
        return_state: bool = False,
        impl: Implementation | None = None,
        **features,
    ) -> tuple[jax.Array, ...]:
        weights = w_KCF, w_residual_GC, w_skip_GS
        operands = check_gated(x_BTC, *weights, dilation=dilation, **features)
        return gated.unit(operands, dilation, impl, return_state, axes)

    return Convolutions(conv2d, conv1d, gated_conv1d)


@dataclasses.dataclass(frozen=True)
class Sharded:
    """An implementation that runs another one on each device's part of the arrays."""

    impl: ModuleType
    axes: Axes

    def forward(
        self,
        operands: Operands,
        spec: Spec,
        block_sizes: ConvBlockSizes | None = None,
        keep: bool = False,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns y_BPQO in x's type and, where `keep`, u_BPQO."""
        parts = partition(self.axes, operands, spec)

        def local(operands):
            made = self.impl.forward(_wider(parts, operands), parts.spec, block_sizes, keep)
            return jax.tree.map(lambda x: _narrower(parts, x, operands), made)

        outputs = parts.outputs, parts.outputs if keep else None
        return _mapped(local, parts, (parts.specs(operands),), outputs)(operands)

    def input_gradient(
        self,
        du_BPQO: jax.Array,
        operands: Operands,
        spec: Spec,
        block_sizes: ConvBlockSizes | None = None,
    ) -> jax.Array:
        """Returns the cotangent of x, summed over the devices that had a position."""
        parts = partition(self.axes, operands, spec)
        specs = parts.specs(operands)

        def local(du_BPQO, operands):
            wider, du_BPQO = _wider(parts, operands), _zeros_around(parts, du_BPQO)
            dx_BHWC = self.impl.input_gradient(du_BPQO, wider, parts.spec, block_sizes)
            dtype = dx_BHWC.dtype
            dx_BHWC = dx_BHWC.astype(accumulator(dtype))
            for n, axes in enumerate((parts.rows, parts.cols)):
                if axes:
                    dx_BHWC = halo.fold(dx_BHWC, *axes, 1 + n, parts.before[n], parts.after[n])
            if parts.channels and spec.groups == 1:
                dx_BHWC = jax.lax.psum(dx_BHWC, parts.channels)
            return dx_BHWC.astype(dtype)

        return _mapped(local, parts, (parts.outputs, specs), specs.x_BHWC)(du_BPQO, operands)

    def weight_gradient(
        self,
        du_BPQO: jax.Array,
        operands: Operands,
        spec: Spec,
        block_sizes: ConvBlockSizes | None = None,
    ) -> jax.Array:
        """Returns the cotangent of w, summed over the parts of batch and space."""
        parts = partition(self.axes, operands, spec)
        specs = parts.specs(operands)

        def local(du_BPQO, operands):
            wider, du_BPQO = _wider(parts, operands), _zeros_around(parts, du_BPQO)
            dw_KLDO = self.impl.weight_gradient(du_BPQO, wider, parts.spec, block_sizes)
            axes = parts.batch + parts.rows + parts.cols
            total = dw_KLDO.astype(accumulator(dw_KLDO.dtype))
            return (jax.lax.psum(total, axes) if axes else total).astype(dw_KLDO.dtype)

        return _mapped(local, parts, (parts.outputs, specs), specs.w_KLDO)(du_BPQO, operands)


def _mapped(local, parts: Partition, in_specs, out_specs):
    if not parts.mapped:
        return local
    # Nothing rests on the types of what varies: derivatives do not pass through here, and Pallas'
    # interpreter does not know them.
    return jax.shard_map(
        local,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(parts.mapped),
        check_vma=False,
    )


def _wider(parts: Partition, operands: Operands) -> Operands:
    """Returns a part's operands with its neighbours' positions."""
    x_BHWC, ids_BT = operands.x_BHWC, operands.segment_ids_BT
    for n, axes in enumerate((parts.rows, parts.cols)):
        if axes:
            x_BHWC = halo.exchange(x_BHWC, *axes, 1 + n, parts.before[n], parts.after[n])
    if parts.cols and ids_BT is not None:
        ids_BT = halo.exchange(ids_BT, *parts.cols, 1, parts.before[1], parts.after[1])
    return operands._replace(x_BHWC=x_BHWC, segment_ids_BT=ids_BT)


def _narrower(parts: Partition, y_BPQO: jax.Array, operands: Operands) -> jax.Array:
    """Returns the outputs of a part, without those of its neighbours' positions."""
    if not (parts.taps and parts.cols):
        return y_BPQO
    T = operands.x_BHWC.shape[2]
    return jax.lax.slice_in_dim(y_BPQO, parts.before[1], parts.before[1] + T, axis=2)


def _zeros_around(parts: Partition, du_BPQO: jax.Array) -> jax.Array:
    """Returns the transpose of `_narrower`."""
    if not (parts.taps and parts.cols):
        return du_BPQO
    return jnp.pad(du_BPQO, ((0, 0), (0, 0), (parts.before[1], parts.after[1]), (0, 0)))

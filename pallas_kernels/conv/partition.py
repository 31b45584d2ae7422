"""How a mesh splits the arrays of one convolution, and what is said when it cannot.

Legend: B batch, H W input rows and columns, P Q output rows and columns, O output channels.
"""

import dataclasses
import math

import jax
from jax.sharding import PartitionSpec as P

from pallas_kernels.conv.arguments import Operands, Spec, span
from pallas_kernels.mesh import Names, check_axes, check_once, manual, part

_DIMS = {'rows': (0, 'H'), 'cols': (1, 'W')}


@dataclasses.dataclass(frozen=True)
class Axes:
    """Names of the mesh axes over which images, rows, columns and output channels are split.

    Raises:
      ValueError: an axis that is named twice, or two for rows or for columns.
    """

    batch: Names
    rows: Names  # one or none
    cols: Names  # one or none
    channels: Names

    def __post_init__(self):
        for field in _DIMS:
            axes = getattr(self, field)
            if len(axes) > 1:
                raise ValueError(f'{field}={axes}: must be one axis; try {field}={axes[0]!r}')
        check_once(vars(self), 'rows=None')


@dataclasses.dataclass(frozen=True)
class Partition:
    """Which axes split which dimension of one call's arrays.

    Attributes:
      mapped: all axes of the mesh that no `jax.shard_map` around the call has split.
      batch, rows, cols, channels: those that split it here.
      before, after: rows and columns of its neighbours that a part needs.
      spec: what is static in the call of a part.
      taps: whether outputs must be as long as inputs (segments), so that those of the neighbours'
        positions are computed and left out.
    """

    mapped: Names
    batch: Names
    rows: Names
    cols: Names
    channels: Names
    before: tuple[int, int]
    after: tuple[int, int]
    spec: Spec
    taps: bool

    @property
    def outputs(self) -> P:
        """The PartitionSpec of y, u and their gradients."""
        return P(*(axes or None for axes in (self.batch, self.rows, self.cols, self.channels)))

    def specs(self, operands: Operands) -> Operands:
        """Returns the PartitionSpec of every operand that is there."""
        b, r, c, o = (axes or None for axes in (self.batch, self.rows, self.cols, self.channels))
        grouped = o if operands.w_KLDO.shape[2] < operands.x_BHWC.shape[3] else None
        dims = Operands(
            x_BHWC=P(b, r, c, grouped),
            w_KLDO=P(None, None, None, o),
            bias_O=P(o),
            scale_O=P(o),
            shift_O=P(o),
            residual_BPQO=self.outputs,
            segment_ids_BT=P(b, c),
        )
        full = zip(operands, dims, strict=True)
        return Operands(*[None if x is None else spec for x, spec in full])

    def local(self, operands: Operands) -> Operands:
        """Returns the shapes and types of one device's part with its neighbours' positions."""
        here = part(operands, self.specs(operands))
        B, H, W, C = here.x_BHWC.shape
        more = tuple(map(sum, zip(self.before, self.after, strict=True)))
        x = jax.ShapeDtypeStruct((B, H + more[0], W + more[1], C), here.x_BHWC.dtype)
        ids = here.segment_ids_BT
        if ids is not None:
            ids = jax.ShapeDtypeStruct((B, W + more[1]), ids.dtype)
        return here._replace(x_BHWC=x, segment_ids_BT=ids)


def partition(axes: Axes, operands: Operands, spec: Spec) -> Partition | None:
    """Returns how the mesh that is set splits a call; None where there is nothing to split over.

    Raises:
      ValueError: an axis is not in the mesh, or does not divide what it shall split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    check_axes(mesh, vars(axes))
    around = manual(mesh)
    mapped = tuple(n for n in mesh.axis_names if n not in around)
    if not around and mesh.size == 1:
        return None
    free = lambda axes: tuple(n for n in axes if n not in around)  # noqa: E731
    size = lambda axes: math.prod(mesh.shape[n] for n in axes)  # noqa: E731
    batch, channels = free(axes.batch), free(axes.channels)
    # A model is often initialised with a row or two.
    batch = () if size(batch) > operands.x_BHWC.shape[0] else batch
    divides('batch', batch, 'images', operands.x_BHWC.shape[0], size(batch))
    divides('channels', channels, 'output channels', operands.w_KLDO.shape[3], size(channels))
    groups = spec.groups
    if groups > 1:
        divides('channels', channels, 'groups', groups, size(channels))
        groups //= size(channels)
    segments = operands.segment_ids_BT is not None
    before, after, padding = [0, 0], [0, 0], [*spec.padding]
    for field, (n, letter) in _DIMS.items():
        split = getattr(axes, field)
        if set(split) & set(around):
            raise ValueError(
                f'{field}={split[0]!r}: is an axis of the shard_map around this call, which cannot '
                f'reach its neighbours then; try the call outside of it'
            )
        if size(split) > 1:
            _check_kept(field, split, letter, operands, spec, n, size(split))
            before[n] = spec.padding[n][0]
            over = span(operands.w_KLDO.shape[n], spec.dilation[n])
            after[n] = max(0, over - spec.stride[n] - before[n])
            if not segments:
                padding[n] = (0, 0)
    here = dataclasses.replace(spec, padding=tuple(padding), groups=groups)
    rows, cols = (axes if size(axes) > 1 else () for axes in (axes.rows, axes.cols))
    return Partition(
        mapped, batch, rows, cols, channels, tuple(before), tuple(after), here, segments
    )


def _check_kept(field, axes, letter, operands, spec, n, parts) -> None:
    """Raises unless every part makes as many outputs as it has strides of inputs."""
    size = operands.x_BHWC.shape[1 + n]
    stride, out = (
        spec.stride[n],
        spec.out_size(operands.x_BHWC.shape[1:3], operands.w_KLDO.shape[:2])[n],
    )
    if out * stride != size:
        raise ValueError(
            f'{field}={axes[0]!r}: splits outputs as it splits inputs, so {letter} / stride of '
            f"them must remain, and of {size} / {stride} there are {out}; try padding='SAME'"
        )
    divides(field, axes, f'{letter} / stride', out, parts)


def divides(field: str, axes: Names, what: str, count: int, parts: int) -> None:
    """Raises ValueError unless `parts`, the devices along `axes`, divide the count of `what`."""
    if count % parts:
        good = max(1, round(count / parts)) * parts
        shown = repr(axes[0]) if len(axes) == 1 else repr(axes)
        raise ValueError(
            f'{field}={shown}: the {count} {what} must be a multiple of {parts}, the devices along '
            f'the axis; try {good}'
        )

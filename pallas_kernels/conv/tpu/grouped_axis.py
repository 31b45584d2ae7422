"""Rows or columns of a convolution cut into tiles of outputs, and the kernel of such tiles.

Tile j makes the outputs j * outs + t, t < outs, and sees the inputs j * step + offset for a few
fixed offsets. Whatever the stride and the dilation, one matrix takes the inputs of a tile to its
outputs, the same for every tile. The gradient of an input is of this kind, too: with a stride,
`outs` is a multiple of it and the outputs of a tile see taps of their own.
"""

import dataclasses

ABSENT = -1


@dataclasses.dataclass(frozen=True)
class Axis:
    """Tiles along one dimension, all static.

    Attributes:
      inputs, outputs: positions that there are.
      outs: outputs of a tile.
      step: inputs from a tile to the next.
      offsets: of the inputs that a tile sees from its step; those that no tile has are left out.
      taps: for every offset and every output of a tile the tap between them, or `ABSENT`.
    """

    inputs: int
    outputs: int
    outs: int
    step: int
    offsets: tuple[int, ...]
    taps: tuple[tuple[int, ...], ...]

    @property
    def tiles(self) -> int:
        """Tiles that it takes; the last may have outputs behind the end."""
        return -(-self.outputs // self.outs)

    @property
    def reach(self) -> int:
        """Inputs from the first to the last that a tile sees."""
        return self.offsets[-1] - self.offsets[0] + 1

    def inside(self, offset: int) -> tuple[int, int]:
        """Returns the range of the tiles for which an offset is no padding."""
        first = max(0, -(offset // self.step))
        last = min(self.tiles, (self.inputs - 1 - offset) // self.step + 1)
        return min(first, self.tiles), max(first, last)

    def made(self, t: int) -> int:
        """Returns how many tiles have an output t that exists."""
        return -(-(self.outputs - t) // self.outs)


def forward_axis(
    inputs: int, outputs: int, taps: int, *, stride: int, dilation: int, low: int, outs: int
) -> Axis:
    """Returns the tiles of a convolution with `low` zeros before the inputs."""
    seen = {(t * stride + tap * dilation - low, t): tap for t in range(outs) for tap in range(taps)}
    return _axis(inputs, outputs, outs, outs * stride, seen)


def gradient_axis(
    inputs: int, outputs: int, taps: int, *, stride: int, dilation: int, low: int, outs: int
) -> Axis:
    """Returns the tiles of the input's gradient, whose inputs are a convolution's `outputs`.

    `outs` must be a multiple of the stride.
    """
    seen = {}
    for t in range(outs):
        for tap in range(taps):
            offset, rest = divmod(t + low - tap * dilation, stride)
            if not rest:
                seen[offset, t] = tap
    return _axis(outputs, inputs, outs, outs // stride, seen)


def _axis(inputs: int, outputs: int, outs: int, step: int, seen: dict) -> Axis:
    offsets = sorted({offset for offset, _ in seen})
    whole = Axis(inputs, outputs, outs, step, tuple(offsets), ())
    kept = [o for o in offsets if whole.inside(o)[0] < whole.inside(o)[1]] or offsets[:1]
    taps = tuple(tuple(seen.get((o, t), ABSENT) for t in range(outs)) for o in kept)
    return dataclasses.replace(whole, offsets=tuple(kept), taps=taps)

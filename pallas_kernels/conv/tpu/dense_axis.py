"""Which inputs the outputs of a convolution see along one dimension.

The gradient of the input of a strided convolution is one convolution for each phase, that is for
each remainder of the output's index by the stride. So an axis has outputs in units of `step_out` of
them, each with taps of its own, and a unit moves `step_in` inputs: a forward pass has units of one
output that move by the stride, that gradient has units of a stride's outputs that move by one.
"""

import dataclasses
import functools

Tap = tuple[int, int]  # its index in the kernel, and which input it sees, from the unit's first on


@dataclasses.dataclass(frozen=True)
class Axis:
    """Rows or columns of a convolution, all static.

    Attributes:
      size_in, size_out: inputs and outputs that there are.
      step_in: inputs from one unit to the next.
      taps: for each output of a unit, the taps that may see an input.
    """

    size_in: int
    size_out: int
    step_in: int
    taps: tuple[tuple[Tap, ...], ...]

    @property
    def step_out(self) -> int:
        """Outputs of a unit."""
        return len(self.taps)

    @property
    def units(self) -> int:
        """Units that there are; the last may be short."""
        return -(-self.size_out // self.step_out)

    @property
    def shifts(self) -> tuple[int, int]:
        """The first and the last input that a unit sees, from its first on."""
        seen = [shift for taps in self.taps for _, shift in taps] or [0]
        return min(seen), max(seen)

    def source(self, unit: int, shift: int) -> int | None:
        """The input that a tap of a unit sees, None if that is padding."""
        place = unit * self.step_in + shift
        return place if 0 <= place < self.size_in else None

    @functools.cached_property
    def inner(self) -> tuple[int, int]:
        """The units, from one to before another, whose taps see no padding and that are whole."""
        low, high = self.shifts
        first = max(0, -(low // self.step_in))
        last = min(self.size_out // self.step_out, (self.size_in - 1 - high) // self.step_in + 1)
        return (first, last) if first < last else (0, 0)

    def window(self, units: int) -> int:
        """Inputs that units in a row see."""
        low, high = self.shifts
        return min(self.size_in, (units - 1) * self.step_in + high - low + 1)


def forward_axis(
    size_in: int, size_out: int, taps: int, stride: int, dilation: int, low: int
) -> Axis:
    """Returns a convolution's axis; `low` zeros stand before the inputs."""
    return Axis(size_in, size_out, stride, (tuple((k, k * dilation - low) for k in range(taps)),))


def gradient_axis(
    size_in: int, size_out: int, taps: int, stride: int, dilation: int, low: int
) -> Axis:
    """Returns the axis of the input's gradient: of what is `size_out`, from what is `size_in`."""
    return Axis(
        size_in,
        size_out,
        1,
        tuple(
            tuple(
                (k, (phase + low - k * dilation) // stride)
                for k in reversed(range(taps))
                if (phase + low - k * dilation) % stride == 0
            )
            for phase in range(stride)
        ),
    )

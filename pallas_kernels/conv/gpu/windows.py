"""The input of a dense convolution as TMA copies it: rows of a matrix, one for each output.

Legend: B batch, H W input rows and columns, C input channels, M = B * P * Q outputs.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.conv.gpu.axes import Axis

COLUMNS = 64  # channels of one copy: a line of shared memory as the tensor cores read it


@dataclasses.dataclass(frozen=True)
class Windows:
    """How TMA's im2col mode reads x: as windows that start at every output's first tap.

    A stride s is not TMA's (Pallas does not hand that on): x is seen as [B, H / s, s, W / s, s * C]
    without a copy, and a tap is then an offset in whole strides, a row among s, and channels from a
    multiple of C on.
    """

    axes: tuple[Axis, Axis]
    given: int

    @property
    def channels(self) -> int:
        """Channels of x in memory: `given` ones, and zeros up to what TMA can copy."""
        # Where a stride's columns lie side by side, a copy of 64 must not reach into the next.
        return self.given + -self.given % (COLUMNS if self.axes[1].stride > 1 else 8)

    @property
    def flat(self) -> bool:
        """Whether x has one row only, as a conv1d's; it then has no dimension for rows."""
        rows = self.axes[0]
        return rows.size == rows.out == rows.taps == 1 and rows.first == 0

    def _strided(self) -> list[tuple[int, int, int]]:
        """Returns (size in strides, padding before, window) of each dimension that slides."""
        found = []
        for axis in self.axes[1:] if self.flat else self.axes:
            low = min(0, axis.first // axis.stride)
            found.append((-(-axis.size // axis.stride), -low, axis.last // axis.stride - low + 1))
        return found

    @property
    def window(self) -> tuple[int, ...]:
        """The window's size in each spatial dimension of what TMA sees."""
        window, _ = zip(*self._dimensions(), strict=True)
        return window

    @property
    def padding(self) -> tuple[tuple[int, int], ...]:
        """The zeros before and after each spatial dimension of what TMA sees."""
        _, padding = zip(*self._dimensions(), strict=True)
        return padding

    def _dimensions(self) -> list[tuple[int, tuple[int, int]]]:
        found = []
        for axis, (size, low, window) in zip(self.axes[self.flat :], self._strided(), strict=True):
            # `out` windows start at -low; what TMA is told is where the last of them ends.
            high = axis.out - low - size + window - 1
            found.append((window - min(high, 0), (low, max(high, 0))))
            if axis is self.axes[0] and axis.stride > 1:
                found.append((axis.stride, (0, 0)))  # one window over the rows of a stride
        return found

    def refuses(self) -> str | None:
        """Returns why TMA cannot read these windows, or None."""
        window, padding = self.window, self.padding
        most = 1 << (16 // len(window))
        for size, (low, high) in zip(window, padding, strict=True):
            fits = size <= most and low <= most // 2
            fits = fits and max(0, size - 1 - most // 2) <= high <= size - 2 + most // 2
            if not fits:
                return f'takes dilated kernels of up to {most} strides, and half of that as padding'
        return None

    def view(self, x_BHWC: jax.Array) -> jax.Array:
        """Returns x as TMA sees it, padded where a stride does not divide it."""
        (rows, columns), (B, H, W, C) = self.axes, x_BHWC.shape
        pads = ((0, 0), (0, -H % rows.stride), (0, -W % columns.stride), (0, self.channels - C))
        x = jnp.pad(x_BHWC, pads)
        _, H, W, C = x.shape
        last = (W // columns.stride, columns.stride * C)
        if self.flat:
            return x.reshape(B, *last)
        if rows.stride > 1:
            return x.reshape(B, H // rows.stride, rows.stride, *last)
        return x.reshape(B, H, *last)

    def matrix(self, ref: jax.Ref) -> jax.Ref:
        """Returns [M, *window, C] of a reference to the view; copies read it, nothing else does."""
        return plgpu.im2col_ref(ref, window_shape=self.window, padding=self.padding)

    def written_out(self, view: jax.Array) -> jax.Array:
        """Returns [M, *window, C], in memory: what the interpreter reads instead of windows."""
        starts = [
            n + sum(pads) - w + 1
            for n, w, pads in zip(view.shape[1:-1], self.window, self.padding, strict=True)
        ]
        padded = jnp.pad(view, ((0, 0), *self.padding, (0, 0)))
        B, C = view.shape[0], view.shape[-1]
        taps = []
        for offset in itertools.product(*map(range, self.window)):
            index = tuple(slice(o, o + n) for o, n in zip(offset, starts, strict=True))
            taps.append(padded[:, *index])
        return jnp.stack(taps, axis=-2).reshape(B * math.prod(starts), *self.window, C)

    def index(self, down: jax.Array, across: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        """Returns the place in the window, and the first channel, of a tap."""
        place: list[jax.Array] = []
        channel = jnp.int32(0)
        for axis, tap in zip(self.axes[self.flat :], (down, across)[self.flat :], strict=True):
            at = tap * axis.step + axis.first - axis.stride * min(0, axis.first // axis.stride)
            place.append(lax.div(at, jnp.int32(axis.stride)))
            phase = lax.rem(at, jnp.int32(axis.stride))
            if axis.stride > 1 and axis is self.axes[0]:
                place.append(phase)
            elif axis.stride > 1:
                channel = phase * self.channels
        return place, channel

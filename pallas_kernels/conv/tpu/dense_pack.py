"""Convolutions of few channels as convolutions of many: neighbours side by side in the lanes.

Few input channels leave a contraction empty, few output channels the product's columns. So `f`
columns of the image are put side by side in the lanes (in VMEM: HBM holds them as they were), and a
product makes `g` columns and `r` rows of the output at once, which lie in its lanes the same way.
That is a convolution again, of f * C channels to r * g * O, whose kernel has zeros where an output
does not see an input; rows move by r * stride and columns of f by one.

Legend: K L kernel rows and columns, C input channels, O output channels, and with a stroke (k', l')
those of the new convolution.
"""

import dataclasses
import functools
import math

import numpy as np

from pallas_kernels.conv.tpu import layout
from pallas_kernels.conv.tpu.dense_plan import Axis

FEATURES = 256  # lanes of a product, see dense_plan: outputs side by side are whole parts of it
MOST_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Packing:
    """How neighbours are put side by side, all static.

    Attributes:
      rows, cols: the axes of the convolution, of one output a unit.
      f, g, r: input columns, output columns and output rows in the lanes.
    """

    rows: Axis
    cols: Axis
    f: int
    g: int
    r: int

    @property
    def parts(self) -> list[tuple[int, int]]:
        """Row and column of each output of a product, in the order they lie in the lanes."""
        return [(a, b) for a in range(self.r) for b in range(self.g)]

    @property
    def low(self) -> int:
        """The first column that the first output sees, where that is in the image or before it."""
        return self.cols.shifts[0]

    def columns(self, block: int) -> list[int | None]:
        """The columns that lie side by side, None for padding."""
        return [self.cols.source(0, self.low + block * self.f + i) for i in range(self.f)]

    @functools.cached_property
    def axes(self) -> tuple[Axis, Axis]:
        """Rows and columns of the new convolution."""
        move = self.rows.step_in
        shifts = sorted({a * move + s for a in range(self.r) for _, s in self.rows.taps[0]})
        rows = Axis(
            self.rows.size_in,
            self.rows.size_out // self.r,
            self.r * move,
            (tuple(enumerate(shifts)),),
        )
        low, high = self.cols.shifts
        taps = -(-((self.g - 1) * self.cols.step_in + high - low + 1) // self.f)
        outputs = -(-self.cols.size_out // self.g)
        if self.f == 1:
            return rows, self.cols
        cols = Axis(outputs + taps - 1, outputs, 1, (tuple((n, n) for n in range(taps)),))
        return rows, cols

    @functools.cached_property
    def table(self) -> np.ndarray:
        """Which tap, of K * L or none, is at [k', l', f, r * g]: int [K', L', f, r * g]."""
        rows, cols = self.axes
        K, L = len(self.rows.taps[0]), len(self.cols.taps[0])
        shape = len(rows.taps[0]), len(cols.taps[0]), self.f, len(self.parts)
        table = np.full(shape, K * L)
        for n, (a, b) in enumerate(self.parts):
            for k, down in self.rows.taps[0]:
                at = [s for _, s in rows.taps[0]].index(down + a * self.rows.step_in)
                for tap, right in self.cols.taps[0]:
                    block, i = divmod(right + b * self.cols.step_in - self.low, self.f)
                    if self.f == 1:
                        block = tap
                    table[at, block, i, n] = k * L + tap
        return table


def choose(
    rows: Axis, cols: Axis, C: int, O: int, mxu: int  # noqa: E741
) -> Packing | None:  # fmt: skip
    """Returns the packing that leaves the matrix unit the least to do, None if none helps."""
    if rows.step_out > 1 or cols.step_out > 1 or mxu < 2 * O or FEATURES % O:
        return None
    if C < layout.LANES:
        f = layout.LANES // C
        if layout.LANES % C or f % cols.step_in or C < 16:
            return None
        g = f // cols.step_in
    else:
        f = g = 1
    plain = len(rows.taps[0]) * len(cols.taps[0]) * -(-C // mxu)
    found = []
    for r in range(1, MOST_ROWS + 1):
        if rows.size_out % r or r * g * O > FEATURES:
            continue
        one = Packing(rows, cols, f, g, r)
        K, L = one.table.shape[:2]
        passes = math.ceil(K * L * f * C / mxu) * math.ceil(r * g * O / mxu)
        found.append((passes / (r * g), r, one))
    best = min(found, key=lambda item: item[:2], default=None)
    return best[2] if best and best[0] < 0.75 * plain else None

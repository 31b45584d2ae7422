"""All that is static in a kernel of dense convolutions.

Legend: K L kernel rows and columns, C input channels, O output channels.
"""

import dataclasses
import math

from pallas_kernels.conv.tpu import layout
from pallas_kernels.conv.tpu.dense_axis import Axis
from pallas_kernels.conv.tpu.dense_pack import Packing

FEATURES = 256  # of a product: with some 256 rows, all the registers there are


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is static in a kernel.

    Attributes:
      rows, cols: of the images.
      kernel: K and L.
      B, C, O: of the arrays, padded.
      batch, units, features: images, units of rows and output channels of a block.
      group: units of rows in a turn of the loop; 0 where all are unrolled.
      places: outputs of a batch block in a product, at most.
      together: taps that a product contracts at once.
      packing: how outputs, and maybe inputs, lie side by side, if they do: all that stands here is
        then of the convolution that this makes, but for the blocks' shapes.
      vectors: those of 'bias', 'scale' and 'shift' that the epilogue has.
      residual: whether it has one.
      keep: whether u is stored beside y.
      activation: of the epilogue.
      weights: whether this is the kernel's gradient, whose sums are float32.
    """

    rows: Axis
    cols: Axis
    kernel: tuple[int, int]
    B: int
    C: int
    O: int  # noqa: E741
    batch: int = 0
    units: int = 0
    features: int = 0
    group: int = 0
    places: int = 0
    together: int = 1
    packing: Packing | None = None
    vectors: tuple[str, ...] = ()
    residual: bool = False
    keep: bool = False
    activation: str | None = None
    weights: bool = False

    @property
    def n_rows(self) -> int:
        """Blocks of rows."""
        return -(-self.rows.units // self.units)

    @property
    def out_rows(self) -> int:
        """Output rows of a block."""
        return min(self.units * self.rows.step_out, self.rows.size_out)

    @property
    def packed(self) -> bool:
        """Whether inputs are put side by side before they are multiplied."""
        return self.packing is not None and self.packing.f > 1

    @property
    def x_block(self) -> tuple[int, int, int, int]:
        """Shape of a block of inputs."""
        if not self.packed:
            return self.in_rows, self.cols.size_in, self.batch, self.C
        return self.in_rows, self.packing.cols.size_in, self.batch, self.C // self.packing.f

    @property
    def y_block(self) -> tuple[int, int, int, int]:
        """Shape of a block of outputs."""
        if self.packing is None:
            return self.out_rows, self.cols.size_out, self.batch, self.features
        columns, lanes = self.packing.cols.size_out, len(self.packing.parts)
        return self.out_rows * self.spread, columns, self.batch, self.features // lanes

    @property
    def w_block(self) -> tuple[int, int, int, int]:
        """Shape of a block of the kernel."""
        if self.packing is None:
            return *self.kernel, self.C, self.features
        axes = self.packing.rows, self.packing.cols
        K, L = (len(axis.taps[0]) for axis in axes)
        return K, L, self.x_block[3], self.y_block[3]

    @property
    def dw_block(self) -> tuple[int, int, int, int]:
        """Shape of a block of the kernel's gradient."""
        K, L, C, O = self.w_block  # noqa: E741
        return K, L, O, C

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        """Shape of the outputs."""
        _, cols, _, features = self.y_block
        lanes = self.O // self.features * features
        return self.rows.size_out * self.spread, cols, self.B, lanes

    @property
    def spread(self) -> int:
        """Rows that each output has become."""
        return self.packing.r if self.packing else 1

    @property
    def scratch(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what lies side by side."""
        found = {}
        if self.packed:
            found['x'] = self.in_rows, self.cols.size_in, self.batch, self.C
        if self.packing is not None and self.weights:
            found['du'] = self.out_rows, self.cols.size_out, self.batch, self.features
            found['dw'] = *self.kernel, self.features, self.C
        elif self.packing is not None:
            found['w'] = *self.kernel, self.C, self.features
        return found

    @property
    def in_rows(self) -> int:
        """Input rows of a block."""
        return self.rows.size_in if self.n_rows == 1 else self.rows.window(self.units)

    @property
    def whole_units(self) -> list[int]:
        """Units of each block of rows whose taps see no padding."""
        first, last = self.rows.inner
        ends = [
            (max(first, i * self.units), min(last, (i + 1) * self.units))
            for i in range(self.n_rows)
        ]
        return [max(0, high - low) for low, high in ends]

    @property
    def rest(self) -> int:
        """Units of rows in a turn for those that the turns of every block leave; 0 if none do."""
        return math.gcd(*(n % self.group for n in self.whole_units))

    def first_row(self, block):
        """The first input row of a block of rows, which is never one that does not exist."""
        if self.n_rows == 1:
            return 0
        first = block * (self.units * self.rows.step_in) + self.rows.shifts[0]
        return layout.clip(first, 0, self.rows.size_in - self.in_rows)

    @property
    def products(self) -> int:
        """Matrix products that the program spells out: of a turn of the loop, and of edges."""
        first, last = self.rows.inner
        bodies = [self.rows.units]
        if self.group:
            edges = self.rows.units - (last - first)
            bodies = [self.group, *[self.rest] * (self.rest > 0), *[1] * edges]
        count = 0
        for units in bodies:
            for row_taps in self.rows.taps:
                for col_taps in self.cols.taps:
                    parts = -(-units * self.cols.units // self.places)
                    count += parts * -(-len(row_taps) * len(col_taps) // self.together)
        return count * -(-self.features // FEATURES)

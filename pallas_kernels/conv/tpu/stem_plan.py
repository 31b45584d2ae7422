"""How a convolution of few channels becomes matrix products whose lanes are columns of the image.

Images lie as [B, C, H, W], columns in the lanes: XLA's own layout for few channels, in which
nothing is padded but the last lanes. A product makes a few output rows of an image, [rows * O, Q],
from all that they see, [L * window, Q]: the inputs of a window of rows and channels, shifted by
each column tap. With a stride the columns are first split into its phases, by a product with a
matrix of ones and zeros, so that every shift is a rotation of lanes.

The window's rows are moved as 32-bit words, of two rows in bfloat16, so that they can begin at any
word: `word` t of it is word t % `words` of channel t // `words`.

Legend: B batch, C O input and output channels, K L taps of rows and columns, H W input rows and
columns, P Q output rows and columns.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.chip import Chip
from pallas_kernels.conv.arguments import ConvBlockSizes, Operands, Spec
from pallas_kernels.conv.tpu import layout

LANES = layout.LANES
SUBLANES = 8  # of 32-bit words
MOST_ROWS = 8  # output rows of a product
SHARE = 0.75  # of the memory for blocks; the rest is the compiler's


@dataclasses.dataclass(frozen=True)
class Plan:
    """One call; all static.

    Attributes:
      size_in, size_out: (H, W) and (P, Q).
      channels, features: C and O.
      taps, stride, dilation: of rows and columns.
      low: zeros before rows and columns.
      packing: rows in a 32-bit word.
      group: output rows of a product.
      images: of a block.
      rows: output rows of a block, a multiple of `group`.
      parts: into which the batch is split for the cores of a chip, each with sums of its own.
      blocks: of images of a part.
      activation: of the epilogue.
      given: names of the epilogue's operands.
      keep: whether u is written, too.
    """

    size_in: tuple[int, int]
    size_out: tuple[int, int]
    channels: int
    features: int
    taps: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    low: tuple[int, int]
    packing: int
    group: int = 1
    images: int = 1
    rows: int = 1
    parts: int = 1
    blocks: int = 1
    activation: str | None = None
    given: tuple[str, ...] = ()
    keep: bool = False

    @property
    def words(self) -> int:
        """Words of a channel in a window."""
        window = layout.span(self.group, self.taps[0], self.stride[0], self.dilation[0])
        return -(-window // self.packing)

    @property
    def window(self) -> int:
        """Words of a window, in whole registers."""
        return layout.up(self.channels * self.words, SUBLANES)

    @property
    def contracted(self) -> int:
        """Rows of a product's inputs."""
        return self.taps[1] * self.window * self.packing

    @property
    def padded(self) -> int:
        """The same in whole lanes, as the kernels hold it."""
        return layout.up(self.contracted, LANES)

    @property
    def outputs(self) -> int:
        """Features of a row, in whole registers."""
        return layout.up(self.features, 2 * SUBLANES)

    @property
    def lanes(self) -> int:
        """Columns of the output in whole lanes."""
        return layout.up(self.size_out[1], LANES)

    @property
    def phases(self) -> tuple[int, ...]:
        """Which inputs of a stride some column tap begins with."""
        return tuple(
            sorted({tap * self.dilation[1] % self.stride[1] for tap in range(self.taps[1])})
        )

    def shift(self, tap: int) -> tuple[int, int]:
        """Returns which of `phases` a column tap sees, and how many columns later."""
        columns, phase = divmod(tap * self.dilation[1], self.stride[1])
        return self.phases.index(phase), columns

    @property
    def phase_lanes(self) -> int:
        """Columns of a phase in whole lanes: no rotation brings one end to the other."""
        return layout.up(self.size_out[1] + self.shift(self.taps[1] - 1)[1], LANES)

    @property
    def before(self) -> int:
        """Words of zeros before an image: of the padding, and those that a register begins with."""
        return self.low[0] // self.packing + SUBLANES

    @property
    def depth(self) -> int:
        """Words of a channel with what is before and behind."""
        last = self.first(self.last_group) + self.words + SUBLANES
        return layout.up(max(self.before + self.held, last), SUBLANES)

    @property
    def held(self) -> int:
        """Words that an image itself fills, with zeros in the last register."""
        image = self.low[0] % self.packing + self.size_in[0]
        return layout.up(image, SUBLANES * self.packing) // self.packing

    def first(self, group):
        """The first word of a group's window."""
        step = self.group * self.stride[0] // self.packing
        return SUBLANES + group * step

    @property
    def last_group(self) -> int:
        """The last group of rows that has an output."""
        return -(-self.size_out[0] // self.group) - 1

    @property
    def groups(self) -> int:
        """Groups of rows in a block."""
        return self.rows // self.group

    def phases_shape(self) -> tuple[int, int, int, int, int]:
        """Images split into phases, one register's lanes at a time, so that rows are addresses."""
        tiles = len(self.phases) * self.phase_lanes // LANES
        return self.images, tiles, self.channels, self.depth, LANES

    def in_shape(self) -> tuple[int, int, int, int]:
        """A block of the inputs."""
        return self.images, self.channels, *self.size_in

    def out_shape(self) -> tuple[int, int, int, int]:
        """A block of the outputs."""
        return self.images, self.rows, self.features, self.size_out[1]

    def bytes(self, dtype, outs: int) -> int:
        """VMEM of the blocks, two of each, and of what lies between."""
        blocks = layout.tile_bytes(self.in_shape(), dtype)
        blocks += outs * layout.tile_bytes(self.out_shape(), dtype)
        line = layout.tile_bytes(self.size_in, jnp.float32) * len(self.phases)
        between = layout.tile_bytes(self.phases_shape(), jnp.int32) + line
        return 2 * blocks + between + 4 * self.group * self.outputs * self.padded


def planned(
    operands: Operands,
    spec: Spec,
    outs: int,
    sizes: ConvBlockSizes | None,
    chip: Chip,
    packing: int = 0,
    **more,
) -> Plan:
    """Returns the plan of a call that reads or writes `outs` arrays like its output."""
    (B, H, W, C), (K, L, _, features) = operands.x_BHWC.shape, operands.w_KLDO.shape
    dtype = operands.x_BHWC.dtype
    packing = packing or 4 // dtype.itemsize
    plan = Plan(
        (H, W), spec.out_size((H, W), (K, L)), C, features, (K, L), spec.stride, spec.dilation,
        (spec.padding[0][0], spec.padding[1][0]), packing, **more,
    )  # fmt: skip
    group = _group(plan, chip)
    images = min(B, max(1, chip.mxu // plan.lanes))
    images = layout.largest_divisor(B, sizes.batch if sizes and sizes.batch else images)
    plan = dataclasses.replace(plan, group=group, images=images)
    whole = layout.up(plan.size_out[0], group)
    wanted = layout.up(sizes.rows, group) if sizes and sizes.rows else whole
    fits = lambda plan: plan.bytes(dtype, outs) <= SHARE * chip.vmem_limit  # noqa: E731
    for fewer in range(images, 0, -1):
        for rows in range(min(wanted, whole), 0, -group):
            found = dataclasses.replace(plan, images=fewer, rows=rows)
            if B % fewer == 0 and fits(found):
                return _shared(found, B, chip)
    return _shared(dataclasses.replace(plan, images=1, rows=group), B, chip)


def _shared(plan: Plan, B: int, chip: Chip) -> Plan:
    """Returns the plan with the batch split among a chip's cores."""
    blocks = B // plan.images
    parts = layout.largest_divisor(blocks, chip.cores)
    return dataclasses.replace(plan, parts=parts, blocks=blocks // parts)


def _group(plan: Plan, chip: Chip) -> int:
    """Output rows of a product: few, so that little of the window is not every row's."""

    def cost(group: int) -> float:
        at = dataclasses.replace(plan, group=group)
        # The unit takes as long to be filled as to take in as many rows as its side.
        rows = max(group * at.outputs, chip.mxu // 2)
        return -(-at.contracted // chip.mxu) * rows / group

    whole = [n for n in range(1, MOST_ROWS + 1) if n * plan.stride[0] % plan.packing == 0]
    return min(whole, key=cost)


def kernels(plan: Plan, w_KLDO: jax.Array) -> jax.Array:
    """Returns the kernels of a product, [outputs, group * padded], linear in w."""
    K, L, C, features = w_KLDO.shape
    places = np.zeros((plan.group, plan.padded, K, L, C), np.float32)
    for row in range(plan.group):
        for k in range(K):
            at = row * plan.stride[0] + k * plan.dilation[0]
            for l in range(L):  # noqa: E741
                for c in range(C):
                    word = c * plan.words + at // plan.packing
                    into = (l * plan.window + word) * plan.packing + at % plan.packing
                    places[row, into, k, l, c] = 1
    places = jnp.asarray(places.reshape(plan.group * plan.padded, K * L * C), w_KLDO.dtype)
    w = w_KLDO.reshape(K * L * C, features)
    # One term of each sum is not zero, and the highest precision leaves it as it is.
    found = jax.lax.dot_general(w, places, (((0,), (1,)), ((), ())), jax.lax.Precision.HIGHEST)
    return jnp.pad(found, ((0, plan.outputs - features), (0, 0)))

"""Counts the arithmetic of matrix products and convolutions in a compiled program.

A TPU's compiler writes every matrix product as a convolution, and batch dimensions as dimensions
that the convolution slides along, so that most of what it seems to multiply is padding or between
the elements of a dilated operand. Only products of two elements that exist count.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

from bigjax.plan.program.hlo import Computation, Instruction, Module

PRODUCTS = ('convolution', 'dot')
# Passes of the bfloat16 units for a product of float32 (jax.lax.Precision).
_PASSES = {'default': 1, 'high': 3, 'highest': 6}
_PRECISION = re.compile(r'\b(default|highest|high)\b')


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product or a convolution.

    Attributes:
      flops: two for each product of two elements that exist.
      dtype: of the operands; the wider of the two.
      passes: how often the units of bfloat16 go through it for its precision.
    """

    flops: float
    dtype: str
    passes: int = 1


def products(module: Module, computation: Computation, instruction: Instruction) -> list[Product]:
    """Returns the products of one instruction: itself, or those of the fusion that it is."""
    if instruction.opcode == 'while':
        return []
    return [product(*place) for place in _places(module, computation, instruction)]


def _places(
    module: Module, computation: Computation, instruction: Instruction
) -> Iterator[tuple[Computation, Instruction]]:
    for place in ((computation, instruction), *module.inside(instruction)):
        if place[1].opcode in PRODUCTS:
            yield place


def product(computation: Computation, instruction: Instruction) -> Product:
    """Returns the arithmetic of a `dot` or a `convolution`."""
    left, right = computation.operands(instruction)
    lhs, rhs = left.arrays[0], right.arrays[0]
    wide = max((lhs, rhs), key=lambda array: array.bytes / max(array.size, 1))
    passes = 1
    if wide.dtype == 'f32':
        words = _PRECISION.findall(instruction.attributes.get('operand_precision', ''))
        passes = max((_PASSES[word] for word in words), default=1)
    if instruction.opcode == 'dot':
        inner = _numbers(instruction.attributes.get('lhs_contracting_dims', ''))
        depth = math.prod(lhs.dims[i] for i in inner)
        return Product(2.0 * instruction.arrays[0].size * depth, wide.dtype, passes)
    pairs = _pairs(
        instruction.attributes['dim_labels'], instruction.attributes.get('window', ''),
        lhs.dims, rhs.dims, instruction.arrays[0].dims,
    )  # fmt: skip
    return Product(2.0 * pairs, wide.dtype, passes)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r'\d+', text)]


@functools.cache
def _pairs(
    labels: str, window: str, lhs: tuple[int, ...], rhs: tuple[int, ...], out: tuple[int, ...]
) -> float:
    """How many products of two elements a convolution adds up.

    Args:
      labels: names of the dimensions, '0bf_io0->0bf': batch, features in and out, and the numbered
        ones that the window slides along.
      window: '{size=3x3 stride=2x2 pad=1_1x0_0 lhs_dilate=… rhs_dilate=… rhs_reversal=…}'.
      lhs: shape of the array that is slid along.
      rhs: shape of the window's weights.
      out: shape of the result.
    """
    left, _, rest = labels.partition('_')
    right, _, result = rest.partition('->')
    read = dict(item.split('=') for item in window.strip('{}').split())
    count = float(out[result.index('b')] * out[result.index('f')] * rhs[right.index('i')])
    for name in filter(str.isdigit, right):
        i = int(name)

        def field(key: str, default: str, i: int = i) -> str:
            return read[key].split('x')[i] if key in read else default

        count *= along(
            extent=lhs[left.index(name)],
            taps=rhs[right.index(name)],
            outputs=out[result.index(name)],
            stride=int(field('stride', '1')),
            before=int(field('pad', '0_0').split('_')[0]),
            apart=int(field('lhs_dilate', '1')),
            taps_apart=int(field('rhs_dilate', '1')),
        )
    return count


def along(
    *, extent: int, taps: int, outputs: int, stride: int, before: int, apart: int, taps_apart: int
) -> int:
    """Pairs of a window's place and tap that meet an element, along one dimension."""
    if taps == 1 and before == 0 and apart == 1:
        return outputs
    where_O = np.arange(outputs) * stride - before
    found = 0
    for tap in range(taps):
        at_O = where_O + tap * taps_apart
        inside_O = (at_O >= 0) & (at_O < (extent - 1) * apart + 1) & (at_O % apart == 0)
        found += int(np.sum(inside_O))
    return found

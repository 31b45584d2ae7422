"""What devices send each other of a decoder's parameters and their gradients, by arithmetic."""

import math
from collections.abc import Iterable

from bigjax.compiler_options import has_scatter
from bigjax.plan.arithmetic.closed_exchange import GATHER, REDUCE, SCATTER, exchange, visits
from bigjax.plan.arithmetic.closed_flops import recomputed
from bigjax.plan.arithmetic.shape import (
    CONTEXT,
    DATA,
    EXPERT,
    FSDP,
    STAGE,
    TENSOR,
    Shape,
    Step,
    Weight,
)
from bigjax.plan.records import Collective

# Where libtpu 0.0.52 has no scatter (`bigjax.compiler_options`), it scatters in a ring of products:
# among not too many devices, each with enough tokens and bytes of a part of a matrix. Seen with 16
# devices, 512 tokens and 32 KiB, not with 64 or 8 KiB.
MOST_IN_RING, LEAST_RING_TOKENS, LEAST_RING_BYTES = 32, 512, 2**14
# Of several slices it gathers such small parts along a whole square by a sum, and along a whole box
# all. Seen with 24 and 32 KiB, not with 196; not with 32 of 16 devices.
MOST_SUMMED_BYTES = 2**15
# What is innermost of an array it keeps in whole vectors of lanes. Gradients of query, key and
# value that are as small go between slices together, unfilled. Seen with 64 KiB, not with 128.
LANES, MOST_JOINED_BYTES = 128, 2**16


def _slices(step: Step) -> int:
    return math.prod(step.dcn.values())


def _no_scatter(step: Step) -> bool:
    """Whether the devices along FSDP are all of a slice that has no scatter among them."""
    here = step.size(FSDP) // step.dcn.get(FSDP, 1)
    whole = here == step.devices // _slices(step)
    return step.topology.hardware.is_tpu and whole and not has_scatter(step.topology.shape)


def _vectors(step: Step, weight: Weight) -> tuple[bool, float]:
    """Returns whether a gradient can be scattered along FSDP, and by what factor its lanes fill up.

    Of heads one head or a device's part of the width is innermost, whichever fills its vectors
    better, else the last dimension; a part that does not fill them cannot be scattered. Other
    matrices have a dimension that fills them.
    """
    if weight.makes not in ('qkv', 'out') or not step.topology.hardware.is_tpu:
        return True, 1.0
    head = weight.sizes[weight.axes.index(None)]
    part = weight.sizes[weight.axes.index('embed')] // step.size(FSDP)
    of_head, of_part = (math.ceil(size / LANES) * LANES / size for size in (head, part))
    by_part = of_part < of_head or (of_part == of_head and weight.axes[-1] == 'embed')
    return not by_part or of_part == 1, min(of_head, of_part)


def spread(step: Step, weight: Weight) -> tuple[str, float]:
    """Returns how a layer's gradient comes to be split along FSDP: a kind, how often it is sent."""
    n = step.size(FSDP)
    if step.dcn.get(FSDP, 1) > 1:
        return REDUCE, 1
    if not _no_scatter(step):
        return (SCATTER if _vectors(step, weight)[0] else REDUCE), 1
    part = numbers(step, weight) * step.item / n
    small = step.tokens / step.parts < LEAST_RING_TOKENS or part < LEAST_RING_BYTES
    if n > MOST_IN_RING or _slices(step) > 1 or small:
        return REDUCE, 1
    return SCATTER, (n + 1) / (n - 1)


def _gathered_by(step: Step, weight: Weight) -> str:
    """Returns a kind: a sum of one device's part and zeros sends twice what gathering does."""
    n = step.size(FSDP)
    small = numbers(step, weight) * step.item / n <= MOST_SUMMED_BYTES and n > MOST_IN_RING
    box = sum(side > 1 for side in step.topology.shape) == 3
    here = _slices(step) > 1 and step.dcn.get(FSDP, 1) == 1 and _no_scatter(step)
    return REDUCE if here and (box or small) else GATHER


def _gathers(shape: Shape, step: Step, weight: Weight) -> float:
    """How often a parameter is gathered along FSDP in a step.

    A matrix of a layer is so in each pass, and where it is computed again once more for its own
    gradient, if a whole part of the block lies between: attention, or its experts. A pipeline keeps
    it for both. A table is used once in either pass, with nothing between that would make a device
    forget it, so it is gathered once.
    """
    if not weight.layered:
        return step.accumulate
    far = ('qkv', 'out') if shape.routing.experts else ('qkv',)
    again = weight.makes in far and weight.makes in recomputed(shape, step.saved)
    return (2 + (again and step.stages == 1)) * visits(shape, step)


def _gradient(shape: Shape, step: Step, weight: Weight) -> Iterable[tuple[str, tuple, float]]:
    """Yields how a gradient is summed: a kind of exchange, its axes, the bytes that a group has.

    Layers' matrices have gradients of the computation's type; norms and biases, float32, are summed
    whole at once.
    """
    held, split = numbers(step, weight), step.size(FSDP) > 1
    # An expert's gradient is of all rows that came to it; of all else, every row has its part.
    rows = (DATA, CONTEXT) if 'experts' in weight.axes else (DATA, EXPERT, CONTEXT)
    # Devices that all have the whole of a table have the gradients of their positions.
    of_table = rows if 'vocab' in weight.axes else (*rows, TENSOR)
    if len(weight.sizes) == 1:
        everywhere = (*rows, FSDP) if 'heads' in weight.axes else (*rows, FSDP, TENSOR)
        yield REDUCE, everywhere, 4 * held
    elif weight.layered:
        kind, turns = spread(step, weight)
        yield kind, (FSDP,), step.item * held * turns
        # What is published of GPUs sums what has accumulated, in float32.
        item = step.item if step.topology.hardware.is_tpu else 4
        part = item * held / step.size(FSDP)
        joined = weight.makes == 'qkv' and part <= MOST_JOINED_BYTES
        if math.prod(step.dcn.get(axis, 1) for axis in rows) > 1 and not joined:
            part *= _vectors(step, weight)[1]
        yield REDUCE, rows, part
    elif weight.name == 'embedding' and shape.tied and (split or step.topology.hardware.is_tpu):
        # Its uses, each by itself.
        yield from _table(step, of_table, weight, read=True)
        yield from _table(step, of_table, weight, read=False)
    else:
        yield from _table(step, of_table, weight, read=weight.name != 'output')


def _table(
    step: Step, rows: tuple[str, ...], weight: Weight, *, read: bool
) -> Iterable[tuple[str, tuple, float]]:
    """How the gradient of a table is summed that rows are read of, or that makes logits.

    Logits are made of equal parts of the rows by all stages of a pipeline.
    """
    held, split = numbers(step, weight), step.size(FSDP)
    if read:  # `bigjax.nn.look_up` says what is sent.
        item, even = 4, 128
    else:  # `bigjax.nn.logits`.
        item, even, rows = step.item, 256, (*rows, STAGE)
    # Where there are several slices libtpu scatters tables among all of a square or a box, too, but
    # nowhere parts that are not even.
    uneven = step.topology.hardware.is_tpu and weight.sizes[-1] // split % even
    whole = uneven or (_no_scatter(step) and _slices(step) == 1)
    yield REDUCE if whole else SCATTER, (FSDP,), item * held
    yield REDUCE, rows, item * held / split


def numbers(step: Step, weight: Weight) -> float:
    """Returns what of a parameter a group along the FSDP axis holds together."""
    return weight.elements / step.shards(tuple(axis for axis in weight.axes if axis != 'embed'))


def _sums(shape: Shape, step: Step, weight: Weight, axes: tuple[str, ...]) -> float:
    """How often a gradient is summed along some axes in a step.

    Along FSDP wherever it is made. Along others a stage does so when all its microbatches are done,
    and GPUs when all is accumulated.
    """
    if axes == (FSDP,):
        return visits(shape, step) if weight.layered else step.accumulate
    layers = shape.layers / step.stages if weight.layered else 1
    return layers * step.accumulate if step.topology.hardware.is_tpu else layers


def parameters(shape: Shape, step: Step) -> Iterable[Collective]:
    """FSDP: parameters gathered for either pass, gradients spread; all others: gradients summed."""
    gathered: dict[str, list[float]] = {}
    summed: dict[tuple[str, tuple], list[float]] = {}
    for weight in shape.weights():
        if 'embed' in weight.axes:
            count = _gathers(shape, step, weight)
            item = 4 if len(weight.sizes) == 1 else step.item
            total = gathered.setdefault(_gathered_by(step, weight), [0.0, 0.0])
            total[0] += count * item * numbers(step, weight)
            total[1] += count
        for kind, axes, whole in _gradient(shape, step, weight):
            count = _sums(shape, step, weight, axes)
            axes = tuple(axis for axis in axes if step.size(axis) > 1)
            total = summed.setdefault((kind, axes), [0.0, 0.0])
            total[0] += whole * count
            total[1] += count
    for kind, (bytes_, count) in gathered.items():
        yield from exchange(step, kind, (FSDP,), bytes_ / count, count, 'parameters')
    for (kind, axes), (whole, count) in summed.items():
        # Sums along the others are few: the compiler puts them together.
        count = count if axes == (FSDP,) else 1
        yield from exchange(step, kind, axes, whole / count, count, 'gradients')

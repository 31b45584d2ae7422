"""What devices send each other in a decoder's training step, by arithmetic.

Bytes are those one device sends: see `bigjax.plan.records`. Every exchange is of one mesh axis, or
of several at once where the same numbers are summed over all of them.
"""

import dataclasses
import math
from collections.abc import Iterable

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
    parameter_bytes,
)
from bigjax.plan.records import Collective
from bigjax.plan.topology import Topology
from bigjax.sharding import AXES

GATHER, SCATTER, REDUCE = 'all-gather', 'reduce-scatter', 'all-reduce'
SWAP, PASS = 'all-to-all', 'collective-permute'
# What libtpu 0.0.52 does with gradients that are split afterwards: it scatters them among 16
# devices, but among 256 and 512, or in a program of several slices, it sums them whole.
MOST_SCATTERED = 64
# It multiplies while it gathers or scatters, in a ring, where there are so many devices, tokens of
# one, and bytes of a matrix's part: seen with 512 tokens and 32 KiB, not with 8 KiB.
LEAST_RING, LEAST_RING_TOKENS, LEAST_RING_BYTES = 4, 512, 2**14
SHARE = {GATHER: 1, SCATTER: 1, REDUCE: 2, SWAP: 1}


def rings(size: int, topology: Topology) -> int:
    """Returns the sides of a torus that a group of devices spreads over, at least one.

    Taken to be the fewest whose lengths multiply to the group's size.
    """
    sides, found = sorted(topology.shape, reverse=True), 1
    reached = sides[0] * topology.hardware.devices_per_chip
    for side in sides[1:]:
        if reached >= size:
            break
        reached *= side
        found += 1
    return found


def bandwidth(kind: str, size: int, network: str, topology: Topology) -> float:
    """Returns the bytes per second that one device sends with to a group of `size`."""
    hardware = topology.hardware
    if network == 'dcn':
        return hardware.dcn_bytes_per_s
    if kind == PASS or not hardware.dimensions:
        return hardware.ici_bytes_per_s
    return hardware.ring_bytes_per_s * rings(size, topology)


def _exchange(
    step: Step, kind: str, axes: tuple[str, ...], whole: float, count: float, what: str
) -> list[Collective]:
    """Executions over some axes of exchanges of `whole` bytes each, those of size 1 left out.

    An axis that crosses slices does so first where it reduces: parts meet within a slice before
    they cross, so that the slow network has only their shards to carry.
    """
    axes = tuple(axis for axis in AXES if axis in axes and step.size(axis) > 1)
    if not axes or not count or not whole:
        return []
    size = step.size(*axes)
    far = math.prod(step.dcn.get(axis, 1) for axis in axes)
    if not step.topology.hardware.dimensions:
        far = _hosts(step, axes)
    if kind == PASS:
        network = 'dcn' if far > 1 else 'ici'
        seconds = whole / bandwidth(kind, size, network, step.topology)
        return [Collective(kind, axes, whole * count, count, network, seconds * count,
                           seconds * count, what)]  # fmt: skip
    parts = [('ici', size // far, whole), ('dcn', far, whole / (size // far))]
    found = []
    for network, members, amount in parts:
        if members > 1:
            sent = SHARE[kind] * (members - 1) / members * amount * count
            seconds = sent / bandwidth(kind, members, network, step.topology)
            found += [Collective(kind, axes, sent, count, network, seconds, seconds, what)]
    return found


def _hosts(step: Step, axes: tuple[str, ...]) -> int:
    """Over how many hosts of GPUs a group goes: the innermost axes of a mesh share a host."""
    inner = math.prod(step.size(axis) for axis in AXES[AXES.index(axes[-1]) + 1 :])
    within = max(1, min(step.size(*axes), step.topology.shape[0] // inner))
    return step.size(*axes) // within


def _visits(shape: Shape, step: Step) -> float:
    """How often a device computes a layer in a step, for one microbatch of a pipeline at a time."""
    layers = shape.layers / step.stages
    return layers * step.parts * step.bubble(shape.layers) * step.accumulate


def _sums_whole(step: Step) -> bool:
    """Whether gradients that are split along FSDP are summed whole, in twice the bytes."""
    return step.size(FSDP) > MOST_SCATTERED or math.prod(step.dcn.values()) > 1


def _rings(shape: Shape, step: Step, weight: Weight) -> tuple[float, float]:
    """How often a layer's matrix is gathered along FSDP, and its gradient spread.

    In exchanges of (n - 1) / n of it. Projections lie a whole block apart from their gradients, and
    are gathered anew where they are computed again. A ring that is multiplied as it goes sends more
    than it needs: where an exchange serves one product alone whose result is not itself scattered
    along the tensor axis, which would be the ring then.
    """
    again = weight.makes in recomputed(shape, step.saved)
    apart = again and weight.makes == 'qkv'
    n = step.size(FSDP)
    part = _numbers(step, weight) * step.item / n
    few = n < LEAST_RING or step.tokens / step.parts < LEAST_RING_TOKENS
    few |= part < LEAST_RING_BYTES or not step.topology.hardware.is_tpu
    if few or _sums_whole(step) or 'experts' in weight.axes:
        return 2 + apart, 1
    turns = (n + 1) / (n - 1)
    # A ring of four is written out, and only some gradients have a way back to where they began.
    gather, scatter = (1, n / (n - 1)) if n == LEAST_RING else (turns, turns)
    whole = step.size(TENSOR) == 1
    wide = weight.makes in ('qkv', 'mlp_in')  # as Megatron's: split by what it makes
    forward = gather if wide or whole else 1
    backward = gather if not wide or whole else 1
    if apart:
        backward += gather
    elif again:
        backward = 1
    return forward + backward, scatter


def _gradient(shape: Shape, step: Step, weight: Weight) -> tuple[float, tuple[str, ...], float]:
    """Where a gradient is summed: its bytes along FSDP, then along which axes, and its bytes there.

    Each counts as what one group of devices has of it. Layers' matrices have gradients of the
    computation's type; norms and biases, float32, are summed whole at once, and so are tables of
    more than a few devices that no tensor axis splits.
    """
    numbers = _numbers(step, weight)
    # An expert's gradient is of all rows that came to it; of all else, every row has its part.
    rows = (DATA, CONTEXT) if 'experts' in weight.axes else (DATA, EXPERT, CONTEXT)
    if len(weight.sizes) == 1:
        everywhere = (*rows, FSDP) if 'heads' in weight.axes else (*rows, FSDP, TENSOR)
        return 0, everywhere, 4 * numbers
    split = step.size(FSDP) > 1
    sums, turns = 1, 1.0
    if weight.layered:
        item = step.item
        turns = _rings(shape, step, weight)[1] if weight.makes else 1.0
    else:
        item = 4
        both = weight.name == 'embedding' and shape.tied and split  # its uses, each by itself
        sums += both
        far = math.prod(step.dcn.values()) > 1 or not step.topology.hardware.is_tpu
        many = step.size(*rows) > 1 or step.size(FSDP) > LEAST_RING
        if split and many and not far and step.size(TENSOR) == 1:
            read = weight.name == 'output'
            return 0, (*rows, FSDP), numbers * (step.item if read else 4 + both * step.item)
    whole = item * sums * numbers
    return whole * turns, rows, whole / step.size(FSDP)


def _numbers(step: Step, weight: Weight) -> float:
    """What of a parameter a group along the FSDP axis holds together."""
    return weight.elements / step.shards(tuple(axis for axis in weight.axes if axis != 'embed'))


def _parameters(shape: Shape, step: Step) -> Iterable[Collective]:
    """FSDP: parameters gathered for either pass, gradients spread; all others: gradients summed.

    Embedding and output are used once in either pass, with nothing between that would make a
    device forget them, so they are gathered once.
    """
    gathered = spread = count = 0.0
    summed: dict[tuple[str, ...], float] = {}
    for weight in shape.weights():
        times = _visits(shape, step) if weight.layered else step.accumulate
        here, axes, there = _gradient(shape, step, weight)
        if 'embed' in weight.axes:
            gathers: float = 1 + weight.layered
            if weight.makes:
                gathers = _rings(shape, step, weight)[0]
            item = 4 if len(weight.sizes) == 1 else step.item
            gathered += gathers * item * _numbers(step, weight) * times
            spread += here * times
            count += times
        if not step.topology.hardware.is_tpu:
            # What is published of GPUs sums what has accumulated, in float32.
            times = shape.layers / step.stages if weight.layered else 1
            there *= 4 / step.item if weight.layered and len(weight.sizes) > 1 else 1
        summed[axes] = summed.get(axes, 0) + there * times
    if count:
        yield from _exchange(step, GATHER, (FSDP,), gathered / count, count, 'parameters')
        kind = REDUCE if _sums_whole(step) else SCATTER
        yield from _exchange(step, kind, (FSDP,), spread / count, count, 'gradients')
    for axes, whole in summed.items():
        yield from _exchange(step, REDUCE, axes, whole, 1, 'gradients')


def _tensor(shape: Shape, step: Step) -> Iterable[Collective]:
    """Sequence-parallel norms: the stream gathered before, and spread after, a half of a block.

    Korthikanti et al. 2022, §4.2.2. Backward as often, the other way round; where blocks compute
    again, what was gathered is gathered again for the gradients of the matrices, and what attention
    adds is spread again, if it was not kept.
    """
    again = recomputed(shape, step.saved)
    stream = step.tokens / step.parts * shape.width * step.item
    visits = _visits(shape, step)
    gathers = (4 if step.saved is None else 6) * visits
    scatters = (4 + ('out' in again)) * visits
    # And before the output layer and behind the embedding, each with a gradient; that of float32
    # logits is float32.
    ends = step.parts * step.accumulate
    wide = (1 + 4 / step.item) * ends
    yield from _exchange(step, GATHER, (TENSOR,), stream, gathers + 2 * ends, 'activations')
    yield from _exchange(step, SCATTER, (TENSOR,), stream, scatters + wide, 'activations')
    if shape.split_vocab:
        # Of every token the largest logit, the sum of exponentials and the label's.
        sums = 3 * 4 * step.tokens / step.parts
        yield from _exchange(step, REDUCE, (TENSOR,), sums, ends, 'logits')


def _context(shape: Shape, step: Step) -> Iterable[Collective]:
    """Keys and values of other devices: handed round, or gathered; their gradients are float32."""
    visits, n = _visits(shape, step), step.size(CONTEXT)
    heads = shape.kv_heads / min(step.size(TENSOR), shape.kv_heads)
    numbers = step.tokens / step.parts * 2 * heads * shape.head_dim
    forward = 1 + ('context' in recomputed(shape, step.saved))
    if step.context == 'gather':
        whole = numbers * n
        yield from _exchange(
            step, GATHER, (CONTEXT,), whole * step.item, (forward + 1) * visits, 'keys'
        )
        yield from _exchange(step, SCATTER, (CONTEXT,), whole * 4, visits, 'keys')
        return
    # Backward they go one place further than they need, so that sending is ahead of computing.
    keys = (forward * (n - 1) + n) * visits
    yield from _exchange(step, PASS, (CONTEXT,), numbers * step.item, keys, 'keys')
    yield from _exchange(step, PASS, (CONTEXT,), numbers * 4, n * visits, 'gradients')


def _experts(shape: Shape, step: Step) -> Iterable[Collective]:
    """Tokens to their experts and back; both ways again for the gradient, and to compute again."""
    routing = shape.routing
    if not routing.experts:
        return
    slots = routing.experts * routing.capacity(step.length) / step.length
    whole = step.tokens / step.parts * slots * shape.width * step.item
    swaps = (4 if step.saved is None else 6) * _visits(shape, step)
    yield from _exchange(step, SWAP, (EXPERT,), whole, swaps, 'tokens')


def _pipeline(shape: Shape, step: Step) -> Iterable[Collective]:
    """Every microbatch handed to the next stage, and its gradient back; layers to their stages.

    Every stage holds the batch that comes in (`bigjax.nn.pipeline`), so its gradient is summed over
    them all, though only the first has one. How the last stage's output is handed on to those that
    compute the output layer is not counted.
    """
    stream = step.tokens / step.parts * shape.width * step.item / step.size(TENSOR)
    rounds = step.rounds(shape.layers)
    count = 2 * (step.parts * rounds + step.stages - 1) * step.accumulate
    yield from _exchange(step, PASS, (STAGE,), stream, count, 'activations')
    batch = stream * step.parts
    yield from _exchange(step, REDUCE, (STAGE,), batch, step.accumulate, 'activations')
    if rounds > 1:
        layered = dataclasses.replace(shape, vocab=0, positions=0)
        held = parameter_bytes(layered, step)
        yield from _exchange(step, SWAP, (STAGE,), held, 2 * step.accumulate, 'parameters')


def collectives(shape: Shape, step: Step) -> tuple[Collective, ...]:
    """Returns every exchange of a step, nothing of it hidden behind computation."""
    parts = (_parameters, _tensor, _context, _experts, _pipeline)
    return tuple(found for part in parts for found in part(shape, step))

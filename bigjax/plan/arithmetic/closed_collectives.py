"""What devices send each other in a decoder's training step, by arithmetic.

Bytes are those one device sends: see `bigjax.plan.records`. Every exchange is of one mesh axis, or
of several at once where the same numbers are summed over all of them.
"""

from collections.abc import Iterable

from bigjax.plan.arithmetic.closed_exchange import (
    GATHER,
    PASS,
    REDUCE,
    SCATTER,
    SWAP,
    exchange,
    visits,
)
from bigjax.plan.arithmetic.closed_flops import recomputed
from bigjax.plan.arithmetic.closed_parameters import parameters
from bigjax.plan.arithmetic.shape import CONTEXT, EXPERT, STAGE, TENSOR, Shape, Step
from bigjax.plan.records import Collective


def _tensor(shape: Shape, step: Step) -> Iterable[Collective]:
    """Sequence-parallel norms: the stream gathered before, and spread after, a half of a block.

    Korthikanti et al. 2022, §4.2.2. Backward as often, the other way round; where blocks compute
    again, what was gathered is gathered again for the gradients of the matrices, and what attention
    adds is spread again, if it was not kept. Experts' outputs, and the gradients of what they read,
    are spread along the width before they travel; a token's sum changes to positions then, and so
    does the gradient of what a token sent.
    """
    again = recomputed(shape, step.saved)
    stream = step.tokens / step.parts * shape.width * step.item
    times = visits(shape, step)
    experts = bool(shape.routing.experts)
    gathers = (4 if step.saved is None else 6) * times
    scatters = (4 - 2 * experts + ('out' in again)) * times
    # And behind the embedding and before the output layer, each with a gradient; that of float32
    # logits is float32. Stages of a pipeline make the logits of a part each. Devices that all have
    # the whole vocabulary keep to their positions instead.
    first = step.parts * step.accumulate * shape.split_vocab
    last = first / step.stages
    wide = first + 4 / step.item * last
    yield from exchange(step, GATHER, (TENSOR,), stream, gathers + first + last, 'activations')
    yield from exchange(step, SCATTER, (TENSOR,), stream, scatters + wide, 'activations')
    if experts:
        yield from exchange(
            step, SWAP, (TENSOR,), stream / step.size(TENSOR), 2 * times, 'activations'
        )
        yield from exchange(step, SCATTER, (TENSOR,), *_slots(shape, step), 'tokens')
    # Of every token the largest logit, the sum of exponentials and the label's.
    sums = 3 * 4 * step.tokens / step.parts
    yield from exchange(step, REDUCE, (TENSOR,), sums, last, 'logits')


def _context(shape: Shape, step: Step) -> Iterable[Collective]:
    """Keys and values of other devices: handed round, or gathered; their gradients are float32."""
    times, n = visits(shape, step), step.size(CONTEXT)
    heads = shape.kv_heads / min(step.size(TENSOR), shape.kv_heads)
    numbers = step.tokens / step.parts * 2 * heads * shape.head_dim
    forward = 1 + ('context' in recomputed(shape, step.saved))
    if step.context == 'gather':
        whole = numbers * n
        yield from exchange(
            step, GATHER, (CONTEXT,), whole * step.item, (forward + 1) * times, 'keys'
        )
        yield from exchange(step, SCATTER, (CONTEXT,), whole * 4, times, 'keys')
        return
    # Backward they go one place further than they need, so that sending is ahead of computing. Of
    # two devices the compiler sees that nobody needs that, and what is computed again has the keys
    # of the backward pass.
    keys = 2 * times if n == 2 else (forward * (n - 1) + n) * times
    yield from exchange(step, PASS, (CONTEXT,), numbers * step.item, keys, 'keys')
    # On their last way, home, gradients are rounded before they are sent.
    sums = ((n - 1) * 4 + step.item) / n
    yield from exchange(step, PASS, (CONTEXT,), numbers * sums, n * times, 'gradients')


def _slots(shape: Shape, step: Step) -> tuple[float, float]:
    """Returns the bytes of a device's tokens in the slots of all experts, and how often they go."""
    slots = shape.routing.experts * shape.routing.capacity(step.length) / step.length
    passes = (2 if step.saved is None else 3) * visits(shape, step)
    return step.tokens / step.parts * slots * shape.width * step.item, passes


def _experts(shape: Shape, step: Step) -> Iterable[Collective]:
    """Tokens to their experts and back; both ways again for the gradient, and to compute again.

    What experts give, and the gradient of what they read, is split along the width.
    """
    if not shape.routing.experts:
        return
    whole, passes = _slots(shape, step)
    yield from exchange(step, SWAP, (EXPERT,), whole, passes, 'tokens')
    yield from exchange(step, SWAP, (EXPERT,), whole / step.size(TENSOR), passes, 'tokens')


def _pipeline(shape: Shape, step: Step) -> Iterable[Collective]:
    """Every microbatch handed to the next stage, and its gradient back; layers to their stages.

    Every stage holds the batch that comes in (`bigjax.nn.pipeline`), so its gradient is summed over
    them all, though only the first has one. Of what comes out of the last, each stage takes a part
    to make logits of, and the last has all of its gradient back.
    """
    stream = step.tokens / step.parts * shape.width * step.item / step.size(TENSOR)
    rounds = step.rounds(shape.layers)
    count = 2 * (step.parts * rounds + step.stages - 1) * step.accumulate
    yield from exchange(step, PASS, (STAGE,), stream, count, 'activations')
    batch, times = stream * step.parts, step.accumulate
    yield from exchange(step, REDUCE, (STAGE,), batch, times, 'activations')
    yield from exchange(step, SWAP, (STAGE,), batch, times, 'activations')
    yield from exchange(step, GATHER, (STAGE,), batch, times, 'activations')
    if rounds > 1:
        # A stage gives as many layers to each, some twice; gradients come back in float32.
        layers = -(-rounds // step.stages) * step.stages * shape.layers / step.stages / rounds
        numbers = sum(w.elements / step.shards(w.axes) for w in shape.weights() if w.layered)
        whole = layers * numbers * (step.item + 4)
        yield from exchange(step, SWAP, (STAGE,), whole / 2, 2 * times, 'parameters')


def collectives(shape: Shape, step: Step) -> tuple[Collective, ...]:
    """Returns every exchange of a step, nothing of it hidden behind computation."""
    parts = (parameters, _tensor, _context, _experts, _pipeline)
    return tuple(found for part in parts for found in part(shape, step))

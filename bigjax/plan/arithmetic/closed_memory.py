"""What one device holds at the peak of a decoder's training step, by arithmetic.

A block keeps its input and what `Step.saved` names for every layer. The peak is either in the
output layer, when all of these wait, or in the backward pass of a block, when the gradients of all
layers have their place as well.
"""

from bigjax.plan.arithmetic.closed_exchange import REDUCE
from bigjax.plan.arithmetic.closed_parameters import numbers, spread
from bigjax.plan.arithmetic.shape import FSDP, TENSOR, Shape, Step, parameter_bytes
from bigjax.plan.records import CATEGORIES, Memory

# A compiled program's code and constants; they hardly depend on the model.
PROGRAM = 40 * 2**20


def kept_bytes(shape: Shape, step: Step, tokens: float) -> dict[str, float]:
    """Returns the bytes of what one block makes of some tokens, by what `PARTS` calls it.

    Args:
      shape: the decoder.
      step: how it is computed.
      tokens: of one device, all positions of its share of rows.
    """
    tensor, D = step.size(TENSOR), shape.head_dim
    heads, kv_heads = shape.heads / tensor, max(1, shape.kv_heads / tensor)
    routing = shape.routing
    rows = tokens
    if routing.experts:
        rows = tokens * routing.experts * routing.capacity(step.length) / step.length
    hidden = shape.hidden if routing.experts else shape.hidden / tensor
    stream = tokens * shape.width / tensor * step.item
    return {
        'input': stream,
        'qkv': tokens * (heads + 2 * kv_heads) * D * step.item,
        'context': tokens * heads * (D * step.item + 4),
        'out': stream,
        'router': 4 * tokens * routing.experts,
        'mlp_in': (1 + shape.gated) * rows * hidden * step.item,
        'mlp_out': stream if not routing.experts else rows * shape.width * step.item,
    }


def saved_bytes(shape: Shape, step: Step) -> tuple[float, float]:
    """Returns what all blocks of one device keep for their gradients, here and on the host."""
    made = kept_bytes(shape, step, step.tokens)
    if step.saved is None:
        # What norms read, and what they give, gathered; what the last layer reads, and of a gate
        # what its function makes on the way.
        each = sum(made.values()) - made['mlp_out'] + 2 * made['input'] * step.size(TENSOR)
        each += made['mlp_in'] / (1 + shape.gated) * (4 if shape.gated else 1)
        away = 0.0
    else:
        # Of what is kept, no more than is needed: a block's last product is so by a router alone.
        kept = (step.saved | {'input'}) - (set() if shape.routing.experts else {'mlp_out'})
        each = sum(made[part] for part in kept - step.offloaded)
        away = sum(made[part] for part in kept & step.offloaded)
    layers = shape.layers / step.stages * step.bubble(shape.layers)
    return each * layers, away * layers


def gathered_bytes(shape: Shape, step: Step) -> float:
    """Returns what exchanges of parameters work with along the FSDP axis, in a block.

    The largest matrix whole, the one that is fetched meanwhile, and the gradient of a third; or of
    the whole block, where gradients are summed on every device: the compiler does so with all.
    """
    if step.size(FSDP) == 1:
        return 0.0
    matrices = [weight for weight in shape.weights() if weight.makes]
    largest = max(numbers(step, weight) for weight in matrices)
    whole = sum(numbers(step, w) for w in matrices if spread(step, w)[0] == REDUCE)
    return (2 * largest + max(largest, whole)) * step.item


def head_bytes(shape: Shape, step: Step) -> float:
    """Returns what the output layer works with: float32 logits, its matrix, the stream in float32.

    TPU's products make the gradient of the logits as they read it; elsewhere it is stored. Each
    stage of a pipeline makes the logits of a part of the rows. The tensor axis splits them by
    positions where it does not by the vocabulary.
    """
    tokens = step.tokens / step.stages
    logits = tokens * shape.vocab / step.size(TENSOR)
    vocab = shape.vocab / (step.size(TENSOR) if shape.split_vocab else 1)
    gradient = 0 if step.topology.hardware.is_tpu else step.item
    # The matrix is gathered, and so is its gradient before it is spread.
    matrices = 2 * shape.width * vocab * step.item
    return logits * (4 + gradient) + matrices + tokens * shape.width * (4 + step.item)


def block_bytes(shape: Shape, step: Step) -> float:
    """Returns what one block's backward pass works with, in the middle of its MLP.

    What the block made, its hidden layer twice for the gradients of it, and the stream, gathered
    along the tensor axis: what was read, its gradient, and both in float32 for a norm.
    """
    tokens = step.tokens / step.parts
    made = kept_bytes(shape, step, tokens)
    stream = tokens * shape.width * step.item
    scores = 0.0
    if step.attention != 'kernel':
        scores = 2 * tokens * step.length * shape.heads / step.size(TENSOR) * 4
    return made['qkv'] + made['context'] + 2 * made['mlp_in'] + 4 * stream + scores


def memory(shape: Shape, step: Step) -> Memory:
    """Returns what one device holds at the peak, by category."""
    parameters = parameter_bytes(shape, step)
    optimizer = int(step.slots * parameters)
    saved, away = saved_bytes(shape, step)
    in_head = saved + head_bytes(shape, step)
    in_block = saved + block_bytes(shape, step)
    gradients: float = parameters * (2 if step.accumulate > 1 else 1)
    collectives = gathered_bytes(shape, step)
    if step.rounds(shape.layers) > 1:
        # Layers that changed their devices, and their gradients there.
        gradients += parameters * step.item / 4
        collectives += parameters * step.item / 4
    found = dict.fromkeys(CATEGORIES, 0)
    found |= {
        'parameters': parameters,
        'optimizer': 0 if step.offload else optimizer,
        'program': PROGRAM,
    }
    if in_head > in_block + gradients + collectives:
        found['activations'] = int(in_head)
    else:
        found |= {
            'activations': int(in_block),
            'gradients': int(gradients),
            'collectives': int(collectives),
        }
    host = int(away) + (optimizer if step.offload else 0)
    return Memory(found, sum(found.values()), host)

"""Floating-point operations of a decoder's training step, two for a multiply-add.

Only matrix products count, as everywhere in bigjax.
"""

from bigjax.plan.arithmetic.shape import CONTEXT, TENSOR, Shape, Step
from pallas_kernels.attention.tpu.layout import heads
from pallas_kernels.attention.xla_runs import is_short, runs

# Products of the scores' size: q k and p v forward; backward p again, dp, dv, dq and dk.
FORWARD, BACKWARD = 2, 5


def dense_flops(shape: Shape, length: int, *, places: float | None = None) -> dict[str, float]:
    """Returns what the products of one block take in the forward pass of one row.

    Args:
      shape: the decoder.
      length: positions of a row.
      places: rows of all experts' inputs; None counts a token's experts as they are asked for.

    Returns:
      By what they make: `shape.PARTS`, of which 'context' is no such product.
    """
    found: dict[str, float] = {}
    for weight in shape.weights():
        rows: float = length
        elements = weight.elements
        if shape.routing.experts and weight.makes in ('mlp_in', 'mlp_out'):
            elements //= shape.routing.experts
            rows = shape.routing.experts_per_token * length if places is None else places
        if weight.makes:
            found[weight.makes] = found.get(weight.makes, 0) + 2 * rows * elements
    return found


def product_flops(shape: Shape, pairs: float) -> float:
    """Returns what one product of the scores' size takes, of all heads of one row and layer."""
    return 2 * pairs * shape.heads * shape.head_dim


def seen_pairs(length: int) -> float:
    """Returns the pairs of a query and a key of one row that a causal mask leaves."""
    return length * (length + 1) / 2


def computed_pairs(step: Step) -> float:
    """Returns the pairs of one row whose scores are computed, masked ones in their chunks too.

    Of kernels those that are seen. XLA's form has eight chunks of queries, each with the keys up to
    its last one; where devices split positions, each has two chunks of queries, which meet all keys
    if these are gathered, and in a ring the 2 n + 1 of 2 n + 2 n chunks that they see.
    """
    length, n = step.length, step.size(CONTEXT)
    if step.attention == 'kernel':
        return seen_pairs(length)
    if n > 1:
        return length**2 * ((2 * n + 1) / (4 * n) if step.context == 'ring' else 1)
    if step.attention == 'reference':
        return length**2
    cut = runs(1, length, length, 1, left=None, right=0, shift=0)
    return sum(run.count * run.queries * run.keys for run in cut)


def _filled(shape: Shape, step: Step) -> float:
    """Returns what the TPU kernels multiply over what there is: they fill heads up with zeros."""
    if step.attention != 'kernel' or not step.topology.hardware.is_tpu:
        return 1.0
    H, K = (max(1, n // step.size(TENSOR)) for n in (shape.heads, shape.kv_heads))
    there = heads(H, K, shape.head_dim, shape.head_dim)
    return there.n_q * there.D / (H * shape.head_dim)


def attention_products(shape: Shape, step: Step) -> int:
    """Returns how many products of the scores' size a layer takes in all.

    XLA's form hands the weights of a short row to the gradient, which then has no need to compute
    them; a policy keeps attention's result at most, and has them computed again.
    """
    again = 'context' in recomputed(shape, step.saved)
    if step.attention == 'xla' and is_short(step.length, step.length) and step.size(CONTEXT) == 1:
        twice = FORWARD if again else int(step.saved is not None and 'context' in step.saved)
        return FORWARD + BACKWARD - 1 + twice
    return FORWARD * (1 + again) + BACKWARD


def head_flops(shape: Shape, length: int) -> float:
    """Returns what the output layer takes in the forward pass of one row."""
    return 2.0 * length * shape.width * shape.vocab


def model_flops(shape: Shape, batch: int, length: int, *, causal: bool = False) -> float:
    """Returns the operations of a step on all devices, none of them done twice.

    Args:
      shape: the decoder.
      batch: rows of the step.
      length: positions of a row.
      causal: leave out the scores that a causal mask hides; all count in the convention of
        Chowdhery et al. 2022, appendix B.
    """
    block = sum(dense_flops(shape, length).values())
    block += FORWARD * product_flops(shape, seen_pairs(length) if causal else length**2)
    return 3 * batch * (shape.layers * block + head_flops(shape, length))


def recomputed(shape: Shape, saved: frozenset[str] | None) -> tuple[str, ...]:
    """Returns what a block's backward pass computes again.

    The last product is dead then: the next block's input is kept, and nothing of it is needed but
    by a mixture, whose router learns from its experts' outputs.
    """
    if saved is None:
        return ()
    needed = ['qkv', 'context', 'out', 'mlp_in']
    if shape.routing.experts:
        needed += ['router', 'mlp_out']
    return tuple(part for part in needed if part not in saved)


def row_flops(shape: Shape, step: Step) -> tuple[float, float, float]:
    """Returns what one row takes, executed: in dense layers, in attention, in the output layer."""
    experts = shape.routing.experts
    places = experts * shape.routing.capacity(step.length) if experts else None
    dense = dense_flops(shape, step.length, places=places)
    again = recomputed(shape, step.saved)
    block = 3 * sum(dense.values()) + sum(dense[part] for part in again if part != 'context')
    if experts:  # A token's outputs, weighted and summed, and the weights' gradients.
        block += 2 * 2 * step.length * shape.routing.experts_per_token * shape.width
    attention = attention_products(shape, step) * product_flops(shape, computed_pairs(step))
    attention *= _filled(shape, step)
    # Stages that have nothing to do compute, too.
    layers = shape.layers * step.bubble(shape.layers)
    return layers * block, layers * attention, 3 * head_flops(shape, step.length)


def executed_flops(shape: Shape, step: Step) -> float:
    """Returns what one device computes in a step, what is done again counted, masked blocks not."""
    return sum(row_flops(shape, step)) * step.batch / step.devices


def busy_seconds(shape: Shape, step: Step) -> float:
    """Returns the seconds that one device's operations take at its peak.

    Dense layers run at the rate of their type; attention and the output layer stay in bfloat16.
    """
    hardware = step.topology.hardware
    peaks = {'int8': hardware.int8_flops, 'fp8': hardware.fp8_flops}
    dense, *rest = row_flops(shape, step)
    seconds = dense / peaks.get(step.matmul, hardware.peak_flops) + sum(rest) / hardware.peak_flops
    return seconds * step.batch / step.devices

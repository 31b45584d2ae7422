"""Floating-point operations of a decoder's training step, two for a multiply-add.

Only matrix products count, as everywhere in bigjax.
"""

from bigjax.plan.arithmetic.shape import Shape, Step

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


def product_flops(shape: Shape, length: int, *, causal: bool) -> float:
    """Returns what one product of the scores' size takes, of all heads of one row and layer."""
    pairs = length * (length + 1) / 2 if causal else length**2
    return 2 * pairs * shape.heads * shape.head_dim


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
    block += FORWARD * product_flops(shape, length, causal=causal)
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
    if experts:  # A token's outputs, weighted and summed.
        block += 3 * 2 * step.length * shape.routing.experts_per_token * shape.width
    products = FORWARD * (1 + ('context' in again)) + BACKWARD
    attention = products * product_flops(shape, step.length, causal=step.flash)
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

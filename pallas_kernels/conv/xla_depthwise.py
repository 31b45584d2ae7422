"""Depthwise convolution on a CPU: shifted images times a number for each channel, added up.

Nothing depends on how many rows, columns or images there are, so that a part of a sequence has the
bits that it has within the whole.

Legend: B batch, H W input rows and columns, K L kernel rows and columns, P Q output rows and
columns, C channels, O = C·M output channels, M of each channel, N chunks of R columns of output.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.arrays import accumulator
from pallas_kernels.conv.arguments import Pair, Spec, span

_CHUNK = 64  # columns whose sums stay in a core's cache


def forward(x_BHWC: jax.Array, w_KL1O: jax.Array, spec: Spec) -> tuple[jax.Array, None]:
    """Returns u_BPQO in the type of the sum, and None."""
    padded = jnp.pad(x_BHWC, ((0, 0), *spec.padding, (0, 0)))
    if w_KL1O.shape[:2] != (1, 1):
        padded = _stored(padded)
    size_PQ = spec.out_size(x_BHWC.shape[1:3], w_KL1O.shape[:2])
    return _sum(padded, w_KL1O, size_PQ, spec.stride, spec.dilation), None


def gradients(
    du_BPQO: jax.Array, x_BHWC: jax.Array, w_KL1O: jax.Array, spec: Spec, kept: None
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients in the types of x and w."""
    del kept
    dx_BHWC = _input_gradient(du_BPQO, x_BHWC, w_KL1O, spec)
    dw_KL1O = _weight_gradient(du_BPQO, x_BHWC, w_KL1O, spec)
    return dx_BHWC.astype(x_BHWC.dtype), dw_KL1O.astype(w_KL1O.dtype)


def _input_gradient(du_BPQO, x_BHWC, w_KL1O, spec) -> jax.Array:
    """Correlates the cotangent, spread out by the strides, with the kernel turned."""
    config = [(0, 0, 0)]
    for axis in (0, 1):
        stride, (low, _) = spec.stride[axis], spec.padding[axis]
        over, size = span(w_KL1O.shape[axis], spec.dilation[axis]), x_BHWC.shape[1 + axis]
        filled = (du_BPQO.shape[1 + axis] - 1) * stride + 1
        before = over - 1 - low
        config.append((before, size + over - 1 - before - filled, stride - 1))
    padded = jax.lax.pad(du_BPQO, jnp.zeros((), du_BPQO.dtype), [*config, (0, 0, 0)])
    size_HW, C = x_BHWC.shape[1:3], x_BHWC.shape[3]
    dx_BHWO = _sum(_stored(padded), w_KL1O[::-1, ::-1], size_HW, (1, 1), spec.dilation)
    if dx_BHWO.shape[3] == C:
        return dx_BHWO
    return dx_BHWO.reshape(*dx_BHWO.shape[:3], C, -1).sum(4)


def _weight_gradient(du_BPQO, x_BHWC, w_KL1O, spec) -> jax.Array:
    """Sums products over rows, chunk by chunk of columns, and over a chunk's columns at the end."""
    (B, P, Q, outputs), (K, L) = du_BPQO.shape, w_KL1O.shape[:2]
    dtype = accumulator(x_BHWC.dtype)
    N = -(-Q // _CHUNK)
    R = -(-Q // N)
    # The last chunk is filled with zeros, which some pixels, whichever, are multiplied by.
    more = max(0, (N * R - 1) * spec.stride[1] + span(L, spec.dilation[1]) - x_BHWC.shape[2])
    (left, right), rows = spec.padding[1], spec.padding[0]
    x_padded = _stored(jnp.pad(x_BHWC, ((0, 0), rows, (left, max(right, more - left)), (0, 0))))
    du_padded = jnp.pad(du_BPQO, ((0, 0), (0, 0), (0, N * R - Q), (0, 0)))

    def step(sums, index):
        b, p, n = index // (P * N), index // N % P, index % N
        du_RO = jax.lax.dynamic_slice(du_padded, (b, p, n * R, 0), (1, 1, R, outputs))[0, 0]
        du_RO = du_RO.astype(dtype)
        for i in range(K):
            row = p * spec.stride[0] + i * spec.dilation[0]
            for j in range(L):
                col = n * R * spec.stride[1] + j * spec.dilation[1]
                size = (1, 1, (R - 1) * spec.stride[1] + 1, x_BHWC.shape[3])
                x_RC = jax.lax.dynamic_slice(x_padded, (b, row, col, 0), size)[0, 0]
                x_RO = _repeat(x_RC[:: spec.stride[1]].astype(dtype), outputs)
                sums[i][j] = sums[i][j] + x_RO * du_RO
        return sums, None

    zeros = [[jnp.zeros((R, outputs), dtype)] * L for _ in range(K)]
    sums, _ = jax.lax.scan(step, zeros, jnp.arange(B * P * N))
    return jnp.stack([jnp.stack([x_RO.sum(0)[None] for x_RO in row]) for row in sums])


def _sum(padded, w_KL1O, size_PQ: Pair, stride: Pair, dilation: Pair) -> jax.Array:
    dtype, outputs = accumulator(padded.dtype), w_KL1O.shape[3]
    total = None
    for i, j, read in _reads(w_KL1O.shape[:2], size_PQ, stride, dilation):
        part = _repeat(padded[:, *read].astype(dtype), outputs)
        part *= w_KL1O[i, j].astype(dtype)[None, None]
        total = part if total is None else total + part
    return total


def _reads(
    kernel_KL: Pair, size_PQ: Pair, stride: Pair, dilation: Pair
) -> Iterator[tuple[int, int, tuple[slice, slice]]]:
    """Yields (i, j, what the outputs read of a padded image) for every kernel position."""

    def read(axis, tap):
        first = tap * dilation[axis]
        return slice(first, first + (size_PQ[axis] - 1) * stride[axis] + 1, stride[axis])

    for i in range(kernel_KL[0]):
        for j in range(kernel_KL[1]):
            yield i, j, (read(0, i), read(1, j))


def _repeat(x: jax.Array, outputs: int) -> jax.Array:
    """Returns x with each channel as often as it has outputs."""
    return x if x.shape[-1] == outputs else jnp.repeat(x, outputs // x.shape[-1], axis=-1)


def _stored(x: jax.Array) -> jax.Array:
    # XLA would fuse the padding into each shift, which then asks at every number whether it is one.
    return jax.lax.optimization_barrier(x)

"""Convolution as one matrix product for each kernel position, zero padding left out.

Legend: B batch, H W input rows and columns, K L kernel rows and columns, P Q output rows and
columns, C input channels, O output channels, N = B·P·Q of one kernel position.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.conv.arguments import Pair, Spec

Slices = tuple[slice, slice]


def forward(x_BHWC: jax.Array, w_KLCO: jax.Array, spec: Spec) -> tuple[jax.Array, None]:
    """Returns the sum over kernel positions of (the pixels it reads) @ w[i, j], and None."""
    size_PQ = spec.out_size(x_BHWC.shape[1:3], w_KLCO.shape[:2])
    u_BPQO = jnp.zeros((x_BHWC.shape[0], *size_PQ, w_KLCO.shape[3]), x_BHWC.dtype)
    for i, j, out, read in _taps(x_BHWC.shape[1:3], w_KLCO.shape[:2], spec):
        x_BPQC = x_BHWC[:, *read]
        part = (_rows(x_BPQC) @ w_KLCO[i, j]).reshape(*x_BPQC.shape[:3], -1)
        u_BPQO += _place(part, out, size_PQ)
    return u_BPQO, None


def gradients(
    du_BPQO: jax.Array, x_BHWC: jax.Array, w_KLCO: jax.Array, spec: Spec, kept: None
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients, sums of the same kind."""
    del kept
    K, L = w_KLCO.shape[:2]
    dx_BHWC = jnp.zeros_like(x_BHWC)
    dw_KLCO = [[jnp.zeros_like(w_KLCO[0, 0])] * L for _ in range(K)]
    for i, j, out, read in _taps(x_BHWC.shape[1:3], (K, L), spec):
        du_tap = du_BPQO[:, *out]
        du_NO = _rows(du_tap)
        dw_KLCO[i][j] = _rows(x_BHWC[:, *read]).T @ du_NO
        part = (du_NO @ w_KLCO[i, j].T).reshape(*du_tap.shape[:3], -1)
        dx_BHWC += _place(part, read, x_BHWC.shape[1:3])
    return dx_BHWC, jnp.stack([jnp.stack(row) for row in dw_KLCO])


def _taps(size_HW: Pair, kernel_KL: Pair, spec: Spec) -> Iterator[tuple[int, int, Slices, Slices]]:
    """Yields (i, j, output slices, input slices) for every kernel position that meets a pixel."""
    rows, cols = (_span(axis, size_HW, kernel_KL, spec) for axis in (0, 1))

    def read(start, stop, first, stride):
        return slice(first, first + (stop - start - 1) * stride + 1, stride)

    for i, row in enumerate(rows):
        for j, col in enumerate(cols):
            if row[0] < row[1] and col[0] < col[1]:
                out = (slice(row[0], row[1]), slice(col[0], col[1]))
                yield i, j, out, (read(*row, spec.stride[0]), read(*col, spec.stride[1]))


def _span(axis: int, size_HW: Pair, kernel_KL: Pair, spec: Spec) -> list[tuple[int, int, int]]:
    """Per tap along an axis: the outputs [start, stop) that read real pixels, and the first."""
    size, stride, low = size_HW[axis], spec.stride[axis], spec.padding[axis][0]
    out = spec.out_size(size_HW, kernel_KL)[axis]
    spans = []
    for tap in range(kernel_KL[axis]):
        shift = tap * spec.dilation[axis] - low
        start = max(0, -(shift // stride))
        stop = min(out, (size - 1 - shift) // stride + 1)
        spans.append((start, max(start, stop), start * stride + shift))
    return spans


def _place(part_BPQO: jax.Array, slices: Slices, size_PQ: Pair) -> jax.Array:
    """Puts a block at (strided) slices of zeros of size_PQ, as a pad: XLA fuses it into a sum."""
    config = [(0, 0, 0)]
    for s, size in zip(slices, size_PQ, strict=True):
        step = s.step or 1
        config.append((s.start, size - s.stop, step - 1))
    return jax.lax.pad(part_BPQO, jnp.zeros((), part_BPQO.dtype), [*config, (0, 0, 0)])


def _rows(x_BPQC: jax.Array) -> jax.Array:
    return x_BPQC.reshape(-1, x_BPQC.shape[-1])

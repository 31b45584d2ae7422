"""Spatial pooling of images [B, H, W, C].

Legend: B batch, H W rows and columns, P Q pooled rows and columns, I J window rows and columns, C
channels.
"""

import itertools
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from pallas_kernels.chip import accelerator

Pads = tuple[tuple[int, int], tuple[int, int]]
Padding = str | Pads
_IMPLS = (None, 'xla', 'blocks', 'taps')


def max_pool(
    x_BHWC: jax.Array,
    *,
    window: tuple[int, int] = (2, 2),
    strides: tuple[int, int] | None = None,
    padding: Padding = 'VALID',
    impl: str | None = None,
) -> jax.Array:
    """Largest value of each window; the gradient goes to the first largest (row by row).

    `strides` None means `window`; `padding` is 'VALID', 'SAME', 'CEIL' (`ceil_padding`) or pairs,
    padded with -inf. `impl` is one of
      'xla': `lax.reduce_window`;
      'blocks': the image cut in 2×2 blocks, for window and strides 2×2, no padding, even H and W;
      'taps': the largest of one strided image per window position, for any window;
      None: chosen by shape and backend, as the last two are faster on CPUs.
    Raises ValueError for another `impl`, or where 'blocks' does not apply.
    """
    window = (int(window[0]), int(window[1]))
    strides = window if strides is None else (int(strides[0]), int(strides[1]))
    pads = _pads(x_BHWC.shape[1:3], window, strides, padding)
    even = not (x_BHWC.shape[1] % 2 or x_BHWC.shape[2] % 2)
    blocks = window == strides == (2, 2) and pads == ((0, 0), (0, 0)) and even
    if impl not in _IMPLS:
        raise ValueError(f'impl={impl!r} is not a max-pooling; use one of {_IMPLS}')
    if impl == 'blocks' and not blocks:
        raise ValueError(
            "impl='blocks' needs window and strides (2, 2), no padding and even sizes; "
            f"got {window}, {strides}, {padding!r}, {x_BHWC.shape}; use impl='xla'"
        )
    if impl is None and accelerator() is None:
        impl = 'blocks' if blocks else 'taps'
    if impl == 'blocks':
        return _max_pool_2x2(x_BHWC)
    if impl == 'taps':
        return _max_pool_taps(x_BHWC, window, strides, pads)
    return nn.max_pool(x_BHWC, window, strides, pads)


def _pads(size_HW, window, strides, padding: Padding) -> Pads:
    if padding == 'CEIL':
        return ceil_padding(size_HW, window, strides)
    if isinstance(padding, str):
        (top, bottom), (left, right) = lax.padtype_to_pads(size_HW, window, strides, padding)
    else:
        (top, bottom), (left, right) = padding
    return (int(top), int(bottom)), (int(left), int(right))


def ceil_padding(
    size_HW: tuple[int, int], window: tuple[int, int], strides: tuple[int, int]
) -> Pads:
    """Padding on the far sides that keeps every pixel in a window (torch's `ceil_mode`).

    Windows that would start beyond the image are left out, but never the only one.
    """

    def extra(size: int, window: int, stride: int) -> int:
        count = max(-(-(size - window) // stride) + 1, 1)
        if count > 1 and (count - 1) * stride >= size:
            count -= 1
        return max((count - 1) * stride + window - size, 0)

    high, wide = (extra(*axis) for axis in zip(size_HW, window, strides, strict=True))
    return (0, high), (0, wide)


def avg_pool(
    x_BHWC: jax.Array,
    *,
    window: tuple[int, int] = (2, 2),
    strides: tuple[int, int] | None = None,
    padding: Padding = 'VALID',
) -> jax.Array:
    """Mean of each window, padding counted as zeros; `strides` None means `window`."""
    strides = window if strides is None else strides
    return nn.avg_pool(x_BHWC, tuple(window), tuple(strides), padding)


def global_avg_pool(x_BHWC: jax.Array) -> jax.Array:
    """Mean over all pixels, summed in float32 at least: [B, C] in the dtype of the input."""
    wide = jnp.promote_types(x_BHWC.dtype, jnp.float32)
    return x_BHWC.mean(axis=(1, 2), dtype=wide).astype(x_BHWC.dtype)


def adaptive_avg_pool(x_BHWC: jax.Array, size_PQ: tuple[int, int]) -> jax.Array:
    """Mean of P × Q windows that cover the image, whatever its size: [B, P, Q, C].

    Row p is the mean of rows ⌊p H / P⌋ to ⌈(p + 1) H / P⌉ - 1, columns likewise (torch's
    `AdaptiveAvgPool2d`): windows overlap where P does not divide H, and repeat where P > H.
    """
    if x_BHWC.shape[1:3] == tuple(size_PQ):
        return x_BHWC
    rows_PH, cols_QW = (
        jnp.asarray(_windows(size, out), x_BHWC.dtype)
        for size, out in zip(x_BHWC.shape[1:3], size_PQ, strict=True)
    )
    x_BPWC = jnp.einsum('ph,bhwc->bpwc', rows_PH, x_BHWC, precision='highest')
    return jnp.einsum('qw,bpwc->bpqc', cols_QW, x_BPWC, precision='highest')


def _windows(size: int, out: int) -> np.ndarray:
    """Weights [out, size] of the pixels in each window of `adaptive_avg_pool`."""
    starts = np.arange(out) * size // out
    stops = -(-np.arange(1, out + 1) * size // out)
    pixel = np.arange(size)
    inside = (starts[:, None] <= pixel[None]) & (pixel[None] < stops[:, None])
    return inside / (stops - starts)[:, None]


def _blocks(x_BHWC):
    b, h, w, c = x_BHWC.shape
    return x_BHWC.reshape(b, h // 2, 2, w // 2, 2, c)


@jax.custom_vjp
def _max_pool_2x2(x_BHWC):
    return _blocks(x_BHWC).max(axis=(2, 4))


def _max_pool_2x2_fwd(x_BHWC):
    y_BPQC = _max_pool_2x2(x_BHWC)
    return y_BPQC, (x_BHWC, y_BPQC)


def _max_pool_2x2_bwd(saved, g_BPQC):
    x_BHWC, y_BPQC = saved
    top_BPIQJC = _blocks(x_BHWC) == y_BPQC[:, :, None, :, None, :]
    free_BPQC = jnp.ones_like(y_BPQC, bool)
    # The first maximum of a block takes the whole gradient, as select-and-scatter (and torch) do.
    first = {}
    for i in range(2):
        for j in range(2):
            hit_BPQC = top_BPIQJC[:, :, i, :, j]
            first[i, j] = jnp.where(hit_BPQC & free_BPQC, g_BPQC, 0)
            free_BPQC &= ~hit_BPQC
    rows = [jnp.stack([first[i, 0], first[i, 1]], axis=3) for i in range(2)]
    return (jnp.stack(rows, axis=2).reshape(x_BHWC.shape),)


_max_pool_2x2.defvjp(_max_pool_2x2_fwd, _max_pool_2x2_bwd)


def _taps(x_BHWC, window, strides, pads) -> Iterator[tuple[int, int, jax.Array]]:
    """Yields (i, j, what that position of every window reads), row by row."""
    padded = jnp.pad(x_BHWC, ((0, 0), *pads, (0, 0)), constant_values=-jnp.inf)
    last = [
        (size - taps) // stride * stride
        for size, taps, stride in zip(padded.shape[1:3], window, strides, strict=True)
    ]
    for i in range(window[0]):
        for j in range(window[1]):
            rows = slice(i, i + last[0] + 1, strides[0])
            yield i, j, padded[:, rows, j : j + last[1] + 1 : strides[1]]


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _max_pool_taps(x_BHWC, window, strides, pads):
    """Max-pooling whose gradient is a sum over window positions, not a scatter."""
    y_BPQC = None
    for _, _, tap_BPQC in _taps(x_BHWC, window, strides, pads):
        y_BPQC = tap_BPQC if y_BPQC is None else jnp.maximum(y_BPQC, tap_BPQC)
    return y_BPQC


def _max_pool_taps_fwd(x_BHWC, window, strides, pads):
    y_BPQC = _max_pool_taps(x_BHWC, window, strides, pads)
    return y_BPQC, (x_BHWC, y_BPQC)


def _max_pool_taps_bwd(window, strides, pads, saved, g_BPQC):
    x_BHWC, y_BPQC = saved
    # Which position holds the first maximum: the last that is written, from the end on.
    first_BPQC = jnp.full(y_BPQC.shape, -1, jnp.int32)
    for i, j, tap_BPQC in reversed(list(_taps(x_BHWC, window, strides, pads))):
        first_BPQC = jnp.where(tap_BPQC == y_BPQC, i * window[1] + j, first_BPQC)
    # Pixels whose places differ by a stride belong to one phase, a grid with room for every window
    # and no gaps; gaps in the parts themselves would be found anew for each pixel and position.
    (low_H, _), (low_W, _) = pads
    B, H, W, C = x_BHWC.shape
    most = [(taps - 1) // stride for taps, stride in zip(window, strides, strict=True)]
    grid = [
        max(-(-(low + size) // stride), out + m)
        for (low, _), size, stride, out, m in zip(
            pads, (H, W), strides, y_BPQC.shape[1:3], most, strict=True
        )
    ]
    # Padded once and read at an offset: nine padded parts would be tested for their edges, pixel by
    # pixel, in the one loop that also adds what other branches give. Strided reads are no such
    # loop, and gain from arrays that exist.
    edges = [(m, n - out) for m, n, out in zip(most, grid, y_BPQC.shape[1:3], strict=True)]
    first = jnp.pad(first_BPQC, ((0, 0), *edges, (0, 0)), constant_values=-1)
    g = jnp.pad(g_BPQC, ((0, 0), *edges, (0, 0)))
    if strides != (1, 1):
        first, g = lax.optimization_barrier((first, g))
    phases = [jnp.zeros((B, *grid, C), x_BHWC.dtype)] * (strides[0] * strides[1])
    for i, j in itertools.product(*map(range, window)):
        (m, row), (n, column) = divmod(i, strides[0]), divmod(j, strides[1])
        top, left = most[0] - m, most[1] - n
        at = (slice(None), slice(top, top + grid[0]), slice(left, left + grid[1]))
        part = jnp.where(first[at] == i * window[1] + j, g[at], 0)
        phases[row * strides[1] + column] += part
    dx = jnp.stack(phases).reshape(*strides, B, *grid, C).transpose(2, 3, 0, 4, 1, 5)
    dx = dx.reshape(B, grid[0] * strides[0], grid[1] * strides[1], C)
    dx_BHWC = dx[:, low_H : low_H + H, low_W : low_W + W]
    return (dx_BHWC,)


_max_pool_taps.defvjp(_max_pool_taps_fwd, _max_pool_taps_bwd)

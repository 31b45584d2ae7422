"""Convolution: the one place convolutions are called from.

`conv` chooses between XLA's own convolution and forms that are faster on CPUs. Off the CPU it is
always XLA's (`lax.conv_general_dilated`).

Legend: B batch, H W input rows and columns, P Q output rows and columns, I J kernel rows and
columns, C input channels, O output channels, N = B·P·Q of one kernel position.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from bigjax.nn.winograd import conv_winograd

Padding = str | Sequence[tuple[int, int]]
_IMPLS = (None, 'xla', 'split_grad', 'taps', 'taps_grad', 'winograd')
_SPLIT = 16  # images of one part of 'split_grad'


def conv(
    x_BHWC: jax.Array,
    w_IJCO: jax.Array,
    *,
    strides: tuple[int, int] = (1, 1),
    padding: Padding = 'SAME',
    impl: str | None = None,
) -> jax.Array:
    """Two-dimensional cross-correlation of images [B, H, W, C] with a kernel [I, J, C, O].

    `padding` is 'SAME' (output size ⌈H / stride⌉), 'VALID', or ((top, bottom), (left, right)) in
    pixels of zeros. `impl` is one of
      None: chosen by shape, dtype and backend;
      'xla': XLA's own convolution;
      'split_grad': the same, the kernel's gradient summed over parts of the batch;
      'taps': the sum of one matrix product per kernel position, zero padding left out;
      'taps_grad': XLA's convolution whose gradients are such sums;
      'winograd': see `bigjax.nn.winograd`; 3×3, strides 1, one pixel of padding.
    Returns [B, P, Q, O] in the dtype of the inputs, which must agree. Raises ValueError for another
    `impl`, rank or channel count, or where 'winograd' does not apply.
    """
    if impl not in _IMPLS:
        raise ValueError(f'impl={impl!r} is not a convolution; use one of {_IMPLS}')
    if x_BHWC.ndim != 4 or w_IJCO.ndim != 4 or x_BHWC.shape[3] != w_IJCO.shape[2]:
        raise ValueError(
            f'conv takes images [B, H, W, C] and a kernel [I, J, C, O] with the same C; '
            f'got {x_BHWC.shape} and {w_IJCO.shape}'
        )
    size_HW, size_IJ = x_BHWC.shape[1:3], w_IJCO.shape[:2]
    pads = (
        lax.padtype_to_pads(size_HW, size_IJ, strides, padding)
        if isinstance(padding, str)
        else padding
    )
    pads = tuple((int(low), int(high)) for low, high in pads)
    if impl is None:
        impl = _choose(x_BHWC, w_IJCO, strides, pads)
    if impl == 'winograd':
        if not _winograd_fits(w_IJCO.shape, strides, pads):
            raise ValueError(
                "impl='winograd' needs a 3×3 kernel, strides (1, 1) and one pixel of padding; got "
                f"{w_IJCO.shape[:2]}, {tuple(strides)}, {pads}; use impl='xla'"
            )
        return conv_winograd(x_BHWC, w_IJCO)
    if impl == 'taps':
        return _conv_taps(x_BHWC, w_IJCO, tuple(strides), pads, _sum_taps)
    if impl == 'taps_grad':
        return _conv_taps(x_BHWC, w_IJCO, tuple(strides), pads, _xla)
    if impl == 'split_grad':
        return _conv_split(x_BHWC, w_IJCO, tuple(strides), pads)
    return _xla(x_BHWC, w_IJCO, strides, pads)


def _xla(x_BHWC, w_IJCO, strides, pads):
    return lax.conv_general_dilated(
        x_BHWC, w_IJCO, strides, pads, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )


def _winograd_fits(w_shape, strides, pads) -> bool:
    return tuple(w_shape[:2]) == (3, 3) and tuple(strides) == (1, 1) and pads == ((1, 1), (1, 1))


def _choose(x_BHWC, w_IJCO, strides, pads) -> str:
    if jax.default_backend() != 'cpu':
        return 'xla'
    # Measured on CPUs: with 64 channels or more, XLA's own convolution packs and pads slowly.
    _, h, w, c = x_BHWC.shape
    if x_BHWC.dtype != jnp.float32:
        return 'xla'
    # One matrix product, which XLA's own convolution reaches half the speed of, also when narrow.
    if w_IJCO.shape[:2] == (1, 1):
        return 'taps'
    if min(c, w_IJCO.shape[3]) < 64:
        return 'split_grad'
    # Odd sides leave part of the last tiles unused, which with 64 channels is not worth it.
    tiled = h % 2 == w % 2 == 0 or min(c, w_IJCO.shape[3]) > 64
    if tiled and h * w >= 16 and _winograd_fits(w_IJCO.shape, strides, pads):
        return 'winograd'
    if h * w <= 16:
        return 'taps'
    if not tiled:
        return 'split_grad'
    # XLA transposes the whole image for a kernel's gradient, and dilates for a strided input's.
    return 'taps_grad' if max(strides) > 1 else 'xla'


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv_split(x_BHWC, w_IJCO, strides, pads):
    return _xla(x_BHWC, w_IJCO, strides, pads)


def _conv_split_fwd(x_BHWC, w_IJCO, strides, pads):
    return _xla(x_BHWC, w_IJCO, strides, pads), (x_BHWC, w_IJCO)


def _conv_split_bwd(strides, pads, saved, g_BPQO):
    x_BHWC, w_IJCO = saved
    dx_BHWC = jax.vjp(lambda x: _xla(x, w_IJCO, strides, pads), x_BHWC)[1](g_BPQO)[0]
    dw_IJCO = jnp.zeros_like(w_IJCO)
    # XLA transposes all images for the kernel's gradient: parts of them stay in a core's cache.
    for i in range(0, x_BHWC.shape[0], _SPLIT):
        x, g = x_BHWC[i : i + _SPLIT], g_BPQO[i : i + _SPLIT]
        dw_IJCO += jax.vjp(lambda w, x=x: _xla(x, w, strides, pads), w_IJCO)[1](g)[0]
    return dx_BHWC, dw_IJCO


_conv_split.defvjp(_conv_split_fwd, _conv_split_bwd)


def _span(size: int, taps: int, stride: int, pads: tuple[int, int]) -> list[tuple[int, int, int]]:
    """Per tap along an axis: the outputs [start, stop) that read real pixels, and the first."""
    low, high = pads
    out = (size + low + high - taps) // stride + 1
    spans = []
    for tap in range(taps):
        start = max(0, -((tap - low) // stride))
        stop = min(out, (size - 1 + low - tap) // stride + 1)
        spans.append((start, max(start, stop), start * stride + tap - low))
    return spans


def _taps(x_shape, w_shape, strides, pads):
    """Yields (i, j, output slices, input slices) for every kernel position that meets a pixel."""
    rows = _span(x_shape[1], w_shape[0], strides[0], pads[0])
    cols = _span(x_shape[2], w_shape[1], strides[1], pads[1])

    def read(start, stop, first, stride):
        return slice(first, first + (stop - start - 1) * stride + 1, stride)

    for i, row in enumerate(rows):
        for j, col in enumerate(cols):
            if row[0] < row[1] and col[0] < col[1]:
                out = (slice(row[0], row[1]), slice(col[0], col[1]))
                yield i, j, out, (read(*row, strides[0]), read(*col, strides[1]))


def _out_size(size: int, taps: int, stride: int, pads: tuple[int, int]) -> int:
    return (size + sum(pads) - taps) // stride + 1


def _place(part_BPQO, slices, size_PQ):
    """Puts a block at (strided) slices of zeros of size_PQ, as a pad: XLA fuses it into a sum."""
    config = [(0, 0, 0)]
    for s, size in zip(slices, size_PQ, strict=True):
        step = s.step or 1
        config.append((s.start, size - s.stop, step - 1))
    return lax.pad(part_BPQO, jnp.zeros((), part_BPQO.dtype), [*config, (0, 0, 0)])


def _rows(x_BPQC):
    return x_BPQC.reshape(-1, x_BPQC.shape[-1])


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _conv_taps(x_BHWC, w_IJCO, strides, pads, forward):
    """Convolution by `forward` with gradients that are sums over kernel positions."""
    return forward(x_BHWC, w_IJCO, strides, pads)


def _sum_taps(x_BHWC, w_IJCO, strides, pads):
    """Sum over kernel positions of (the pixels it reads) @ w[i, j], zero padding left out."""
    size_PQ = [
        _out_size(*a) for a in zip(x_BHWC.shape[1:3], w_IJCO.shape[:2], strides, pads, strict=True)
    ]
    y_BPQO = jnp.zeros((x_BHWC.shape[0], *size_PQ, w_IJCO.shape[3]), x_BHWC.dtype)
    for i, j, out, read in _taps(x_BHWC.shape, w_IJCO.shape, strides, pads):
        x_BPQC = x_BHWC[:, *read]
        part = (_rows(x_BPQC) @ w_IJCO[i, j]).reshape(*x_BPQC.shape[:3], -1)
        y_BPQO += _place(part, out, size_PQ)
    return y_BPQO


def _conv_taps_fwd(x_BHWC, w_IJCO, strides, pads, forward):
    return forward(x_BHWC, w_IJCO, strides, pads), (x_BHWC, w_IJCO)


def _conv_taps_bwd(strides, pads, forward, saved, g_BPQO):
    del forward
    x_BHWC, w_IJCO = saved
    dx_BHWC = jnp.zeros_like(x_BHWC)
    dw_IJCO = [[jnp.zeros_like(w_IJCO[0, 0])] * w_IJCO.shape[1] for _ in range(w_IJCO.shape[0])]
    for i, j, out, read in _taps(x_BHWC.shape, w_IJCO.shape, strides, pads):
        g_tap = g_BPQO[:, *out]
        g_NO = _rows(g_tap)
        dw_IJCO[i][j] = _rows(x_BHWC[:, *read]).T @ g_NO
        part = (g_NO @ w_IJCO[i, j].T).reshape(*g_tap.shape[:3], -1)
        dx_BHWC += _place(part, read, x_BHWC.shape[1:3])
    return dx_BHWC, jnp.stack([jnp.stack(row) for row in dw_IJCO])


_conv_taps.defvjp(_conv_taps_fwd, _conv_taps_bwd)


class Conv(nn.Module):
    """Two-dimensional convolution layer over images [B, H, W, C].

    Parameters are float32 (`kernel` [I, J, C, features], `bias` [features]); the product is taken
    in `dtype` (None: the input's). `padding`, `strides` and `impl` as in `conv`.
    """

    features: int
    kernel_size: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    padding: Padding = 'SAME'
    use_bias: bool = True
    dtype: jnp.dtype | None = None
    kernel_init: nn.initializers.Initializer = nn.initializers.he_normal()
    impl: str | None = None

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """Returns [B, P, Q, features]."""
        shape = (*self.kernel_size, x_BHWC.shape[-1], self.features)
        dtype = self.dtype or x_BHWC.dtype
        w_IJCO = self.param('kernel', self.kernel_init, shape, jnp.float32).astype(dtype)
        y_BPQO = conv(
            x_BHWC.astype(dtype),
            w_IJCO,
            strides=self.strides,
            padding=self.padding,
            impl=self.impl,
        )
        if self.use_bias:
            bias_O = self.param('bias', nn.initializers.zeros_init(), (self.features,), jnp.float32)
            y_BPQO += bias_O.astype(dtype)[None, None, None]
        return y_BPQO


def conv_flops(
    size_HW: tuple[int, int],
    channels: int,
    features: int,
    *,
    kernel_size: tuple[int, int] = (3, 3),
    strides: tuple[int, int] = (1, 1),
    padding: Padding = 'SAME',
) -> tuple[int, tuple[int, int]]:
    """FLOPs (2 × multiply-adds, padding included) and output size of a convolution."""
    pads = (
        lax.padtype_to_pads(size_HW, kernel_size, strides, padding)
        if isinstance(padding, str)
        else padding
    )
    high, wide = (
        _out_size(*axis) for axis in zip(size_HW, kernel_size, strides, pads, strict=True)
    )
    taps = kernel_size[0] * kernel_size[1]
    return 2 * high * wide * taps * channels * features, (high, wide)

"""Spatial pooling of images [B, H, W, C].

Legend: B batch, H W rows and columns, P Q pooled rows and columns, I J window rows and columns, C
channels.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

_IMPLS = (None, 'xla', 'blocks')


def max_pool(
    x_BHWC: jax.Array,
    *,
    window: tuple[int, int] = (2, 2),
    strides: tuple[int, int] | None = None,
    padding: str | tuple[tuple[int, int], tuple[int, int]] = 'VALID',
    impl: str | None = None,
) -> jax.Array:
    """Largest value of each window; the gradient goes to the first largest (row by row).

    `strides` None means `window`; `padding` is 'VALID', 'SAME' or pairs, padded with -inf. `impl`
    'xla' is `lax.reduce_window`; 'blocks' cuts the image in 2×2 blocks, which is faster on CPUs
    and needs window and strides 2×2, no padding and even H and W, else ValueError; None chooses.
    """
    strides = window if strides is None else strides
    no_padding = padding == 'VALID' or (
        not isinstance(padding, str) and not any(sum(pair) for pair in padding)
    )
    even = not (x_BHWC.shape[1] % 2 or x_BHWC.shape[2] % 2)
    blocks = tuple(window) == tuple(strides) == (2, 2) and no_padding and even
    if impl not in _IMPLS:
        raise ValueError(f'impl={impl!r} is not a max-pooling; use one of {_IMPLS}')
    if impl == 'blocks' and not blocks:
        raise ValueError(
            "impl='blocks' needs window and strides (2, 2), no padding and even sizes; "
            f"got {window}, {strides}, {padding!r}, {x_BHWC.shape}; use impl='xla'"
        )
    if impl is None:
        impl = 'blocks' if blocks and jax.default_backend() == 'cpu' else 'xla'
    if impl == 'blocks':
        return _max_pool_2x2(x_BHWC)
    return nn.max_pool(x_BHWC, tuple(window), tuple(strides), padding)


def avg_pool(
    x_BHWC: jax.Array,
    *,
    window: tuple[int, int] = (2, 2),
    strides: tuple[int, int] | None = None,
    padding: str | tuple[tuple[int, int], tuple[int, int]] = 'VALID',
) -> jax.Array:
    """Mean of each window, padding counted as zeros; `strides` None means `window`."""
    strides = window if strides is None else strides
    return nn.avg_pool(x_BHWC, tuple(window), tuple(strides), padding)


def global_avg_pool(x_BHWC: jax.Array) -> jax.Array:
    """Mean over all pixels, summed in float32 at least: [B, C] in the dtype of the input."""
    wide = jnp.promote_types(x_BHWC.dtype, jnp.float32)
    return x_BHWC.mean(axis=(1, 2), dtype=wide).astype(x_BHWC.dtype)


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

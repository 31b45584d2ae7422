"""The checks of a convolution's arguments: what does not fit is named, with what would.

Legend: B batch, H W input rows and columns, K L kernel rows and columns, P Q output rows and
columns, C input channels, D = C / groups channels of a kernel, O output channels, T positions,
S positions before the first.
"""

import dataclasses
import numbers
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.arrays import FLOATS, wrong
from pallas_kernels.conv.arguments import ConvBlockSizes, Operands, Padding, Pair, Spec, span
from pallas_kernels.conv.epilogue import ACTIVATIONS

_SHAPES = {
    'x_BHWC': ('[B, H, W, C]', [2, 16, 16, 8]),
    'w_KLDO': ('[K, L, C / groups, O]', [3, 3, 8, 16]),
    'x_BTC': ('[B, T, C]', [2, 16, 8]),
    'w_KDO': ('[K, C / groups, O]', [3, 8, 16]),
}


def check_conv2d(
    x: jax.Array,
    w: jax.Array,
    *,
    stride: int | Pair = 1,
    padding: Padding = 'SAME',
    dilation: int | Pair = 1,
    groups: int = 1,
    bias: jax.Array | None = None,
    activation: str | None = None,
    residual: jax.Array | None = None,
    scale_shift: tuple[jax.Array, jax.Array] | None = None,
    block_sizes: ConvBlockSizes | None = None,
) -> tuple[Operands, Spec]:
    """Returns the operands and the specification that `conv2d`'s arguments come to.

    Raises:
      ValueError: an argument does not fit; the message names it, its value, the rule, and a value
        that works.
    """
    x, w = _check_x_w(x, w, ('x_BHWC', 'w_KLDO'), groups)
    stride, dilation = _check_pair('stride', stride), _check_pair('dilation', dilation)
    sizes = x.shape[1:3], tuple(span(k, d) for k, d in zip(w.shape, dilation, strict=False))
    pads = check_padding(padding, *sizes, stride)
    spec = Spec(stride, pads, dilation, groups, _check_activation(activation))
    out, features = _check_fits(x, w, spec, ('rows', 'columns')), w.shape[3]
    _check_block_sizes(block_sizes)
    if scale_shift is not None and (not isinstance(scale_shift, tuple) or len(scale_shift) != 2):
        good = f'(float32[{features}], float32[{features}])'
        raise wrong('scale_shift', scale_shift, 'must be None or a pair (scale, shift)', good)
    scale, shift = scale_shift or (None, None)
    operands = Operands(
        x,
        w,
        bias_O=_check_features('bias', bias, features),
        scale_O=_check_features('scale_shift[0]', scale, features, must=scale_shift is not None),
        shift_O=_check_features('scale_shift[1]', shift, features, must=scale_shift is not None),
        residual_BPQO=_check_residual(residual, x, (x.shape[0], *out, features)),
    )
    return operands, spec


def check_conv1d(
    x: jax.Array,
    w: jax.Array,
    *,
    stride: int = 1,
    padding: str | Pair = 'SAME',
    dilation: int = 1,
    groups: int = 1,
    bias: jax.Array | None = None,
    activation: str | None = None,
    segment_ids: jax.Array | None = None,
    state: jax.Array | None = None,
    return_state: bool = False,
    block_sizes: ConvBlockSizes | None = None,
) -> tuple[Operands, Spec]:
    """Returns the operands and the specification that `conv1d`'s arguments come to, but the state.

    Raises:
      ValueError: an argument does not fit; the message names it, its value, the rule, and a value
        that works.
    """
    x, w = _check_x_w(x, w, ('x_BTC', 'w_KDO'), groups)
    stride, dilation = _check_int('stride', stride), _check_int('dilation', dilation)
    T, size = x.shape[1], span(w.shape[0], dilation)
    pads = _check_padding_1d(padding, T, size, stride)
    check_state(state, x, size - 1)
    for name, given in {'state': state is not None, 'return_state': return_state}.items():
        if given and padding != 'CAUSAL':
            raise wrong('padding', repr(padding), f"must be 'CAUSAL' with {name}", "'CAUSAL'")
    if return_state and T % stride:
        rule = f'its length must be a multiple of stride={stride}, for the state to go on from'
        raise wrong('x_BTC', x, rule, f'{x.dtype}{[x.shape[0], T + -T % stride, x.shape[2]]}')
    spec = Spec((1, stride), ((0, 0), pads), (1, dilation), groups, _check_activation(activation))
    operands = Operands(x[:, None], w[None], bias_O=_check_features('bias', bias, w.shape[2]))
    if state is None:
        _check_fits(*operands[:2], spec, ('row', 'positions'))
    _check_block_sizes(block_sizes)
    if segment_ids is not None:
        segment_ids = check_segment_ids(segment_ids, x)
        if stride > 1:
            raise wrong('stride', stride, 'must be 1 with segment_ids', '1')
        if sum(pads) != size - 1:
            rule = 'must keep the length with segment_ids'
            raise wrong('padding', repr(padding), rule, "'CAUSAL'")
    return operands._replace(segment_ids_BT=segment_ids), spec


def check_state(state: jax.Array | None, x: jax.Array, S: int) -> None:
    """Raises ValueError where a state is not [B, S, C] of x's type."""
    shape = (x.shape[0], S, x.shape[2])
    if state is not None and (jnp.shape(state) != shape or jnp.asarray(state).dtype != x.dtype):
        rule = 'must be the (K - 1) * dilation inputs before x, in its type'
        raise wrong('state', jnp.asarray(state), rule, f'{x.dtype}{list(shape)}')


def check_segment_ids(segment_ids: jax.Array, x: jax.Array) -> jax.Array:
    """Returns segment ids as int32 [B, T]; ValueError where they are none."""
    ids = jnp.asarray(segment_ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer) or ids.shape != x.shape[:2]:
        rule = 'must be integers of shape [B, T]'
        raise wrong('segment_ids', ids, rule, f'int32{list(x.shape[:2])}')
    return ids.astype(jnp.int32)


def _check_x_w(
    x: jax.Array, w: jax.Array, names: tuple[str, str], groups: int
) -> tuple[jax.Array, jax.Array]:
    arrays = {name: jnp.asarray(array) for name, array in zip(names, (x, w), strict=True)}
    for name, array in arrays.items():
        letters, good = _SHAPES[name]
        if array.ndim != len(good) or not array.size:
            rule = f'must have {len(good)} dimensions {letters}, none of them 0'
            raise wrong(name, array, rule, f'{array.dtype}{good}')
        if array.dtype.name not in FLOATS:
            good = f"{name}.astype('float32')"
            raise wrong(name, array, f'must be one of {", ".join(FLOATS)}', good)
    (x, w), (_, w_name) = arrays.values(), names
    (*kernel, D, features), C = w.shape, x.shape[-1]
    if w.dtype != x.dtype:
        good = f'{x.dtype}{list(w.shape)}'
        raise wrong(w_name, w, f'must have the type of {names[0]}, {x.dtype}', good)
    _check_int('groups', groups)
    if C % groups or features % groups:
        good = max(n for n in range(1, groups) if C % n == features % n == 0)
        rule = f'must divide the {C} channels of {names[0]} and the {features} of {w_name}'
        raise wrong('groups', groups, rule, str(good))
    if groups * D != C:
        rule = f'must have C / groups = {C // groups} input channels, as {names[0]} has C = {C}'
        raise wrong(w_name, w, rule, f'{w.dtype}{[*kernel, C // groups, features]}')
    return x, w


def _check_int(name: str, value: int) -> int:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise wrong(name, value, 'must be a Python int >= 1', '1')
    return int(value)


def _check_pair(name: str, value: int | Pair) -> Pair:
    pair = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(pair) != 2 or not all(_is_size(n, 1) for n in pair):
        raise wrong(name, value, 'must be a Python int >= 1, or a pair (rows, columns)', '1')
    return int(pair[0]), int(pair[1])


def _is_size(n: object, least: int) -> bool:
    return isinstance(n, numbers.Integral) and not isinstance(n, bool) and n >= least


def _is_pads(pads: object) -> bool:
    return isinstance(pads, Sequence) and len(pads) == 2 and all(_is_size(n, 0) for n in pads)


def check_padding(
    padding: Padding, size_HW: Pair, span_KL: Pair, stride: Pair
) -> tuple[Pair, Pair]:
    """Returns the zeros (before, after) of rows and of columns.

    Args:
      padding: as `conv2d` takes it.
      size_HW: of the image.
      span_KL: rows and columns that the kernel reaches over.
      stride: of rows and columns.

    Raises:
      ValueError: there is no such padding.
    """
    if isinstance(padding, str) and padding in ('SAME', 'VALID'):
        pads = jax.lax.padtype_to_pads(size_HW, span_KL, stride, padding)
    elif (
        isinstance(padding, Sequence)
        and not isinstance(padding, str)
        and len(padding) == 2
        and all(map(_is_pads, padding))
    ):
        pads = padding
    else:
        rule = "must be 'SAME', 'VALID' or ((above, below), (left, right)), Python ints >= 0"
        raise wrong('padding', repr(padding), rule, "'SAME'")
    return tuple((int(low), int(high)) for low, high in pads)


def _check_padding_1d(padding: str | Pair, T: int, span: int, stride: int) -> Pair:
    if padding == 'CAUSAL':
        return span - 1, 0
    if isinstance(padding, str) and padding in ('SAME', 'VALID'):
        return check_padding(padding, (1, T), (1, span), (1, stride))[1]
    if isinstance(padding, str) or not _is_pads(padding):
        rule = "must be 'SAME', 'VALID', 'CAUSAL' or a pair (before, after) of Python ints >= 0"
        raise wrong('padding', repr(padding), rule, "'CAUSAL'")
    return int(padding[0]), int(padding[1])


def _check_fits(x: jax.Array, w: jax.Array, spec: Spec, names: tuple[str, str]) -> Pair:
    out = spec.out_size(x.shape[1:3], w.shape[:2])
    for axis, name in enumerate(names):
        if out[axis] < 1:
            size, pads = x.shape[1 + axis], spec.padding[axis]
            over = span(w.shape[axis], spec.dilation[axis])
            missing = over - size - pads[1]
            rule = f'the kernel reaches over {over} {name}, which these and x, of {size}, must hold'
            raise wrong(f'padding of {name}', pads, rule, f'{(missing, pads[1])}')
    return out


def _check_activation(activation: str | None) -> str | None:
    if activation is not None and activation not in ACTIVATIONS:
        rule = f'must be None or one of {", ".join(ACTIVATIONS)}'
        raise wrong('activation', repr(activation), rule, "'relu'")
    return activation


def _check_features(name: str, x: jax.Array | None, features: int, must: bool = False):
    if x is None and not must:
        return None
    good = f'float32[{features}]'
    if x is None:
        raise wrong(name, x, 'must be float of shape [O]', good)
    x = jnp.asarray(x)
    if x.shape != (features,) or not jnp.issubdtype(x.dtype, jnp.floating):
        raise wrong(name, x, 'must be float of shape [O]', good)
    return x


def _check_residual(residual: jax.Array | None, x: jax.Array, shape: tuple[int, ...]):
    if residual is None:
        return None
    residual = jnp.asarray(residual)
    if residual.shape != shape or residual.dtype != x.dtype:
        rule = "must have the output's shape [B, P, Q, O] and the type of x_BHWC"
        raise wrong('residual', residual, rule, f'{x.dtype}{list(shape)}')
    return residual


def _check_block_sizes(sizes: ConvBlockSizes | None) -> None:
    if sizes is None:
        return
    if not isinstance(sizes, ConvBlockSizes):
        raise wrong('block_sizes', sizes, 'must be a ConvBlockSizes or None', 'None')
    for name, n in dataclasses.asdict(sizes).items():
        if n is not None and not _is_size(n, 1):
            raise wrong(f'block_sizes.{name}', n, 'must be None or a Python int >= 1', 'None')

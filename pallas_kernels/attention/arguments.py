"""What attention takes: operands, static specification, gradients, and the checks of all of them.

Legend: B batch, T queries, S keys and values, H query heads, K key-value heads (K divides H),
D size of a query and key head, V size of a value head.
"""

import dataclasses
import math
import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.arrays import FLOATS, wrong
from pallas_kernels.block_sizes import BlockSizes

Window = tuple[int | None, int | None]

FARTHEST = 2**30  # a window as wide hides nothing
_LETTERS = {'q': 'B, T, H, D', 'k': 'B, S, K, D', 'v': 'B, S, K, V'}


class Operands(NamedTuple):
    """The arrays of one call; None where absent.

    `mask_BHTS` (bool, true is seen) and `bias_BHTS` have every dimension full or 1. Segment ids are
    int32: a query sees the keys of its own id only. A sink is a logit that takes part in a head's
    softmax and has no value. `dropout_seed` is an int32 scalar. `start` is int32 [4]: the global
    index of the first batch row, head, query and key, where this call is a shard of a larger one.
    """

    q_BTHD: jax.Array
    k_BSKD: jax.Array
    v_BSKV: jax.Array
    segment_ids_BT: jax.Array | None = None
    kv_segment_ids_BS: jax.Array | None = None
    mask_BHTS: jax.Array | None = None
    bias_BHTS: jax.Array | None = None
    sinks_H: jax.Array | None = None
    dropout_seed: jax.Array | None = None
    start: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is static in one call.

    Query t stands at position `start[2] + t + shift` among the keys, which stand at `start[3] + s`.
    `window` is how far a query sees to the left and to the right; None is without limit.
    `bias_gradient` is whether the backward pass must give the bias's gradient, which costs as much
    memory as the bias, where that is not broadcast: ALiBi's, for one, is a constant.
    """

    causal: bool
    window: Window
    softcap: float | None
    dropout_rate: float
    scale: float
    shift: int
    bias_gradient: bool = True

    @property
    def left(self) -> int | None:
        """How many keys before its own position a query sees; None is all."""
        return self.window[0]

    @property
    def right(self) -> int | None:
        """How many keys behind its own position a query sees, by window and causality together."""
        return 0 if self.causal else self.window[1]


class Gradients(NamedTuple):
    """Cotangents of the operands that have one, each in its operand's shape and type."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    bias: jax.Array | None = None
    sinks: jax.Array | None = None


def check_arguments(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = False,
    window: int | Window | None = None,
    segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_seed: jax.Array | int | None = None,
    scale: float | None = None,
    block_sizes: BlockSizes | None = None,
) -> tuple[Operands, Spec]:
    """Returns the operands and the specification that `attention`'s arguments come to.

    Raises:
      ValueError: an argument does not fit; the message names it, its value, the rule, and a value
        that works.
    """
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    _check_qkv(q, k, v)
    (B, T, H, D), S = q.shape, k.shape[1]
    if segment_ids is not None and kv_segment_ids is None and T == S:
        kv_segment_ids = segment_ids
    dropout_rate = _check_dropout(dropout_rate, dropout_seed)
    check_block_sizes(block_sizes)
    operands = Operands(
        q,
        k,
        v,
        *_check_segments(segment_ids, kv_segment_ids, (B, T), (B, S)),
        mask_BHTS=_check_broadcast('mask', mask, (B, H, T, S)),
        bias_BHTS=_check_broadcast('bias', bias, (B, H, T, S)),
        sinks_H=_check_sinks(sinks, H),
        dropout_seed=_check_seed(dropout_seed) if dropout_rate else None,
    )
    spec = Spec(
        causal=_check_causal(causal),
        window=_check_window(window),
        softcap=_check_softcap(softcap),
        dropout_rate=dropout_rate,
        scale=1 / math.sqrt(D) if scale is None else _check_number('scale', scale, 'None'),
        shift=S - T,
    )
    return operands, spec


def check_block_sizes(sizes: BlockSizes | None, name: str = 'block_sizes') -> None:
    """Raises ValueError unless sizes are such as some kernel may take; each has further rules."""
    if sizes is None:
        return
    if not isinstance(sizes, BlockSizes):
        raise wrong(name, sizes, 'must be a BlockSizes or None', 'None')
    for field, good in (('q', 512), ('kv', 512), ('sub', 512), ('chunk', 512), ('heads', None)):
        value = getattr(sizes, field)
        if value is None and field == 'heads':
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            rule = 'must be a Python int >= 1' + (' or None' if field == 'heads' else '')
            raise wrong(f'{name}.{field}', value, rule, f'{good}')
    check_block_sizes(sizes.backward, f'{name}.backward')


def _check_qkv(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    arrays = {'q': q, 'k': k, 'v': v}
    for name, x in arrays.items():
        if x.ndim != 4 or not x.size:
            rule = f'must have four dimensions [{_LETTERS[name]}], none of them 0'
            raise wrong(name, x, rule, f'{q.dtype}[2, 16, 4, 64]')
        if x.dtype.name not in FLOATS:
            raise wrong(name, x, f'must be one of {", ".join(FLOATS)}', f"{name}.astype('float32')")
    (B, _, H, D), (S, K) = q.shape, k.shape[1:3]
    shapes = {'k': (B, S, K, D), 'v': (B, S, K, v.shape[3])}
    for name, shape in shapes.items():
        fits = f'{q.dtype}{list(shape)}'
        if arrays[name].dtype != q.dtype:
            raise wrong(name, arrays[name], f'must have the type of q, {q.dtype}', fits)
        if arrays[name].shape != shape:
            of = 'batch and head size of q' if name == 'k' else 'batch, length and heads of k'
            raise wrong(name, arrays[name], f'must have {of}', fits)
    if H % K:
        good = max(n for n in range(1, K) if H % n == 0)
        rule = f'its {K} heads must divide the {H} heads of q'
        raise wrong('k', k, rule, f'{k.dtype}{[B, S, good, D]}')


def _check_segments(
    segment_ids: jax.Array | None,
    kv_segment_ids: jax.Array | None,
    queries: tuple[int, int],
    keys: tuple[int, int],
) -> tuple[jax.Array | None, jax.Array | None]:
    if segment_ids is None and kv_segment_ids is None:
        return None, None
    checked = []
    for name, other, ids, shape in (
        ('segment_ids', 'kv_segment_ids', segment_ids, queries),
        ('kv_segment_ids', 'segment_ids', kv_segment_ids, keys),
    ):
        good = f'int32{list(shape)}'
        if ids is None:
            rule = f'must be given with {other}'
            if name == 'kv_segment_ids':
                rule += f', as q has length {queries[1]} and k {keys[1]}'
            raise wrong(name, ids, rule, good)
        ids = jnp.asarray(ids)
        if not jnp.issubdtype(ids.dtype, jnp.integer) or ids.shape != shape:
            letters = '[B, T]' if name == 'segment_ids' else '[B, S]'
            raise wrong(name, ids, f'must be integers of shape {letters}', good)
        checked.append(ids.astype(jnp.int32))
    return tuple(checked)


def _check_broadcast(name: str, x: jax.Array | None, shape: tuple[int, ...]) -> jax.Array | None:
    if x is None:
        return None
    x = jnp.asarray(x)
    kind, good = ('bool', jnp.bool_) if name == 'mask' else ('float', jnp.floating)
    fits = x.ndim == 4 and all(n in (1, full) for n, full in zip(x.shape, shape, strict=True))
    if not fits or not jnp.issubdtype(x.dtype, good):
        rule = f'must be {kind} with dimensions [B, H, T, S], each full or 1'
        raise wrong(name, x, rule, f'{"bool" if name == "mask" else "float32"}{list(shape)}')
    return x


def _check_sinks(sinks: jax.Array | None, H: int) -> jax.Array | None:
    if sinks is None:
        return None
    sinks = jnp.asarray(sinks)
    if sinks.shape != (H,) or not jnp.issubdtype(sinks.dtype, jnp.floating):
        raise wrong('sinks', sinks, 'must be float of shape [H]', f'float32[{H}]')
    return sinks


def _check_number(name: str, x: float, good: str) -> float:
    # A traced value would have to be an operand, with a gradient of its own.
    if not isinstance(x, numbers.Real) or isinstance(x, bool) or not math.isfinite(x):
        raise wrong(name, x, 'must be a finite Python number, for it is compiled in', good)
    return float(x)


def _check_causal(causal: bool) -> bool:
    if not isinstance(causal, bool):
        raise wrong('causal', causal, 'must be True or False, for it is compiled in', 'True')
    return causal


def _check_window(window: int | Window | None) -> Window:
    left_right = window if isinstance(window, tuple) else (window, window)
    if len(left_right) != 2 or not all(
        n is None or (isinstance(n, numbers.Integral) and not isinstance(n, bool) and n >= 0)
        for n in left_right
    ):
        rule = 'must be None, a Python int >= 0, or a pair (left, right) of these'
        raise wrong('window', window, rule, '(128, 0)')
    # Positions are int32, and so are sums of one and a window.
    return tuple(None if n is None or n >= FARTHEST else int(n) for n in left_right)


def _check_softcap(softcap: float | None) -> float | None:
    if softcap is None:
        return None
    if _check_number('softcap', softcap, '50.0') <= 0:
        raise wrong('softcap', softcap, 'must be > 0, or None for no cap', '50.0')
    return float(softcap)


def _check_dropout(rate: float, seed: jax.Array | int | None) -> float:
    rate = _check_number('dropout_rate', rate, '0.1')
    if not 0 <= rate < 1:
        raise wrong('dropout_rate', rate, 'must be in [0, 1)', '0.1')
    if rate and seed is None:
        rule = f'dropout_rate={rate} needs an int32 scalar, another one at every step and layer'
        raise wrong('dropout_seed', seed, rule, "jax.random.bits(key, (), 'uint32')")
    return rate


def _check_seed(seed: jax.Array | int) -> jax.Array:
    if isinstance(seed, int):
        seed = jnp.uint32(seed % 2**32)
    seed = jnp.asarray(seed)
    if seed.shape or seed.dtype not in (jnp.int32, jnp.uint32):
        rule = 'must be an int, or a scalar of int32 or uint32'
        raise wrong('dropout_seed', seed, rule, "jax.random.bits(key, (), 'uint32')")
    return jax.lax.bitcast_convert_type(seed, jnp.int32)

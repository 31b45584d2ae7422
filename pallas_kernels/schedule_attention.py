"""What the schedule tool compiles for attention: the kernel here and published ones beside it."""

import dataclasses
import functools
import importlib.metadata
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from pallas_kernels.block_sizes import AttentionShape, BlockSizes, choose
from pallas_kernels.chip import Chip, current_chip
from pallas_kernels.schedule_work import OURS, Work

RIVALS = ('tokamax', 'splash')


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of attention.

    Attributes:
      batch, length, heads, kv_heads, head_dim: B, T (= S), H, K and D (= V).
      causal: whether keys after the query are masked.
      window: positions seen on either side; None is no limit.
      backward: whether the derivatives of q, k and v are computed, too.
      dtype: of queries, keys and values.
    """

    op: ClassVar[str] = 'attention'

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool = False
    window: int | None = None
    backward: bool = False
    dtype: str = 'bfloat16'

    def __str__(self) -> str:
        shape = (self.batch, self.length, self.heads, self.kv_heads, self.head_dim)
        words = ['x'.join(map(str, shape)), 'causal' if self.causal else 'full']
        words += [f'window {self.window}'] if self.window is not None else []
        words += ['forward + backward' if self.backward else 'forward', self.dtype]
        return ' '.join(words)

    @property
    def pairs(self) -> int:
        """(query, key) pairs that are seen, of one head of one sequence."""
        T, left = self.length, self.length if self.window is None else self.window
        right = 0 if self.causal else left
        queries = range(T)
        if left >= T and right >= T:
            return T * T
        return sum(min(T - 1, t + right) - max(0, t - left) + 1 for t in queries)


def work(case: Case, chip: Chip) -> Work:
    """The least work of a case on `chip`: q k^T and p v; backward five products more."""
    pairs = case.batch * case.heads * case.pairs
    D = case.head_dim
    padded = -(-D // chip.mxu) * chip.mxu  # a contraction over D fills the array's side or idles
    # Contractions over keys or queries are long; those over the head's size are the padded ones.
    flops, mxu_flops = 4 * pairs * D, 2 * pairs * (padded + D)
    item = jnp.dtype(case.dtype).itemsize
    q_bytes = case.batch * case.length * case.heads * D * item
    kv_bytes = case.batch * case.length * case.kv_heads * D * item
    hbm = 2 * q_bytes + 2 * kv_bytes
    if case.backward:
        flops += 10 * pairs * D  # p again, dp, dv, dq, dk
        mxu_flops += 2 * pairs * (2 * padded + 3 * D)
        # The backward pass reads q, k, v, o and do and writes dq, dk, dv.
        hbm += 4 * q_bytes + 4 * kv_bytes
    return Work(flops, mxu_flops, hbm)


def build(request: dict[str, Any]) -> tuple[Callable[..., Any], list[Any], dict[str, Any]]:
    """The function to compile, its arguments' shapes, and what its builder chose.

    Everything comes and goes as [B, T, heads * head_dim], as the projections around attention
    make and take it; `request['split']` passes [B, T, heads, head_dim], as tokamax is timed.
    `request['impl']` names an implementation here, which chooses its block sizes itself.
    """
    case = Case(**request['case'])
    side = request['side']
    notes: dict[str, Any] = dict(request.get('config') or {})
    if 'impl' in request:
        forward = _named(case, request['impl'])
    elif side == OURS:
        forward = _ours(case, notes)
    elif side == 'tokamax':
        forward = _tokamax(case, notes)
    else:
        forward = _splash(case, notes)
    split = request.get('split', False)
    q_shape = (case.batch, case.length, case.heads, case.head_dim)
    kv_shape = (case.batch, case.length, case.kv_heads, case.head_dim)
    shapes = [q_shape, kv_shape, kv_shape]

    def merged(q, k, v):
        q, k, v = (x.reshape(shape) for x, shape in zip((q, k, v), shapes, strict=True))
        return forward(q, k, v).reshape(_flat(q_shape, split))

    def both(q, k, v, do):
        o, vjp = jax.vjp(merged, q, k, v)
        return o, *vjp(do)

    arrays = [*shapes, q_shape] if case.backward else shapes
    specs = [jax.ShapeDtypeStruct(_flat(shape, split), jnp.dtype(case.dtype)) for shape in arrays]
    return (both if case.backward else merged), specs, notes


def _flat(shape: tuple[int, ...], split: bool) -> tuple[int, ...]:
    B, T, heads, D = shape
    return shape if split else (B, T, heads * D)


def chosen(case: Case, chip: Chip) -> dict[str, Any]:
    """The block sizes that our kernels take for a case."""
    shape = AttentionShape(
        case.batch, case.length, case.length, case.heads, case.kv_heads, case.head_dim,
        case.head_dim,
    )  # fmt: skip
    sizes = choose(
        'attention', shape, case.dtype, causal=case.causal, window=(case.window, case.window),
        chip=chip,
    )  # fmt: skip
    if not case.backward:
        sizes = dataclasses.replace(sizes, backward=None)
    return dataclasses.asdict(sizes)


def _named(case: Case, impl: str | None) -> Callable[..., jax.Array]:
    from pallas_kernels.attention import attention

    return functools.partial(attention, causal=case.causal, window=case.window, impl=impl)


def _ours(case: Case, notes: dict[str, Any]) -> Callable[..., jax.Array]:
    from pallas_kernels.attention import attention

    if not notes:
        notes.update(chosen(case, current_chip()))
    return functools.partial(
        attention,
        causal=case.causal,
        window=case.window,
        block_sizes=_sizes(BlockSizes, notes),
        impl='tpu',
    )


def _sizes(kind, values: dict[str, Any]):
    values = dict(values)
    backward = values.pop('backward', None)
    return kind(**values, backward=kind(**backward) if backward else None)


def _mask(module, case: Case):
    shape = (case.length, case.length)
    if case.window is not None:
        right = 0 if case.causal else case.window
        return module.LocalMask(shape, (case.window, right), 0)
    return module.CausalMask(shape) if case.causal else module.FullMask(shape)


def _tokamax(case: Case, notes: dict[str, Any]) -> Callable[..., jax.Array]:
    """tokamax's TPU kernel as its `dot_product_attention` calls it, transposes and all."""
    try:
        from tokamax._src.ops.experimental.tpu.splash_attention import (
            splash_attention_kernel as splash,
        )
        from tokamax._src.ops.experimental.tpu.splash_attention import (
            splash_attention_mask as masks,
        )
    except ImportError as error:
        raise ImportError(
            f'to compare with tokamax: pip install tokamax==0.0.17 ({error})'
        ) from None
    settings = dict(notes)
    for name in ('q_layout', 'k_layout', 'v_layout'):
        if name in settings:
            settings[name] = splash.QKVLayout(settings[name])
    config = splash.SplashConfig(**settings)
    notes['version'] = importlib.metadata.version('tokamax')
    kernel = splash.make_splash_mha(
        _mask(masks, case),
        config=config,
        q_seq_shards=1,
        mask_value=float(jnp.finfo(jnp.float32).min),
        downcast_smem_data=False,
    )
    return functools.partial(_transposed, kernel)


def _splash(case: Case, notes: dict[str, Any]) -> Callable[..., jax.Array]:
    """The splash attention kernel that JAX brings along."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    sizes = splash.BlockSizes(**notes)
    mask = splash.MultiHeadMask([_mask(splash, case)] * case.heads)
    kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    return functools.partial(_transposed, kernel)


def _transposed(kernel, q, k, v) -> jax.Array:
    """Calls a kernel that wants [heads, T, head_dim] and scaled queries."""
    q = q * q.shape[-1] ** -0.5
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)

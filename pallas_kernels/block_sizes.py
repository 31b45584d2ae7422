"""Block sizes of a kernel, chosen from shape, dtype and chip without a device.

Sizes that the schedule model has compared are in `block_sizes.json`
(`python -m pallas_kernels.schedule_search` writes it); elsewhere they follow from VMEM.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.arrays import wrong
from pallas_kernels.chip import CHIPS, Chip

LANES = 128
MOST_HEADS = 8  # of a step: a program of more is too long to compile and to fetch
TABLE = pathlib.Path(__file__).with_suffix('.json')


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """What one grid step of an attention kernel works on, in rows.

    Attributes:
      q: queries of a block; a multiple of 128.
      kv: keys of a block; a multiple of 128.
      sub: keys of a tile; divides `kv`.
      chunk: queries of a tile; divides `q`.
      heads: query heads of a grid step; None leaves it to the kernel.
      backward: the same for the backward pass; None takes the kernel's own choice.
    """

    q: int
    kv: int
    sub: int
    chunk: int
    heads: int | None = None
    backward: 'BlockSizes | None' = None


class AttentionShape(NamedTuple):
    """Sizes of one attention call."""

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int


def choose(
    op: str,
    shape: AttentionShape,
    dtype: Any,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] = (None, None),
    logit_bytes: int = 0,
    chip: Chip | None = None,
) -> BlockSizes:
    """Block sizes for a call, within the VMEM that `chip` gives a kernel.

    Args:
      op: 'attention'.
      shape: the call's sizes.
      dtype: of queries, keys and values.
      causal: whether keys after the query are masked.
      window: positions seen to the left and right of a query; None is no limit.
      logit_bytes: bytes read for every logit (a mask, a bias), 0 if there are none.
      chip: what it will run on; None (a CPU that interprets the kernel) counts as 'v5e'.

    Raises:
      ValueError: for an unknown op.
    """
    if op != 'attention':
        raise ValueError(f"op must be 'attention', not {op!r}")
    known = chip is not None and chip.is_tpu
    chip = chip if known else CHIPS['v5e']
    bound = _reach(window)
    row = _table_row(op, chip.name, shape, dtype, causal)
    sizes = []
    for backward in (False, True):
        wanted = row.get('backward' if backward else 'forward') or _rule(chip, backward, causal)
        fitted = _fit(
            BlockSizes(**wanted), shape, dtype, bound, logit_bytes, backward, chip.vmem_limit
        )
        # An interpreter has no steps to save, and more heads are more to trace.
        sizes.append(fitted if known else dataclasses.replace(fitted, heads=None))
    return dataclasses.replace(sizes[0], backward=sizes[1])


def check(sizes: BlockSizes, name: str = 'block_sizes') -> None:
    """Raises ValueError, naming the field and what works, for sizes that no TPU kernel can run."""
    for field in ('q', 'kv', 'sub', 'chunk'):
        value = getattr(sizes, field)
        if not isinstance(value, int) or value <= 0 or value % LANES:
            good = _lanes(max(1, value)) if isinstance(value, int) else LANES
            raise wrong(f'{name}.{field}', value, f'must be a positive multiple of {LANES}', good)
    for part, whole in (('sub', 'kv'), ('chunk', 'q')):
        value, size = getattr(sizes, part), getattr(sizes, whole)
        if size % value:
            rule = f'must divide {name}.{whole}={size}'
            raise wrong(f'{name}.{part}', value, rule, _divisor(size, value))
    if sizes.heads is not None and sizes.heads < 1:
        raise wrong(f'{name}.heads', sizes.heads, 'must be positive or None', None)
    if sizes.backward is not None:
        check(sizes.backward, f'{name}.backward')


def check_fit(
    sizes: BlockSizes,
    shape: AttentionShape,
    dtype: Any,
    *,
    chip: Chip,
    logit_bytes: int = 0,
    backward: bool = False,
) -> None:
    """Raises ValueError for sizes that need more VMEM than `chip` gives a kernel.

    Sizes are held to the estimate that `choose` holds its own to; arguments are its own.
    """
    options = {'logit_bytes': logit_bytes, 'backward': backward}
    part = _part(sizes, shape, backward, chip.vmem_limit)
    needed = vmem_bytes(sizes, part, dtype, **options)
    # Of the smallest blocks the compiler says what does not fit, as it does of a choice.
    if needed > chip.vmem_limit and max(sizes.q, sizes.kv) > LANES:
        good = _shrunk(sizes, part, dtype, limit=chip.vmem_limit, **options)
        name, given = 'block_sizes' + '.backward' * backward, _text(sizes)
        rule = (
            f'its blocks take some {needed} bytes of VMEM, and a kernel gets {chip.vmem_limit} on '
            f'{chip.name}'
        )
        raise wrong(name, given, rule, _text(good))


def _text(sizes: BlockSizes) -> str:
    fields = ('q', 'kv', 'sub', 'chunk') + ('heads',) * (sizes.heads is not None)
    return f'BlockSizes({", ".join(f"{field}={getattr(sizes, field)}" for field in fields)})'


def vmem_bytes(
    sizes: BlockSizes,
    shape: AttentionShape,
    dtype: Any,
    *,
    logit_bytes: int = 0,
    backward: bool = False,
) -> int:
    """VMEM that a grid step needs, in bytes; an estimate from above, which the tests compile."""
    item = jnp.dtype(dtype).itemsize
    group = shape.heads // shape.kv_heads
    heads = sizes.heads or max(1, -(-LANES // shape.head_dim))
    kv_heads = max(1, heads // group)
    dims = _lanes(shape.head_dim * heads), _lanes(shape.value_dim * heads)
    kv_dims = _lanes(shape.head_dim * kv_heads), _lanes(shape.value_dim * kv_heads)
    # Blocks that come and go are held twice: one is computed on while the other is copied.
    q_rows, kv_rows = 2 * item * sizes.q, 2 * item * sizes.kv
    total = 2 * logit_bytes * sizes.q * sizes.kv
    if backward:
        total += q_rows * (2 * dims[0] + 2 * dims[1]) + kv_rows * 2 * sum(kv_dims)
        # float32 sums of the gradients: those of all keys stay.
        total += 4 * (max(shape.keys, sizes.kv) * sum(kv_dims) + sizes.q * dims[0])
    else:
        total += q_rows * sum(dims) + kv_rows * sum(kv_dims)
        total += 2 * 4 * sizes.q * (dims[1] + 16 * heads)  # the sum over keys, and its copy
    # Tiles of logits that are alive at once, spilled between units.
    return total + (6 if backward else 4) * 4 * sizes.sub * sizes.chunk


def _rule(chip: Chip, backward: bool, causal: bool) -> dict[str, int]:
    """Sizes for a call without a row in the table: large blocks, tiles of 512 x 512 or half."""
    if backward:
        return {'q': 2048 if causal else 1024, 'kv': 2048, 'sub': 512, 'chunk': 256}
    return {'q': 2048, 'kv': 2048, 'sub': 256 if chip.name == 'v7x' else 512, 'chunk': 512}


def _fit(sizes, shape, dtype, bound, logit_bytes, backward, limit) -> BlockSizes:
    """`sizes`, no larger than the call, and halved until they fit `limit` bytes of VMEM."""
    q, kv = sizes.q, sizes.kv
    if bound is not None:  # a block far wider than the window is mostly masked
        kv = min(kv, max(256, _power(bound)))
        q = min(q, max(256, 2 * _power(bound)))
    sizes = _tiled(sizes, _block(shape.queries, q), _block(shape.keys, kv))
    if sizes.heads is None:
        # Short blocks leave a step's fixed cost (a few hundred cycles, and what a pipeline takes
        # to fill and drain) to little work: then a step takes several heads.
        budget = (1024 if backward else 2048) * 1024
        heads = min(MOST_HEADS, shape.heads, budget // (sizes.q * sizes.kv))
        sizes = dataclasses.replace(sizes, heads=heads if heads > 1 else None)
    part = _part(sizes, shape, backward, limit)
    return _shrunk(sizes, part, dtype, limit=limit, logit_bytes=logit_bytes, backward=backward)


def _part(sizes: BlockSizes, shape: AttentionShape, backward: bool, limit: int) -> AttentionShape:
    """What one kernel sees of a call: of longer sequences the backward pass takes keys in parts."""
    if not backward:
        return shape
    most = limit // (8 * (_lanes(shape.head_dim) + _lanes(shape.value_dim)))
    return shape._replace(keys=min(shape.keys, max(most, sizes.kv)))


def _shrunk(sizes, shape, dtype, *, limit, logit_bytes, backward) -> BlockSizes:
    """`sizes`, halved until they fit `limit` bytes of VMEM."""
    while vmem_bytes(sizes, shape, dtype, logit_bytes=logit_bytes, backward=backward) > limit:
        if sizes.heads is not None and sizes.heads > 1:
            sizes = dataclasses.replace(sizes, heads=None)
        elif max(sizes.q, sizes.kv) <= LANES:
            break  # nothing left to give: the compiler will say what does not fit
        elif sizes.q >= sizes.kv:
            sizes = _tiled(sizes, _lanes(sizes.q // 2), sizes.kv)
        else:
            sizes = _tiled(sizes, sizes.q, _lanes(sizes.kv // 2))
    return sizes


def _tiled(sizes: BlockSizes, q: int, kv: int) -> BlockSizes:
    """`sizes` with other blocks, and the largest tiles up to the wanted ones that divide them."""
    sub, chunk = _divisor(kv, sizes.sub), _divisor(q, sizes.chunk)
    return dataclasses.replace(sizes, q=q, kv=kv, sub=sub, chunk=chunk)


def _block(length: int, most: int) -> int:
    """A block of at most `most` rows that covers `length` with little padding."""
    if length <= most:
        return _lanes(length)
    sizes = range(most, most // 3, -2 * LANES)

    def cost(size: int) -> int:
        # A step costs about as much as 64 rows more; larger sizes win ties, being tried first.
        return -(-length // size) * (size + 64)

    return min(sizes, key=cost)


def _divisor(size: int, most: int) -> int:
    """The largest multiple of 128 that divides `size` and is at most `most`."""
    return max(d for d in range(LANES, min(most, size) + 1, LANES) if size % d == 0)


def _reach(window) -> int | None:
    """Positions that a query can see, None if unlimited on some side."""
    left, right = window
    return None if left is None or right is None else left + right + 1


def _lanes(size: int) -> int:
    """`size` rounded up to a multiple of 128."""
    return -(-size // LANES) * LANES


def _power(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << max(size - 1, 0).bit_length()


def _table_row(op, chip: str, shape: AttentionShape, dtype, causal: bool) -> dict[str, Any]:
    """The table's row for the class of shapes that `shape` belongs to; {} if there is none."""
    return table().get(shape_class(op, chip, shape, dtype, causal), {})


def shape_class(op: str, chip: str, shape: AttentionShape, dtype: Any, causal: bool) -> str:
    """The table's key: shapes of one class share their block sizes.

    Lengths are rounded to the nearest power of two up to 4096 (beyond, the grid only grows).
    """
    length = min(4096, max(LANES, _power(max(shape.queries, shape.keys) * 3 // 4)))
    dims = f'{shape.head_dim}' + (
        f'/{shape.value_dim}' if shape.value_dim != shape.head_dim else ''
    )
    mask = 'causal' if causal else 'full'
    return f'{op} {chip} {jnp.dtype(dtype).name} d{dims} {mask} s{length}'


@functools.cache
def table() -> dict[str, dict[str, Any]]:
    """The committed table: shape class -> {'forward': sizes, 'backward': sizes}."""
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}

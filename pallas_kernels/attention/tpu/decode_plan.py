"""What is static in the TPU's decode kernel: its sizes, how they are chosen, what it refuses.

Legend: B rows, T new tokens, H query heads, K key-value heads, G query heads of each, D and V
sizes of heads, P tokens of a page, A pages of a block, L pages of a row, S = A * P keys of a block,
M key-value heads in one product, C = K / M products, R = M * G * T rows of a product.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from pallas_kernels.attention.decode_arguments import DecodeSpec
from pallas_kernels.chip import CHIPS, Chip, current_chip

LANES = 128
# Blocks in VMEM: one is worked on while the others are copied, enough to bridge short ones.
SLOTS = 4
# Bytes of keys and values in a block: copied in well over the time that a grid step costs.
BLOCK_BYTES = 2 * 1024**2
MOST_KEYS = 1024
PAGE = 64
# Of 1 MiB of scalar memory, which holds the page table.
SCALAR_BYTES = 900 * 1024


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static in one call; sizes by the letters of the legend.

    `paged` is whether there is a page table; without one, row b has the pages from b * L on.
    """

    T: int
    K: int
    G: int
    D: int
    V: int
    P: int
    A: int
    L: int
    M: int
    cores: int
    paged: bool
    left: int | None
    softcap: float | None
    scale: float

    @property
    def C(self) -> int:
        """Products in a block."""
        return self.K // self.M

    @property
    def R(self) -> int:
        """Rows of a product."""
        return self.M * self.G * self.T

    @property
    def S(self) -> int:
        """Keys of a block."""
        return self.A * self.P

    def first_page(self, length: jax.Array) -> jax.Array:
        """The first page that a row of `length` looks at; its blocks are counted from there."""
        if self.left is None:
            return jnp.zeros_like(length)
        return jax.lax.div(jnp.maximum(length - self.T - self.left, 0), jnp.int32(self.P))

    def pages(self, length: jax.Array) -> jax.Array:
        """How many pages a row of `length` looks at."""
        return quotient_up(length, self.P) - self.first_page(length)


def quotient_up(x: jax.Array, by: int) -> jax.Array:
    """x / by rounded up; towards zero where x < 0."""
    return jax.lax.div(x + (by - 1), jnp.int32(by))


def refuses(
    q_BTHD: jax.Array,
    k: jax.Array,
    v: jax.Array,
    page_table_BP: jax.Array | None,
    spec: DecodeSpec,
    block_keys: int | None = None,
) -> str | None:
    """Returns why the kernel cannot run a call, worded for a user; None if it can."""
    if k.dtype not in (jnp.bfloat16, jnp.float32):
        return f'takes a cache of bfloat16 or float32, not k of {k.dtype}'
    page, rows = k.shape[1], _sublanes(k.dtype)
    if page_table_BP is not None and page % rows:
        return f'page_table: pages of {page} tokens of {k.dtype} must be a multiple of {rows}'
    chip = planned_chip()
    plan = choose(q_BTHD, k, v, page_table_BP, spec, chip, block_keys)
    B = q_BTHD.shape[0]
    scalars = B * plan.L * plan.paged + B * _up(plan.L, plan.A) + 2 * B
    if 4 * scalars > SCALAR_BYTES:
        return (
            f'page_table: {B} rows of {plan.L} pages of {plan.P} tokens need {4 * scalars} bytes '
            f'of scalar memory, of which there are {SCALAR_BYTES}; larger pages need less'
        )
    if vmem_bytes(plan, k.dtype) > chip.vmem_limit:
        return (
            f'q: {q_BTHD.shape[1]} new tokens of {q_BTHD.shape[2]} heads need '
            f'{vmem_bytes(plan, k.dtype)} bytes of VMEM, of which there are {chip.vmem_limit}'
        )
    return None


def vmem_bytes(plan: Plan, dtype) -> int:
    """VMEM that a grid step needs, an estimate from above."""
    item = jnp.dtype(dtype).itemsize
    rows = _up(plan.R, 16) * 16
    total = SLOTS * plan.S * item * (_lanes(plan.K * plan.D) + _lanes(plan.K * plan.V))
    # Queries, outputs, lse and sinks are held twice, the state once.
    state = 2 * item * _lanes(plan.M * plan.D) + 4 * _lanes(plan.M * plan.V)
    total += plan.C * rows * (state + 2 * 4 * _lanes(plan.V) + 4 * 6 * LANES)
    total += 4 * rows * (4 * _lanes(plan.S) + 2 * _lanes(plan.M * plan.V))
    # What the compiler adds: products of float32 in parts, spilled registers.
    return total + total // 16


def choose(q_BTHD, k, v, page_table_BP, spec: DecodeSpec, chip: Chip, keys: int | None) -> Plan:
    """Returns block sizes that fit; the kernel's cores are 1."""
    (_, T, H, D), (K, V), item = q_BTHD.shape, v.shape[2:], k.dtype.itemsize
    if page_table_BP is not None:
        page, pages = k.shape[1], page_table_BP.shape[1]
    else:
        rows, S = _sublanes(k.dtype), k.shape[1]
        page = math.gcd(S, PAGE)
        if page < rows:
            page = PAGE if S > PAGE else rows
        pages = _up(S, page)
    if keys is None:
        keys = min(MOST_KEYS, BLOCK_BYTES // (item * (_lanes(K * D) + _lanes(K * V))))
        if spec.left is not None:
            keys = min(keys, spec.left + T + page)
        keys = max(LANES, 1 << (keys.bit_length() - 1))
    fits = [
        m for m in range(1, K + 1)
        if K % m == 0 and (m == K or (m * D % LANES == 0 and m * V % LANES == 0))
    ]  # fmt: skip
    # The fewest heads that fill the sublanes of a product's rows.
    M = next((m for m in fits if m * (H // K) * T >= 16), K)
    plan = Plan(
        T=T, K=K, G=H // K, D=D, V=V, P=page, A=min(pages, max(1, keys // page)), L=pages, M=M,
        cores=1, paged=page_table_BP is not None,
        left=spec.left, softcap=spec.softcap, scale=spec.scale,
    )  # fmt: skip
    while plan.A > 1 and vmem_bytes(plan, k.dtype) > chip.vmem_limit:
        plan = dataclasses.replace(plan, A=plan.A // 2)
    return plan


def planned_chip() -> Chip:
    """The chip to plan for; a kernel that is interpreted is planned for the smallest."""
    chip = current_chip()
    return chip if chip is not None and chip.is_tpu else CHIPS['v5e']


def _sublanes(dtype) -> int:
    return 8 * 4 // jnp.dtype(dtype).itemsize


def _lanes(size: int) -> int:
    return _up(size, LANES) * LANES


def _up(size: int, by: int) -> int:
    return -(-size // by)

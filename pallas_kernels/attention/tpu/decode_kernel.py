"""The body of the TPU's decode kernel: one grid step, a block of one row's pages.

Legend: T new tokens, K key-value heads, G query heads of each, D and V sizes of heads, P tokens of
a page, A pages of a block, L pages of a row, S = A * P keys of a block, M key-value heads in one
product, C = K / M products, R = M * G * T rows of a product, W = M * D lanes, X blocks to work on,
B rows, 1 a reduced or single dimension. `decode.py` says how the parts go together.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.tpu.decode_plan import SLOTS, Plan, quotient_up

# Copies that are issued in one stretch of code, where addresses are computed side by side.
UNROLL = 8
# Finite, so that no difference of two maxima is NaN; hidden logits are -inf.
LOWEST = -1e30
LOG2_E = math.log2(math.e)


def kernel(plan: Plan, sinks: bool, lse: bool, *refs) -> None:
    """One grid step; `decode.run` names the refs and says what they hold."""
    count = 4 if plan.paged else 3
    scalars, refs = (*refs[:count], None)[:4], refs[count:]
    q_ref, sink_ref, refs = refs[0], refs[1] if sinks else None, refs[1 + sinks :]
    pages, o_ref, lse_ref, refs = refs[:2], refs[2], refs[3] if lse else None, refs[3 + lse :]
    buffers, semaphores, state = refs[:2], refs[2], refs[3:]
    row_X, start_B, length_B, _ = scalars

    total = start_B[start_B.shape[0] - 1]
    share = quotient_up(total, plan.cores)
    first = pl.program_id(0) * share
    stop = jnp.minimum(first + share, total)
    step = pl.program_id(1)
    item = first + step
    fetch = functools.partial(_fetch, plan, scalars, pages, buffers, semaphores)

    def start(ahead, _):
        @pl.when(item + ahead < stop)
        def _():
            fetch(item + ahead, jax.lax.rem(step + ahead, SLOTS), 'start')

    jax.lax.fori_loop(jnp.where(step == 0, 0, SLOTS - 1), SLOTS, start, None)

    @pl.when(item < stop)
    def _():
        row, slot = row_X[item], jax.lax.rem(step, SLOTS)
        length, block = length_B[row], item - start_B[row]
        # Position of the block's first key.
        origin = (plan.first_page(length) + block * plan.A) * plan.P
        filled = length - origin

        @pl.when((block == 0) | (step == 0))
        def _():
            _begin(sink_ref, block == 0, *state)

        fetch(item, slot, 'wait')
        _hide_values(plan, buffers[1], slot, filled)
        for c in range(plan.C):
            _product(plan, c, q_ref, *buffers, slot, filled, *state)

        @pl.when((filled <= plan.S) | (item == stop - 1))
        def _():
            _end(plan, *state, o_ref, lse_ref)


def _fetch(plan: Plan, scalars, pages, buffers, semaphores, item, slot, action: str) -> None:
    """Starts the copies of an item's filled pages, or waits for them."""
    row_X, start_B, length_B, page_BL = scalars
    row = row_X[item]
    length = length_B[row]
    seen = (item - start_B[row]) * plan.A
    filled = plan.pages(length) - seen
    column = row * plan.L + plan.first_page(length) + seen

    def copies(page, *at):
        for n, (hbm, buffer) in enumerate(zip(pages, buffers, strict=True)):
            copy = pltpu.make_async_copy(
                hbm.at[page], buffer.at[(slot, *at)], semaphores.at[slot, n]
            )
            getattr(copy, action)()

    def one(n, _=None):
        if plan.paged:
            # What is waited for is a number of bytes, whichever page they came from.
            page = page_BL[column + n] if action == 'start' else 0
        else:
            page = column + n
        copies(page, n)

    def several(n, _):
        for m in range(UNROLL):
            one(n * UNROLL + m)

    @pl.when(filled >= plan.A)
    def _():
        if not plan.paged or action == 'wait':
            copies(pl.ds(0 if plan.paged else column, plan.A))
        else:
            jax.lax.fori_loop(0, plan.A // UNROLL, several, None)
            for n in range(plan.A // UNROLL * UNROLL, plan.A):
                one(n)

    @pl.when(filled < plan.A)
    def _():
        jax.lax.fori_loop(0, filled, one, None)


def _begin(sink_ref, own: jax.Array, m_ref, l_ref, acc_ref) -> None:
    m_ref[...] = jnp.full_like(m_ref, LOWEST)
    l_ref[...] = jnp.zeros_like(l_ref)
    acc_ref[...] = jnp.zeros_like(acc_ref)
    if sink_ref is not None:
        # Where another core begins the row, it counts the sink.
        sink_CR1 = jnp.where(own, sink_ref[...], -jnp.inf)
        m_CR1 = jnp.maximum(sink_CR1, LOWEST)
        m_ref[...] = jnp.broadcast_to(m_CR1, m_ref.shape)
        l_ref[...] = jnp.broadcast_to(jnp.exp2(sink_CR1 - m_CR1), l_ref.shape)


def _hide_values(plan: Plan, v_ref, slot: jax.Array, filled: jax.Array) -> None:
    """Puts the values behind the length to zero, for zero times what lies there may be NaN."""

    def page(n, _):
        v_PF = v_ref[slot, n]
        s_PF = jax.lax.broadcasted_iota(jnp.int32, v_PF.shape, 0) + n * plan.P
        v_ref[slot, n] = jnp.where(s_PF < filled, v_PF, jnp.zeros_like(v_PF))

    @pl.when(filled < plan.S)
    def _():
        start = jax.lax.div(jnp.maximum(filled, 0), jnp.int32(plan.P))
        jax.lax.fori_loop(start, plan.A, page, None)


def _product(plan: Plan, c: int, q_ref, k_ref, v_ref, slot, filled, m_ref, l_ref, acc_ref) -> None:
    """Online softmax (Milakov and Gimelshein 2018) of one block, for M key-value heads."""
    k_SW, v_SW = (
        ref[slot, :, :, pl.ds(c * plan.M * size, plan.M * size)].reshape(plan.S, -1)
        for ref, size in ((k_ref, plan.D), (v_ref, plan.V))
    )
    precision = jax.lax.Precision.HIGHEST if k_SW.dtype == jnp.float32 else None
    dot = functools.partial(
        jax.lax.dot_general, precision=precision, preferred_element_type=jnp.float32
    )
    s_RS = dot(q_ref[0, c], k_SW, (((1,), (1,)), ((), ())))
    # Logits in units of log 2, as the exponential is that of base 2.
    if plan.softcap is None:
        s_RS *= plan.scale * LOG2_E
    else:
        s_RS = jnp.tanh(s_RS * (plan.scale / plan.softcap)) * (plan.softcap * LOG2_E)
    s_RS = jnp.where(_visible(plan, filled), s_RS, -jnp.inf)
    m_RL = m_ref[c]
    new_RL = jnp.maximum(m_RL, s_RS.max(1, keepdims=True))
    m_ref[c] = new_RL
    p_RS = jnp.exp2(s_RS - new_RL[:, :1])
    shrink_RL = jnp.exp2(m_RL - new_RL)
    l_ref[c] = l_ref[c] * shrink_RL + p_RS.sum(1, keepdims=True)
    o_RW = dot(p_RS.astype(v_SW.dtype), v_SW, (((1,), (0,)), ((), ())))
    acc_ref[c] = acc_ref[c] * shrink_RL[:, :1] + o_RW


def _visible(plan: Plan, filled: jax.Array) -> jax.Array:
    """Returns what each row sees of a block, of whose keys and later ones `filled` are there."""
    shape = plan.R, plan.S
    s_RS = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    t_RS = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    t_RS -= _quotient(t_RS, plan.T) * plan.T if plan.T > 1 else t_RS
    after_RS = s_RS - t_RS - (filled - plan.T)
    return after_RS <= 0 if plan.left is None else (after_RS <= 0) & (after_RS >= -plan.left)


def _quotient(x: jax.Array, by: int) -> jax.Array:
    """x // by of small x >= 0, by way of float32, there being no vector division of integers."""
    return ((x.astype(jnp.float32) + 0.5) * (1 / by)).astype(jnp.int32)


def _end(plan: Plan, m_ref, l_ref, acc_ref, o_ref, lse_ref) -> None:
    l_CR1 = l_ref[:, :, :1]
    norm_CR1 = 1 / jnp.where(l_CR1 > 0, l_CR1, 1)
    # The M heads of a product have gathered from each other's values, too: each takes its own.
    head_RV = _quotient(jax.lax.broadcasted_iota(jnp.int32, (plan.R, plan.V), 0), plan.G * plan.T)
    for c in range(plan.C):
        o_RV = acc_ref[c, :, : plan.V]
        for m in range(1, plan.M):
            o_RV = jnp.where(head_RV == m, acc_ref[c, :, m * plan.V : (m + 1) * plan.V], o_RV)
        o_ref[0, 0, c] = (o_RV * norm_CR1[c]).astype(o_ref.dtype)
    if lse_ref is not None:
        lse_CR1 = (m_ref[:, :, :1] + jnp.log2(l_CR1)) * math.log(2)
        lse_ref[0, 0] = jnp.where(l_CR1 > 0, lse_CR1, -jnp.inf)

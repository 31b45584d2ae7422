"""Decode attention: every feature and implementation against a float64 oracle in numpy.

Legend: B rows, T new tokens, S tokens of a row's cache, H query heads, K key-value heads, D and V
sizes of heads, N pages of P tokens, L pages of a row.
"""

import dataclasses

import ahead_of_time
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.decode import decode_attention
from pallas_kernels.attention.decode_arguments import DecodeSpec
from pallas_kernels.attention.tpu import decode as tpu
from pallas_kernels.attention.tpu import decode_plan
from pallas_kernels.block_sizes import BlockSizes

IMPLS = 'reference', 'xla', 'tpu'
BLOCKS = BlockSizes(q=128, kv=32, sub=128, chunk=128)


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and options of a call."""

    T: int = 1
    H: int = 4
    K: int = 2
    D: int = 16
    V: int = 16
    S: int = 48
    lengths: tuple[int, ...] = (0, 1, 31, 32, 48)
    dtype: str = 'float32'
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


CASES = {
    'plain': Case(),
    'tokens': Case(T=3, D=80, V=80, lengths=(0, 2, 3, 35, 48)),
    'multi-head': Case(H=3, K=3, D=64, V=64),
    'one-key-value-head': Case(H=8, K=1, D=40, V=24, T=2),
    'window': Case(window=9, T=2),
    'window-of-itself': Case(window=0),
    # No sum of a position and such a window is an int32.
    'softcap-sinks': Case(softcap=2.0, sinks=True, T=2, D=8, V=8, window=2**31 - 1),
    'everything': Case(
        T=3, H=8, K=4, D=64, V=128, S=45, lengths=(45, 4, 33, 0), dtype='bfloat16', window=20,
        softcap=3.0, sinks=True,
    ),
    'bfloat16': Case(dtype='bfloat16', H=8, D=256, V=64),
}  # fmt: skip


def operands(case: Case, seed: int = 0):
    """Queries, cache, lengths and sinks; the cache is NaN behind the lengths."""
    rng = np.random.default_rng(seed)
    B = len(case.lengths)
    cast = lambda x: jnp.asarray(x, case.dtype)  # noqa: E731
    q_BTHD = cast(rng.normal(size=(B, case.T, case.H, case.D)))
    k_BSKD, v_BSKV = (rng.normal(size=(B, case.S, case.K, size)) for size in (2 * case.D, case.V))
    k_BSKD = k_BSKD[..., : case.D]
    for b, length in enumerate(case.lengths):
        k_BSKD[b, length:] = v_BSKV[b, length:] = np.nan
    sinks_H = jnp.asarray(rng.normal(size=case.H), jnp.float32) if case.sinks else None
    return q_BTHD, cast(k_BSKD), cast(v_BSKV), jnp.array(case.lengths, jnp.int32), sinks_H


def oracle(case: Case, q_BTHD, k_BSKD, v_BSKV, lengths_B, sinks_H):
    """Output and lse, one query at a time in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q_BTHD, k_BSKD, v_BSKV))
    B, T, H, D = q.shape
    o_BTHV, lse_BHT = np.zeros((B, T, H, v.shape[3])), np.full((B, H, T), -np.inf)
    for b, t, h in np.ndindex(B, T, H):
        end = int(lengths_B[b]) - T + t + 1
        seen = slice(max(0, end - 1 - case.window) if case.window is not None else 0, max(0, end))
        head = h // (H // k.shape[2])
        logits = k[b, seen, head] @ q[b, t, h] / np.sqrt(D)
        if case.softcap:
            logits = case.softcap * np.tanh(logits / case.softcap)
        if sinks_H is not None:
            logits = np.append(logits, np.float64(sinks_H[h]))
        if logits.size:
            lse_BHT[b, h, t] = logits.max() + np.log(np.exp(logits - logits.max()).sum())
            p = np.exp(logits - lse_BHT[b, h, t])
            values = v[b, seen, head]
            o_BTHV[b, t, h] = p[: len(values)] @ values
    return o_BTHV, lse_BHT


def run(case: Case, q_BTHD, k, v, lengths_B, sinks_H, **options):
    """The public function, jitted, with lse."""
    options = {'block_sizes': BLOCKS, **options}

    def call(q_BTHD, k, v, lengths_B, sinks_H, page_table_BP):
        return decode_attention(
            q_BTHD, k, v, lengths_B=lengths_B, sinks=sinks_H, page_table_BP=page_table_BP,
            window=case.window, softcap=case.softcap, return_lse=True, **options,
        )  # fmt: skip

    table = options.pop('page_table_BP', None)
    return jax.jit(call)(q_BTHD, k, v, lengths_B, sinks_H, table)


def pages(case: Case, x_BSKD: jax.Array, page: int, order: np.ndarray) -> jax.Array:
    """The pages of a cache put at `order` [B, L] in a pool, where the others are NaN."""
    B, S, *rest = x_BSKD.shape
    missing = ((0, 0), (0, -S % page), (0, 0), (0, 0))
    x_BLPKD = jnp.pad(x_BSKD, missing, constant_values=jnp.nan).reshape(B, -1, page, *rest)
    pool_NPKD = jnp.full((order.max() + 2, *x_BLPKD.shape[2:]), jnp.nan, x_BSKD.dtype)
    return pool_NPKD.at[order.reshape(-1)].set(x_BLPKD.reshape(-1, *x_BLPKD.shape[2:]))


def tolerance(case: Case) -> float:
    return 3e-2 if case.dtype == 'bfloat16' else 5e-6


@pytest.mark.parametrize('impl', IMPLS)
@pytest.mark.parametrize('name', CASES)
def test_values_and_lse_are_the_oracles_whatever_lies_behind_the_length(name, impl):
    case = CASES[name]
    x = operands(case)
    o_BTHV, lse_BHT = run(case, *x, impl=impl)
    assert o_BTHV.dtype == case.dtype
    assert lse_BHT.dtype == jnp.float32
    want_o, want_lse = oracle(case, *x)
    np.testing.assert_allclose(np.asarray(o_BTHV, float), want_o, atol=tolerance(case))
    np.testing.assert_allclose(lse_BHT, want_lse, atol=tolerance(case))
    empty = np.isinf(want_lse).swapaxes(1, 2)
    assert (np.asarray(o_BTHV, float)[empty] == 0).all()


@pytest.mark.parametrize('impl', IMPLS)
def test_pages_in_any_order_give_what_a_contiguous_cache_gives(impl):
    case = Case(T=2, window=17, lengths=(0, 1, 31, 40, 48))
    q_BTHD, k, v, lengths_B, sinks_H = operands(case)
    table = np.random.default_rng(1).permutation(20)[:15].reshape(5, 3)
    # What lies behind the lengths is looked at neither in the cache nor in the table.
    junk = np.where(np.arange(3)[None] * 16 < np.array(case.lengths)[:, None], table, 10**9)
    got = run(
        case, q_BTHD, *(pages(case, x, 16, table) for x in (k, v)), lengths_B, sinks_H,
        page_table_BP=jnp.asarray(junk), impl=impl,
    )  # fmt: skip
    want = run(case, q_BTHD, k, v, lengths_B, sinks_H, impl=impl)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('impl', IMPLS)
def test_rows_may_share_pages(impl):
    case = Case(lengths=(40, 40, 17), S=40)
    q_BTHD, k, v, lengths_B, sinks_H = operands(case)
    prefix = lambda x: x.at[:2, :32].set(x[:1, :32])  # noqa: E731
    table = np.array([[0, 1, 2, 3, 4], [0, 1, 2, 3, 9], [5, 6, 7, 8, 8]])
    got, _ = run(
        case, q_BTHD, *(pages(case, prefix(x), 8, table) for x in (k, v)), lengths_B, sinks_H,
        page_table_BP=jnp.asarray(table), impl=impl,
    )  # fmt: skip
    want, _ = oracle(case, q_BTHD, prefix(k), prefix(v), lengths_B, sinks_H)
    np.testing.assert_allclose(got, want, atol=5e-6)


def test_two_cores_join_a_row_that_both_work_on():
    case = Case(T=2, lengths=(33, 48, 0, 5), sinks=True, softcap=4.0, window=40)
    q_BTHD, k, v, _, sinks_H = operands(case)
    spec = DecodeSpec(case.window, case.softcap, case.D**-0.5)
    options = {'lse': True, 'block_keys': 16, 'cores': 2}
    both = jax.jit(lambda *x: tpu.forward(*x, None, sinks_H, spec, **options))
    # Two of these cut row 1, one leaves the second core a block less, one holds nothing.
    for lengths in case.lengths, (0, 48, 0, 0), (0, 0, 0, 20), (0, 0, 0, 0):
        x = q_BTHD, *(jnp.nan_to_num(c) for c in (k, v)), jnp.array(lengths, jnp.int32)
        for a, b in zip(both(*x), oracle(case, *x, sinks_H), strict=True):
            np.testing.assert_allclose(a, b, atol=5e-6)


def test_the_grid_has_one_step_for_each_block_that_holds_something():
    case = Case(S=256, lengths=(0, 1, 32, 33, 256))
    q_BTHD, k, v, lengths_B, _ = operands(case)
    for left, blocks in ((None, [1, 1, 1, 2, 8]), (40, [1, 1, 1, 2, 2])):
        spec = DecodeSpec(left, None, 1.0)
        plan = decode_plan.choose(
            q_BTHD, k.reshape(-1, 8, case.K, case.D), v.reshape(-1, 8, case.K, case.V),
            jnp.arange(160).reshape(5, 32), spec, decode_plan.planned_chip(), 32,
        )  # fmt: skip
        row_X, start_B = tpu._blocks(plan, lengths_B)
        assert np.diff(start_B).tolist() == blocks
        assert row_X.tolist()[: sum(blocks)] == np.repeat(np.arange(5), blocks).tolist()


def test_twice_is_bit_equal():
    case = CASES['everything']
    x = operands(case)
    for a, b in zip(run(case, *x, impl='tpu'), run(case, *x, impl='tpu'), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('paged', [False, True])
def test_no_race_and_no_use_of_memory_that_nobody_wrote(paged):
    case = Case(lengths=(40, 0, 48, 7), H=2, K=2, T=2)
    q_BTHD, k, v, lengths_B, _ = operands(case)
    table = np.arange(12)[::-1].reshape(4, 3)
    options = {}
    if paged:
        k, v = (pages(case, x, 16, table) for x in (k, v))
        options = {'page_table_BP': jnp.asarray(table)}
    params = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory='nan', out_of_bounds_reads='raise',
        dma_execution_mode='eager' if paged else 'on_wait',
    )  # fmt: skip
    with pltpu.force_tpu_interpret_mode(params):
        got, _ = run(case, q_BTHD, k, v, lengths_B, None, impl='tpu', **options)
    want, _ = oracle(case, *operands(case))
    np.testing.assert_allclose(got, want, atol=5e-6)


def test_the_race_detector_sees_a_copy_that_is_not_waited_for(monkeypatch):
    from pallas_kernels.attention.tpu import decode_kernel

    fetch = decode_kernel._fetch

    def hasty(*args):
        if args[-1] == 'start':
            fetch(*args)

    monkeypatch.setattr(decode_kernel, '_fetch', hasty)
    case = Case(lengths=(40, 48), H=2, K=2)
    x = operands(case)
    params = pltpu.InterpretParams(detect_races=True, dma_execution_mode='eager')
    try:
        with (
            pltpu.force_tpu_interpret_mode(params),
            pytest.raises(jax.errors.JaxRuntimeError, match='RACE'),
        ):
            jax.block_until_ready(run(case, *x, impl='tpu'))
    finally:
        pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.parametrize('axes', [(0, 0, 0, 0, None), (0, None, None, 0, None), (None, 0, 0, 0, 0)])
@pytest.mark.parametrize('impl', ['xla', 'tpu'])
def test_vmap_is_a_loop(impl, axes):
    case = Case(lengths=(5, 48), T=2, sinks=True)
    x = [jnp.stack(n) for n in zip(*(operands(case, seed) for seed in range(3)), strict=True)]
    x[3] -= jnp.arange(3, dtype=jnp.int32)[:, None]
    x = [n if axis == 0 else n[0] for n, axis in zip(x, axes, strict=True)]

    def call(q_BTHD, k, v, lengths_B, sinks):
        options = {'impl': impl, 'block_sizes': BLOCKS}
        return decode_attention(q_BTHD, k, v, lengths_B=lengths_B, sinks=sinks, **options)

    got = jax.jit(jax.vmap(call, axes))(*x)
    one = jax.jit(call)
    for n in range(3):
        want = one(*(a[n] if axis == 0 else a for a, axis in zip(x, axes, strict=True)))
        np.testing.assert_allclose(got[n], want, atol=2e-6)


@pytest.mark.parametrize('mapped', [False, True])
def test_vmap_over_rows_with_pages_in_one_pool_or_in_several(mapped):
    case = Case(lengths=(33, 48))
    q_BTHD, k, v, lengths_B, _ = operands(case)
    k, v = (pages(case, x, 16, np.array([[4, 1, 3], [0, 2, 5]])) for x in (k, v))
    tables = jnp.array([[[4, 1, 3], [0, 2, 5]], [[0, 2, 5], [4, 1, 3]]])
    # Rows change places, and so do tables; or pages do, within their pool.
    q_VBTHD, lengths_VB = (jnp.stack([x, x[::-1]]) for x in (q_BTHD, lengths_B))
    if mapped:
        k, v = (jnp.stack([x, x[::-1]]) for x in (k, v))
        tables = tables.at[1].set(6 - tables[1])

    def call(q_BTHD, k, v, lengths_B, table):
        options = {'impl': 'tpu', 'block_sizes': BLOCKS, 'page_table_BP': table}
        return decode_attention(q_BTHD, k, v, lengths_B=lengths_B, **options)

    axis = 0 if mapped else None
    got = jax.jit(jax.vmap(call, (0, axis, axis, 0, 0)))(q_VBTHD, k, v, lengths_VB, tables)
    want, _ = oracle(case, *operands(case))
    np.testing.assert_allclose(got[0], want, atol=5e-6)
    np.testing.assert_array_equal(got[1], got[0][::-1])


def test_derivatives_are_the_specifications():
    case = Case(T=2, S=40, lengths=(3, 40), sinks=True, window=20)
    x = operands(case)

    def loss(impl, q_BTHD, k, v, sinks):
        o_BTHV, lse_BHT = run(case, q_BTHD, k, v, x[3], sinks, impl=impl)
        return jnp.sin(o_BTHV).sum() + lse_BHT.sum()

    grads = [jax.grad(loss, (1, 2, 3, 4))(n, *x[:3], x[4]) for n in ('xla', 'reference')]
    for got, want in zip(*grads, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
        assert jnp.isfinite(got).all()
        assert jnp.abs(got).max() > 0.01
    with pytest.raises(ValueError, match="impl='tpu': decode attention has no derivative; try imp"):
        jax.grad(loss, 1)('tpu', *x[:3], x[4])


def test_attention_is_what_a_full_cache_gives():
    from pallas_kernels.attention import attention

    case = Case(T=5, S=40, lengths=(40, 40))
    q_BTHD, k, v, lengths_B, _ = operands(case)
    got, _ = run(case, q_BTHD, k, v, lengths_B, None, impl='xla')
    want = attention(q_BTHD, k, v, causal=True, impl='reference')
    np.testing.assert_allclose(got, want, atol=2e-6)


SHAPED = {
    'q': (2, 1, 4, 16), 'k': (2, 32, 2, 16), 'v': (2, 32, 2, 24), 'lengths_B': (2,),
}  # fmt: skip


@pytest.mark.parametrize(
    ('wrong', 'message'),
    [
        ({'q': jnp.zeros((2, 4, 16))}, r'q=float32\[2, 4, 16\]: must be bfloat16, .* \[B, T, H'),
        ({'k': jnp.zeros((2, 32, 2, 16), 'float8_e4m3fn')}, r'k=float8_e4m3fn.*try k=float32\['),
        ({'k': jnp.zeros((3, 32, 2, 16))}, r'k=float32\[3, .*must have the rows and head size'),
        ({'k': jnp.zeros((2, 32, 3, 16)), 'v': jnp.zeros((2, 32, 3, 16))}, 'its 3 heads must divi'),
        ({'v': jnp.zeros((2, 32, 2, 16), 'bfloat16')}, 'v=bfloat16.* must have the type of k'),
        ({'lengths_B': jnp.zeros(3, jnp.int32)}, r'lengths_B=int32\[3\]: must be integers \[B\]'),
        ({'lengths_B': jnp.zeros(2)}, r'lengths_B=float32\[2\]: must be .*=int32\[2\]'),
        ({'page_table_BP': jnp.zeros((3, 2), jnp.int32)}, r'page_table_BP=int32\[3, 2\]: must'),
        ({'window': -1}, 'window=-1: must be'),
        ({'softcap': 0.0}, 'softcap=0.0: must be > 0'),
        ({'sinks': jnp.zeros(3)}, 'sinks=float32.*must be float of shape'),
        ({'scale': jnp.ones(())}, 'scale=.* must be a finite Python number'),
        ({'block_sizes': 128}, 'block_sizes=128: must be a BlockSizes or None; try block_s'),
        ({'block_sizes': dataclasses.replace(BLOCKS, kv=-8)}, 'block_sizes.kv=-8: must be a Pytho'),
        ({'impl': 'gpu'}, "impl='gpu': there is no decode kernel for GPUs; try impl='xla'"),
        ({'impl': 'mps'}, "impl='mps': must be 'reference', 'xla', 'tpu' or None"),
        (
            {'impl': 'tpu', 'k': jnp.zeros((2, 32, 2, 16), 'float16'),
             'v': jnp.zeros((2, 32, 2, 16), 'float16')},
            "impl='tpu': takes a cache of bfloat16 or float32, not k of float16; try impl='xla'",
        ),
        (
            {'impl': 'tpu', 'k': jnp.zeros((9, 12, 2, 16)), 'v': jnp.zeros((9, 12, 2, 16)),
             'page_table_BP': jnp.zeros((2, 2), jnp.int32)},
            "impl='tpu': page_table: pages of 12 tokens of float32 must be a multiple of 8",
        ),
        ({'impl': 'tpu', 'q': jnp.zeros((2, 9000, 4, 16))}, "impl='tpu': q: 9000 new tokens of 4"),
    ],
)  # fmt: skip
def test_a_mistake_is_named(wrong, message):
    shaped = {
        n: jnp.zeros(s, jnp.int32 if n == 'lengths_B' else 'float32') for n, s in SHAPED.items()
    }
    q, k, v = ((shaped | wrong)[n] for n in ('q', 'k', 'v'))
    options = {n: x for n, x in (shaped | wrong).items() if n not in ('q', 'k', 'v')}
    with pytest.raises(ValueError, match=message):
        decode_attention(q, k, v, **options)


@pytest.mark.slow
@pytest.mark.parametrize('chip', ['v5e', 'v5p', 'v6e', 'v7x'])
def test_compiles_for_every_tpu_without_a_copy_of_the_cache(chip):
    rows = ahead_of_time.printed('compile_decode.py', chip)
    assert len(rows) == 3
    for row in rows:
        assert row['vmem_bytes'] <= row['estimate'] <= row['limit'], row
        # Where K * D is no multiple of 128, XLA lays out the cache the other way round.
        assert row['lanes'] % 128 or row['temp_bytes'] < row['cache_bytes'] / 16, row

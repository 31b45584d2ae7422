"""Attention on a CPU: its chunks, the memory that it takes, and the keys that it leaves out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case, arguments, attend, cotangents, with_gradients

from pallas_kernels.attention import attention, xla_runs

RANGES = [
    (70, 70, None, None),
    (70, 70, None, 0),
    (1000, 1000, None, 0),
    (300, 700, None, 0),
    (700, 300, None, 0),
    (1000, 1000, 20, 0),
    (1000, 1000, 20, 9),
    (1000, 400, 3, 9),
    (400, 1000, 700, 0),
    (1000, 1000, None, 5),
    (1000, 1000, 5, None),
    (1, 999, 30, 0),
]


@pytest.mark.parametrize('heads', [1, 4096])
@pytest.mark.parametrize(('T', 'S', 'left', 'right'), RANGES)
def test_chunks_cover_the_queries_and_every_key_they_see(T, S, left, right, heads):
    shift, covered = S - T, []
    for run in xla_runs.runs(1, T, S, heads, left, right, shift):
        few = xla_runs.is_short(T, S) or run.queries == 1
        assert few or heads * run.queries * run.keys <= 2**22
        for i in range(run.count):
            first = run.first + i * run.queries
            first_key = run.first_key
            if run.slides:
                first_key = min(max(first_key + i * run.queries, 0), S - run.keys)
            assert 0 <= first_key <= first_key + run.keys <= S
            for t in range(first, first + run.queries):
                low = 0 if left is None else max(t + shift - left, 0)
                high = S if right is None else min(t + shift + right + 1, S)
                assert high <= max(low, 0) or (first_key <= low and high <= first_key + run.keys)
            covered += range(first, first + run.queries)
    assert covered == list(range(T))


def test_a_triangle_costs_little_over_half_and_a_band_its_width():
    count = lambda *args: sum(  # noqa: E731
        run.count * run.queries * run.keys for run in xla_runs.runs(1, *args)
    )
    T = 4096
    assert count(T, T, 1, None, None, 0) == T * T
    assert count(T, T, 1, None, 0, 0) <= 0.57 * T * T
    assert count(T, T, 1, 100, 0, 0) <= 200 * T


@pytest.mark.parametrize(
    'features',
    [
        {'causal': True, 'bias': 'full', 'mask': 'keys'},
        {'window': (12, 4), 'lengths': (500, 520), 'bias': 'keys', 'segments': True},
        {'bias': 'heads', 'sinks': True, 'heads': (4, 2)},
    ],
    ids=lambda features: '-'.join(features),
)
def test_many_small_chunks_give_what_one_does(features, monkeypatch):
    case = Case(**{'heads': (2, 1), 'lengths': (250, 270), 'softcap': 2.0, **features})
    arrays, others = arguments(case)

    def run(impl):
        return with_gradients(impl, lambda x: attend(impl, x, others), arrays, cotangents(case))()

    want = run('reference')
    monkeypatch.setattr(xla_runs, '_SHORT', 0)
    monkeypatch.setattr(xla_runs, '_SCORES', 30000)
    monkeypatch.setattr(xla_runs, '_LEAST', 16)
    monkeypatch.setattr(xla_runs, '_STEPS', 3 if case.causal else 8)
    spec = xla_runs.runs(
        2, *case.lengths, case.heads[0], *(case.window or (None, 0 if case.causal else None)), 20
    )
    assert any(run.count > 1 for run in spec)
    assert any(run.slides for run in spec) == (case.window is not None)
    for name, x in run('xla').items():
        atol = 2e-6 * max(1, float(np.abs(np.where(np.isfinite(x), x, 0)).max()))
        np.testing.assert_allclose(x, want[name], rtol=1e-5, atol=10 * atol, err_msg=name)


def test_a_long_sequence_takes_no_memory_of_its_square():
    T, H = 8192, 4
    x = jax.ShapeDtypeStruct((1, T, H, 64), jnp.float32)
    loss = lambda q, k, v: attention(q, k, v, impl='xla').sum()  # noqa: E731
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * H * T * T / 8

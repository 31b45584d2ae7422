"""The TPU backward kernels where all implementations' tests do not reach: blocks, sums, races."""

import dataclasses
import functools
import sys

import ahead_of_time
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chip as chips
from pallas_kernels.attention import reference
from pallas_kernels.attention.arguments import check_arguments
from pallas_kernels.attention.tpu.backward import backward
from pallas_kernels.block_sizes import BlockSizes

# The package's name `backward` is the function.
backward_lib = sys.modules[backward.__module__]
NAN = pltpu.InterpretParams(
    detect_races=True, out_of_bounds_reads='uninitialized', uninitialized_memory='nan'
)


def sizes(q=128, kv=128, sub=128, chunk=128, heads=None):
    return BlockSizes(128, 128, 128, 128, backward=BlockSizes(q, kv, sub, chunk, heads))


def draw(T=256, S=None, H=1, K=None, D=128, V=None, B=1, seed=0):
    normal = np.random.default_rng(seed).normal
    S, K, V = S or T, K or H, V or D
    shapes = (B, T, H, D), (B, S, K, D), (B, S, K, V)
    return [jnp.asarray(normal(size=shape), jnp.float32) for shape in shapes]


def saved(operands, spec):
    """What a forward pass saves, and gradients to begin with: (o, lse, do, dlse)."""
    o_BTHV, lse_BHT = jax.jit(reference.forward, static_argnums=(1,))(operands, spec)
    normal = np.random.default_rng(1).normal
    do_BTHV, dlse_BHT = (jnp.asarray(normal(size=x.shape), x.dtype) for x in (o_BTHV, lse_BHT))
    return o_BTHV, lse_BHT, do_BTHV, dlse_BHT


def run(operands, spec, rows, blocks=None, interpret=True):
    call = functools.partial(backward, interpret=interpret)
    return jax.jit(call, static_argnums=(1, 2))(operands, spec, blocks or sizes(), *rows)


def exact(operands, spec, rows):
    call = jax.jit(reference.backward, static_argnums=(1, 2))
    return call(operands, spec, None, *rows)


def assert_close(got, want, atol=3e-5):
    for name, x, y in zip(want._fields, got, want, strict=True):
        assert (x is None) == (y is None), name
        if x is not None:
            assert x.shape == y.shape, name
            np.testing.assert_allclose(x, y, atol=atol, rtol=1e-5, err_msg=name)


def assert_right(operands, spec, blocks=None, **options):
    rows = saved(operands, spec)
    assert_close(run(operands, spec, rows, blocks, **options), exact(operands, spec, rows))


@pytest.mark.parametrize(
    ('features', 'hidden', 'reading'),
    [
        ({'causal': True}, slice(384, 512), slice(0, 384)),
        ({'causal': True, 'window': (100, 0)}, slice(0, 128), slice(256, 512)),
        ({'segment_ids': np.arange(512)[None] // 256}, slice(256, 512), slice(0, 256)),
        ({'segment_ids': np.arange(512)[None] // 256}, slice(0, 256), slice(256, 512)),
    ],
    ids=['causal', 'left', 'later-segment', 'earlier-segment'],
)
def test_blocks_that_nobody_sees_are_never_read(features, hidden, reading):
    operands, spec = check_arguments(*draw(512), **features)
    rows = saved(operands, spec)
    clean = run(operands, spec, rows)
    nan = jnp.nan
    # In a block that is read, 0 * NaN would show.
    poisoned = operands._replace(
        k_BSKD=operands.k_BSKD.at[:, hidden].set(nan), v_BSKV=operands.v_BSKV.at[:, hidden].set(nan)
    )
    got = run(poisoned, spec, rows)
    np.testing.assert_array_equal(got.q[:, reading], clean.q[:, reading])
    assert np.isnan(got.q).any()
    assert_close(clean, exact(operands, spec, rows))


RAGGED = {
    'causal': ((200, 200, 2, 2, 64, 64), {'causal': True}),
    'packed': ((200, 200, 2, 1, 64, 32), {'segment_ids': np.arange(200)[None] // 77}),
    'tiles': ((130, 130, 1, 1, 16, 16), {'mask': np.tri(130, dtype=bool)[None, None], 'window': 9}),
    'bias': ((70, 200, 1, 1, 128, 128), {'bias': np.linspace(-1, 1, 70)[None, None, :, None]}),
}


@pytest.mark.parametrize('name', RAGGED)
def test_ends_races_and_memory_that_was_never_written(name):
    (T, S, H, K, D, V), features = RAGGED[name]
    operands, spec = check_arguments(*draw(T, S, H, K, D, V), **features)
    assert_right(operands, spec, interpret=NAN)
    pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.parametrize(
    ('H', 'K', 'D', 'V', 'heads'),
    [
        (4, 1, 128, 128, 2),  # a row of blocks for each pair of heads, one sum for all four
        (8, 2, 128, 128, 8),
        (4, 4, 128, 128, 2),
        (5, 5, 64, 32, None),
        (4, 2, 256, 64, None),
        (3, 3, 80, 8, None),
    ],
)
def test_keys_sum_over_their_query_heads(H, K, D, V, heads):
    operands, spec = check_arguments(*draw(128, 256, H, K, D, V), causal=True)
    assert_right(operands, spec, sizes(heads=heads))


@pytest.mark.parametrize(
    'shape', [(2, 1, 200, 200), (1, 2, 200, 200), (2, 2, 1, 200), (1, 1, 200, 1), (1, 2, 1, 1)]
)
def test_bias_gradient_sums_where_the_bias_is_broadcast(shape):
    bias = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    operands, spec = check_arguments(*draw(200, H=2, B=2, D=16), bias=bias, causal=True)
    assert_right(operands, spec)


def test_bias_gradient_is_left_out_where_nobody_wants_it():
    bias = np.zeros((1, 1, 1, 128), np.float32)
    operands, spec = check_arguments(*draw(128, D=16), bias=bias)
    spec = dataclasses.replace(spec, bias_gradient=False)
    assert run(operands, spec, saved(operands, spec)).bias is None


@pytest.mark.parametrize(
    'features',
    [{'causal': True}, {'window': (130, 40)}, {'dropout_rate': 0.5, 'dropout_seed': 3}],
    ids=str,
)
def test_more_keys_than_fit_are_taken_in_parts(features, monkeypatch):
    operands, spec = check_arguments(*draw(300, D=16), **features)
    rows = saved(operands, spec)
    whole = run(operands, spec, rows)
    calls = []
    original = backward_lib._Call
    monkeypatch.setattr(backward_lib, '_Call', lambda *x, **y: calls.append(y) or original(*x, **y))
    monkeypatch.setattr(backward_lib, 'SUMS_BYTES', 1)
    got = run(operands, spec, rows)
    assert [call['key_start'] for call in calls] == [0, 128, 256]
    assert_close(got, whole)
    assert_close(got, exact(operands, spec, rows))


@pytest.mark.parametrize(
    'shape', [(256, 128, 128, 128), (128, 256, 128, 128), (256, 256, 128, 256)]
)
@pytest.mark.parametrize('features', [{'causal': True}, {'window': (130, 40)}], ids=str)
def test_blocks_and_tiles_of_any_shape(shape, features):
    operands, spec = check_arguments(*draw(512, D=16), **features)
    assert_right(operands, spec, sizes(*shape))


def test_softcap_sinks_and_a_shard_together():
    sinks = jnp.asarray([0.5, -1.0])
    operands, spec = check_arguments(*draw(256, H=2, D=16), causal=True, softcap=2.0, sinks=sinks)
    shard = operands._replace(start=jnp.asarray([0, 0, 128, 64], jnp.int32))
    assert_right(shard, spec)


def test_queries_that_see_nothing_have_no_gradients():
    operands, spec = check_arguments(*draw(256, 128, D=16), causal=True)  # half stand before keys
    rows = saved(operands, spec)
    got = run(operands, spec, rows)
    assert np.all(np.asarray(got.q)[:, :128] == 0)
    assert_close(got, exact(operands, spec, rows))


def test_two_runs_and_two_cores_give_the_same_bits():
    operands, spec = check_arguments(*draw(256, H=2, K=1, D=128, B=2), causal=True)
    rows = saved(operands, spec)
    first, again = (run(operands, spec, rows) for _ in range(2))
    two = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    cores = run(operands, spec, rows, interpret=two)
    pltpu.reset_tpu_interpret_mode_state()
    for x, y, z in zip(first[:3], again[:3], cores[:3], strict=True):
        np.testing.assert_array_equal(x, y)
        np.testing.assert_allclose(x, z, atol=1e-5)


def test_a_race_is_found(monkeypatch):
    operands, spec = check_arguments(*draw(256, 128, D=16))
    # Two cores that share the queries whose gradients one sum of keys collects.
    monkeypatch.setattr(
        backward_lib, 'SEMANTICS', ('parallel', 'parallel', 'parallel', 'arbitrary')
    )
    two = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    with pytest.raises(jax.errors.JaxRuntimeError, match='RACE DETECTED'):
        run(operands, spec, saved(operands, spec), interpret=two)
    pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.slow
@pytest.mark.parametrize('chip', chips.TPUS)
def test_it_compiles_within_vmem_and_keeps_no_logits(chip):
    (found,) = ahead_of_time.printed('compile_tpu_backward.py', chip)
    for case, memory in found.items():
        assert memory['vmem'] < memory['limit'], case
        # Copies that are there because the arrays are small, but nothing of the logits' size.
        assert memory['temp'] < memory['logits'], case

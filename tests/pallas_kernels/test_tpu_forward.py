"""The TPU forward kernel where all implementations' tests do not reach: blocks, redoing, races."""

import importlib

import ahead_of_time
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chip as chips
from pallas_kernels.attention import reference, tpu
from pallas_kernels.attention.arguments import check_arguments
from pallas_kernels.attention.tpu import blocks as blocks_lib
from pallas_kernels.attention.tpu import forward_edges, layout
from pallas_kernels.block_sizes import BlockSizes

SMALL = BlockSizes(128, 128, 128, 128)
NAN = pltpu.InterpretParams(
    detect_races=True, out_of_bounds_reads='uninitialized', uninitialized_memory='nan'
)


def draw(B=1, T=512, S=None, H=1, K=None, D=128, V=None, dtype='bfloat16', seed=0):
    normal = np.random.default_rng(seed).normal
    S, K, V = S or T, K or H, V or D
    shapes = (B, T, H, D), (B, S, K, D), (B, S, K, V)
    return [jnp.asarray(normal(size=shape), dtype) for shape in shapes]


def run(operands, spec, sizes=SMALL, interpret=True, chip=None):
    """The kernel as it is for `chip`, interpreted; None counts as a v5e."""
    device = chip and jax.sharding.AbstractDevice(chips.named(chip).kind, 1, 'tpu')
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        call = jax.jit(lambda x: tpu.forward(x, spec, sizes, interpret=interpret))
        return [np.asarray(x, np.float32) for x in call(operands)]


def exact(operands, spec):
    """The specification in float32."""
    wide = {name: getattr(operands, name).astype(jnp.float32) for name in operands._fields[:3]}
    return [np.asarray(x) for x in reference.forward(operands._replace(**wide), spec)]


def assert_close(got, want, lse=1e-5):
    """Holds o against what rounding weights and outputs to bfloat16 leaves, and lse."""
    np.testing.assert_allclose(got[0], want[0], atol=1.5e-2)
    np.testing.assert_allclose(got[1], want[1], atol=lse, rtol=1e-6)


@pytest.mark.parametrize(
    ('features', 'hidden', 'reading'),
    [
        ({'causal': True}, slice(384, 512), slice(0, 384)),
        ({'causal': True, 'window': (100, 0)}, slice(0, 128), slice(256, 512)),
        ({'window': (5, 3)}, slice(384, 512), slice(0, 256)),
        ({'segment_ids': np.arange(512)[None] // 256}, slice(256, 512), slice(0, 256)),
        ({'segment_ids': np.arange(512)[None] // 256}, slice(0, 256), slice(256, 512)),
    ],
    ids=['causal', 'left', 'right', 'later-segment', 'earlier-segment'],
)
def test_blocks_that_nobody_sees_are_never_read(features, hidden, reading):
    q, k, v = draw()
    operands, spec = check_arguments(q, k, v, **features)
    clean = run(operands, spec)
    # In a block that is read, 0 * NaN would show.
    poisoned = operands._replace(v_BSKV=v.at[:, hidden].set(jnp.nan))
    got = run(poisoned, spec)
    np.testing.assert_array_equal(got[0][:, reading], clean[0][:, reading])
    assert np.isnan(got[0]).any()
    assert_close(clean, exact(operands, spec))


def ramp(q, k, nats):
    """Keys whose logits grow by `nats` from the first to the last, for every query alike."""
    q = q.at[..., 0].set(1.0)
    slope = jnp.linspace(0, nats * k.shape[-1] ** 0.5, k.shape[1]).astype(k.dtype)
    return q, k.at[..., 0].set(slope[None, :, None])


@pytest.mark.parametrize('chip', [None, 'v6e'])
@pytest.mark.parametrize('features', [{}, {'causal': True}], ids=['full', 'causal'])
def test_logits_that_outgrow_the_maximum_are_redone_exactly(features, chip, monkeypatch):
    q, k, v = draw(H=2, K=1, D=64)
    q, k = ramp(q, k, 900)
    operands, spec = check_arguments(q, k, v, **features)
    # The rows of ones sum the rounded weights: lse is as exact as bfloat16 is.
    assert_close(run(operands, spec, chip=chip), exact(operands, spec), lse=4e-3)
    monkeypatch.setattr(forward_edges, 'redo', lambda step: None)
    assert not np.isfinite(run(operands, spec, chip=chip)[0]).all()


def test_a_query_whose_keys_the_probe_missed_is_redone(monkeypatch):
    q, k, v = draw(T=256)
    mask = np.zeros((1, 1, 256, 256), bool)
    mask[..., 200:] = True  # the first keys are all hidden
    mask[:, :, 9] = False  # and to one query all are: its maximum stays -inf
    operands, spec = check_arguments(q, k, v, mask=mask)
    assert_close(run(operands, spec), exact(operands, spec))
    monkeypatch.setattr(forward_edges, 'redo', lambda step: None)
    assert not np.isfinite(run(operands, spec)[0]).all()


def test_a_bias_of_minus_infinity_hides_without_redoing(monkeypatch):
    monkeypatch.setattr(forward_edges, 'redo', lambda step: None)
    bias = np.zeros((1, 1, 70, 70), np.float32)
    bias[..., 5, :] = bias[..., :40] = -np.inf
    operands, spec = check_arguments(*draw(T=70, D=16), bias=bias)
    assert_close(run(operands, spec), exact(operands, spec))


RAGGED = {
    'causal': ((200, 200, 2, 2, 64, 64), {'causal': True}),
    'packed': ((200, 200, 2, 1, 64, 32), {'segment_ids': np.arange(200)[None] // 77}),
    'rows': ((70, 300, 1, 1, 128, 128), {'bias': np.linspace(-1, 1, 300)[None, None, None]}),
    'tiles': ((130, 130, 1, 1, 16, 16), {'mask': np.tri(130, dtype=bool)[None, None], 'window': 9}),
}


@pytest.mark.parametrize('name', RAGGED)
def test_ends_races_and_memory_that_was_never_written(name):
    (T, S, H, K, D, V), features = RAGGED[name]
    operands, spec = check_arguments(*draw(T=T, S=S, H=H, K=K, D=D, V=V), **features)
    assert_close(run(operands, spec, interpret=NAN), exact(operands, spec))


def test_a_race_is_found(monkeypatch):
    operands, spec = check_arguments(*draw(T=128, S=256))
    # Two cores that share the blocks of keys of one block of queries.
    module = importlib.import_module('pallas_kernels.attention.tpu.forward')
    monkeypatch.setattr(module, 'SEMANTICS', ('parallel',) * 4)
    two = pltpu.InterpretParams(
        detect_races=True, num_cores_or_threads=2, uninitialized_memory='zero'
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match='RACE DETECTED'):
        run(operands, spec, interpret=two)
    pltpu.reset_tpu_interpret_mode_state()


def test_two_cores_share_the_queries():
    operands, spec = check_arguments(*draw(T=256, S=256), causal=True)
    two = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    assert_close(run(operands, spec, interpret=two), exact(operands, spec))


@pytest.mark.parametrize(
    ('H', 'K', 'D', 'V', 'heads'),
    [
        (4, 4, 128, 128, 4),
        (8, 2, 128, 128, 2),
        (4, 1, 64, 64, 4),
        (5, 5, 64, 64, 1),
        (4, 4, 96, 32, 2),
    ],
)
def test_heads_share_a_step(H, K, D, V, heads):
    operands, spec = check_arguments(*draw(T=128, H=H, K=K, D=D, V=V), causal=True)
    sizes = BlockSizes(128, 128, 128, 128, heads=heads)
    assert_close(run(operands, spec, sizes), exact(operands, spec))


@pytest.mark.parametrize(
    'sizes', [(256, 128, 128, 128), (128, 256, 128, 128), (256, 256, 128, 256)]
)
@pytest.mark.parametrize('features', [{'causal': True}, {'window': (130, 40)}], ids=str)
def test_blocks_and_tiles_of_any_shape(sizes, features):
    operands, spec = check_arguments(*draw(T=512), **features)
    assert_close(run(operands, spec, BlockSizes(*sizes)), exact(operands, spec))


def test_a_shard_sees_what_it_would_in_the_whole():
    operands, spec = check_arguments(*draw(T=256), causal=True, window=(150, None))
    whole = run(operands, spec)
    queries = operands._replace(
        q_BTHD=operands.q_BTHD[:, 128:], start=jnp.asarray([0, 0, 128, 0], jnp.int32)
    )
    got = run(queries, spec)
    np.testing.assert_allclose(got[0], whole[0][:, 128:], atol=1e-2)
    np.testing.assert_allclose(got[1], whole[1][:, :, 128:], atol=1e-5)


def test_scalars_do_not_grow_with_the_square_of_the_length():
    def size(T):
        shape = jax.ShapeDtypeStruct((1, T, 1, 128), jnp.bfloat16)
        ids = jax.ShapeDtypeStruct((1, T), jnp.int32)
        operands, spec = check_arguments(*draw(T=128), causal=True)
        operands = operands._replace(
            q_BTHD=shape, k_BSKD=shape, v_BSKV=shape, segment_ids_BT=ids, kv_segment_ids_BS=ids
        )
        blocks = blocks_lib.blocks(operands, spec, 1024, 1024)
        return jax.eval_shape(lambda x: blocks_lib.scalars(x, blocks), operands).size

    assert size(2**20) < 2.1 * size(2**19) < 2**14


@pytest.mark.parametrize('D', [8, 16, 64, 80, 128, 192, 256])
@pytest.mark.parametrize('V', [8, 64, 128])
@pytest.mark.parametrize(('H', 'K'), [(1, 1), (6, 3), (32, 1), (32, 8), (25, 25)])
def test_heads_fill_the_lanes_or_are_all_there_are(D, V, H, K):
    for wanted in (1, 4, 8):
        heads = layout.heads(H, K, D, V, wanted)
        assert heads.n_q >= H
        assert heads.n_q % heads.q == 0
        assert heads.q == heads.kv * heads.share or heads.kv == 1
        for lanes, n, total in (
            (heads.q * heads.D, heads.q, heads.n_q),
            (heads.kv * heads.D, heads.kv, heads.n_kv),
            (heads.kv * heads.V, heads.kv, heads.n_kv),
            (heads.q * heads.V, heads.q, heads.n_q),
        ):
            assert lanes % layout.LANES == 0 or n == total


@pytest.mark.slow
@pytest.mark.parametrize('chip', chips.TPUS)
def test_it_compiles_within_vmem_and_keeps_no_logits(chip):
    (found,) = ahead_of_time.printed('compile_tpu_forward.py', chip)
    for case, memory in found.items():
        assert memory['vmem'] < memory['limit'], case
        assert memory['temp'] < memory['logits'], case

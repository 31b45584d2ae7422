"""Dense convolution over positions on TPU: blocks, what is around them, segments, memory."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conv_passes import TWO_CORES, Call, assert_right
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.conv import conv1d
from pallas_kernels.conv.arguments import ConvBlockSizes, Operands, Spec
from pallas_kernels.conv.tpu import sequence
from pallas_kernels.conv.tpu.sequence_window import FINE, around, block_rows

SMALL = ConvBlockSizes(cols=FINE, features=128)
STRICT = pltpu.InterpretParams(
    detect_races=True, out_of_bounds_reads='raise', uninitialized_memory='nan'
)


def call(B, T, C, K, O_, pads, sizes=SMALL, dilation=1, **more):
    """A call of one row of T positions."""
    features = {name: more.pop(name) for name in ('epilogue', 'dtype') if name in more}
    spec = Spec((1, 1), ((0, 0), pads), (1, dilation), 1, **more)
    return Call((B, 1, T, C), (1, K, O_), spec, sizes, **features)


CALLS = {
    # Blocks before and after, a last one that is not full, features that fill no block.
    'causal': call(2, 520, 24, 2, 40, (3, 0), dilation=3, activation='silu', epilogue=True),
    'both sides': call(1, 600, 128, 3, 136, (8, 8), dilation=8, dtype='bfloat16', epilogue=True),
    'cut at both ends': call(1, 530, 8, 3, 8, (0, 0), dilation=100),
    'far before': call(1, 300, 8, 2, 8, (200, 0), dilation=200),
    'more padding than taps': call(1, 300, 8, 2, 8, (260, 3)),
    'nothing but padding': call(1, 20, 8, 3, 8, (64, 64), None, dilation=64),
    'many taps': call(1, 40, 128, 9, 8, (4, 4), None),
    'one tap': call(1, 40, 8, 1, 8, (0, 0), None),
}


@pytest.mark.parametrize('name', CALLS)
def test_every_pass_is_right_and_reads_nothing_that_is_not_there(name):
    assert_right(sequence, CALLS[name], interpret=STRICT)


def test_two_cores_share_the_batch_without_a_race():
    causal = call(2, 260, 8, 2, 8, (1, 0))
    assert_right(sequence, causal, chip='v5p', interpret=TWO_CORES)


@pytest.mark.parametrize('padding', ['CAUSAL', 'SAME'])
def test_packed_segments_equal_separate_sequences(padding):
    draw = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(draw.normal(size=shape), jnp.float32)  # noqa: E731
    ends, T = [0, 7, 260, 300], 300
    x_BTC, w_KDO, dy_BTO = normal(1, T, 8), normal(3, 8, 16), normal(1, T, 16)
    ids_BT = np.repeat([4, 1, 4], np.diff(ends))[None]

    @jax.jit
    def packed(x, w):
        def f(x, w):
            return conv1d(
                x,
                w,
                padding=padding,
                dilation=2,
                segment_ids=ids_BT,
                impl='tpu',
                block_sizes=SMALL,
                activation='tanh',
            )

        y, vjp = jax.vjp(f, x, w)
        return y, *vjp(dy_BTO)

    def separate(x, w):
        parts = [
            conv1d(x[:, a:b], w, padding=padding, dilation=2, activation='tanh', impl='reference')
            for a, b in itertools.pairwise(ends)
        ]
        return jnp.concatenate(parts, axis=1)

    y, vjp = jax.vjp(separate, x_BTC, w_KDO)
    for got, want in zip(packed(x_BTC, w_KDO), (y, *vjp(dy_BTO)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=3e-6 * np.abs(want).max())


@pytest.mark.parametrize('T', [1, 16, 17, 256, 257, 1000, 4096, 5000, 16384, 100_000])
@pytest.mark.parametrize(('most', 'least'), [(256, 0), (512, 300), (4096, 512), (8192, 0)])
def test_blocks_hold_the_sequence_and_no_more_than_they_must(T, most, least):
    rows = block_rows(T, most, least)
    blocks = -(-T // rows)
    assert rows % 16 == 0
    assert blocks * rows - T < 1024 * blocks
    if blocks > 1:
        assert least <= rows <= 2 * max(most, 2 * least)
        assert rows % around(least, rows) == 0 if least else True
        assert around(least, rows) >= least


def test_blocks_divide_a_sequence_that_can_be_divided():
    assert all(T % block_rows(T, 4096) == 0 for T in (8192, 12288, 20480, 65536))


def test_what_does_not_fit_into_memory_is_refused():
    x = jax.ShapeDtypeStruct((1, 1, 1_000_000, 512), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((1, 2, 512, 512), jnp.bfloat16)
    spec = Spec((1, 1), ((0, 0), (100_000, 0)), (1, 100_000), 1)
    reason = sequence.refuses(Operands(x, w), spec)
    assert 'takes what fits into' in reason
    assert '100000 positions' in reason
    near = Spec((1, 1), ((0, 0), (512, 0)), (1, 512), 1)
    assert sequence.refuses(Operands(x, w), near) is None


@pytest.mark.parametrize(
    ('dtype', 'spec', 'reason'),
    [
        ('float16', Spec(), 'takes bfloat16 and float32, and x is float16'),
        ('float32', Spec(stride=(1, 2)), 'takes sequences, one group and stride 1'),
        ('float32', Spec(groups=2), 'takes sequences, one group and stride 1'),
    ],
)
def test_what_is_no_dense_convolution_of_step_one_is_refused(dtype, spec, reason):
    x = jax.ShapeDtypeStruct((1, 1, 40, 8), dtype)
    w = jax.ShapeDtypeStruct((1, 2, 8 // spec.groups, 8), dtype)
    assert sequence.refuses(Operands(x, w), spec) == reason

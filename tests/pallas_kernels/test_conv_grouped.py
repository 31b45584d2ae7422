"""Grouped convolution on TPU: blocks, padded groups, edges, tiles of columns, memory."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conv_passes import TWO_CORES, Call, assert_right, passes
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pallas_kernels import chip as chips
from pallas_kernels.conv.arguments import ConvBlockSizes, Spec
from pallas_kernels.conv.tpu import grouped, grouped_axis, grouped_plan
from pallas_kernels.conv.tpu.grouped_axis import ABSENT, forward_axis, gradient_axis

SAME = ((1, 1), (1, 1))
CALLS = {
    # Blocks of rows that overlap, of images that are filled up, and a last one that is not full.
    'blocks': Call(
        (9, 5, 4, 32), (3, 3, 32), Spec(padding=SAME, groups=4, activation='gelu'),
        ConvBlockSizes(rows=2, batch=8), epilogue=True,
    ),
    'strides': Call(
        (2, 9, 7, 16), (3, 2, 32), Spec((2, 3), ((1, 4), (5, 0)), (1, 2), 4),
        ConvBlockSizes(rows=2),
    ),
    'dilation': Call((1, 9, 8, 12), (2, 2, 6), Spec((1, 1), ((4, 3), (0, 3)), (3, 2), 3)),
    'groups filled up': Call((1, 4, 4, 60), (1, 3, 100), Spec(padding=((0, 0), (1, 1)), groups=5)),
    'many features': Call((1, 2, 4, 256), (1, 3, 768), Spec(padding=((0, 0), (1, 1)), groups=2)),
    'bfloat16': Call(
        (3, 4, 5, 256), (2, 2, 256), Spec((1, 2), SAME, groups=32, activation='silu'),
        epilogue=True, dtype='bfloat16',
    ),
}  # fmt: skip


@pytest.mark.parametrize(('name', 'chip'), [('strides', None), *((name, 'v6e') for name in CALLS)])
def test_every_pass_is_right(name, chip):
    assert_right(grouped, CALLS[name], chip)


def test_two_cores_share_channels_and_read_nothing_that_is_not_there():
    call = Call(
        (9, 3, 3, 256), (2, 2, 256), Spec(padding=SAME, groups=64), ConvBlockSizes(2, batch=8)
    )
    assert_right(grouped, call, interpret=TWO_CORES)


def test_what_is_behind_an_edge_is_met_by_zeros(monkeypatch):
    call = CALLS['dilation']
    right = passes(grouped, call)
    kernel = importlib.import_module('pallas_kernels.conv.tpu.grouped_kernel')
    monkeypatch.setattr(kernel, '_row', lambda plan, block, tile, offset: (0, True))
    assert np.abs(passes(grouped, call)['y'] - right['y']).max() > 0.1


@settings(deadline=None, max_examples=60, derandomize=True)
@given(*(st.integers(1, n) for n in (12, 5, 3, 3, 3)), st.integers(0, 9), st.integers(0, 4))
def test_tiles_have_every_tap_of_every_output_once(size, taps, stride, dilation, outs, low, high):
    outputs = (size + low + high - (taps - 1) * dilation - 1) // stride + 1
    assume(outputs > 0)
    of = {'stride': stride, 'dilation': dilation, 'low': low}

    def seen(axis):
        """Which tap takes an input to an output, by [input, output]."""
        found = np.full((axis.inputs, axis.outputs), ABSENT)
        for offset, taps in zip(axis.offsets, axis.taps, strict=True):
            first, last = axis.inside(offset)
            for j in range(axis.tiles):
                assert (first <= j < last) == (0 <= j * axis.step + offset < axis.inputs)
                for t in range(axis.outs):
                    if first <= j < last and j * axis.outs + t < axis.outputs:
                        found[j * axis.step + offset, j * axis.outs + t] = taps[t]
        return found

    want = np.full((size, outputs), ABSENT)
    for o in range(outputs):
        for tap in range(taps):
            if 0 <= o * stride + tap * dilation - low < size:
                want[o * stride + tap * dilation - low, o] = tap
    forward = forward_axis(size, outputs, taps, outs=outs, **of)
    np.testing.assert_array_equal(seen(forward), want)
    backward = gradient_axis(size, outputs, taps, outs=outs * stride, **of)
    np.testing.assert_array_equal(seen(backward), want.T)
    assert all(forward.made(t) == len(range(t, outputs, outs)) for t in range(outs))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(2, 70), st.integers(1, 300), st.integers(1, 300))
def test_a_block_of_groups_is_whole_lanes_and_wastes_little(groups, D, E):
    at = grouped_plan.lanes(groups, D, E)
    assert at.X % 128 == at.Y % 128 == 0
    assert at.together * (at.blocks - 1) < groups <= at.together * at.blocks
    assert at.D >= D
    assert at.E >= E
    assert max(at.X, at.Y) <= grouped_plan.WIDEST or at.together == 1


def test_a_diagonal_block_has_each_weight_once_and_nothing_else():
    at = grouped_plan.lanes(5, 12, 20)
    w_KLDO = jnp.arange(1.0, 2 * 12 * 100 + 1).reshape(2, 1, 12, 100)
    w_KLXO = np.asarray(grouped_plan.diagonal(w_KLDO, at))
    assert sorted(w_KLXO[w_KLXO > 0]) == sorted(np.asarray(w_KLDO).ravel())
    like = jax.ShapeDtypeStruct(w_KLDO.shape, w_KLDO.dtype)
    back = jax.linear_transpose(lambda w: grouped_plan.diagonal(w, at), like)
    np.testing.assert_array_equal(back(jnp.asarray(w_KLXO))[0], w_KLDO)


@pytest.mark.parametrize('chip', chips.TPUS)
@pytest.mark.parametrize('shape', [(32, 56, 56, 256), (128, 14, 14, 1024), (1, 300, 400, 2048)])
def test_blocks_fit_and_are_many(shape, chip):
    B, H, W, C = shape
    at = grouped_plan.lanes(32, C // 32, C // 32)
    axes = [
        forward_axis(n, n, 3, stride=1, dilation=1, low=1, outs=outs)
        for n, outs in ((H, 1), (W, 2))
    ]
    plan = grouped_plan.Plan(*axes, at)
    for dtype in (jnp.bfloat16, jnp.float32):
        found = grouped_plan.fitted(plan, B, dtype, chips.named(chip), None)
        assert found.bytes(dtype) <= chips.named(chip).vmem_limit
        assert found.row_blocks >= 4


def test_axis_leaves_out_what_only_sees_padding():
    axis = grouped_axis.forward_axis(3, 8, 3, stride=1, dilation=4, low=6, outs=1)
    assert all(first < last for first, last in map(axis.inside, axis.offsets))

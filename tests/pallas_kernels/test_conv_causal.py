"""Depthwise convolution over positions on TPU: blocks, edges, segments, steps, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conv_passes import Call, assert_right, drawn
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chip as chips
from pallas_kernels.conv.arguments import ConvBlockSizes, Operands, Spec
from pallas_kernels.conv.tpu import causal, causal_plan, causal_rows, causal_segments

SMALL = ConvBlockSizes(cols=32, features=128)
STRICT = pltpu.InterpretParams(
    detect_races=True, out_of_bounds_reads='raise', uninitialized_memory='nan'
)


def call(B, T, C, L, pads, sizes=SMALL, dilation=1, **more):
    """A call of one row of T positions."""
    features = {name: more.pop(name) for name in ('epilogue', 'dtype') if name in more}
    spec = Spec((1, 1), ((0, 0), pads), (1, dilation), C, **more)
    return Call((B, 1, T, C), (1, L, C), spec, sizes, **features)


CALLS = {
    # What is carried from block to block, a last one that is not full, lanes that are not there.
    'causal': call(2, 90, 130, 4, (3, 0), activation='silu', epilogue=True),
    'both sides': call(1, 90, 128, 3, (5, 5), dilation=5, dtype='bfloat16'),
    'after the last block': call(1, 67, 128, 4, (0, 0)),
    'wide padding': call(1, 40, 128, 2, (7, 39)),
    'far before': call(1, 100, 128, 2, (90, 0)),
    'taps that meet padding': call(1, 9, 128, 4, (15, 15), dilation=10),
    'part of a batch': call(5, 7, 128, 4, (0, 0), ConvBlockSizes(batch=2), dtype='bfloat16'),
    'many taps': call(1, 140, 128, 9, (8, 0), None),
}


STRICTLY = ('causal', 'both sides', 'after the last block', 'part of a batch')


@pytest.mark.parametrize('name', CALLS)
def test_every_pass_is_right_and_reads_nothing_that_is_not_there(name):
    assert_right(causal, CALLS[name], interpret=STRICT if name in STRICTLY else True)


def test_straight_code_is_right_too(monkeypatch):
    """As it is compiled: several chunks one after the other, several columns side by side."""
    monkeypatch.setattr(causal, 'target', lambda: (chips.named('v6e'), True))
    assert_right(causal, call(1, 64, 256, 4, (3, 0), None, dtype='bfloat16'), interpret=True)
    taps = causal_plan.taps(Spec((1, 1), ((0, 0), (3, 0)), (1, 1), 256), 4, 64)
    found = causal_plan.plan(taps, (1, 256), jnp.bfloat16, chips.named('v6e'))
    assert (found.unroll, found.columns) == (2, 2)


def test_two_cores_share_the_batch_and_the_channels_without_a_race():
    two = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    assert_right(causal, call(2, 64, 256, 2, (1, 0)), interpret=two)


def test_what_is_carried_is_needed(monkeypatch):
    one = call(1, 90, 128, 4, (3, 0))
    operands, _ = drawn(one)
    right, _ = causal.forward(operands, one.spec, SMALL)
    monkeypatch.setattr(causal_rows, 'copy', lambda to, *rest: None)
    wrong, _ = causal.forward(operands, one.spec, SMALL)
    differs = np.abs(wrong - right).max(axis=(0, 1, 3)) > 1e-3
    assert set(np.flatnonzero(differs)) == {32, 33, 34, 64, 65, 66}


PACKED = {
    'causal': (call(1, 160, 128, 4, (3, 0)), (1, 2, 70, 3, 30, 54), STRICT),
    'both sides': (
        call(1, 160, 128, 3, (5, 5), dilation=5, dtype='bfloat16'), (33, 6, 40, 81), True,
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', PACKED)
def test_packed_segments_equal_separate_runs(name):
    one, lengths, interpret = PACKED[name]
    operands, du = drawn(one)
    ids = np.repeat(np.arange(len(lengths)) * 7 - 3, lengths)[None]
    operands = operands._replace(segment_ids_BT=jnp.asarray(ids, jnp.int32))
    packed = every_pass(one, operands, du, interpret)
    ends = np.cumsum(lengths)
    # Runs are filled up behind to one length, which is compiled once.
    behind = max(lengths) - np.asarray(lengths)

    def alone(x):
        parts = [
            jnp.pad(x[:, :, end - n : end], ((0, 0), (0, 0), (0, fill), (0, 0)))
            for end, n, fill in zip(ends, lengths, behind, strict=True)
        ]
        return jnp.concatenate(parts)

    separate = Operands(alone(operands.x_BHWC), operands.w_KLDO)
    runs = every_pass(one._replace(sizes=None), separate, alone(du), True)
    for k, (end, n) in enumerate(zip(ends, lengths, strict=True)):
        here = slice(end - n, end)
        np.testing.assert_array_equal(packed['y'][0, 0, here], runs['y'][k, 0, :n])
        np.testing.assert_array_equal(packed['dx'][0, 0, here], runs['dx'][k, 0, :n])
    np.testing.assert_allclose(packed['dw'], runs['dw'], rtol=1e-2, atol=1e-4)


def every_pass(one, operands, du, interpret):
    """Returns y, dx, dw as they come."""

    def run(operands, du):
        y, _ = causal.forward(operands, one.spec, one.sizes, interpret=interpret)
        dx = causal.input_gradient(du, operands, one.spec, one.sizes, interpret=interpret)
        dw = causal.weight_gradient(du, operands, one.spec, one.sizes, interpret=interpret)
        return {'y': y, 'dx': dx, 'dw': dw}

    made = jax.jit(run)(operands, du)
    return {name: np.asarray(x.astype(jnp.float32)) for name, x in made.items()}


def test_other_segments_are_not_even_multiplied():
    one = call(1, 64, 128, 4, (3, 0), None)
    operands, _ = drawn(one)
    ids = jnp.asarray(np.arange(64)[None] >= 20, jnp.int32)
    x = operands.x_BHWC.at[:, :, 19].set(jnp.inf)
    operands = operands._replace(x_BHWC=x, segment_ids_BT=ids)
    y, _ = causal.forward(operands, one.spec)
    assert np.flatnonzero(~np.isfinite(np.asarray(y)).all(axis=(0, 1, 3))).tolist() == [19]


def test_bits_go_on_in_the_next_word():
    one = call(1, 40, 128, 34, (33, 0), None)
    operands, _ = drawn(one)
    ids = jnp.asarray(np.arange(40)[None] >= 4, jnp.int32)
    y, _ = causal.forward(operands._replace(segment_ids_BT=ids), one.spec)
    without = operands.x_BHWC.at[:, :, :4].set(0)
    want, _ = causal.forward(operands._replace(x_BHWC=without), one.spec)
    np.testing.assert_array_equal(y[:, :, 4:], want[:, :, 4:])


def test_ids_that_come_again_count_again():
    """A tap counts where the ids are equal, though others lie between."""
    ids = jnp.asarray([[5, 5, 2, 5, 2, 2]])
    taps = causal_plan.Taps((0, 1, 2), (-2, -1, 0), 6, 6)
    bits = np.asarray(causal_segments.bits(ids, taps, 8))
    assert bits[0, 0, 2:].tolist() == [0b100, 0b101, 0b101, 0b110, 0, 0]


def test_steps_with_the_inputs_before_give_the_bits_of_the_whole_sequence():
    B, T, C, L, dilation = 2, 40, 128, 4, 3
    S = (L - 1) * dilation
    whole = call(B, T, C, L, (S, 0), dilation=dilation, activation='silu', epilogue=True)
    operands, _ = drawn(whole)
    operands = operands._replace(scale_O=None, shift_O=None, residual_BPQO=None)
    forward = lambda x, spec, sizes: causal.forward(  # noqa: E731
        operands._replace(x_BHWC=x), spec, sizes
    )[0]
    jitted = jax.jit(forward, static_argnums=(1, 2))
    want = np.asarray(jitted(operands.x_BHWC, whole.spec, SMALL))
    spec = Spec((1, 1), ((0, 0), (0, 0)), (1, dilation), C, 'silu')
    x = jnp.pad(operands.x_BHWC, ((0, 0), (0, 0), (S, 0), (0, 0)))
    for n in (1, 8):
        steps = [jitted(x[:, :, t : t + S + n], spec, None) for t in range(0, T, n)]
        np.testing.assert_array_equal(np.concatenate(steps, axis=2), want)


def test_it_works_under_vmap():
    one = call(2, 40, 128, 3, (2, 0))
    operands, _ = drawn(one)
    x = jnp.stack([operands.x_BHWC, 2 * operands.x_BHWC])
    run = lambda x: causal.forward(operands._replace(x_BHWC=x), one.spec, SMALL)[0]  # noqa: E731
    got = jax.jit(jax.vmap(run))(x)
    np.testing.assert_array_equal(got[1], jax.jit(run)(2 * operands.x_BHWC))


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    st.sampled_from(chips.TPUS), st.sampled_from([jnp.float32, jnp.bfloat16]),
    st.integers(1, 70), st.integers(1, 40000), st.integers(1, 5000), st.integers(1, 40),
    st.integers(1, 600), st.integers(0, 700), st.integers(0, 700), st.booleans(), st.booleans(),
)  # fmt: skip
def test_plans_hold_what_is_read(chip, dtype, B, T, C, L, dilation, low, high, segments, gradient):
    spec = Spec((1, 1), ((0, 0), (low, high)), (1, dilation), C)
    assume(spec.out_size((1, T), (1, L))[1] > 0)
    taps = causal_plan.taps(spec, L, T)
    read = [tap * dilation - low for tap in range(L)]
    assert list(taps.shift) == [s for s in read if -taps.outputs < s < T]
    assume(taps.shift)
    for one in (taps, taps.turned):
        plan = causal_plan.plan(
            one, (B, C), dtype, chips.named(chip), segments=segments, gradient=gradient
        )
        assume(plan is not None)
        steps = plan.steps
        assert steps[0] * plan.batch >= B
        assert steps[1] * plan.lanes >= C
        assert steps[2] * plan.rows >= one.outputs
        assert plan.rows % (plan.chunk * plan.unroll) == 0
        assert plan.groups % plan.columns == 0
        assert plan.carried <= plan.rows or steps[2] == 1
        assert not plan.view or (plan.rows % plan.view == 0 and plan.view >= one.after)
        # Rows behind the last block that exist are seen by a view, and then there are such.
        behind = one.inputs - steps[2] * plan.rows
        assert behind <= 0 or not one.after or plan.view
        assert steps[2] == 1 or plan.batch == 1
        assert not segments or plan.rows % 128 == 0


SHAPES = ((8, 4096, 4096, 4, 1), (1, 100_000, 64, 2, 512), (256, 4, 2048, 4, 1), (1, 9, 7, 31, 1))


@pytest.mark.parametrize('chip', chips.TPUS)
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_blocks_are_large_and_waste_little(shape, chip):
    B, T, C, L, dilation = shape
    spec = Spec((1, 1), ((0, 0), ((L - 1) * dilation, 0)), (1, dilation), C)
    taps = causal_plan.taps(spec, L, T)
    chip = chips.named(chip)
    plan = causal_plan.plan(taps, (B, C), jnp.bfloat16, chip)
    padded = np.prod(plan.steps) * plan.batch * plan.rows * plan.lanes
    least = -(-C // 128) * 128 * -(-T // 16) * 16 * B
    assert padded <= 1.05 * least
    assert np.prod(plan.steps) <= max(2 * chip.cores, padded * 2 / 2**18)


def reason(B=1, T=64, C=128, L=4, pads=(3, 0), **more):
    """Why a call is refused."""
    w = more.pop('w', (1, L, 1, C))
    spec = Spec(**{'padding': ((0, 0), pads), 'groups': C} | more)
    arrays = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((B, 1, T, C), w))
    return causal.refuses(Operands(*arrays), spec)


def test_what_is_refused_is_said():
    assert reason() is None
    assert reason(stride=(1, 2)) == 'takes one row of positions, and no stride'
    assert (
        reason(w=(1, 4, 1, 256)) == 'takes one kernel for each of 128 channels, and these are 256'
    )
    assert reason(L=300) == 'takes kernels of up to 256 positions, and this has 300'
    padding = reason(T=1, L=2, pads=(5, 5), dilation=(1, 10))
    assert padding == 'takes kernels that meet an input, and this of 2 positions meets padding only'
    far = reason(T=400_000, L=2, pads=(300_000, 0), dilation=(1, 300_000))
    assert far == 'takes taps as far apart as VMEM holds, and these are 300000 positions apart'

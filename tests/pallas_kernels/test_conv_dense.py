"""Dense convolution on TPU: blocks of rows, edges, phases, what lies side by side, memory."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conv_passes import Call, assert_right, drawn, passes
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chip as chips
from pallas_kernels.conv.arguments import ConvBlockSizes, Operands, Spec
from pallas_kernels.conv.tpu import dense, dense_blocks, dense_kernel, dense_pack, dense_plan
from pallas_kernels.conv.tpu.dense_axis import forward_axis, gradient_axis

# Nobody reads behind an end, nor what no copy and no store has filled.
STRICT = pltpu.InterpretParams(
    detect_races=True,
    num_cores_or_threads=2,
    out_of_bounds_reads='raise',
    uninitialized_memory='nan',
)
SAME = ((1, 1), (1, 1))
CALLS = {
    'padding wider than the kernel': Call(
        (1, 4, 3, 8), (3, 2, 8), Spec((1, 1), ((4, 0), (1, 5))), epilogue=True
    ),
    'phases': Call((3, 6, 5, 8), (3, 2, 8), Spec((2, 3), ((0, 2), (4, 1)), (1, 2))),
    'stride beyond the kernel': Call((1, 5, 5, 8), (1, 2, 8), Spec((2, 3))),
    'dilation': Call((1, 6, 5, 8), (2, 3, 4), Spec((1, 1), ((4, 3), (2, 3)), (3, 2))),
    'more columns than rows': Call((1, 1, 17, 8), (1, 3, 8), Spec((1, 2), ((0, 0), (0, 3)))),
    'taps together': Call((1, 4, 3, 128), (2, 3, 8), Spec((1, 1), SAME)),
    'inputs side by side': Call(
        (1, 4, 3, 64), (3, 3, 64), Spec((1, 1), SAME, activation='gelu'), epilogue=True
    ),
    'outputs side by side': Call((1, 4, 3, 128), (3, 2, 32), Spec((1, 1), SAME)),
    'strides side by side': Call((1, 4, 9, 32), (2, 3, 16), Spec((1, 2), ((1, 0), (2, 1)), (2, 1))),
    'bfloat16': Call(
        (3, 3, 2, 64), (3, 3, 64), Spec((1, 1), SAME, activation='silu'),
        epilogue=True, dtype='bfloat16',
    ),
}  # fmt: skip
# Several blocks of rows, with a loop over rows in them if `UNROLLED` is small.
BLOCKS = {
    'rows': Call((2, 8, 2, 8), (3, 1, 8), Spec((1, 1), ((1, 1), (0, 0))), ConvBlockSizes(rows=3)),
    'strided': Call(
        (9, 11, 2, 8), (3, 1, 8), Spec((2, 1), ((1, 1), (0, 0))), ConvBlockSizes(rows=2, batch=8)
    ),
    'packed': Call((1, 8, 2, 64), (3, 3, 64), Spec((1, 1), SAME), ConvBlockSizes(rows=4)),
}


@pytest.mark.parametrize(
    ('name', 'chip'),
    [*((name, 'v6e') for name in CALLS), ('inputs side by side', None)],
)
def test_every_pass_is_right(name, chip):
    assert_right(dense, CALLS[name], chip)


@pytest.mark.parametrize(
    ('name', 'unrolled'),
    [('rows', 1e9), ('strided', 1e9), ('strided', 1e-3), ('packed', 1e-3)],
    ids=['rows-spelt', 'strided-spelt', 'strided-loop', 'packed-loop'],
)
def test_blocks_of_rows_are_right(name, unrolled, monkeypatch):
    monkeypatch.setattr(dense_blocks, 'UNROLLED', unrolled)
    assert_right(dense, BLOCKS[name], 'v6e')


@pytest.mark.parametrize('group', [2, 3], ids=['rest of one', 'rest of two'])
def test_turns_of_the_loop_do_every_row_once(group, monkeypatch):
    call = BLOCKS['rows']._replace(image=(2, 12, 2, 8), sizes=ConvBlockSizes(rows=6))
    monkeypatch.setattr(dense_blocks, '_group', lambda plan, chip: group)  # of five rows, and five
    assert_right(dense, call, 'v6e')


def test_rows_that_turns_leave_are_done_together():
    axes = forward_axis(28, 28, 3, 1, 4, 4), forward_axis(28, 28, 3, 1, 4, 4)
    plan = dense_plan.Plan(*axes, (3, 3), 32, 256, 256)
    chosen = dense_blocks.choose(plan, jnp.bfloat16, chips.named('v6e'))
    assert (chosen.whole_units, chosen.group, chosen.rest) == ([3, 7, 7, 3], 7, 3)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(st.integers(1, 300), st.integers(1, 40))
def test_products_are_of_one_size(places, most):
    parts = [len(part) for part in dense_kernel.evenly(list(range(places)), most)]
    assert sum(parts) == places
    assert max(parts) <= most
    assert max(parts) - min(parts) <= 1


@pytest.mark.parametrize(
    ('chip', 'O', 'more', 'near'),
    [
        ('v6e', 256, {}, True),
        ('v6e', 2**12, {}, False),
        ('v6e', 256, {'features': 128}, False),
        ('v6e', 256, {'weights': True}, False),
        ('v5p', 256, {}, False),
    ],
    ids=['small', 'large', 'in blocks', 'gradient', 'two cores'],
)
def test_which_kernels_are_fetched_beside_what_runs_before(chip, O, more, near):  # noqa: E741
    axes = [forward_axis(4, 4, 3, 1, 1, 1)] * 2
    plan = dense_plan.Plan(*axes, (3, 3), 16, 256, O, **({'features': O} | more), batch=16, units=4)
    assert dense_blocks.keeps_kernel(plan, jnp.bfloat16, chips.named(chip)) == near


@pytest.mark.parametrize('mapped', [False, True], ids=['one', 'many stay in HBM'])
def test_a_kernel_is_fetched_beside_what_runs_before(mapped):
    device = jax.sharding.AbstractDevice(chips.named('v6e').kind, 1, 'tpu')
    operands, _ = drawn(CALLS['bfloat16'])
    operands = Operands(operands.x_BHWC, operands.w_KLDO)
    operands = jax.tree.map(lambda x: jnp.stack([x, x]), operands) if mapped else operands
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        forward = lambda operands: dense.forward(operands, Spec((1, 1), SAME))[0]  # noqa: E731
        traced = jax.jit(jax.vmap(forward) if mapped else forward).trace(operands)
        program = traced.lower(lowering_platforms=('tpu',)).as_text()
    assert ('input_memory_space_colors' in program) == (not mapped)


@pytest.mark.parametrize('name', ['rows', 'packed'])
def test_two_cores_race_for_nothing_and_read_nothing_that_is_not_there(name, monkeypatch):
    monkeypatch.setattr(dense_blocks, 'UNROLLED', 1e-3)
    call = BLOCKS[name]
    assert_right(dense, call._replace(image=(9, *call.image[1:])), interpret=STRICT)


def test_the_sums_of_two_cores_are_added(monkeypatch):
    kernel = importlib.import_module('pallas_kernels.conv.tpu.dense_weights')
    call, made = kernel.call, []
    monkeypatch.setattr(kernel, 'call', lambda *args: made.append(call(*args)) or made[-1])
    assert_right(dense, BLOCKS['strided'], 'v5p')  # two blocks of the batch
    assert made[0].shape == (2, 3, 1, 8, 8)


@settings(deadline=None, max_examples=80, derandomize=True)
@given(*(st.integers(1, n) for n in (12, 5, 3, 3)), st.integers(0, 9), st.integers(0, 4))
def test_axes_have_every_tap_of_every_output_once(size, taps, stride, dilation, low, high):
    outputs = (size + low + high - (taps - 1) * dilation - 1) // stride + 1
    assume(outputs > 0)

    def pairs(axis):
        """Input, output and tap of all that are no padding."""
        found = [
            (axis.source(unit, shift), unit * axis.step_out + phase, tap)
            for unit in range(axis.units)
            for phase, of_phase in enumerate(axis.taps)
            for tap, shift in of_phase
            if unit * axis.step_out + phase < axis.size_out
        ]
        first, last = axis.inner
        inside = [unit for unit in range(axis.units) if first <= unit < last]
        for _, shift in (pair for of_phase in axis.taps for pair in of_phase):
            assert all(axis.source(unit, shift) is not None for unit in inside)
        return sorted(at for at in found if at[0] is not None)

    want = [
        (q * stride + k * dilation - low, q, k) for q in range(outputs) for k in range(taps)
    ]  # fmt: skip
    want = sorted(at for at in want if 0 <= at[0] < size)
    assert pairs(forward_axis(size, outputs, taps, stride, dilation, low)) == want
    backward = pairs(gradient_axis(outputs, size, taps, stride, dilation, low))
    assert sorted((h, q, k) for q, h, k in backward) == want


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('C', [32, 64, 128])
def test_each_tap_is_once_in_each_output_side_by_side(C, stride):
    axis = forward_axis(12, 12, 3, 1, 1, 1), forward_axis(13, 13 // stride, 3, stride, 1, 1)
    packing = dense_pack.choose(*axis, C, 32, 256)
    for n in range(len(packing.parts)):
        taps = packing.table[..., n]
        np.testing.assert_array_equal(np.sort(taps[taps < 9]), np.arange(9))


def test_a_batch_of_mapped_calls_is_one_call_each():
    call = BLOCKS['rows']
    operands, _ = drawn(call)
    x_NBHWC = jnp.stack([operands.x_BHWC, 2 * operands.x_BHWC])

    def forward(x_BHWC):
        return dense.forward(Operands(x_BHWC, operands.w_KLDO), call.spec, call.sizes)[0]

    y_NBPQO = jax.jit(jax.vmap(forward))(x_NBHWC)
    want = passes(dense, call)['y']
    np.testing.assert_allclose(y_NBPQO, np.stack([want, 2 * want]), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize('chip', chips.TPUS)
def test_blocks_fit_and_waste_no_memory(chip):
    at = chips.named(chip)
    for size, C, O in [(56, 64, 64), (14, 256, 256), (224, 128, 64), (7, 2048, 512)]:  # noqa: E741
        axes = [forward_axis(size, size, 3, 1, 1, 1)] * 2
        plan = dense_plan.Plan(*axes, (3, 3), 100, C, O)
        chosen = dense_blocks.choose(plan, jnp.bfloat16, at)
        assert dense_blocks.vmem_bytes(chosen, jnp.bfloat16) <= at.vmem_limit
        assert chosen.B == 112


@pytest.mark.parametrize(
    ('kernel', 'reason'),
    [
        ((3, 3, 2**19, 8), 'no row of the images and the kernel, 3 x 3 x 524288 x 8, fit into'),
        ((39, 39, 8, 8), 'a kernel of 39 x 39 on images of 40 x 40 is too long a program'),
    ],
    ids=['memory', 'program'],
)
def test_what_does_not_fit_is_refused(kernel, reason):
    x_BHWC = jax.ShapeDtypeStruct((1, 40, 40, kernel[2]), jnp.float32)
    w_KLDO = jax.ShapeDtypeStruct(kernel, jnp.float32)
    assert dense.refuses(Operands(x_BHWC, w_KLDO), Spec()).startswith(reason)
    small = Operands(x_BHWC, jax.ShapeDtypeStruct((5, 5, kernel[2], 1), jnp.float32))
    assert kernel[2] > 8 or dense.refuses(small, Spec()) is None

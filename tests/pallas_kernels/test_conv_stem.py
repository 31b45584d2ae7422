"""Convolution of few channels on TPU: windows of rows, phases of columns, blocks, edges."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conv_passes import TWO_CORES, Call, assert_right, drawn

from pallas_kernels import chip as chips
from pallas_kernels.conv.arguments import ConvBlockSizes, Spec
from pallas_kernels.conv.tpu import stem, stem_kernel, stem_plan

CALLS = {
    # Two images side by side on v6e; rows begin in the middle of a word; blocks of rows.
    'seven': Call(
        (2, 9, 10, 3), (7, 7, 24), Spec((2, 2), ((3, 3), (3, 3)), activation='relu'),
        ConvBlockSizes(rows=2), epilogue=True, dtype='bfloat16',
    ),
    'epilogue, float32': Call(
        (3, 9, 10, 3), (5, 4, 8), Spec((2, 2), ((2, 3), (2, 3)), activation='gelu'),
        epilogue=True,
    ),
    'more columns than lanes': Call(
        (1, 4, 131, 2), (2, 3, 8), Spec(padding=((0, 1), (1, 1))), dtype='bfloat16'
    ),
    'lanes full of columns': Call((1, 3, 128, 1), (1, 5, 8), Spec(padding=((0, 0), (2, 2)))),
    'eight channels': Call((1, 6, 9, 8), (3, 3, 5), Spec(padding=((1, 1), (1, 1)))),
    'strides, dilation': Call(
        (2, 12, 11, 3), (3, 2, 5), Spec((2, 3), ((0, 5), (6, 0)), (2, 2)), dtype='bfloat16'
    ),
    'patches': Call((2, 8, 8, 3), (4, 4, 16), Spec((4, 4)), dtype='bfloat16'),
    'one row': Call((2, 1, 16, 1), (1, 3, 8), Spec((1, 2), ((0, 0), (1, 1))), dtype='bfloat16'),
}  # fmt: skip


@pytest.mark.parametrize('name', CALLS)
def test_every_pass_is_right(name):
    assert_right(stem, CALLS[name], 'v6e')


def test_two_cores_share_images_and_read_nothing_that_is_not_there():
    call = CALLS['seven']._replace(image=(3, 9, 8, 3), epilogue=False)
    assert_right(stem, call, interpret=TWO_CORES)


def planned(call: Call, chip: str, **more) -> stem_plan.Plan:
    operands, _ = drawn(call)
    return stem_plan.planned(operands, call.spec, 1, call.sizes, chips.named(chip), **more)


@pytest.mark.parametrize('name', CALLS)
def test_a_product_has_each_weight_once_for_every_row(name):
    plan = planned(CALLS[name], 'v6e')
    w_KLDO = jnp.round(8 * drawn(CALLS[name])[0].w_KLDO.astype(jnp.float32))  # sums are exact
    back = jax.linear_transpose(lambda w: stem_plan.kernels(plan, w), w_KLDO)
    (sums,) = back(stem_plan.kernels(plan, w_KLDO))
    np.testing.assert_array_equal(sums, plan.group * w_KLDO)


def test_phases_hold_every_column_that_a_tap_sees():
    call = CALLS['strides, dilation']
    plan = planned(call, 'v5e')
    (_, _, W, _), (_, L, _) = call.image, call.kernel
    phases = np.asarray(stem_kernel.selection(plan, jnp.float32)).T @ np.arange(1.0, W + 1)
    phases = phases.reshape(len(plan.phases), -1)
    for tap in range(L):
        phase, shift = plan.shift(tap)
        at = np.arange(plan.size_out[1]) * 3 + tap * 2 - 6
        want = np.where((at >= 0) & (at < W), at + 1, 0)
        np.testing.assert_array_equal(phases[phase, shift:][: plan.size_out[1]], want)


@pytest.mark.parametrize('chip', chips.TPUS)
def test_a_large_stem_fills_the_matrix_unit_and_fits(chip):
    image, spec = (32, 224, 224, 3), Spec((2, 2), ((2, 3), (2, 3)))
    call = Call(image, (7, 7, 64), spec, dtype='bfloat16')
    shapes = jax.eval_shape(lambda: drawn(call))[0]
    plan = stem_plan.planned(shapes, spec, 1, None, chips.named(chip))
    assert plan.bytes(jnp.bfloat16, 1) <= chips.named(chip).vmem_limit
    assert plan.contracted <= 256  # one pass of the widest unit
    assert plan.images * plan.lanes == chips.named(chip).mxu
    assert dataclasses.replace(plan, group=1).contracted <= plan.contracted

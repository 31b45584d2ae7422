"""Depthwise kernels for TPUs against the specification: values, both gradients, tiles and plans.

The public function's cases are in `test_conv_implementations.py`. Here are the forms that its small
images do not come to: more than one block, tiles side by side, the tiles of a wide matrix unit.

Legend: B batch, H W rows and columns, K L kernel rows and columns, C channels, O output channels.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compiled

from pallas_kernels.chip import CHIPS
from pallas_kernels.conv import reference
from pallas_kernels.conv.arguments import ConvBlockSizes, Operands, Spec
from pallas_kernels.conv.tpu import (
    depthwise,
    depthwise_choice,
    depthwise_plan,
    depthwise_tiles,
    layout,
)

TOLERANCE = {'float32': 2e-6, 'bfloat16': 8e-3}


def operands_of(
    size, kernel, channels, dtype, *, spec: Spec, epilogue: bool = False, batch: int = 2
) -> tuple[Operands, jax.Array]:
    """Returns operands and a cotangent of u."""
    C, features = channels
    keys = iter(jax.random.split(jax.random.key(0), 8))
    normal = lambda *shape: jax.random.normal(next(keys), shape, dtype)  # noqa: E731
    out = batch, *spec.out_size(size, kernel), features
    operands = Operands(normal(batch, *size, C), normal(*kernel, 1, features))
    if epilogue:
        vectors = (normal(features) for _ in range(3))
        operands = Operands(*operands[:2], *vectors, residual_BPQO=normal(*out))
    return operands, normal(*out)


# Stride, padding, dilation and blocks of a convolution; kernel, size and channels of its arrays.
CASES = {
    # Of rows, columns and channels, whose second block needs bands of its own.
    'blocks': (
        ((6, 12), (3, 3), (130, 130), 'bfloat16'),
        Spec((1, 1), ((1, 1), (1, 1)), (1, 1), 130),
        ConvBlockSizes(rows=4, cols=6),
    ),
    # Of rows alone, each of which needs three tiles of the one above.
    'rows': (
        ((10, 9), (7, 3), (8, 8), 'float32'),
        Spec((1, 1), ((3, 3), (1, 1)), (1, 1), 8),
        ConvBlockSizes(rows=4),
    ),
    # One block, whose first and last tiles are padding.
    'padding': (
        ((4, 5), (7, 5), (8, 8), 'bfloat16'),
        Spec((1, 1), ((3, 3), (2, 2)), (1, 1), 8),
        None,
    ),
    'strided_multiplier': (
        ((5, 9), (2, 3), (4, 8), 'float32'),
        Spec((2, 3), ((2, 1), (0, 2)), (2, 1), 4, 'silu'),
        None,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ('chip', 'name'),
    [('v5e', 'blocks'), ('v6e', 'rows'), ('v6e', 'padding'), ('v6e', 'strided_multiplier')],
)
def test_passes(chip, name, monkeypatch):
    # Kernels are interpreted as they are laid out for a chip, as its matrix unit is wide.
    monkeypatch.setattr(layout, 'target', lambda: (CHIPS[chip], False))
    (size, kernel, channels, dtype), spec, sizes = CASES[name]
    epilogue = spec.activation is not None
    operands, du = operands_of(size, kernel, channels, dtype, spec=spec, epilogue=epilogue)
    made = compiled(
        'tpu',
        lambda operands, du: (
            *depthwise.forward(operands, spec, sizes, keep=epilogue),
            depthwise.input_gradient(du, operands, spec, sizes),
            depthwise.weight_gradient(du, operands, spec, sizes),
        ),
        operands,
        du,
    )()
    wanted = (
        *reference.forward(operands, spec, keep=epilogue),
        reference.input_gradient(du, operands, spec).astype(dtype),
        reference.weight_gradient(du, operands, spec).astype(dtype),
    )
    for got, value in zip(made, wanted, strict=True):
        if value is None:
            assert got is None
            continue
        assert (got.shape, got.dtype) == (value.shape, value.dtype)
        got, value = (np.asarray(x, np.float32) for x in (got, value))
        np.testing.assert_allclose(got, value, rtol=0, atol=TOLERANCE[dtype] * np.abs(value).max())


@pytest.mark.parametrize('g', [4, 8, 16])
def test_tiles_turn_back(g):
    n = 128 // g
    words = jnp.arange(n * 2 * 128, dtype=jnp.uint32).reshape(n, 2, 128)
    turned, back = jax.jit(
        lambda words: (
            tiles := depthwise_tiles.to_tiles(words, g),
            depthwise_tiles.to_pixels(tiles, g),
        )
    )(words)
    np.testing.assert_array_equal(back, words)
    for j in range(n):  # tile j: channels j g to (j + 1) g of all pixels, rotated by j
        groups = np.asarray(turned[j]).reshape(2, n, g)
        pixels = np.asarray(words)[:, :, j * g : (j + 1) * g]
        np.testing.assert_array_equal(np.roll(groups, -j, 1), pixels.transpose(1, 0, 2))


@pytest.mark.parametrize('name', ['v5e', 'v5p', 'v6e', 'v7x'])
@pytest.mark.parametrize('turned', [False, True], ids=['forward', 'input'])
@pytest.mark.parametrize('stride', [1, 2, 3])
def test_every_output_is_in_a_block(name, turned, stride):
    chip, taps = CHIPS[name], 5
    axes = [
        depthwise_plan.Axis.of(size, (size + 3 - taps) // stride + 1, taps, stride, 1, 2)
        for size in (57, 131)
    ]
    axes = tuple(axis.turned if turned else axis for axis in axes)
    plan = depthwise_choice.plan(axes, (48, 256), jnp.bfloat16, chip, None, 1)
    assert depthwise_choice.vmem_bytes(plan, jnp.bfloat16, 1) <= chip.vmem_limit
    for axis, low, tiles, size, start, used in zip(
        (plan.rows, plan.cols),
        (plan.low, plan.col_low),
        (plan.T, plan.U),
        plan.tile,
        (plan.row_step, plan.col_step),
        (plan.tile[0] * plan.phases, plan.Q),
        strict=True,
    ):
        blocks = start // (plan.row_tiles if axis is plan.rows else 1)
        for output in range(axis.outputs):
            first = output // used * blocks + low
            seen = [place for place, _ in axis.taps(output) if 0 <= place < axis.inputs]
            assert all(first <= place < first + tiles * size for place in seen)


def test_refuses():
    spec = Spec((1, 17), ((0, 0), (0, 0)), (1, 1), 8)
    operands = Operands(jnp.zeros((1, 4, 40, 8)), jnp.zeros((3, 3, 1, 8)))
    reason = depthwise.refuses(operands, spec)
    assert reason == 'takes strides up to 16 columns, and this one is 17'
    assert depthwise.refuses(operands, Spec((1, 16), spec.padding, (1, 1), 8)) is None

"""Where the taps of Hopper's convolutions fall: phases, windows, patches, blocks and parts."""

import dataclasses
import itertools

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.core import Im2ColTransform

from pallas_kernels.conv.gpu import depthwise_weights
from pallas_kernels.conv.gpu.axes import Axis, gradient_axes
from pallas_kernels.conv.gpu.patches import Patches, blocks, patches
from pallas_kernels.conv.gpu.windows import Windows
from pallas_kernels.hopper import SHARED_MEMORY

# One dimension: size, taps, stride, dilation and padding, some of which leave no output.
dimensions = st.tuples(
    st.integers(1, 12), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4),
    st.tuples(st.integers(0, 9), st.integers(0, 9)),
)  # fmt: skip


def axis_of(dimension: tuple) -> Axis:
    size, taps, stride, dilation, (low, high) = dimension
    out = (size + low + high - (taps - 1) * dilation - 1) // stride + 1
    hypothesis.assume(out >= 1)
    return Axis(size, out, taps, -low, dilation, stride)


def met(axis: Axis) -> set[tuple[int, int, int]]:
    """Returns (output, tap, input) of every product along an axis."""
    every = itertools.product(range(axis.out), range(axis.taps))
    found = {(p, k, p * axis.stride + axis.first + k * axis.step) for p, k in every}
    return {x for x in found if 0 <= x[2] < axis.size}


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(dimension=dimensions)
def test_phases_of_the_input_gradient_meet_what_the_forward_pass_met(dimension: tuple) -> None:
    axis = axis_of(dimension)
    found = []
    for phase, (turned, kept) in enumerate(gradient_axes(axis)):
        if turned is None:
            continue
        taps = range(axis.taps)[kept]
        assert len(taps) == turned.taps
        assert turned.stride == 1
        found += [(p, taps[k], h * axis.stride + phase) for h, k, p in met(turned)]
    within = {x for x in found if x[2] < axis.size}
    assert len(within) == len([x for x in found if x[2] < axis.size])
    assert within == met(axis)


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(rows=dimensions, columns=dimensions)
def test_parts_of_the_weight_gradient_have_every_tap_once(rows: tuple, columns: tuple) -> None:
    axes = tuple(dataclasses.replace(axis_of(x), taps=17 * x[1]) for x in (rows, columns))

    def taps(axes: tuple[Axis, Axis]) -> list[list[tuple[int, int]]]:
        """Returns what the first output reads, as the kernel is laid out."""
        down, across = ([a.first + k * a.step for k in range(a.taps)] for a in axes)
        return [[(i, j) for j in across] for i in down]

    found = []
    for row in depthwise_weights.parts(axes):
        assert all(a.taps * b.taps <= depthwise_weights.TAPS for a, b in row)
        found += [list(itertools.chain(*x)) for x in zip(*map(taps, row), strict=True)]
    assert found == taps(axes)


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(rows=dimensions, columns=dimensions, flat=st.booleans())
def test_windows_read_every_tap(rows: tuple, columns: tuple, flat: bool) -> None:
    axes = (Axis(1, 1, 1) if flat else axis_of(rows), axis_of(columns))
    windows = Windows(axes, 3)
    assert windows.refuses() is None
    assert windows.flat == (axes[0] == Axis(1, 1, 1))
    x = np.random.default_rng(0).normal(size=(2, axes[0].size, axes[1].size, 3))
    view = windows.view(jnp.asarray(x, jnp.float32))
    # What TMA is told makes as many windows as there are outputs.
    told = Im2ColTransform(windows.window, windows.padding).spatial_out_shape(view.shape)
    assert np.prod(told) == axes[0].out * axes[1].out
    matrix = np.asarray(windows.written_out(view))
    matrix = matrix.reshape(2, axes[0].out, axes[1].out, *matrix.shape[1:])
    for k, n in itertools.product(range(axes[0].taps), range(axes[1].taps)):
        place, channel = windows.index(jnp.int32(k), jnp.int32(n))
        found = matrix[:, :, :, *map(int, place)][..., int(channel) :][..., :3]
        exact = np.zeros_like(found)
        pairs = [
            {(p, h) for p, tap, h in met(a) if tap == t} for a, t in zip(axes, (k, n), strict=True)
        ]
        for (p, h), (q, w) in itertools.product(*pairs):
            exact[:, p, q] = x[:, h, w]
        np.testing.assert_allclose(found, exact, atol=1e-6)


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(
    dimension=dimensions, taps=st.integers(1, 40), block=st.sampled_from([1, 3, 8, 64])
)
def test_patches_hold_every_tap(dimension: tuple, taps: int, block: int) -> None:
    axis = dataclasses.replace(axis_of(dimension), taps=taps)
    found = patches(axis, block)
    least = Patches(axis, block, taps if taps <= 8 else 1 if taps <= 16 else 8)
    hypothesis.assume(least.size <= 256)
    assert found.size <= 256
    for run in (1, taps):  # one patch for each tap, or one for all, would not be less
        other = Patches(axis, block, run)
        if taps <= 16 and other.size <= 256:
            assert found.count * found.size <= other.count * other.size
    for p, k in itertools.product({0, block - 1}, range(taps)):
        patch, place = found.place(p, k)
        assert 0 <= place < found.size
        assert 0 <= patch < found.count
        assert (
            found.start(2, patch) + place
            == (2 * block + p) * axis.stride + axis.first + k * axis.step
        )


@pytest.mark.parametrize('channels', [8, 72, 96, 256, 4096])
@pytest.mark.parametrize('taps', [(1, 4), (7, 7), (1, 600)])
def test_blocks_fit_the_shared_memory_and_cover_the_output(channels: int, taps: tuple) -> None:
    axes = (Axis(14, 14, taps[0]), Axis(700, 700, taps[1], -taps[1] + 1))
    found = blocks(axes, channels, outputs=2)
    assert found.bytes(2) <= SHARED_MEMORY
    assert found.columns.block % found.fold == 0
    assert found.rows.blocks * found.rows.block >= 14
    assert found.columns.blocks * found.columns.block >= 700
    assert found.channel_blocks * found.channels >= channels
    assert np.prod(found.vector) % 128 == 0
